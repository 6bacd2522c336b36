package cp

import (
	"context"
	"errors"
	"sync"
	"testing"
	"testing/synctest"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/oplog"
)

// startedFlusher returns a flusher whose chain has begun, and how to publish a
// record.
func startedFlusher(t *testing.T) (f *Flusher, publish func()) {
	t.Helper()
	mem, err := hpdi.AllocPrivate(int(oplog.SectionSize(1 << 20)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = hpdi.Free(mem) })
	log, err := oplog.Format(mem, oplog.Config{PayloadBytes: 1 << 20, Pool: testPool, Epoch: 1, Start: 100})
	if err != nil {
		t.Fatal(err)
	}
	q, err := blocktest.NewCrash(1<<20, 1).NewQueue(4)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = q.Close() })
	f = NewFlusher(log, oplog.NewDisk(q, oplog.Area{Length: 1 << 20, Pool: testPool}), oplog.DiskPos{}, func(context.Context) error {
		return errors.New("a flush asked for a consistency point")
	})
	t.Cleanup(func() { _ = f.Close() })
	f.committedLocked(100, f.positionLocked(100, 1, 1))
	return f, func() {
		if _, ok := log.Publish([]oplog.Record{{Kind: oplog.KindZero, Volume: 1, LBA: 1, Count: 1}}); !ok {
			t.Error("the log is full")
		}
	}
}

// batches returns how many appends there were.
func (f *Flusher) batches() uint64 { return f.disk.Position(f.log.Head()).Batch - 1 }

// All flushes that wait for the turn are one append, whoever of them gives up.
func TestFlushesGather(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, publish := startedFlusher(t)
		const n = 16
		for gone := range n + 1 { // the leader, each of those who follow, nobody
			f.lock()
			before := f.batches()
			var errs [n]error
			var cancels [n]context.CancelFunc
			var wg sync.WaitGroup
			for i := range n {
				ctx, cancel := context.WithCancel(t.Context())
				cancels[i] = cancel
				publish()
				wg.Go(func() { errs[i] = f.Flush(ctx) })
				synctest.Wait()
			}
			if gone < n {
				cancels[gone]()
				synctest.Wait()
				if !errors.Is(errs[gone], context.Canceled) {
					t.Fatalf("flush %d, whose client has gone, has %v", gone, errs[gone])
				}
			}
			f.unlock()
			wg.Wait()
			for i, err := range errs {
				if i != gone && err != nil {
					t.Errorf("flush %d after %d has gone: %v", i, gone, err)
				}
				cancels[i]()
			}
			if got := f.batches() - before; got != 1 {
				t.Errorf("%d appends for %d flushes of which %d has gone", got, n, gone)
			}
			if at := f.flushed.Load(); at != uint64(f.log.Head()) {
				t.Errorf("flushed up to %d of %d", at, f.log.Head())
			}
			pos := f.positionLocked(f.log.Head(), 1, 1)
			f.log.Release(f.log.Head())
			f.committedLocked(f.log.Head(), pos)
		}
	})
}

// A flush that comes while an append is under way is not served by it: what it
// must cover may have been published after the append looked at the log.
func TestFlushAfterTheAppendBegan(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, publish := startedFlusher(t)
		publish()
		if m := f.group.join(); m != nil {
			t.Fatal("the first flush does not lead")
		}
		f.lock()
		members := f.group.close() // as lead does, right before it looks at the log
		var err error
		ended := make(chan struct{})
		publish()
		go func() { defer close(ended); err = f.Flush(t.Context()) }()
		synctest.Wait()
		f.unlock()
		f.group.tell(members, outcome{done: true})
		<-ended
		if err != nil || f.flushed.Load() != uint64(f.log.Head()) || f.batches() != 1 {
			t.Errorf("%v, flushed up to %d of %d in %d appends", err, f.flushed.Load(), f.log.Head(), f.batches())
		}
	})
}

// An error of the device is everybody's who was in the group.
func TestFlushErrorIsTheGroups(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var g group
		if m := g.join(); m != nil {
			t.Fatal("the first does not lead")
		}
		var wg sync.WaitGroup
		var got [8]outcome
		for i := range got {
			m := g.join()
			if m == nil {
				t.Fatal("a second leader")
			}
			wg.Go(func() { got[i] = g.wait(t.Context(), m) })
		}
		g.tell(g.close(), outcome{err: block.ErrCorrupt})
		wg.Wait()
		for i, o := range got {
			if o.done || !errors.Is(o.err, block.ErrCorrupt) {
				t.Errorf("member %d was told %+v", i, o)
			}
		}
	})
}

// Gathering does not allocate.
func TestGroupAllocates(t *testing.T) {
	var g group
	n := testing.AllocsPerRun(100, func() {
		g.join()
		var members [4]*member
		for i := range members {
			members[i] = g.join()
		}
		g.tell(g.close(), outcome{done: true})
		for _, m := range members {
			if o := g.wait(context.Background(), m); !o.done {
				t.Fatal("not told")
			}
		}
	})
	if n != 0 {
		t.Errorf("%v allocations for five flushes", n)
	}
}
