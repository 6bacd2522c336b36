package volume

import (
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
)

// BenchmarkTag writes 4 KiB with and without a tag, by turns of a thousand, and tells what
// each took, and what a tag costs.
func BenchmarkTag(b *testing.B) {
	r := newRig(b, options{size: 64 << 20, extents: 8192, cache: 16 << 20, device: 1 << 17})
	if _, err := r.OpenSession(b.Context(), 5, 4, 128); err != nil {
		b.Fatal(err)
	}
	data := make([]byte, block.Size)
	data[0] = 1
	var took [2]time.Duration
	n := uint64(0)
	turn := func(tagged bool) time.Duration {
		began := time.Now()
		for range 1000 {
			n++
			w, err := r.TryStage(int64(n%4096)*block.Size, block.Size)
			if err != nil || w == nil {
				b.Fatal(w, err)
			}
			copy(w.Buffers()[0], data)
			if tagged {
				w.SetTag(block.Tag{Session: 5, Queue: uint16(n % 4), Slot: uint16(n % 128), Counter: n})
			}
			if ok, err := w.TryCommit(); !ok || err != nil {
				b.Fatal(ok, err)
			}
		}
		return time.Since(began)
	}
	turn(false)
	turn(true)
	b.ResetTimer()
	turns := 0
	for b.Loop() {
		first := turns % 2 // who goes first has it easier
		took[first] += turn(first == 1)
		took[1-first] += turn(first == 0)
		turns++
		b.StopTimer()
		r.drain()
		b.StartTimer()
	}
	each := func(d time.Duration) float64 { return float64(d.Nanoseconds()) / float64(turns) / 1000 }
	b.ReportMetric(each(took[0]), "ns/plain")
	b.ReportMetric(each(took[1]), "ns/tagged")
	b.ReportMetric(float64(took[1])/float64(took[0]), "tagged/plain")
}
