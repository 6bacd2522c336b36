package pool

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/devices"
)

// tiny is a layout in which everything is used again soon: the journal wraps
// after a few records, and the next consistency point takes the blocks that
// the last one or the last fold has freed. No pool that Create makes is so
// small, so that the rig makes its own.
var tiny = Layout{Journal: 256, JournalBlocks: 12, Flush: 268, FlushBlocks: 640, First: 1024}

const (
	tinyDevice = 1024 + 2*block.TrackBlocks // blocks
	tinyVolume = 64                         // blocks
)

func newTinyRig(t testing.TB) *rig {
	t.Helper()
	r := newBareRig(t, 1, tinyDevice*block.Size)
	ctx := context.Background()
	set := devices.NewSet(r.devices())
	l := Label{Name: "p", Identity: "a", Blocks: tinyDevice, LogBytes: testLog, Layout: tiny}
	l.Pool[0], l.Device[0] = 1, 2
	sb := &cp.Superblock{Pool: l.Pool, Generation: 1, Journal: cp.JournalPos{Number: 1},
		Devices: []cp.DeviceRoot{{ID: l.Device, Blocks: l.Blocks, First: l.Layout.First}}}
	if err := errors.Join(cp.WriteSuperblock(set, sb), writeLabel(r.devs[0], l), set.ReleaseQueues(), ctx.Err()); err != nil {
		t.Fatal(err)
	}
	return r
}

// churn overwrites few blocks again and again, with consistency points and
// whole folds, until n changes are made or the power goes.
func churn(r *rig, v block.Volume, m *blocktest.Model, rng *rand.Rand, n int) error {
	ctx := context.Background()
	fold := func() error { return r.do(ctx, r.foldEverything) }
	if rng.IntN(3) == 0 {
		// No fold but when the journal asks for one: it fills and wraps.
		fold = func() error { return r.Pool.Commit(ctx) }
	}
	for range n {
		at := rng.Int64N(tinyVolume)
		blocks := min(1+rng.Int64N(12), tinyVolume-at)
		var err error
		switch rng.IntN(12) {
		case 0:
			id := m.Zero(at*block.Size, blocks*block.Size)
			if err = v.Trim(ctx, at*block.Size, blocks*block.Size, block.Tag{}); err == nil {
				m.Ack(id)
			}
		case 1, 2:
			err = r.Pool.Commit(ctx)
		case 3, 4:
			// What the fold frees is overwritten at once.
			if err = fold(); err == nil && rng.IntN(2) == 0 {
				err = fold()
			}
		case 5:
			for range rng.IntN(8) {
				if err = r.do(ctx, func() error { _, err := r.machine.Fold(); return err }); err != nil {
					break
				}
			}
		case 6, 7:
			covers := m.FlushStart()
			if err = v.Flush(ctx); err == nil {
				m.FlushDone(covers)
			}
		default:
			id, data := r.drawWrite(m, rng, at*block.Size, int(blocks*block.Size))
			if err = write(v, at*block.Size, data); err == nil {
				m.Ack(id)
			}
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// A power cut at any operation of a pool in which every block is soon used
// again, so that whatever is freed, overwritten or forgotten before it may be
// shows as lost. In each third pool blocks are shared.
func TestPowerCutWhereAllIsReused(t *testing.T) {
	long(t)
	rounds := few(60)
	if soak {
		rounds = 20_000
	}
	for seed := range uint64(rounds) {
		if tinyCut(t, seed); t.Failed() {
			return
		}
	}
}

func tinyCut(t *testing.T, seed uint64) {
	rng := rand.New(rand.NewPCG(seed, 21))
	r := newTinyRig(t)
	r.mustOpen()
	v := r.volume("v", tinyVolume*block.Size)
	if r.repeats = seed%3 == 2; r.repeats {
		if err := r.SetSharing(context.Background(), "v", 1+int(seed/3%4)); err != nil {
			t.Fatal(err)
		}
	}
	m := blocktest.NewModel(seed)
	for life := range uint64(4) {
		r.clock.CutAfter(r.clock.Ops() + 1 + rng.Int64N(200))
		err := churn(r, v, m, rng, 80)
		if err != nil && !errors.Is(err, blocktest.ErrPowerCut) {
			t.Fatalf("seed %d life %d: %v", seed, life, err)
		}
		what := fmt.Sprintf("seed %d life %d", seed, life)
		if rng.IntN(4) == 0 && err == nil {
			r.clock.CutAfter(0)
			r.die()
		} else {
			r.cutPower([]blocktest.CutMode{blocktest.CutRandom, blocktest.CutRandom, blocktest.DropAll, blocktest.KeepAll}[rng.IntN(4)], seed<<3|life)
		}
		v = r.comesBack(m, m.Flushed(), what)
	}
	r.shut()
}
