package pool

import (
	"slices"
	"sync"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/table"
)

// TransferOptions say when references are moved from disks to memory.
type TransferOptions struct {
	// Rate is how many bytes of maps and data are read and written in a second.
	// DefaultTransferRate if 0.
	Rate int64
	// Wait is how long blocks wait for others, so that one walk of the maps serves many.
	// DefaultTransferWait if 0.
	Wait time.Duration
}

// What pools have that do not ask for something else. A walk reads a leaf for each MiB
// that volumes have: 4 GiB a TiB.
const (
	DefaultTransferRate = 64 << 20
	DefaultTransferWait = 10 * time.Second
)

// transferRest is how many times as long as a walk took the next one waits.
const transferRest = 3

// TransferStats tells of the blocks that moved to memory.
type TransferStats struct {
	// Total and Free are bytes of memory, those of devices that leave left out.
	Total, Free int64
	// Threshold is the number of copies on disks with which a block goes there.
	Threshold int
	// Failed says that writing there failed, and nothing moves there any more until the
	// pool is opened again.
	Failed bool
	// Written blocks went there since the pool was opened, and Moved is how many
	// references followed from disks.
	Written, Moved uint64
	// Waiting is how many blocks on disks have references still to be moved.
	Waiting int64
}

// transfer moves what refers to blocks on disks to the copies that memory has of them.
// It is a machine of Run's goroutine, but for Stats, and writes through the log as the
// cleaner does: a block is written once more, and the consistency point finds it in
// memory. It needs no record, see cp's memory.go.
type transfer struct {
	p     *Pool
	o     TransferOptions
	timer *time.Timer
	next  time.Time // no step before

	since time.Time // when blocks were seen to wait
	due   bool      // there are blocks to be looked for
	wait  foldWait  // before the walk: it looks at trees
	walks bool
	began time.Time // when the walk did
	set   table.Table[uint64]
	mover mover

	mu      sync.Mutex // guards moved and waiting
	moved   uint64
	waiting int64
}

func newTransfer(p *Pool, o TransferOptions) *transfer {
	if o.Rate <= 0 {
		o.Rate = DefaultTransferRate
	}
	if o.Wait <= 0 {
		o.Wait = DefaultTransferWait
	}
	t := &transfer{p: p, o: o, timer: time.NewTimer(0)}
	t.timer.Stop()
	t.mover = mover{p: p, has: func(at block.Physical) bool { return t.set.Has(uint64(at)) }, note: func(moved, _, _ int) {
		t.mu.Lock()
		defer t.mu.Unlock()
		t.moved += uint64(moved)
	}}
	return t
}

// Stats may be called at any time.
func (t *transfer) Stats() TransferStats {
	total, free := t.p.space.Apart()
	t.mu.Lock()
	defer t.mu.Unlock()
	return TransferStats{Total: total * block.Size, Free: free * block.Size, Failed: t.p.machine.MemoryFailed(), Threshold: t.p.settings.Load().MinCopies(),
		Written: t.p.machine.Stats().Transferred, Moved: t.moved, Waiting: t.waiting}
}

// wantsFold reports whether a fold is what the walk waits for.
func (t *transfer) wantsFold() bool {
	return t.due && !t.walks && t.wait.wants()
}

// arm makes the timer wake Run when the next step of a walk is due. For the rest Run
// looks often enough.
func (t *transfer) arm() {
	if !t.walks {
		t.timer.Stop()
		return
	}
	t.p.wakeAt(t.timer, t.next)
}

// work does the next step if it is due.
func (t *transfer) work(now time.Time) {
	m := t.p.machine
	t.mu.Lock()
	t.waiting = int64(m.MovedLen() + t.set.Len())
	t.mu.Unlock()
	switch {
	case now.Before(t.next):
		return
	case !t.due:
		if m.MovedLen() == 0 {
			t.since = time.Time{}
		} else if t.since.IsZero() {
			t.since = now
		} else if now.Sub(t.since) >= t.o.Wait {
			t.due = true
			t.wait.begin(t.p)
		}
		return
	case t.p.pressed():
		t.next = now.Add(t.p.soon())
		return
	case !t.walks:
		if err := t.begin(now); err != nil {
			t.end(now, err)
		}
		return
	}
	blocks, more, err := t.mover.step()
	t.next = now.Add(pace(int64(blocks)*block.Size, t.o.Rate))
	if err != nil || !more {
		t.end(now, err)
	}
}

// begin begins the walk, when the trees have what was committed.
func (t *transfer) begin(now time.Time) error {
	m := t.p.machine
	if m.Folding() || !t.wait.over() {
		return nil
	}
	t.began = now
	m.TakeMoved(func(at block.Physical) { t.set.Put(uint64(at), 0) })
	if t.set.Len() == 0 { // all were overwritten or trimmed meanwhile
		t.end(now, nil)
		return nil
	}
	if err := t.mover.begin(); err != nil {
		return err
	}
	// Volumes that share nothing keep what they have.
	t.mover.walk.volumes = slices.DeleteFunc(t.mover.walk.volumes, func(id block.VolumeID) bool {
		v, _ := t.p.catalogue.Get(id)
		return v.Run == 0
	})
	t.walks = true
	return nil
}

// end ends a walk. What it could not do costs savings only; a scan finds it.
func (t *transfer) end(now time.Time, err error) {
	if err != nil {
		t.p.failed(err)
	}
	t.due, t.walks, t.since, t.next = false, false, time.Time{}, now.Add(transferRest*now.Sub(t.began))
	t.mover.end()
	t.set.Clear()
}

// close ends the work.
func (t *transfer) close() {
	t.timer.Stop()
	t.mover.close()
	t.set.Free()
}
