package pool

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/mirror"
)

// A mirror whose copies have all become larger is a larger device of its pool.
func TestGrownMirror(t *testing.T) {
	r, m := newMirroredRig(t, 2)
	r.mustOpen()
	v := r.volume("v", 4<<20)
	if err := write(v, 0, pattern(5)); err != nil {
		t.Fatal(err)
	}
	if err := r.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	before := r.Stats().Bytes
	for i := range r.devs {
		r.die()
		r.devs[i] = r.devs[i].Resize(2 * testSize)
		r.mustOpen()
		if got, want := r.Stats().Bytes-before, int64(i)*testSize; got != want {
			t.Errorf("with %d larger copies there are %d bytes more, want %d", i+1, got, want)
		}
	}
	r.cutPower(blocktest.DropAll, 1)
	r.mustOpen()
	if s := m().Status(); r.Stats().Bytes != before+testSize || s.Copies[0].State != mirror.InSync || s.Copies[1].State != mirror.InSync {
		t.Errorf("after a power cut: %d bytes more, %+v", r.Stats().Bytes-before, s)
	}
	v, _ = r.Volume("v")
	verifyBlocks(t, v, map[int64]byte{0: 5})
	r.shut()
}

// What a device has grown by is used from the next open on, whenever the power goes
// after that; a device that becomes smaller again is refused, and harmed by nothing.
func TestGrownDevice(t *testing.T) {
	long(t)
	const small, large = 64 << 20, 160<<20 + 3*block.Size
	for seed := range uint64(few(6)) {
		t.Run(fmt.Sprint(seed), func(t *testing.T) {
			rng := rand.New(rand.NewPCG(seed, 1))
			r := newRig(t, 2, small)
			r.mustOpen()
			v := r.volume("v", 512<<20)
			before := r.Stats().Bytes
			content := map[int64]byte{}
			fill := func() { // until the pool is full
				t.Helper()
				page := make([]byte, 64*block.Size)
				for at := int64(len(content)); ; at++ {
					for i := range page {
						page[i] = byte(at + 1)
					}
					err := write(v, at*int64(len(page)), page)
					if errors.Is(err, block.ErrNoSpace) {
						return
					}
					if err != nil {
						t.Fatal(err)
					}
					content[at] = byte(at + 1)
					if err := r.Commit(t.Context()); err != nil { // there is no Run
						t.Fatal(err)
					}
				}
			}
			fill()
			full := len(content)
			if err := r.Fold(t.Context()); err != nil {
				t.Fatal(err)
			}
			r.die()
			i := rng.IntN(2)
			r.devs[i] = r.devs[i].Resize(large)
			o := r.options()
			var grown int64
			o.Grown = func(_ hpdi.Device, bytes int64) { grown += bytes }
			if err := r.openWith(o); err != nil {
				t.Fatal(err)
			}
			if want := int64(large/block.Size/block.TrackBlocks*block.TrackBlocks*block.Size - small); grown != want || r.Stats().Bytes != before+want {
				t.Fatalf("grown by %d, the pool by %d; want %d", grown, r.Stats().Bytes-before, want)
			}
			v, _ = r.Volume("v")
			fill()
			if len(content) <= full {
				t.Fatal("what it has grown by is not used")
			}
			v, _ = r.Volume("v")
			if err := v.Flush(t.Context()); err != nil {
				t.Fatal(err)
			}
			if rng.IntN(2) == 0 {
				if err := r.Fold(t.Context()); err != nil {
					t.Fatal(err)
				}
			}
			r.cutPower(blocktest.CutRandom, seed)
			r.devs[i] = r.devs[i].Resize(small)
			r.refused(r.devices(), block.ErrInvalid, "shrunk", fmt.Sprintf("disk%d", i))
			r.devs[i] = r.devs[i].Resize(large)
			r.mustOpen()
			v, _ = r.Volume("v")
			page := make([]byte, 64*block.Size)
			for at, want := range content {
				if err := v.Read(t.Context(), page, at*int64(len(page))); err != nil || page[0] != want || page[len(page)-1] != want {
					t.Fatalf("seed %d: piece %d holds %d instead of %d: %v", seed, at, page[0], want, err)
				}
			}
			r.shut()
		})
	}
}
