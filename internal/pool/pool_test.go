package pool

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

func TestWriteCloseOpenRead(t *testing.T) {
	r := newRig(t, 2, testSize)
	r.mustOpen()
	v := r.volume("v", 1<<30)
	data := bytes.Repeat([]byte("pollux"), 5000)
	if err := write(v, 12345, data); err != nil {
		t.Fatal(err)
	}
	for _, how := range []string{"dirty", "committed", "folded", "cold"} {
		switch how {
		case "committed":
			if err := r.Pool.Commit(context.Background()); err != nil {
				t.Fatal(err)
			}
		case "folded":
			if err := r.Fold(context.Background()); err != nil {
				t.Fatal(err)
			}
		case "cold":
			r.shut()
			r.reopen()
			r.mustOpen()
			v, _ = r.Volume("v")
		}
		got := make([]byte, len(data)+20000)
		if err := v.Read(context.Background(), got, 12345-10000); err != nil {
			t.Fatalf("%s: %v", how, err)
		}
		want := append(append(make([]byte, 10000), data...), make([]byte, 10000)...)
		if !bytes.Equal(got, want) {
			t.Fatalf("%s: read other bytes than were written", how)
		}
		r.mustCheck()
	}
	r.shut()
}

// exercise makes random changes of v, of which the model knows, until the power
// goes or n of them are made. Some are flushed, and now and then a consistency
// point or some steps of a fold are made.
func exercise(r *rig, v block.Volume, m *blocktest.Model, rng *rand.Rand, n int) error {
	ctx := context.Background()
	size := v.Info().Size
	for range n {
		off := rng.Int64N(size)
		length := min(1+rng.Int64N(60_000), size-off)
		if rng.IntN(3) > 0 { // mostly whole blocks
			off &^= block.Size - 1
			length = min((length+block.Size-1)&^(block.Size-1), size-off)
		}
		switch rng.IntN(20) {
		case 0, 1:
			id := m.Zero(off, length)
			if err := v.Trim(ctx, off, length, block.Tag{}); err != nil {
				return err
			}
			m.Ack(id)
		case 2:
			if err := r.Pool.Commit(ctx); err != nil {
				return err
			}
		case 3:
			if err := r.do(ctx, func() error { _, err := r.machine.Fold(); return err }); err != nil {
				return err
			}
		case 4, 5, 6:
			covers := m.FlushStart()
			if err := v.Flush(ctx); err != nil {
				return err
			}
			m.FlushDone(covers)
		default:
			if r.dirty.Usage().Active > 100 {
				if err := r.Pool.Commit(ctx); err != nil {
					return err
				}
			}
			id, data := r.drawWrite(m, rng, off, int(length))
			if err := write(v, off, data); err != nil {
				return err
			}
			m.Ack(id)
		}
	}
	return nil
}

// A guest that dies loses nothing that was acknowledged, again and again.
func TestGuestDeath(t *testing.T) {
	long(t)
	for seed := range uint64(max(2, few(6))) {
		rng := rand.New(rand.NewPCG(seed, 1))
		r := newRig(t, 1+int(seed%2), testSize)
		r.warm = seed%4 > 1
		r.mustOpen()
		v := r.volume("v", 3<<20)
		m := blocktest.NewModel(seed)
		for round := range 8 {
			if err := exercise(r, v, m, rng, 60); err != nil {
				t.Fatalf("seed %d round %d: %v", seed, round, err)
			}
			r.die()
			r.mustOpen()
			v, _ = r.Volume("v")
			if _, err := m.CheckPrefix(blockReader(v), m.Acked()); err != nil {
				t.Fatalf("seed %d round %d: %v", seed, round, err)
			}
			r.mustCheck()
		}
		r.shut()
	}
}

// A power cut after every single device operation leaves a prefix of what was
// written that holds everything flushed.
func TestPowerCutAtEveryOperation(t *testing.T) {
	long(t)
	changes := 120
	if testing.Short() {
		changes = 40
	}
	for seed := range uint64(3) {
		step := int64(3) // from one, two or three on, by seed
		switch {
		case soak:
			step = 1
		case raced:
			step = 16
		}
		for cut := 1 + int64(seed)%step; ; cut += step {
			ended := powerCut(t, seed, cut, changes, 0)
			if t.Failed() {
				return
			}
			if ended {
				t.Logf("seed %d: %d operations", seed, cut)
				break
			}
		}
	}
}

// powerCut runs the workload of a seed until the power is cut at one
// operation, recovers and checks. It returns true when the workload ended
// before. With a run, the volume shares blocks, and much is written twice.
func powerCut(t *testing.T, seed uint64, cut int64, changes, run int) bool {
	rng := rand.New(rand.NewPCG(seed, 1))
	r := newRig(t, 1+int(seed%2), 13<<20) // so small that freed blocks are soon used again
	r.mustOpen()
	v := r.volume("v", 2<<20)
	if r.repeats = run > 0; r.repeats {
		if err := r.SetSharing(context.Background(), "v", run); err != nil {
			t.Fatal(err)
		}
	}
	m := blocktest.NewModel(seed)
	r.clock.CutAfter(r.clock.Ops() + cut)
	err := exercise(r, v, m, rng, changes)
	if err != nil && !errors.Is(err, blocktest.ErrPowerCut) {
		t.Fatalf("seed %d cut %d: %v", seed, cut, err)
	}
	for twice := range uint64(2) { // the second time without any change between
		r.cutPower(blocktest.CutRandom, seed<<32|uint64(cut)<<1|twice)
		if err := r.open(); err != nil {
			t.Fatalf("seed %d cut %d: open: %v", seed, cut, err)
		}
		if v, e := r.Volume("v"); e != nil {
			t.Fatalf("seed %d cut %d: %v", seed, cut, e)
		} else if n, e := m.CheckPrefix(blockReader(v), m.Flushed()); e != nil {
			t.Fatalf("seed %d cut %d: %v", seed, cut, e)
		} else {
			m.Truncate(n)
		}
		r.mustCheck()
		if twice == 0 {
			// Life goes on in the recovered pool.
			v, _ := r.Volume("v")
			if err := exercise(r, v, m, rng, 10); err != nil {
				t.Fatalf("seed %d cut %d: after recovery: %v", seed, cut, err)
			}
		}
	}
	r.shut()
	return err == nil
}

// Where memory survives power cuts, a flush touches no device.
func TestBatteryBacked(t *testing.T) {
	for _, battery := range []bool{false, true} {
		r := newRig(t, 1, testSize)
		r.battery = battery
		r.mustOpen()
		v := r.volume("v", 1<<20)
		if err := write(v, 0, make([]byte, block.Size)); err != nil {
			t.Fatal(err)
		}
		before := r.clock.Ops()
		if err := v.Flush(context.Background()); err != nil {
			t.Fatal(err)
		}
		if touched := r.clock.Ops() > before; touched == battery {
			t.Errorf("battery %v: flush touched a device: %v", battery, touched)
		}
		r.shut()
	}
}
