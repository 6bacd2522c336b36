package dump

import (
	"errors"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/pool"
)

// Labels are the copies of a device's label.
type Labels struct {
	Found
	Device string  `json:"device"`
	Copies []Label `json:"copies"`
}

// Label is one copy.
type Label struct {
	Block  uint64 `json:"block"`
	Valid  bool   `json:"valid"`
	Why    string `json:"why,omitempty"` // it is not valid
	Pool   string `json:"pool,omitempty"`
	Name   string `json:"name,omitempty"`
	Owner  string `json:"identity,omitempty"`
	Device string `json:"id,omitempty"`
	// Joining says that it counts only if the superblock names the device.
	Joining bool   `json:"joining,omitempty"`
	Number  int    `json:"number,omitempty"` // of the device in the pool, from 1
	Blocks  uint64 `json:"blocks,omitempty"`
	Log     int64  `json:"log_bytes,omitempty"`
	// In blocks.
	Journal       uint64 `json:"journal,omitempty"`
	JournalBlocks uint64 `json:"journal_blocks,omitempty"`
	Flush         uint64 `json:"flush,omitempty"`
	FlushBlocks   uint64 `json:"flush_blocks,omitempty"`
	Data          uint64 `json:"data,omitempty"`
	// Who had it last, and whether it was closed to be taken elsewhere.
	Host     string `json:"host,omitempty"`
	Exported bool   `json:"exported,omitempty"`
}

// ReadLabels shows the copies of a device's label.
func ReadLabels(path string, o Options) (*Labels, error) {
	devs, err := o.open([]string{path})
	if err != nil {
		return nil, err
	}
	defer closeAll(devs)
	copies, err := pool.InspectLabels(devs[0])
	if err != nil {
		return nil, err
	}
	r := &Labels{Found: o.found(), Device: path}
	for _, c := range copies {
		l := Label{Block: c.Block, Valid: c.Err == nil, Why: text(c.Err)}
		if c.Err != nil {
			r.bad("label at block %d: %v", c.Block, c.Err)
		} else {
			x, y := c.Label, c.Label.Layout
			l.Pool, l.Name, l.Owner, l.Device = x.Pool.String(), x.Name, x.Identity, x.Device.String()
			l.Joining, l.Host, l.Exported = x.Joining, x.Host, x.Exported
			l.Number, l.Blocks, l.Log = x.Index+1, x.Blocks, x.LogBytes
			l.Journal, l.JournalBlocks, l.Flush, l.FlushBlocks, l.Data = y.Journal, y.JournalBlocks, y.Flush, y.FlushBlocks, y.First
		}
		r.Copies = append(r.Copies, l)
	}
	if a, b := copies[0], copies[1]; a.Err == nil && b.Err == nil && a.Label != b.Label {
		r.bad("the two copies of the label differ")
	}
	return r, nil
}

// Superblocks are all places of superblocks of a pool.
type Superblocks struct {
	Found
	Device string       `json:"device"`
	Slots  []Superblock `json:"slots"`
}

// Superblock is one place.
type Superblock struct {
	Block      uint64 `json:"block"`
	Valid      bool   `json:"valid"`
	Wins       bool   `json:"wins"`          // a pool that is opened starts from it
	Why        string `json:"why,omitempty"` // it does not win
	Pool       string `json:"pool,omitempty"`
	Generation uint64 `json:"generation,omitempty"`
	Epoch      uint64 `json:"epoch,omitempty"`
	CP         uint64 `json:"cp"`
	Fold       uint64 `json:"fold"`
	Log        uint64 `json:"log"` // committed position
	Used       uint64 `json:"used_blocks"`
	// Where replay of the journal begins.
	JournalOffset uint64 `json:"journal_offset"`
	JournalNumber uint64 `json:"journal_number"`
	JournalPrev   string `json:"journal_prev,omitempty"`
	FlushOffset   int64  `json:"flush_offset"` // in the flush log
	FlushBatch    uint64 `json:"flush_batch"`

	Catalogue string   `json:"catalogue,omitempty"`
	CatTwin   string   `json:"catalogue_twin,omitempty"` // where it lies once more
	CatBytes  uint32   `json:"catalogue_bytes"`
	RegionID  string   `json:"region,omitempty"`
	BootID    string   `json:"boot,omitempty"`
	Devices   []Device `json:"devices,omitempty"`
	// Prints is the page of the roots of fingerprints, where blocks are shared.
	Prints     string `json:"prints,omitempty"`
	PrintsTwin string `json:"prints_twin,omitempty"`
	// IndexBytes and Threshold are settings of the pool; 0 is the default.
	IndexBytes uint64 `json:"index_bytes,omitempty"`
	Threshold  uint8  `json:"llrrm_threshold,omitempty"`
}

// Device is a device as a superblock has it.
type Device struct {
	ID     string `json:"id"`
	State  string `json:"state,omitempty"` // "leaving" or "gone"; empty for one in use
	Class  string `json:"class"`           // "disk" or "llrrm"
	Blocks uint64 `json:"blocks"`
	Data   uint64 `json:"data"`
	Counts string `json:"counts"` // root of its reference counts
	// CountsTwin is where that root lies once more.
	CountsTwin string `json:"counts_twin,omitempty"`
}

const neverWritten = "never written"

// ReadSuperblocks shows all places of superblocks on the first device of a
// pool, which need not have a label any more.
func ReadSuperblocks(path string, o Options) (*Superblocks, error) {
	devs, err := o.open([]string{path})
	if err != nil {
		return nil, err
	}
	defer closeAll(devs)
	r := &Superblocks{Found: o.found(), Device: path}
	var id block.PoolID
	if l, err := pool.ReadLabel(devs[0]); err != nil {
		r.bad("%v", err)
	} else if id = l.Pool; l.Index != 0 {
		r.Notes = append(r.Notes, "this is not the first device of its pool, which alone has superblocks")
	}
	set := devices.NewSet(devs)
	copies, err := cp.InspectSuperblocks(set, id)
	if err = errors.Join(err, set.ReleaseQueues()); err != nil {
		return nil, err
	}
	won := false
	for _, c := range copies {
		won = won || c.Wins
		s := Superblock{Block: c.At.Block(), Valid: c.Err == nil, Wins: c.Wins, Why: text(c.Err)}
		if c.Superblock != nil {
			s.fill(c.Superblock)
		}
		switch {
		case c.Err == nil && !c.Wins:
			s.Why = "a newer one is valid"
		case errors.Is(c.Err, ondisk.ErrMagic):
			s.Why = neverWritten // the pool has made one superblock so far
		case c.Err != nil:
			r.bad("superblock at block %d: %v", s.Block, c.Err)
		}
		r.Slots = append(r.Slots, s)
	}
	r.compare(won)
	return r, nil
}

// compare looks for what the places say of each other.
func (r *Superblocks) compare(won bool) {
	if !won {
		r.bad("there is no valid superblock")
		return
	}
	for _, s := range r.Slots {
		if !s.Wins {
			continue
		}
		at := cp.SuperblockAt(s.Generation)
		for _, t := range r.Slots {
			if (t.Block == at[0] || t.Block == at[1]) && !t.Wins && (t.Valid || t.Why == neverWritten) {
				r.bad("block %d holds no copy of the superblock at block %d: %s", t.Block, s.Block, t.Why)
			}
		}
	}
}

func (s *Superblock) fill(b *cp.Superblock) {
	s.Pool, s.Generation, s.Epoch = b.Pool.String(), b.Generation, uint64(b.Epoch)
	s.CP, s.Fold, s.Log, s.Used = uint64(b.CP), b.Fold, uint64(b.Log), b.Used
	s.JournalOffset, s.JournalNumber, s.JournalPrev = b.Journal.Offset, b.Journal.Number, hex(b.Journal.Prev)
	s.FlushOffset, s.FlushBatch = b.Flush.Offset, b.Flush.Batch
	s.Catalogue, s.CatTwin, s.CatBytes, s.RegionID, s.BootID = b.Catalogue.String(), twin(b.Catalogue), b.CatBytes, b.RegionID, b.BootID
	s.IndexBytes, s.Threshold = b.Settings.IndexBytes, b.Settings.Threshold
	if b.Shares() {
		s.Prints, s.PrintsTwin = b.Prints.String(), twin(b.Prints)
	}
	for _, d := range b.Devices {
		s.Devices = append(s.Devices, Device{d.ID.String(), d.State.String(), d.Class.String(), d.Blocks, d.First, d.Counts.String(), twin(d.Counts)})
	}
}
