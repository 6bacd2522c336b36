package dump

import (
	"errors"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/oplog"
)

// Journal is the chain of records of a pool's metadata journal.
type Journal struct {
	Found
	Device  string   `json:"device"`
	Pool    string   `json:"pool"`
	Start   uint64   `json:"start"` // of the area, in blocks
	Blocks  uint64   `json:"blocks"`
	Records []Record `json:"records"`
	End     End      `json:"end"`
}

// Record is a record of the journal.
type Record struct {
	Number uint64 `json:"number"`
	Block  uint64 `json:"block"` // of the device
	Bytes  int    `json:"bytes"`
	Epoch  uint64 `json:"epoch"`
	Prev   string `json:"prev"`
	Sum    string `json:"sum"`
	Kind   string `json:"kind"` // "commit" or "fold"
	// Of a commit.
	CP       uint64 `json:"cp,omitempty"`
	Log      uint64 `json:"log,omitempty"`
	Mappings int    `json:"mappings,omitempty"`
	Runs     int    `json:"runs,omitempty"`
	Holes    int    `json:"holes,omitempty"`
	Changes  int    `json:"catalogue_changes,omitempty"`
	// Of a fold.
	Fold  uint64 `json:"fold,omitempty"`
	Taken int    `json:"taken,omitempty"`
	Freed int    `json:"freed,omitempty"`
	Used  bool   `json:"used,omitempty"` // by the superblock that replay starts from
}

// End is where a chain ends.
type End struct {
	At   int64  `json:"at"`   // byte of the device
	Next uint64 `json:"next"` // number of what would follow
	Why  string `json:"why"`
}

// ReadJournal shows the chain from the newest superblock on, and of it the
// records from number from on.
func ReadJournal(path string, from uint64, o Options) (*Journal, error) {
	f, err := o.openFirst(path, "journal")
	if err != nil {
		return nil, err
	}
	l := f.label
	r := &Journal{Found: o.found(), Device: path, Pool: l.Name, Start: l.Layout.Journal, Blocks: l.Layout.JournalBlocks, Records: []Record{}}
	end, err := cp.InspectJournal(f.set, f.sb, r.Start, r.Blocks, func(d cp.JournalRecord) error {
		if d.Number < from || !r.row() {
			return nil
		}
		rec := Record{
			Number: d.Number, Block: d.At.Block(), Bytes: d.Bytes, Epoch: uint64(d.Epoch), Prev: hex(d.Prev), Sum: hex(d.Sum), Kind: "commit",
			CP: uint64(d.CP), Log: uint64(d.Log), Mappings: d.Mappings, Runs: d.Runs, Holes: d.Holes, Changes: d.Catalogue,
			Fold: d.FoldNumber, Taken: d.Taken, Freed: d.Freed, Used: d.Used,
		}
		if d.Fold {
			rec.Kind = "fold"
		}
		r.Records = append(r.Records, rec)
		return nil
	})
	if err != nil {
		r.bad("%v", err)
	}
	if end.Damage != nil {
		r.bad("%v", end.Damage)
	}
	r.End = End{At: int64(end.At.Block()) * block.Size, Next: end.Number, Why: end.Why}
	return r, f.set.Close()
}

// FlushLog is the chain of batches of a pool's flush log.
type FlushLog struct {
	Found
	Device  string  `json:"device"`
	Pool    string  `json:"pool"`
	Start   int64   `json:"start"` // of the area, in bytes
	Bytes   int64   `json:"bytes"`
	Batches []Batch `json:"batches"`
	End     End     `json:"end"`
}

// Batch is a batch of the flush log.
type Batch struct {
	Number  uint64 `json:"number"`
	At      int64  `json:"at"` // byte of the device
	Bytes   int64  `json:"bytes"`
	Epoch   uint64 `json:"epoch"`
	First   uint64 `json:"first"` // log positions
	Last    uint64 `json:"last"`
	Records int    `json:"records"`
	Payload int    `json:"payload_blocks"`
	Damaged int    `json:"damaged_blocks"` // bad in memory already when they were flushed
	Durable uint64 `json:"durable"`        // batch that was known to be flushed by then
}

// ReadFlushLog shows the chain from where the last consistency point lets
// recovery begin.
func ReadFlushLog(path string, o Options) (*FlushLog, error) {
	f, err := o.openFirst(path, "flush log")
	if err != nil {
		return nil, err
	}
	l := f.label
	area := l.FlushArea()
	r := &FlushLog{Found: o.found(), Device: path, Pool: l.Name, Start: area.Start, Bytes: area.Length, Batches: []Batch{}}
	// The journal knows of consistency points that are newer than the superblock.
	pos := f.sb.Flush
	if _, err := cp.InspectJournal(f.set, f.sb, l.Layout.Journal, l.Layout.JournalBlocks, func(d cp.JournalRecord) error {
		if !d.Fold {
			pos = d.Flush
		}
		return nil
	}); err != nil {
		r.bad("%v", err)
	}
	if pos == (oplog.DiskPos{}) {
		r.End.Why = "nothing was flushed yet"
		return r, f.set.Close()
	}
	q, err := f.set.Queue(0)
	if err != nil {
		return nil, errors.Join(err, f.set.Close())
	}
	end, err := oplog.InspectFlushLog(q, area, pos, func(b oplog.Batch) error {
		if b.Damaged > 0 {
			r.bad("batch %d at byte %d: %d blocks were damaged in memory before they were flushed", b.Number, b.At, b.Damaged)
		}
		if r.row() {
			r.Batches = append(r.Batches, Batch{
				Number: b.Number, At: b.At, Bytes: b.Bytes, Epoch: uint64(b.Epoch), First: uint64(b.First), Last: uint64(b.Last),
				Records: b.Records, Payload: b.Blocks, Damaged: b.Damaged, Durable: b.Durable,
			})
		}
		return nil
	})
	if err != nil {
		r.bad("%v", err)
	}
	if end.Damage != nil {
		r.bad("%v", end.Damage)
	}
	r.End = End{At: end.At, Next: end.Batch, Why: end.Why}
	return r, errors.Join(q.Close(), f.set.Close())
}
