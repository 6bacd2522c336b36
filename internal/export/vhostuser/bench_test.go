package vhostuser

import (
	"context"
	"fmt"
	"log/slog"
	"sync"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/export/nbd/nbdtest"
	"github.com/pollux-storage/pollux/internal/virtio"
)

// flat is a volume in one piece of memory, which costs as little as can be: what is
// measured is the server.
type flat struct {
	nbdtest.Sessions
	mem []byte

	mu   sync.Mutex
	free []*flatWrite // guarded by mu
}

func newFlat(n int) *flat { return &flat{mem: make([]byte, n)} }

func (v *flat) Info() block.VolumeInfo {
	return block.VolumeInfo{Name: "flat", Size: int64(len(v.mem))}
}

func (v *flat) TryRead(p []byte, off int64) (bool, error) {
	copy(p, v.mem[off:])
	return true, nil
}

func (v *flat) Read(_ context.Context, p []byte, off int64) error {
	copy(p, v.mem[off:])
	return nil
}

func (v *flat) TryStage(off int64, n int) (block.Write, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	var w *flatWrite
	if n := len(v.free); n > 0 {
		w, v.free = v.free[n-1], v.free[:n-1]
	} else {
		w = &flatWrite{v: v, bufs: make([][]byte, 1)}
	}
	w.bufs[0] = v.mem[off:][:n]
	return w, nil
}

func (v *flat) Stage(_ context.Context, off int64, n int) (block.Write, error) {
	return v.TryStage(off, n)
}

func (v *flat) Trim(context.Context, int64, int64, block.Tag) error              { return nil }
func (v *flat) WriteZeroes(context.Context, int64, int64, bool, block.Tag) error { return nil }
func (v *flat) Flush(context.Context) error                                      { return nil }
func (v *flat) Status(_ context.Context, off, n int64, _ int, ext []block.Extent) ([]block.Extent, error) {
	return append(ext, block.Extent{Offset: off, Length: n}), nil
}

type flatWrite struct {
	v    *flat
	bufs [][]byte
}

func (w *flatWrite) Buffers() [][]byte { return w.bufs }
func (w *flatWrite) SetTag(block.Tag)  {}
func (w *flatWrite) TryCommit() (bool, error) {
	w.v.mu.Lock()
	defer w.v.mu.Unlock()
	w.v.free = append(w.v.free, w)
	return true, nil
}
func (w *flatWrite) Commit(context.Context) error { return nil }
func (w *flatWrite) Abort()                       {}

// keep does n requests of 4 KiB with up to depth in the ring.
func (q *vq) keep(kind uint32, n, depth int) {
	sent, done, at := 0, 0, uint64(1)
	for done < n {
		added := false
		for sent < n && sent-done < depth {
			at = at*6364136223846793005 + 1442695040888963407
			q.queue(kind, at>>33%4096*8, kind == virtio.BlkIn, buffer{dataStart + sent%256*4096, 4096})
			sent++
			added = true
		}
		if added {
			q.publish()
		}
		before := done
		for {
			_, _, ok, err := q.drv.Pop()
			must(q.m.t, err)
			if !ok {
				break
			}
			done++
		}
		if done == before && q.drv.Arm(1) {
			q.called()
		}
	}
}

func BenchmarkServer(b *testing.B) {
	for name, f := range map[string]virtio.Features{
		"split": virtio.Set(virtio.FEventIdx, virtio.FIndirectDesc), "packed": virtio.Set(virtio.FEventIdx, virtio.FIndirectDesc, virtio.FRingPacked),
	} {
		for _, kind := range []uint32{virtio.BlkIn, virtio.BlkOut} {
			for _, depth := range []int{1, 32} {
				b.Run(fmt.Sprintf("%s/%s/%d", name, map[uint32]string{virtio.BlkIn: "read", virtio.BlkOut: "write"}[kind], depth), func(b *testing.B) {
					s, err := New(Options{Volume: newFlat(16 << 20), Log: slog.New(slog.DiscardHandler)})
					must(b, err)
					m := newMachine(b, s, setup{features: f | disk, track: true, size: 128})
					m.start()
					b.ReportAllocs()
					b.SetBytes(4096)
					b.ResetTimer()
					m.vqs[0].keep(kind, b.N, depth)
				})
			}
		}
	}
}

// Requests that memory can answer take no memory of the heap.
func TestAllocations(t *testing.T) {
	layouts(t, func(t *testing.T, f virtio.Features) {
		s, _ := newServer(t, Options{Volume: newFlat(16 << 20)})
		m := newMachine(t, s, setup{features: f | disk, track: true, size: 128})
		m.start()
		q := m.vqs[0]
		for _, kind := range []uint32{virtio.BlkIn, virtio.BlkOut} {
			q.keep(kind, 2000, 32) // all requests of the queue have their memory then
			if n := testing.AllocsPerRun(3, func() { q.keep(kind, 1000, 32) }); n > 20 {
				t.Errorf("%v allocations for 1000 requests of kind %d", n, kind)
			}
		}
	})
}
