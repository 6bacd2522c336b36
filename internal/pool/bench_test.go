package pool

import (
	"context"
	"math/rand/v2"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/mem"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/cache"
)

// BenchmarkOpen measures what a survivor does between the fence and its first
// reply: opening a pool whose journal is as long as it gets before a fold, and
// whose log is half full, both of single random blocks. It reports the mean of
// each step.
func BenchmarkOpen(b *testing.B) {
	ctx := context.Background()
	dev, err := mem.New("mem", 8<<30)
	if err != nil {
		b.Fatal(err)
	}
	if _, err := Create(ctx, CreateOptions{Name: "p", Identity: "a", Devices: []hpdi.Device{keepOpen{dev}}}); err != nil {
		b.Fatal(err)
	}
	mem := make([]byte, 256<<20)
	options := OpenOptions{Devices: []hpdi.Device{keepOpen{dev}}, RegionPath: filepath.Join(b.TempDir(), "region"), Cache: cache.New(mem), Owner: "a"}
	p, err := Open(ctx, options)
	if err != nil {
		b.Fatal(err)
	}
	if err := p.load(ctx); err != nil {
		b.Fatal(err)
	}
	if err := p.commitVolume("v", 4<<30); err != nil {
		b.Fatal(err)
	}
	v, _ := p.Volume("v")
	rng := rand.New(rand.NewPCG(1, 1))
	buf := make([]byte, block.Size)
	fill := func(n int) {
		for range n {
			buf[rng.IntN(len(buf))]++
			if err := write(v, rng.Int64N(1<<20)*block.Size, buf); err != nil {
				b.Fatal(err)
			}
		}
	}
	for !p.machine.FoldDue() {
		fill(16 << 10)
		if err := p.commit(nil); err != nil {
			b.Fatal(err)
		}
	}
	fill(32 << 10)
	entries, _ := p.bmap.Overlays()
	b.Logf("%d mappings to replay", entries)
	if err := p.Release(ctx); err != nil {
		b.Fatal(err)
	}
	total := map[string]float64{}
	for b.Loop() {
		p, err := Open(ctx, options)
		if err != nil {
			b.Fatal(err)
		}
		for _, s := range p.OpenSteps() {
			total[s.Name] += s.Took.Seconds() * 1e3
		}
		if err := p.Release(ctx); err != nil {
			b.Fatal(err)
		}
	}
	for name, ms := range total {
		b.ReportMetric(ms/float64(b.N), strings.ReplaceAll(name, " ", "-")+"-ms")
	}
}

// commitVolume creates a volume without Run.
func (p *Pool) commitVolume(name string, size int64) error {
	go func() {
		j := <-p.jobs
		j.done <- p.runJob(j)
	}()
	_, err := p.CreateVolume(context.Background(), name, size)
	return err
}

// keepOpen is a device that several pools open one after the other.
type keepOpen struct{ hpdi.Device }

func (keepOpen) Close() error { return nil }
