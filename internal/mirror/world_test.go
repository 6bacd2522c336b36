package mirror

import (
	"encoding/binary"
	"fmt"
	"slices"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

const sector = 512

// world is a mirror under test with what its blocks may hold.
type world struct {
	t    testing.TB
	m    *Mirror
	q    hpdi.Queue
	now  uint64           // number of the newest write
	hist map[int][]uint64 // writes to a block that it may hold, by sector at most, oldest first
	done map[int]uint64   // the newest acknowledged write to a block
	// flushed says that the oldest entry of hist is durable, so that the block
	// cannot be as if never written.
	flushed map[int]bool
	dead    bool // power was cut: errors are expected
}

func newWorld(t testing.TB, m *Mirror) *world {
	w := &world{t: t, m: m, hist: map[int][]uint64{}, done: map[int]uint64{}, flushed: map[int]bool{}}
	w.connect()
	return w
}

func (w *world) connect() {
	var err error
	if w.q, err = w.m.NewQueue(8); err != nil {
		w.t.Fatal(err)
	}
}

// try notes an error: with power on there must be none.
func (w *world) try(what string, err error) bool {
	if err != nil && !w.dead {
		w.t.Fatalf("%s: %v", what, err)
	}
	return err == nil
}

// pattern returns the n blocks of write v.
func pattern(v uint64, n int) []byte {
	p := make([]byte, n*block.Size)
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], v)
	}
	return p
}

// write writes n blocks from at on.
func (w *world) write(at, n int) {
	w.now++
	for b := at; b < at+n; b++ {
		w.hist[b] = append(w.hist[b], w.now)
	}
	r := &hpdi.Request{Op: hpdi.OpWrite, Offset: int64(at) * block.Size, Vec: [][]byte{pattern(w.now, n)}}
	if w.try(fmt.Sprintf("write %d at %d", w.now, at), hpdi.Do(w.q, r)) {
		for b := at; b < at+n; b++ {
			w.done[b] = w.now
		}
	}
}

// flush makes what was acknowledged all that blocks may hold.
func (w *world) flush() {
	if !w.try("flush", hpdi.Do(w.q, &hpdi.Request{Op: hpdi.OpFlush})) {
		return
	}
	for b, v := range w.done {
		h := w.hist[b]
		w.hist[b], w.flushed[b] = h[slices.Index(h, v):], true
	}
}

// read returns a block, as the mirror has it.
func (w *world) read(b int) []byte {
	p := make([]byte, block.Size)
	w.try(fmt.Sprintf("read block %d", b), hpdi.Do(w.q, &hpdi.Request{Op: hpdi.OpRead, Offset: int64(b) * block.Size, Vec: [][]byte{p}}))
	return p
}

// latest proves that each block holds the newest acknowledged write.
func (w *world) latest() {
	w.t.Helper()
	for _, b := range w.written() {
		if got := binary.LittleEndian.Uint64(w.read(b)); got != w.done[b] && !w.dead {
			w.t.Fatalf("block %d holds write %d instead of %d", b, got, w.done[b])
		}
	}
}

// plausible proves that each block holds what a power cut may have left, and
// returns it.
func (w *world) plausible() map[int][]byte {
	w.t.Helper()
	out := map[int][]byte{}
	for _, b := range w.written() {
		p := w.read(b)
		out[b] = p
		for s := 0; s < block.Size; s += sector {
			v := binary.LittleEndian.Uint64(p[s:])
			if !slices.Contains(w.hist[b], v) && (v != 0 || w.flushed[b]) {
				w.t.Fatalf("sector %d of block %d holds write %d, not one of %v", s/sector, b, v, w.hist[b])
			}
		}
	}
	return out
}

func (w *world) written() (bs []int) {
	for b := range w.hist {
		bs = append(bs, b)
	}
	slices.Sort(bs)
	return bs
}

// resync finishes all resilvering.
func (w *world) resync() {
	w.t.Helper()
	for range 1000 {
		done, err := w.m.Resync(3)
		if !w.try("resync", err) || done {
			return
		}
	}
	w.t.Fatal("resilvering does not end")
}

// alike proves that a block is the same on all copies, and what was expected.
func alike(t testing.TB, want map[int][]byte, disks ...*blocktest.Crash) {
	t.Helper()
	for i, d := range disks {
		for b, p := range want {
			if got := all(t, d, base+int64(b)*block.Size, block.Size); !slices.Equal(got, p) {
				t.Fatalf("copy %d holds write %d in block %d instead of %d", i, binary.LittleEndian.Uint64(got), b, binary.LittleEndian.Uint64(p))
			}
		}
	}
}
