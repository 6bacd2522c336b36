package dump

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/cache"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/dedup"
	"github.com/pollux-storage/pollux/internal/oplog"
	"github.com/pollux-storage/pollux/internal/pool"
	"github.com/pollux-storage/pollux/internal/region"
	"github.com/pollux-storage/pollux/internal/restart"
	"github.com/pollux-storage/pollux/internal/session"
)

// Region is a region file and the operation log in it.
type Region struct {
	Found
	File      string      `json:"file"`
	Bytes     int64       `json:"bytes"`
	Headers   []Header    `json:"headers"`
	Heartbeat uint64      `json:"heartbeat"`
	Epoch     uint64      `json:"epoch"` // the word that the owner looks at
	State     string      `json:"state"`
	Announced uint64      `json:"announced"`
	CP        uint64      `json:"cp"`        // newest consistency point
	Committed uint64      `json:"committed"` // log position of it
	Sections  []Section   `json:"sections"`
	Log       *LogFacts   `json:"log,omitempty"`
	Records   []LogRecord `json:"records"`
}

// Section is a part of a region.
type Section struct {
	Kind   string `json:"kind"`
	Offset int64  `json:"offset"`
	Length int64  `json:"length"`
	// Index and Cache are what an index of fingerprints and a cache say of themselves, Why
	// why they say nothing: it is no damage, but made anew when the pool is opened.
	Index *IndexFacts `json:"index,omitempty"`
	Cache *CacheFacts `json:"cache,omitempty"`
	// Journal is what a copy of the unfolded journal says of itself, and has.
	Journal *KeptFacts `json:"journal,omitempty"`
	// Restart is the newest restart record.
	Restart *RestartFacts `json:"restart,omitempty"`
	// Sessions is what a table of sessions has.
	Sessions *SessionFacts `json:"sessions,omitempty"`
	Why      string        `json:"why,omitempty"`
}

// SessionFacts are what a table of sessions says of itself, and has.
type SessionFacts struct {
	Pool  string        `json:"pool"`
	Epoch uint64        `json:"epoch"` // of the guest that made it
	Slots uint64        `json:"slots"` // that it has room for
	List  []SessionInfo `json:"list"`
}

// SessionInfo is a session of clients that send requests again.
type SessionInfo struct {
	ID      string `json:"id"`
	Volume  uint32 `json:"volume"`
	Queues  int    `json:"queues"`
	Slots   int    `json:"slots"` // of each queue
	Since   uint64 `json:"since"` // position of the log at which it began
	Left    uint64 `json:"left"`  // 0 if its client has it open, or had when its guest died
	Used    int    `json:"used"`  // slots with a submission
	Last    uint64 `json:"last"`  // newest submission
	Damaged int    `json:"damaged"`
}

// TagFacts are the submission that the records after a tag are the change of.
type TagFacts struct {
	Session string `json:"session"`
	Queue   uint16 `json:"queue"`
	Slot    uint16 `json:"slot"`
	Counter uint64 `json:"counter"`
	Records uint64 `json:"records"`
}

// RestartFacts are what a restart record says.
type RestartFacts struct {
	Pool     string    `json:"pool"`
	Name     string    `json:"name"`
	Identity string    `json:"identity"`
	Number   uint64    `json:"number"`
	Written  time.Time `json:"written"`
	Program  string    `json:"program"`
	Devices  []string  `json:"devices"` // paths, those of copies too
	Volumes  int       `json:"volumes"`
}

// IndexFacts are what an index of fingerprints says of itself.
type IndexFacts struct {
	Pool       string `json:"pool"`
	Generation uint64 `json:"generation"`
	Bytes      int64  `json:"bytes"`
	Entries    int    `json:"entries"`
	Every      int    `json:"one_block_in"` // of a track that it has an entry for
	State      string `json:"state"`        // "new", "in a round", "complete"
	Successor  bool   `json:"successor,omitempty"`
}

// CacheFacts are what a cache says of itself.
type CacheFacts struct {
	Pool   string `json:"pool"`
	Frames int    `json:"frames"` // that it has room for, in use or not
	Shards int    `json:"shards"`
}

// KeptFacts are what a copy of the unfolded journal says of itself, and what it has.
type KeptFacts struct {
	Pool       string `json:"pool"`
	Generation uint64 `json:"generation"`
	Bytes      int64  `json:"bytes"` // of records that it has room for
	Used       int64  `json:"used"`
	Records    int    `json:"records"`
	First      uint64 `json:"first,omitempty"` // number of the first record
	Last       uint64 `json:"last,omitempty"`
	Whole      bool   `json:"whole"` // the records are as many as it says
}

// Header is a copy of a region's header.
type Header struct {
	At         int64  `json:"at"`
	Valid      bool   `json:"valid"`
	Wins       bool   `json:"wins"`
	Why        string `json:"why,omitempty"`
	Generation uint64 `json:"generation,omitempty"`
	ID         string `json:"id,omitempty"`
	Pool       string `json:"pool,omitempty"`
	Owner      string `json:"owner,omitempty"`
	Epoch      uint64 `json:"epoch,omitempty"`
	BootID     string `json:"boot,omitempty"`
}

// LogFacts are what the header of an operation log says, and its positions.
type LogFacts struct {
	Offset     int64  `json:"offset"` // of the section in the file
	Pool       string `json:"pool"`
	Epoch      uint64 `json:"epoch"`
	Birth      uint64 `json:"birth"` // epoch in which it was made
	Generation uint64 `json:"generation"`
	Extents    uint64 `json:"extents"`
	Slots      uint64 `json:"slots"`
	Start      uint64 `json:"start"`
	Tail       uint64 `json:"tail"` // released up to
	Head       uint64 `json:"head"` // published up to
}

// LogRecord is a record of an operation log.
type LogRecord struct {
	Seq    uint64 `json:"seq"`
	Kind   string `json:"kind,omitempty"`
	Volume uint32 `json:"volume,omitempty"`
	LBA    uint64 `json:"lba"`
	Blocks uint64 `json:"blocks"`
	Extent uint32 `json:"extent"`
	// Tag is that of a record of kind tag, which has no blocks.
	Tag     *TagFacts `json:"tag,omitempty"`
	OK      bool      `json:"ok"`
	Verdict string    `json:"verdict"`
}

// ReadRegion shows a region file, of a guest that works, of one that died, or
// a copy of either.
func ReadRegion(path string, o Options) (*Region, error) {
	in, err := region.Inspect(path)
	if err != nil {
		return nil, err
	}
	r := &Region{Found: o.found(), File: path, Bytes: in.Bytes, Headers: []Header{}, Sections: []Section{}, Records: []LogRecord{}}
	r.Live = false // looking at memory needs no lock
	for _, c := range in.Copies {
		h := Header{At: c.At, Valid: c.Err == nil, Wins: c.Wins, Why: text(c.Err)}
		if c.Err == nil {
			x := c.Header
			h.Generation, h.ID, h.Pool, h.Owner, h.Epoch, h.BootID = c.Generation, x.ID, x.Pool.String(), x.Owner, uint64(x.Epoch), x.BootID
		} else {
			r.bad("header of the region at byte %d: %v", c.At, c.Err)
		}
		r.Headers = append(r.Headers, h)
	}
	r.Damage = append(r.Damage, in.Odd...)
	if in.Valid() {
		r.words(in)
		r.sections(in)
		r.log(in)
	}
	return r, in.Close()
}

func (r *Region) words(in *region.Inspection) {
	cp, seq := in.Committed()
	r.Heartbeat, r.Epoch, r.State, r.Announced = in.Heartbeat(), uint64(in.Epoch()), in.State().String(), in.Announced()
	r.CP, r.Committed = uint64(cp), uint64(seq)
	if h := in.Header(); h.Epoch != in.Epoch() {
		r.Notes = append(r.Notes, fmt.Sprintf("the header is of epoch %d and the word that the owner looks at is %d: "+
			"somebody is taking the pool over, or died over it", h.Epoch, r.Epoch))
	}
}

func (r *Region) sections(in *region.Inspection) {
	for _, s := range in.Header().Sections {
		out := Section{Kind: s.Kind.String(), Offset: s.Offset, Length: s.Length}
		switch s.Kind {
		case region.SectionIndex:
			head := make([]byte, dedup.FactsBytes)
			f, err := dedup.ReadFacts(head[:in.Read(s, head)])
			if out.Why = text(err); err == nil {
				out.Index = &IndexFacts{Pool: f.Pool.String(), Generation: f.Generation, Bytes: f.Bytes, Entries: f.Entries,
					Every: f.Every, State: roundState(f.Round), Successor: f.Successor}
			}
		case region.SectionCache:
			head := make([]byte, cache.FactsBytes)
			f, err := cache.ReadFacts(head[:in.Read(s, head)], s.Length)
			if out.Why = text(err); err == nil {
				out.Cache = &CacheFacts{Pool: f.Pool.String(), Frames: f.Frames, Shards: f.Shards}
			}
		case region.SectionJournal:
			mem := make([]byte, s.Length)
			k := &KeptFacts{}
			f, err := cp.InspectKept(mem[:in.Read(s, mem)], func(j cp.JournalRecord, _ []byte) error {
				if k.Records++; k.First == 0 {
					k.First = j.Number
				}
				k.Last = j.Number
				return nil
			})
			if out.Why = text(err); err == nil {
				k.Pool, k.Generation, k.Bytes, k.Used, k.Whole = f.Pool.String(), f.Generation, f.Bytes, int64(f.End-f.From), f.Whole
				out.Journal = k
			}
		}
		if s.Kind == region.SectionSessions {
			mem := make([]byte, s.Length)
			v, bad, err := session.Look(mem[:in.Read(s, mem)])
			if out.Why = text(err); err == nil {
				out.Sessions = sessionFacts(v)
			}
			for _, e := range bad {
				r.bad("table of sessions: %v", e)
			}
		}
		if s.Kind == region.SectionRestart {
			rec, err := pool.RecordIn(in)
			if out.Why = text(err); err == nil {
				out.Restart = restartFacts(rec)
			}
		}
		r.Sections = append(r.Sections, out)
	}
}

func sessionFacts(v session.View) *SessionFacts {
	f := &SessionFacts{Pool: v.Pool.String(), Epoch: uint64(v.Epoch), Slots: v.Cells, List: []SessionInfo{}}
	for _, s := range v.Sessions {
		f.List = append(f.List, SessionInfo{ID: sessionID(s.ID), Volume: uint32(s.Volume), Queues: s.Queues, Slots: s.Slots,
			Since: uint64(s.Since), Left: s.Left, Used: s.Used, Last: s.Last, Damaged: s.Damaged})
	}
	return f
}

func sessionID(id block.SessionID) string { return fmt.Sprintf("%016x", uint64(id)) }

func restartFacts(rec *restart.Record) *RestartFacts {
	f := &RestartFacts{Pool: rec.Pool.String(), Name: rec.Name, Identity: rec.Identity, Number: rec.Number, Written: rec.Written, Program: rec.Program, Volumes: len(rec.Volumes)}
	for _, d := range rec.Devices {
		for _, c := range d.Copies {
			f.Devices = append(f.Devices, c.Path)
		}
	}
	return f
}

func roundState(r dedup.Round) string {
	switch {
	case r.Done:
		return "complete"
	case r.Begun:
		return "in a round"
	}
	return "new"
}

func (r *Region) log(in *region.Inspection) {
	mem := in.Log()
	if mem == nil {
		return
	}
	offset := in.Header().Sections[0].Offset
	v, err := oplog.OpenView(mem)
	if err != nil {
		r.bad("section at byte %d: %v", offset, err)
		return
	}
	bad, lost := v.Damage()
	for _, e := range bad {
		r.Notes = append(r.Notes, e.Error()+"; its twin counts")
	}
	if lost != nil {
		r.bad("section at byte %d: %v", offset, lost)
	}
	h, err := v.Header()
	if err != nil {
		r.bad("section at byte %d: %v", offset, err)
		return
	}
	tail, head := v.Tail(), v.Head()
	r.Log = &LogFacts{
		Offset: offset, Pool: h.Pool.String(), Epoch: uint64(h.Epoch), Birth: uint64(h.Birth), Generation: h.Generation,
		Extents: h.Extents, Slots: h.Slots, Start: uint64(h.Start), Tail: uint64(tail), Head: uint64(head),
	}
	for seq := tail + 1; seq <= head; seq++ {
		rec := r.look(v, seq)
		if rec != nil && r.row() {
			r.Records = append(r.Records, *rec)
		}
	}
	// After the head of a log that lost its end a record may still be whole.
	if _, err := v.Get(head + 1); errors.Is(err, block.ErrCorrupt) && v.Head() == head {
		r.bad("%v", err)
	}
}

// look verifies one record and its payload. It returns nil when the record was
// released meanwhile.
func (r *Region) look(v *oplog.View, seq block.Seq) *LogRecord {
	out := &LogRecord{Seq: uint64(seq), OK: true, Verdict: "good"}
	rec, half, err := v.Look(seq)
	if errors.Is(err, block.ErrNotFound) {
		return nil
	}
	if err != nil {
		out.OK, out.Verdict = false, "LOST"
		r.bad("%v", err)
		return out
	}
	out.Kind, out.Volume, out.LBA, out.Blocks, out.Extent = rec.Kind.String(), uint32(rec.Volume), uint64(rec.LBA), rec.Count, uint32(rec.First)
	if rec.Kind == oplog.KindTag {
		tag := rec.Tag()
		out.Blocks, out.Extent = 0, 0
		out.Tag = &TagFacts{Session: sessionID(tag.Session), Queue: tag.Queue, Slot: tag.Slot, Counter: tag.Counter, Records: rec.Count}
	}
	if len(half) > 0 {
		// A guest that died over it leaves the last record so.
		out.Verdict = "one copy"
		for _, e := range half {
			r.Notes = append(r.Notes, e.Error()+"; its twin counts")
		}
	}
	var blocks []string
	for _, i := range v.VerifyPayload(&rec) {
		blocks = append(blocks, fmt.Sprint(uint64(rec.LBA)+uint64(i)))
	}
	// The extents may have been used again since the record was released.
	if len(blocks) > 0 && v.Tail() < seq {
		out.OK, out.Verdict = false, "PAYLOAD "+strings.Join(blocks, ",")
		r.bad("log record %d: payload of block %s of volume %d is damaged", seq, strings.Join(blocks, ", "), rec.Volume)
	}
	return out
}
