package cp

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/oplog"
)

// A flush for which the flush log has no room is a consistency point instead,
// and one whose device fails promises nothing.
func TestFlusherWithoutRoom(t *testing.T) {
	ctx := context.Background()
	mem, err := hpdi.AllocPrivate(int(oplog.SectionSize(1 << 20)))
	if err != nil {
		t.Fatal(err)
	}
	defer hpdi.Free(mem)
	log, err := oplog.Format(mem, oplog.Config{PayloadBytes: 1 << 20, Pool: testPool, Epoch: 1, Start: 100})
	if err != nil {
		t.Fatal(err)
	}
	fault := blocktest.NewFault(blocktest.NewCrash(64*block.Size, 1), 1)
	q, err := fault.NewQueue(4)
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	commits, refused := 0, error(nil)
	f := NewFlusher(log, oplog.NewDisk(q, oplog.Area{Length: 8 * block.Size, Pool: testPool}), oplog.DiskPos{}, func(context.Context) error {
		commits++
		return refused
	})
	defer f.Close()
	publish := func() {
		t.Helper()
		if _, ok := log.Publish([]oplog.Record{{Kind: oplog.KindZero, Volume: 1, LBA: 1, Count: 1}}); !ok {
			t.Fatal("the log is full")
		}
	}
	pos := f.positionLocked(100, 1, 1)
	f.committedLocked(100, pos)
	n := 0
	for ; commits == 0; n++ {
		if n > 20 {
			t.Fatal("the area never got full")
		}
		publish()
		if err := f.Flush(ctx); err != nil {
			t.Fatal(err)
		}
	}
	if n < 3 || f.flushed.Load() != uint64(100+n-1) {
		t.Errorf("%d flushes, the last up to %d", n, f.flushed.Load())
	}
	refused = errBroken
	if err := f.Flush(ctx); !errors.Is(err, errBroken) || commits != 2 {
		t.Errorf("%v after %d points", err, commits)
	}
	// A point makes room.
	f.committedLocked(log.Head(), f.positionLocked(log.Head(), 1, 2))
	publish()
	fault.Add(blocktest.Rule{Op: hpdi.OpFlush, Count: 1, Err: errBroken})
	before := f.flushed.Load()
	if err := f.Flush(ctx); !errors.Is(err, errBroken) || !strings.Contains(err.Error(), "flush log positions up to") || f.flushed.Load() != before {
		t.Errorf("%v, flushed up to %d", err, f.flushed.Load())
	}
	if err := f.Flush(ctx); err != nil || commits != 2 || f.flushed.Load() != before+1 {
		t.Errorf("%v, flushed up to %d after %d points", err, f.flushed.Load(), commits)
	}
	<-f.turn
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	publish()
	if err := f.Flush(cancelled); !errors.Is(err, context.Canceled) {
		t.Errorf("nobody waits: %v", err)
	}
	f.unlock()
}
