package pool

import (
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"path/filepath"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/mem"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/catalogue"
)

// BenchmarkPoint measures what consistency points and folds cost for each block
// of 4 KiB, on a device in memory: an operation is a point of a sixteenth of
// the log, of single random blocks or of runs of 32, and its share of the fold
// that is due after some of them. A volume that shares blocks with THN 8 is given
// blocks that are like no others, or a few series again and again. Of a pool with cheap
// ranges the volume lies in them, or something else does.
func BenchmarkPoint(b *testing.B) {
	for _, run := range []int{1, 32} {
		b.Run(fmt.Sprintf("runs-of-%d", run), func(b *testing.B) { benchmarkPoint(b, run, 0, 0, nothingCheap) })
		b.Run(fmt.Sprintf("runs-of-%d-shared-unique", run), func(b *testing.B) { benchmarkPoint(b, run, 8, 0, nothingCheap) })
		b.Run(fmt.Sprintf("runs-of-%d-cold", run), func(b *testing.B) { benchmarkPoint(b, run, 0, 0, othersCheap) })
		b.Run(fmt.Sprintf("runs-of-%d-hot", run), func(b *testing.B) { benchmarkPoint(b, run, 0, 0, volumeCheap) })
	}
	b.Run("runs-of-32-shared-alike", func(b *testing.B) { benchmarkPoint(b, 32, 8, 500, nothingCheap) })
}

// What of a pool is cheap.
const (
	nothingCheap = iota
	othersCheap
	volumeCheap
)

// benchmarkPoint gives a volume with a THN, if it has one, series of so many kinds, or
// each one of its own if that is 0.
func benchmarkPoint(b *testing.B, run, thn, kinds, cheap int) {
	const points = 4096 // blocks of one
	ctx := context.Background()
	const device = 1 << 30
	dev, err := mem.New("mem", device)
	if err != nil {
		b.Fatal(err)
	}
	if _, err := Create(ctx, CreateOptions{Name: "p", Identity: "a", Devices: []hpdi.Device{dev}, LogBytes: 64 << 20}); err != nil {
		b.Fatal(err)
	}
	p, err := Open(ctx, OpenOptions{Devices: []hpdi.Device{dev}, RegionPath: filepath.Join(b.TempDir(), "region"), CacheBytes: 256 << 20, Owner: "a"})
	if err != nil {
		b.Fatal(err)
	}
	if err := p.load(ctx); err != nil {
		b.Fatal(err)
	}
	const size = 128 << 20
	if err := p.commitVolume("v", size); err != nil {
		b.Fatal(err)
	}
	v, _ := p.Volume("v")
	if thn > 0 {
		if err := p.enableSharing(); err != nil {
			b.Fatal(err)
		}
		c, _ := p.catalogue.ByName("v")
		c.Run = thn
		if err := p.commit([]catalogue.Change{{Put: &c}}); err != nil {
			b.Fatal(err)
		}
	}
	rng := rand.New(rand.NewPCG(1, 1))
	buf := make([]byte, run*block.Size)
	fill := func(at func() int64) {
		for range points / run {
			kind := rng.Uint64()
			if kinds > 0 {
				kind %= uint64(kinds)
			}
			for i := range run {
				binary.LittleEndian.PutUint64(buf[i*block.Size:], (kind+1)*uint64(run+1)+uint64(i))
			}
			if err := write(v, at(), buf); err != nil {
				b.Fatal(err)
			}
		}
	}
	var point, fold time.Duration
	step := func() {
		begun := time.Now()
		if err := p.commit(nil); err != nil {
			b.Fatal(err)
		}
		point += time.Since(begun)
		if !p.machine.FoldDue() {
			return
		}
		begun = time.Now()
		if err := p.foldAll(); err != nil {
			b.Fatal(err)
		}
		fold += time.Since(begun)
	}
	// All of the volume, so that each later block replaces one, and again, until
	// all memory of the device has been touched.
	for at := int64(0); at < device; {
		fill(func() int64 { at += int64(len(buf)); return (at - int64(len(buf))) % size })
		step()
	}
	if cheap != nothingCheap {
		p.space.SetCheap(0, device/block.Size/2, device/block.Size/4, true)
	}
	if cheap == volumeCheap {
		c, _ := p.catalogue.ByName("v")
		var ptrs [256]block.Pointer
		for lba := block.Logical(0); lba < size/block.Size; lba += 256 {
			if err := p.bmap.Lookup(c.ID, lba, ptrs[:]); err != nil {
				b.Fatal(err)
			}
			for _, at := range ptrs {
				p.space.SetCheap(0, at.Phys.Block()/16*16, 16, true)
			}
		}
	}
	point, fold = 0, 0
	before := p.machine.Stats()
	b.ReportAllocs()
	for b.Loop() {
		b.StopTimer()
		fill(func() int64 { return rng.Int64N(size/int64(len(buf))) * int64(len(buf)) })
		b.StartTimer()
		step()
	}
	b.ReportMetric(float64(point.Nanoseconds())/float64(b.N)/points, "point-ns/block")
	b.ReportMetric(float64(fold.Nanoseconds())/float64(b.N)/points, "fold-ns/block")
	if after := p.machine.Stats(); cheap != nothingCheap {
		b.ReportMetric(100*float64(after.Hot-before.Hot)/float64(after.Blocks-before.Blocks), "hot-%")
	}
	if err := p.Release(ctx); err != nil {
		b.Fatal(err)
	}
}
