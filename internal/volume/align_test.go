package volume

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
)

// model is what a volume should hold.
type model struct {
	bytes []byte
	data  []bool // by block: takes space
}

func newModel(size int64) *model {
	return &model{bytes: make([]byte, size), data: make([]bool, size/block.Size)}
}

func (m *model) write(off int64, p []byte) {
	copy(m.bytes[off:], p)
	for b := off / block.Size; b*block.Size < off+int64(len(p)); b++ {
		m.data[b] = true
	}
}

// zero makes whole blocks holes. Partial ones at the ends are written.
func (m *model) zero(off, n int64) {
	clear(m.bytes[off : off+n])
	for b := off / block.Size; n > 0 && b*block.Size < off+n; b++ {
		m.data[b] = b*block.Size < off || (b+1)*block.Size > off+n
	}
}

// extents are those of a range, as Status should find them.
func (m *model) extents(off, n int64, most int) []block.Extent {
	var ext []block.Extent
	for end := off + n; off < end; {
		hole := !m.data[off/block.Size]
		to := min(end, (off/block.Size+1)*block.Size)
		if k := len(ext); k > 0 && ext[k-1].Hole == hole {
			ext[k-1].Length += to - off
		} else if k == most {
			break
		} else {
			ext = append(ext, block.Extent{Offset: off, Length: to - off, Hole: hole})
		}
		off = to
	}
	return ext
}

func (r *rig) status(m *model, off, n int64, most int) {
	r.t.Helper()
	before := []block.Extent{{Offset: -1, Length: 7, Hole: !m.data[off/block.Size]}}
	got, err := r.Status(context.Background(), off, n, most, before)
	if err != nil {
		r.t.Error(err)
		return
	}
	want := append([]block.Extent{before[0]}, m.extents(off, n, most)...)
	if fmt.Sprint(got) != fmt.Sprint(want) {
		r.t.Errorf("status of %d bytes at %d, at most %d: %v instead of %v", n, off, most, got, want)
	}
}

// Every combination of alignments, for a block that lies in each of the places
// where a block can be.
func TestEveryAlignment(t *testing.T) {
	const size = 32 * block.Size
	places := []struct {
		name string
		put  func(r *rig)
	}{
		{"nowhere", func(*rig) {}},
		{"log", func(r *rig) { r.must(r.write(0, pattern(1, size))) }},
		{"frozen", func(r *rig) { r.must(r.write(0, pattern(1, size))); r.Dirty.Freeze() }},
		{"zeroed", func(r *rig) {
			r.must(r.write(0, pattern(1, size)))
			r.must(r.Trim(context.Background(), 0, size, block.Tag{}))
		}},
		{"overlay", func(r *rig) { r.must(r.write(0, pattern(1, size))); r.Point(); r.forget() }},
		{"tree", func(r *rig) { r.must(r.write(0, pattern(1, size))); r.Point(); r.Fold(); r.forget() }},
	}
	for _, place := range places {
		t.Run(place.name, func(t *testing.T) {
			r := newRig(t, options{size: size, extents: 128, cache: 1 << 20})
			for _, in := range []int64{0, 1, 2048, 4095} {
				for _, n := range []int64{1, 2, 2047, 2048, 4095, 4096, 4097, 8191, 8192, 8193, 12 * block.Size} {
					for _, zero := range []bool{false, true} {
						m := newModel(size)
						r.must(r.Trim(context.Background(), 0, size, block.Tag{}))
						r.Point()
						place.put(r)
						if place.name != "nowhere" && place.name != "zeroed" {
							m.write(0, pattern(1, size))
						}
						off := 3*block.Size + in
						if zero {
							r.must(r.WriteZeroes(context.Background(), off, n, n%2 == 0, block.Tag{}))
							m.zero(off, n)
						} else {
							r.must(r.write(off, pattern(9, int(n))))
							m.write(off, pattern(9, int(n)))
						}
						for range 2 {
							r.reads(0, m.bytes)
							r.reads(off, m.bytes[off:off+n])
							r.status(m, 0, size, 99)
							r.status(m, off, n, 2)
							r.Point()
						}
						if t.Failed() {
							t.Fatalf("zero %v, %d bytes from byte %d of a block on", zero, n, in)
						}
					}
				}
			}
			r.settled()
		})
	}
}

// edgy returns offsets near borders of blocks more often than others.
func edgy(rng *rand.Rand, size int64) int64 {
	off := rng.Int64N(size)
	switch rng.IntN(3) {
	case 0:
		off &^= block.Size - 1
	case 1:
		off = off&^(block.Size-1) + rng.Int64N(5) - 2
	}
	return min(max(off, 0), size-1)
}

// Random requests against bytes in memory.
func TestAgainstModel(t *testing.T) {
	ctx := context.Background()
	const size = 300 * block.Size
	for seed := range uint64(8) {
		rng := rand.New(rand.NewPCG(seed, 5))
		r := newRig(t, options{size: size, extents: 96, cache: rng.IntN(2) * 256 << 10})
		m := newModel(size)
		for step := range 250 {
			if u := r.Dirty.Usage(); u.Active+u.Frozen > u.Permits/3 {
				r.Point()
			}
			off := edgy(rng, size)
			n := min(edgy(rng, 24*block.Size)+1, size-off)
			if rng.IntN(8) == 0 {
				n = min(edgy(rng, size)+1, size-off)
			}
			switch rng.IntN(12) {
			case 0:
				r.Point()
			case 1:
				r.Fold()
			case 2:
				r.Dirty.Freeze()
			case 3, 4:
				r.must(r.Trim(ctx, off, n, block.Tag{}))
				m.zero(off, n)
			case 5:
				r.status(m, off, n, 1+rng.IntN(9))
			case 6:
				w, err := r.TryStage(off, int(min(n, 20*block.Size)))
				if r.must(err); w != nil {
					receive(t, w, pattern(9, int(min(n, 20*block.Size))))
					w.Abort()
				}
			case 7, 8:
				p := make([]byte, n)
				ok, err := r.TryRead(p, off)
				r.must(err)
				if ok && !bytes.Equal(p, m.bytes[off:off+n]) {
					t.Errorf("TryRead of %d bytes at %d: wrong bytes", n, off)
				}
			default:
				p := pattern(byte(step), int(min(n, 20*block.Size)))
				w, err := r.TryStage(off, len(p))
				if r.must(err); w == nil {
					w, err = r.Stage(ctx, off, len(p))
					r.must(err)
				}
				receive(t, w, p)
				ok := false
				if rng.IntN(2) == 0 {
					ok, err = w.TryCommit()
				}
				if err == nil && !ok {
					err = w.Commit(ctx)
				}
				r.must(err)
				m.write(off, p)
			}
			off = edgy(rng, size)
			r.reads(off, m.bytes[off:min(size, off+edgy(rng, 100*block.Size)+1)])
			if t.Failed() {
				t.Fatalf("seed %d, step %d", seed, step)
			}
		}
		r.reads(0, m.bytes)
		r.drain()
		r.Fold()
		r.forget()
		r.reads(0, m.bytes)
		r.status(m, 0, size, 1000)
		used := int64(0)
		for _, d := range m.data {
			if d {
				used++
			}
		}
		if got := r.Map.Trees()[1].Used; got != used {
			t.Errorf("%d blocks are mapped instead of %d", got, used)
		}
		// All is in one tree now: data, and pages of three levels above two leaves.
		if u := r.space.Usage(); u.Total-u.Free-used > 5 {
			t.Errorf("%d blocks in use for %d of data", u.Total-u.Free, used)
		}
		if r.settled(); t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}
