package pool

import (
	"bytes"
	"context"
	"fmt"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

// Journal and flush log of one copy have decayed or never reached it: after a
// power cut the other one is gone by. Then each suffices alone: at once where only
// the flush log was needed, and after a scrub in any case.
func TestMirrorLogsDecay(t *testing.T) {
	const blocks = 64
	for i := range 6 {
		victim, commit, scrub := i%2, i/2 == 1, i/2 > 0
		t.Run(fmt.Sprintf("copy=%d,commit=%v,scrub=%v", victim+1, commit, scrub), func(t *testing.T) {
			r, m := newMirroredRig(t, 2)
			r.mustOpen()
			v := r.volume("v", 4<<20)
			for i := range int64(blocks) {
				if err := write(v, i*block.Size, pattern(byte(i))); err != nil {
					t.Fatal(err)
				}
				if i%16 == 0 && commit {
					if err := r.Commit(context.Background()); err != nil {
						t.Fatal(err)
					}
				}
			}
			if err := v.Flush(context.Background()); err != nil {
				t.Fatal(err)
			}
			lay := r.Pool.label.Layout
			r.cutPower(blocktest.DropAll, 1)
			for b := lay.Journal; b < lay.Flush+lay.FlushBlocks; b++ {
				r.rot(victim, block.At(0, b))
			}
			r.mustOpen()
			for i, c := range m().Status().Copies {
				if c.WriteErrors > 0 {
					t.Errorf("copy %d: %+v", i+1, c)
				}
			}
			holds := func(when string) {
				t.Helper()
				v, err := r.Volume("v")
				if err != nil {
					t.Fatal(err)
				}
				got := make([]byte, block.Size)
				for i := range int64(blocks) {
					if err := v.Read(context.Background(), got, i*block.Size); err != nil || !bytes.Equal(got, pattern(byte(i))) {
						t.Fatalf("%s: block %d: %v", when, i, err)
					}
				}
			}
			holds("with both copies")
			if scrub {
				// A consistency point ends what the flush log was needed for.
				if err := r.Commit(context.Background()); err != nil {
					t.Fatal(err)
				}
				if s := r.scrubAll(); s.Now.Unreadable > 0 {
					t.Errorf("%+v", s)
				}
			}
			if err := m().Detach(1 - victim); err != nil {
				t.Fatal(err)
			}
			r.cutPower(blocktest.DropAll, 2)
			r.mustOpen()
			holds("with the one that had decayed")
			r.shut()
		})
	}
}

// The journal of an open pool decays, on its only device. A scrub makes it
// superfluous before anybody has to read it.
func TestScrubReplacesJournal(t *testing.T) {
	r := newRig(t, 1, testSize)
	r.mustOpen()
	v := r.volume("v", 4<<20)
	if err := write(v, 0, pattern(7)); err != nil {
		t.Fatal(err)
	}
	for _, step := range []func(context.Context) error{r.Pool.Commit, r.Pool.Fold} {
		if err := step(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
	lay := r.Pool.label.Layout
	for b := lay.Journal; b < lay.Flush; b++ {
		r.rot(0, block.At(0, b))
	}
	if s := r.scrubAll(); s.Now.Unreadable > 0 {
		t.Errorf("%+v", s)
	}
	r.cutPower(blocktest.DropAll, 1)
	r.mustOpen()
	v, err := r.Volume("v")
	if err != nil {
		t.Fatal(err)
	}
	got := make([]byte, block.Size)
	if err := v.Read(context.Background(), got, 0); err != nil || !bytes.Equal(got, pattern(7)) {
		t.Error(err)
	}
	r.shut()
}
