package pool

import (
	"context"
	"errors"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/file"
	"github.com/pollux-storage/pollux/hpdi/mem"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/region"
)

// BenchmarkOpen measures what a survivor does between the fence and its first
// reply: opening a pool with single random blocks in its journal, as many as begin a
// fold, or, scattered over a terabyte, as many as there may ever be; and with some in
// its log. It reports the mean of each step, what the reads would take of a disk of 2008,
// and the least of the journal for a thousand mappings.
func BenchmarkOpen(b *testing.B) {
	for _, kept := range []bool{true, false} {
		name := map[bool]string{true: "journal in memory", false: "journal on the device"}[kept]
		b.Run("4GiB/"+name, func(b *testing.B) { benchmarkOpen(b, newHollow(8<<30, 2<<30), false, kept) })
		b.Run("1TiB/"+name, func(b *testing.B) { benchmarkOpen(b, newHollow(2<<40, 2<<30), true, kept) })
		b.Run("1TiB on a file/"+name, func(b *testing.B) {
			path := filepath.Join(b.TempDir(), "disk")
			if err := os.WriteFile(path, nil, 0o600); err != nil {
				b.Fatal(err)
			}
			if err := os.Truncate(path, 2<<30); err != nil {
				b.Fatal(err)
			}
			f, err := file.Open(path, file.Options{})
			if err != nil {
				b.Fatal(err)
			}
			benchmarkOpen(b, &hollow{f, 2 << 40, 2 << 30}, true, kept)
			if err := f.Close(); err != nil {
				b.Fatal(err)
			}
		})
	}
}

func benchmarkOpen(b *testing.B, on *hollow, most, kept bool) {
	ctx := context.Background()
	size := on.size / 2
	sheet := blocktest.BarracudaES2
	sheet.Size = max(sheet.Size, 2*size)
	disk := blocktest.NewDisk(sheet)
	dev := disk.Wrap(on)
	if _, err := Create(ctx, CreateOptions{Name: "p", Identity: "a", Devices: []hpdi.Device{dev}}); err != nil {
		b.Fatal(err)
	}
	options := OpenOptions{Devices: []hpdi.Device{dev}, RegionPath: filepath.Join(b.TempDir(), "region"), CacheBytes: 256 << 20, Owner: "a"}
	p, err := Open(ctx, options)
	if err != nil {
		b.Fatal(err)
	}
	if err := p.load(ctx); err != nil {
		b.Fatal(err)
	}
	if err := p.commitVolume("v", size); err != nil {
		b.Fatal(err)
	}
	v, _ := p.Volume("v")
	rng := rand.New(rand.NewPCG(1, 1))
	buf := make([]byte, block.Size)
	fill := func(n int) {
		for range n {
			buf[rng.IntN(len(buf))]++
			if err := write(v, rng.Int64N(size/block.Size)*block.Size, buf); err != nil {
				b.Fatal(err)
			}
		}
	}
	const point = 16 << 10
	for !p.machine.FoldDue() || most && p.machine.Unfolded() < p.machine.MostUnfolded()-2*point {
		fill(point)
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
	if !kept {
		r, err := region.Open(options.RegionPath, false)
		if err != nil {
			b.Fatal(err)
		}
		for _, s := range r.Sections(region.SectionJournal) {
			err = errors.Join(err, r.RemoveSection(s))
		}
		if err = errors.Join(err, r.Close()); err != nil {
			b.Fatal(err)
		}
	}
	total, least := map[string]float64{}, math.Inf(1)
	busy := time.Duration(0)
	for b.Loop() {
		before := disk.Count().Busy
		p, err := Open(ctx, options)
		if err != nil {
			b.Fatal(err)
		}
		for _, s := range p.OpenSteps() {
			total[s.Name] += s.Took.Seconds() * 1e3
			if s.Name == "journal" {
				least = min(least, s.Took.Seconds()*1e3)
			}
		}
		b.StopTimer()
		busy += disk.Count().Busy - before
		if got := p.machine.KeptJournal().Recalled > 0; got != kept {
			b.Fatalf("the journal comes from memory: %v", got)
		}
		if err := p.Release(ctx); err != nil {
			b.Fatal(err)
		}
		runtime.GC() // a survivor has not opened this pool before
		b.StartTimer()
	}
	for name, ms := range total {
		b.ReportMetric(ms/float64(b.N), strings.ReplaceAll(name, " ", "-")+"-ms")
	}
	b.ReportMetric(float64(busy.Microseconds())/1e3/float64(b.N), "disk-ms") // which a disk would take beside
	b.ReportMetric(least*1e3/float64(entries), "least-journal-ms/1000")
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

// hollow is a device that has memory for its beginning only, where labels and
// journal are: what is written behind it is forgotten. Several pools may open it
// one after the other.
type hollow struct {
	hpdi.Device
	size, kept int64
}

func newHollow(size, kept int64) *hollow {
	dev, err := mem.New("mem", kept)
	if err != nil {
		panic(err)
	}
	return &hollow{dev, size, kept}
}

func (d *hollow) Info() hpdi.Info {
	info := d.Device.Info()
	info.Size = d.size
	return info
}

func (d *hollow) NewQueue(depth int) (hpdi.Queue, error) {
	q, err := d.Device.NewQueue(depth)
	return &hollowQueue{Queue: q, kept: d.kept}, err
}

func (*hollow) Close() error { return nil }

type hollowQueue struct {
	hpdi.Queue
	kept int64
	done []*hpdi.Request
}

func (q *hollowQueue) Submit(reqs ...*hpdi.Request) error {
	for _, r := range reqs {
		if r.Offset < q.kept {
			if err := q.Queue.Submit(r); err != nil {
				return err
			}
			continue
		}
		r.Err = nil
		q.done = append(q.done, r)
	}
	return nil
}

func (q *hollowQueue) Wait(least int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	n := len(q.done)
	done = append(done, q.done...)
	q.done = q.done[:0]
	return q.Queue.Wait(max(0, least-n), done)
}
