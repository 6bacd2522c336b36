//go:build !race

package volume

import (
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
)

// What memory can answer allocates nothing, from wherever it comes: the log,
// the overlay, the tree. (Under the race detector pools drop at random.)
func TestNoAllocationPerRequest(t *testing.T) {
	r := newRig(t, options{size: 8 << 20, extents: 1024, cache: 16 << 20})
	data := make([]byte, 256<<10)
	for i := range data {
		data[i] = byte(i%251 + 1)
	}
	var tag block.Tag
	write := func(off int64, n int) {
		w, err := r.TryStage(off, n)
		if err != nil || w == nil {
			t.Fatalf("stage: %v, %v", w, err)
		}
		rest := data[:n]
		for _, b := range w.Buffers() {
			rest = rest[copy(b, rest):]
		}
		if tag.Counter++; tag.Session != 0 {
			w.SetTag(tag)
		}
		if ok, err := w.TryCommit(); err != nil || !ok {
			t.Fatalf("commit: %v, %v", ok, err)
		}
	}
	read := func(n int) func() {
		p := make([]byte, n)
		return func() {
			if ok, err := r.TryRead(p, 0); err != nil || !ok {
				t.Fatalf("read: %v, %v", ok, err)
			}
		}
	}
	write(0, len(data))
	check := func(from string) {
		t.Helper()
		for _, n := range []int{block.Size, len(data)} {
			r.must(r.Read(t.Context(), make([]byte, n), 0)) // fills the cache
			if a := testing.AllocsPerRun(500, read(n)); a >= 1 {
				t.Errorf("%d bytes from %s: %.2f allocations", n, from, a)
			}
		}
	}
	check("the log")
	r.drain()
	check("the overlay")
	r.Fold()
	check("the tree")
	// The index of dirty blocks has room for these already.
	write(0, block.Size)
	if a := testing.AllocsPerRun(500, func() { write(0, block.Size) }); a >= 1 {
		t.Errorf("write: %.2f allocations", a)
	}
	if _, err := r.OpenSession(t.Context(), 5, 1, 8); err != nil {
		t.Fatal(err)
	}
	tag.Session = 5
	r.drain()
	write(0, block.Size)
	if a := testing.AllocsPerRun(500, func() { write(0, block.Size) }); a >= 1 {
		t.Errorf("write with a tag: %.2f allocations", a)
	}
}
