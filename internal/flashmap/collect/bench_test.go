package collect

import (
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
)

// BenchmarkRecord is what an access costs on the I/O path, beside ticks as often as they are
// needed.
func BenchmarkRecord(b *testing.B) {
	for name, sample := range map[string]int{"each": 1, "one-in-8": 8} {
		b.Run(name, func(b *testing.B) {
			b.ReportAllocs()
			c := newCollector(b, Geometry{1 << 40, 256 * kib}, func(p *Params) { p.Sample = sample })
			r := c.NewRecorder()
			// In an array as a queue would have them: no draw is part of what is measured.
			offsets := make([]int64, 1<<16)
			for i := range offsets {
				offsets[i] = rand.Int64N(1<<28) << 12
			}
			i := 0
			for b.Loop() {
				if i%2000 == 0 {
					b.StopTimer()
					r.tail.Store(r.head.Load())
					b.StartTimer()
				}
				r.Record(hpdi.OpRead, offsets[i%len(offsets)], 4*kib, start)
				i++
			}
		})
	}
}

// BenchmarkRecordParallel has several owners record while ticks count.
func BenchmarkRecordParallel(b *testing.B) {
	c := newCollector(b, Geometry{1 << 40, 256 * kib}, nil)
	stop := make(chan struct{})
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
				c.Tick(start)
			}
		}
	})
	b.ReportAllocs()
	b.RunParallel(func(pb *testing.PB) {
		r := c.NewRecorder()
		x := uint64(1)
		for pb.Next() {
			x = x*6364136223846793005 + 1442695040888963407
			r.Record(hpdi.OpWrite, int64(x>>36)<<12, 4*kib, start)
		}
	})
	b.StopTimer()
	close(stop)
	wg.Wait()
	s := c.Status()
	b.ReportMetric(float64(s.Lost)/float64(s.Counted+s.Lost), "lost/access")
}

// BenchmarkTick is what an access costs in the background: of random ones, which begin
// nothing, and of a scan.
func BenchmarkTick(b *testing.B) {
	for _, kind := range []string{"random", "scan"} {
		b.Run(kind, func(b *testing.B) {
			b.ReportAllocs()
			c := newCollector(b, Geometry{1 << 40, 256 * kib}, func(p *Params) { p.Memory = 16 * mib })
			r := c.NewRecorder()
			now, at := start, int64(0)
			b.ResetTimer()
			for i := 0; i < b.N; {
				b.StopTimer()
				for range 2000 {
					now = now.Add(time.Second / enough)
					if at += 64 * kib; kind == "random" {
						at = rand.Int64N(1<<26) << 12
					}
					r.Record(hpdi.OpRead, at%(1<<40), 64*kib, now)
					i++
				}
				b.StartTimer()
				c.Tick(now)
			}
		})
	}
}
