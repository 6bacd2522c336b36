package main

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/mem"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/devbench"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/flashmap"
	"github.com/pollux-storage/pollux/internal/flashmap/collect"
	"github.com/pollux-storage/pollux/internal/flashmap/policy"
)

// folded is a large device of which all parts are the same memory.
type folded struct {
	hpdi.Device
	size int64
}

func (d folded) Info() hpdi.Info {
	info := d.Device.Info()
	info.Size = d.size
	return info
}

func (d folded) NewQueue(depth int) (hpdi.Queue, error) {
	q, err := d.Device.NewQueue(depth)
	return foldedQueue{q, d.Device.Info().Size}, err
}

type foldedQueue struct {
	hpdi.Queue
	size int64
}

func (q foldedQueue) Submit(reqs ...*hpdi.Request) error {
	for _, r := range reqs {
		r.Offset %= q.size
	}
	return q.Queue.Submit(reqs...)
}

// observer gives a collector what a device is asked for. It asks for the time, as a pool has
// to, and uses that which the benchmark sets.
type observer struct {
	*collect.Recorder
	clock func() time.Time
}

func newObserver(r *collect.Recorder, now *time.Time) observer {
	return observer{r, func() time.Time {
		asked = time.Now()
		return *now
	}}
}

var asked time.Time

func (o observer) Record(op hpdi.Op, off, n int64) { o.RecordBy(op, off, n, o.clock) }

// costs is a device with what is over it.
type costs struct {
	set       *devices.Set
	size      int64
	now       time.Time
	collector *collect.Collector
	engine    *policy.Engine
	stats     []collect.Stat
}

// kind is how much of the layer there is.
type kind int

const (
	bare      kind = iota
	over           // with flash, and nobody told of requests
	collected      // all, and an engine for which nothing matches
)

// newCosts returns a device of so many data sets of 256 KiB.
func newCosts(t testing.TB, k kind, sets int64) *costs {
	t.Helper()
	must := func(err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
	const setBytes = 256 * kib
	c := &costs{size: sets * setBytes, now: epoch}
	memory, err := mem.New("disk", 64*mib)
	must(err)
	dev := hpdi.Device(folded{memory, c.size})
	p := policy.Defaults()
	q := policy.DefaultPattern()
	q.MinAccesses = 1e9
	p.Patterns = map[string]policy.Pattern{policy.AnyType: q}
	c.collector, err = collect.New(collect.Geometry{Size: c.size, SetBytes: setBytes}, p.Collect, epoch)
	must(err)
	c.engine, err = policy.New(p)
	must(err)
	if k != bare {
		flash, err := mem.New("flash", 256*mib)
		must(err)
		_, err = flashmap.Create(flash, flashmap.CreateOptions{SetBytes: setBytes, Reach: c.size})
		must(err)
		f, err := flashmap.Open(flash)
		must(err)
		o := flashmap.Primary{Number: 1, ID: block.DeviceID{1}}
		if k == collected {
			o.Observe = func() flashmap.Observer { return newObserver(c.collector.NewRecorder(), &c.now) }
		}
		dev, err = f.Over(dev, o)
		must(err)
	}
	c.set = devices.NewSet([]hpdi.Device{dev})
	return c
}

// step is what happens in each interval of the engine.
func (c *costs) step() int {
	s := c.collector.SnapshotAbove(c.engine.Least("disk"), c.now, c.stats)
	c.stats = s.Stats
	return len(c.engine.Step(policy.Input{
		Now: c.now, SetBytes: 256 * kib, Slots: 512,
		Devices: []policy.Device{{Number: 1, Type: "disk", Snapshot: s}},
	}))
}

// BenchmarkRequest is the processor time of a request of 4 KiB, at random places, as pools
// make them: to a device alone, through the layer, and with all of collection and policy at
// so many requests a second, of which nothing comes. The device is 1 TiB, of which everything
// or 16 GiB is used, and copies memory.
func BenchmarkRequest(b *testing.B) {
	run := func(name string, k kind, rate int, sets int64) {
		b.Run(name, func(b *testing.B) {
			c := newCosts(b, k, 1<<22)
			page := make([]byte, block.Size)
			io := &devices.IO{Vec: [][]byte{page}}
			ios := []*devices.IO{io}
			rnd := rand.New(rand.NewPCG(1, 1))
			blocks := make([]int64, 1<<20)
			for i := range blocks {
				blocks[i] = rnd.Int64N(sets * 64)
			}
			n, ticked, stepped := 0, 0, 0
			request := func() {
				io.Op = hpdi.OpRead
				if n%10 < 3 {
					io.Op = hpdi.OpWrite
				}
				io.At = block.At(0, uint64(blocks[n&(len(blocks)-1)]))
				if err := c.set.Do(ios); err != nil {
					b.Fatal(err)
				}
				n++
				if rate == 0 {
					return
				}
				c.now = c.now.Add(time.Second / time.Duration(rate))
				if n-ticked >= min(rate/4, 1500) {
					c.collector.Tick(c.now)
					ticked = n
				}
				if n-stepped >= rate*15 {
					if c.step() > 0 {
						b.Fatal("something is to be moved")
					}
					stepped = n
				}
			}
			if rate > 0 {
				for range min(rate*60, 1<<20) {
					request()
				}
				c.step()
			}
			b.ReportAllocs()
			b.ResetTimer()
			before := devbench.CPU()
			for range b.N {
				request()
			}
			b.ReportMetric(float64(devbench.CPU()-before)/float64(b.N), "cpu-ns/op")
			if rate > 0 {
				s := c.collector.Status()
				b.ReportMetric(float64(s.Lost)/float64(s.Counted), "lost/op")
				b.ReportMetric(float64(s.Sets), "sets")
			}
		})
	}
	run("bare", bare, 0, 1<<22)
	run("over", over, 0, 1<<22)
	for _, rate := range []int{1000, 10_000, 50_000} {
		for _, sets := range []int64{1 << 16, 1 << 22} {
			run(fmt.Sprintf("collected/%d-sets/%d-a-second", sets, rate), collected, rate, sets)
		}
	}
}
