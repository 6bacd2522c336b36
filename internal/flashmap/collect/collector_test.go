package collect

import (
	"fmt"
	"math"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"sync"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/config"
)

const (
	kib = 1 << 10
	mib = 1 << 20
	gib = 1 << 30
)

var start = time.Unix(1_800_000_000, 0)

// seed returns the seed of a random test and prints it.
func seed(t *testing.T) uint64 {
	t.Helper()
	s := rand.Uint64()
	if v := os.Getenv("POLLUX_SEED"); v != "" {
		var err error
		if s, err = strconv.ParseUint(v, 10, 64); err != nil {
			t.Fatalf("POLLUX_SEED: %v", err)
		}
	}
	t.Logf("seed %d (POLLUX_SEED=%d repeats this run)", s, s)
	return s
}

func random(t *testing.T) *rand.Rand { s := seed(t); return rand.New(rand.NewPCG(s, s)) }

func testParams(change func(*Params)) Params {
	p := Defaults()
	p.Decay, p.Memory, p.History, p.HistoryWindows = 0.5, mib, 64*kib, 8
	if change != nil {
		change(&p)
	}
	return p
}

func newCollector(t testing.TB, g Geometry, change func(*Params)) *Collector {
	t.Helper()
	c, err := New(g, testParams(change), start)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// sum adds up what a snapshot tells.
func sum(s Snapshot) (random, runs float64) {
	for i := range s.Stats {
		random += s.Stats[i].Accesses()
		runs += float64(s.Stats[i].Runs)
	}
	return random, runs
}

func near(t *testing.T, what string, got, want, part float64) {
	t.Helper()
	if math.Abs(got-want) > math.Abs(want)*part {
		t.Errorf("%s: %g, want %g", what, got, want)
	}
}

// A steady load is told as it is at every time: early, within a window and later.
func TestSteady(t *testing.T) {
	c := newCollector(t, Geometry{gib, 256 * kib}, nil)
	r := c.NewRecorder()
	now := start
	for i := range 6 * 60 {
		now = now.Add(10 * time.Second)
		r.Record(hpdi.OpRead, 5*256*kib+int64(i%7)*4*kib, 4*kib, now)
		r.Record(hpdi.OpWrite, 900*mib+int64(i%3)*64*kib, 8*kib, now)
		if i%2 == 1 {
			r.Record(hpdi.OpWrite, 5*256*kib+int64(i%5)*8*kib, 8*kib, now)
		}
		if i < 30 || i%10 > 0 {
			continue
		}
		s := c.Snapshot(now.Add(6*time.Second), nil)
		one, _ := s.Find(5)
		near(t, fmt.Sprintf("reads after %v", now.Sub(start)), float64(one.Reads), 60, 0.06)
		near(t, "writes", float64(one.Writes), 30, 0.06)
		near(t, "size", float64(one.Size), (60*4+30*8)*kib/90, 0.03)
		if one.Age > 10*time.Second || one.Random() != 1 {
			t.Errorf("at %v: %+v", now.Sub(start), one)
		}
		if _, ok := s.Find(6); ok || len(s.Stats) != 2 {
			t.Errorf("sets that nobody used: %+v", s.Stats)
		}
	}
	// What ends is forgotten by half with each window.
	before, _ := c.Snapshot(now, nil).Find(5)
	after, _ := c.Snapshot(now.Add(30*time.Minute), nil).Find(5)
	near(t, "reads half an hour later", float64(after.Reads), float64(before.Reads)/8, 0.1)
	if after.Age < 30*time.Minute {
		t.Errorf("the newest access was %v ago", after.Age)
	}
	// After years nothing is left, and nothing takes long.
	s := c.Snapshot(now.Add(20*365*24*time.Hour), nil)
	if all, _ := sum(s); all > 1e-6 {
		t.Errorf("%g accesses after years", all)
	}
}

// scan reads a whole device through several recorders, each request one of the next depth,
// the earlier ones sooner.
func scan(rnd *rand.Rand, c *Collector, rs []*Recorder, from time.Time, size, request int64, depth int, beside func(time.Time)) time.Time {
	var queue []int64
	for next := int64(0); next < size || len(queue) > 0; {
		for len(queue) < depth && next < size {
			queue = append(queue, next)
			next += request
		}
		k := rnd.IntN(1 + rnd.IntN(len(queue)))
		from = from.Add(2 * time.Millisecond)
		rs[rnd.IntN(len(rs))].Record(hpdi.OpRead, queue[k], request, from)
		queue = append(queue[:k], queue[k+1:]...)
		if beside != nil {
			beside(from)
		}
		if rnd.IntN(500) == 0 {
			c.Tick(from)
		}
	}
	return from
}

// Who reads everything once makes no set hot, however the requests arrive.
func TestScan(t *testing.T) {
	for _, tt := range []struct {
		request int64
		depth   int
		queues  int
		sample  int
		beside  int // random accesses for each of the scan
		part    float64
	}{
		{request: 4 * kib, depth: 1, queues: 1, sample: 1, part: 0.001},
		{request: 128 * kib, depth: 1, queues: 1, sample: 1, part: 0.001},
		{request: 64 * kib, depth: 16, queues: 4, sample: 1, part: 0.03},
		{request: 4 * kib, depth: 32, queues: 8, sample: 1, part: 0.03},
		{request: 16 * kib, depth: 1, queues: 2, sample: 4, part: 0.1},
		{request: 64 * kib, depth: 1, queues: 2, sample: 1, beside: 8, part: 0.02},
	} {
		t.Run(fmt.Sprintf("%d KiB, depth %d, %d queues, 1 in %d, %d beside", tt.request/kib, tt.depth, tt.queues, tt.sample, tt.beside), func(t *testing.T) {
			rnd := random(t)
			size := min(256*mib, 64*mib+1024*tt.request)
			c := newCollector(t, Geometry{512 * mib, 256 * kib}, func(p *Params) { p.Sample = tt.sample })
			rs := make([]*Recorder, tt.queues)
			for i := range rs {
				rs[i] = c.NewRecorder()
			}
			now := scan(rnd, c, rs, start, size, tt.request, tt.depth, func(now time.Time) {
				for range tt.beside {
					rs[rnd.IntN(len(rs))].Record(hpdi.OpWrite, 256*mib+rnd.Int64N(256*mib/4/kib)*4*kib, 4*kib, now)
				}
			})
			s := c.Snapshot(now.Add(10*time.Second), nil)
			var random, runs, others, taken float64
			for i := range s.Stats {
				if st := &s.Stats[i]; st.Set < Set(size/256/kib) {
					random += st.Accesses()
					runs += float64(st.Runs)
				} else {
					others += st.Accesses()
					taken += float64(st.Runs)
				}
			}
			if taken > 0.01*others {
				t.Errorf("of random accesses %.0f are runs, %.0f are not", taken, others)
			}
			if random > tt.part*(random+runs) || runs == 0 {
				t.Errorf("of a scan %.0f accesses count as random, %.0f as runs", random, runs)
			}
		})
	}
}

// Random accesses, however dense, are no runs, and a reader that reads short pieces in
// sequence is none.
func TestNoRuns(t *testing.T) {
	rnd := random(t)
	c := newCollector(t, Geometry{gib, 64 * kib}, func(p *Params) { p.Window = time.Hour; p.Memory = 4 * mib })
	r := c.NewRecorder()
	now := start
	const n = 20_000
	for i := range n {
		now = now.Add(time.Millisecond)
		r.Record(hpdi.OpRead, rnd.Int64N(32*mib/4/kib)*4*kib, 4*kib, now)
		if i%1000 == 0 {
			c.Tick(now)
		}
	}
	random, runs := sum(c.Snapshot(now.Add(time.Minute), nil))
	if runs > 0.001*random {
		t.Errorf("of random accesses %.0f are runs, %.0f are not", runs, random)
	}
	// 512 KiB in sequence, somewhere else each time.
	c = newCollector(t, Geometry{16 * gib, 64 * kib}, func(p *Params) { p.Memory = 4 * mib })
	r = c.NewRecorder()
	for range 200 {
		at := rnd.Int64N(4000) * 4 * mib
		for i := range int64(8) {
			r.Record(hpdi.OpRead, at+i*64*kib, 64*kib, now)
		}
		now = now.Add(time.Millisecond)
		c.Tick(now)
	}
	random, runs = sum(c.Snapshot(now.Add(time.Minute), nil))
	if runs > 0.02*random {
		t.Errorf("of short sequences %.0f are runs, %.0f are not", runs, random)
	}
}

// Where a scan ends, accesses are not taken for part of it for ever.
func TestEndOfScan(t *testing.T) {
	rnd := random(t)
	c := newCollector(t, Geometry{gib, 256 * kib}, nil)
	r := c.NewRecorder()
	now := start
	for i := range int64(64) {
		now = now.Add(10 * time.Millisecond)
		r.Record(hpdi.OpRead, i*128*kib, 128*kib, now)
	}
	c.Tick(now)
	for range 600 {
		now = now.Add(100 * time.Millisecond)
		r.Record(hpdi.OpRead, 31*256*kib+rnd.Int64N(64)*4*kib, 4*kib, now)
		c.Tick(now)
	}
	s := c.Snapshot(now.Add(10*time.Second), nil)
	if hot, _ := s.Find(31); hot.Runs > 0.2*float32(hot.Accesses()) {
		t.Errorf("%+v", hot)
	}
}

// With sampling, one access counts for all that were not taken.
func TestSampling(t *testing.T) {
	rnd := random(t)
	c := newCollector(t, Geometry{gib, 256 * kib}, func(p *Params) { p.Sample = 8 })
	r := c.NewRecorder()
	now := start
	const n = 50_000
	for i := range n {
		now = now.Add(time.Millisecond)
		r.Record(hpdi.OpRead, rnd.Int64N(gib/4/kib)*4*kib, 4*kib, now)
		if i%1000 == 0 {
			c.Tick(now)
		}
	}
	c.Tick(now)
	near(t, "accesses", float64(c.Status().Counted), n, 0.05)
}

// Of very many accesses only some are taken, which count for all, and all of fewer again.
func TestThinned(t *testing.T) {
	rnd := random(t)
	c := newCollector(t, Geometry{32 * gib, 256 * kib}, func(p *Params) { p.Memory = 8 * mib })
	var rs [8]*Recorder
	for i := range rs {
		rs[i] = c.NewRecorder()
	}
	now := start
	true_ := map[Set]float64{}
	const rate, hot = 20 * enough, 20
	use := func(n, rate int) {
		for i := range n {
			set := Set(rnd.IntN(60_000))
			if rnd.IntN(2) == 0 {
				set = Set(hot*rnd.IntN(hot) + 1_000*rnd.IntN(2))
			}
			true_[set]++
			now = now.Add(time.Second / time.Duration(rate))
			rs[rnd.IntN(len(rs))].Record(hpdi.OpRead, int64(set)*256*kib+rnd.Int64N(64)*4*kib, 4*kib, now)
			if i%5000 == 0 {
				c.Tick(now)
			}
		}
	}
	use(8*rate, rate)
	c.Tick(now)
	st := c.Status()
	near(t, "accesses", float64(st.Counted), 8*rate, 0.03)
	if st.Sample < 16 || st.Sample > 28 || st.Lost != 0 {
		t.Errorf("at %d accesses a second %+v", rate, st)
	}
	f := float64(now.Sub(start)) / float64(c.Params().Window)
	s := c.Snapshot(now, nil)
	all, runs := sum(s)
	near(t, "in a window", all*f, 8*rate, 0.04)
	if runs > 0.03*all {
		t.Errorf("of random accesses %.0f are runs, %.0f are not", runs, all)
	}
	for i := range hot {
		one, _ := s.Find(Set(hot * i))
		near(t, fmt.Sprintf("hot set %d", hot*i), one.Accesses()*f, true_[Set(hot*i)], 0.3)
	}
	// What is read in sequence as fast is still found to be.
	at := int64(0)
	for range 4 {
		for range rate / 2 {
			now = now.Add(2 * time.Second / rate)
			rs[rnd.IntN(len(rs))].Record(hpdi.OpRead, 16*gib+at, 4*kib, now)
			at = (at + 4*kib) % (2 * gib)
			if at%(1000*4*kib) == 0 {
				c.Tick(now)
			}
		}
	}
	random, runs := 0.0, 0.0
	s = c.Snapshot(now.Add(10*time.Second), s.Stats)
	for i := range s.Stats {
		if one := &s.Stats[i]; one.Set >= 16*gib/(256*kib) {
			random, runs = random+one.Accesses(), runs+float64(one.Runs)
		}
	}
	if random > 0.02*runs {
		t.Errorf("of a fast scan %.0f accesses count as random, %.0f as runs", random, runs)
	}
	use(5*enough/4, enough/4)
	if st := c.Status(); st.Sample != 1 {
		t.Errorf("at %d accesses a second one in %d is taken", enough/4, st.Sample)
	}
	if err := c.Use(testParams(func(p *Params) { p.Sample = 3 }), now); err != nil {
		t.Fatal(err)
	}
	use(5*enough/4, enough/4)
	if st := c.Status(); st.Sample != 3 {
		t.Errorf("one in %d is taken, one in 3 is wanted", st.Sample)
	}
}

// A snapshot of what is used more is the part of the whole.
func TestSnapshotAbove(t *testing.T) {
	c, now := filled(t, 300)
	whole := c.Snapshot(now, nil)
	for _, least := range []float64{0, 5, 10, 1e9} {
		want := slices.DeleteFunc(slices.Clone(whole.Stats), func(s Stat) bool { return s.Accesses() < least })
		got := c.SnapshotAbove(least, now, nil)
		if !slices.Equal(got.Stats, want) || got.Windows != whole.Windows || least == 5 && (len(want) == 0 || len(want) == len(whole.Stats)) {
			t.Errorf("above %v: %d sets of %d, want %d", least, len(got.Stats), len(whole.Stats), len(want))
		}
	}
}

// Where nobody ticks, a recorder thins out what it takes and then loses it, and says so.
func TestFullRing(t *testing.T) {
	c := newCollector(t, Geometry{gib, 256 * kib}, nil)
	r := c.NewRecorder()
	const n = 50_000
	for i := range int64(n) {
		r.Record(hpdi.OpRead, i%4096*256*kib, 4*kib, start)
	}
	c.Tick(start)
	s := c.Status()
	near(t, "accesses", float64(s.Counted+s.Lost), n, 0.02)
	if s.Lost == 0 || s.Counted < ringSize {
		t.Errorf("%+v", s)
	}
	// It takes all again.
	before := s.Counted
	for i := range int64(1000) {
		r.Record(hpdi.OpRead, i%4096*256*kib, 4*kib, start)
	}
	r.Close()
	c.Tick(start)
	if got := c.Status(); got.Counted-before != 1000 || got.Lost != s.Lost || got.Bytes >= s.Bytes {
		t.Errorf("after the recorder's end %+v, before %+v", got, s)
	}
}

// The clock is asked for accesses that are taken alone.
func TestRecordBy(t *testing.T) {
	c := newCollector(t, Geometry{gib, 256 * kib}, func(p *Params) { p.Sample = 8 })
	r := c.NewRecorder()
	asked := 0
	clock := func() time.Time { asked++; return start.Add(time.Duration(asked) * time.Millisecond) }
	const n = 8000
	for i := range int64(n) {
		r.RecordBy(hpdi.OpRead, i%4096*256*kib, 4*kib, clock)
	}
	r.RecordBy(hpdi.OpFlush, 0, 0, clock)
	c.Tick(clock())
	if s := c.Status(); s.Counted != uint64(8*(asked-1)) || asked < n/10 || asked > n/6 {
		t.Errorf("asked %d times for %d accesses: %+v", asked, n, s)
	}
}

// What is not to be counted is not.
func TestIgnored(t *testing.T) {
	c := newCollector(t, Geometry{gib, 256 * kib}, func(p *Params) { p.Operations = "writes" })
	r := c.NewRecorder()
	for _, e := range []struct {
		op       hpdi.Op
		off, len int64
	}{
		{hpdi.OpRead, 0, 4096}, {hpdi.OpFlush, 0, 0}, {hpdi.OpDiscard, 0, 4096}, {hpdi.OpWriteZeroes, 0, 4096},
		{hpdi.OpWrite, -4096, 4096}, {hpdi.OpWrite, gib, 4096}, {hpdi.OpWrite, 0, 0}, {hpdi.OpWrite, 4096, gib},
		{hpdi.OpWrite, 1 << 62, 1 << 62},
	} {
		r.Record(e.op, e.off, e.len, start)
	}
	r.Record(hpdi.OpWrite, gib-4096, 4096, start)
	c.Tick(start)
	if s := c.Status(); s.Counted != 1 || s.Classes[0].Writes != 1 || s.Classes[0].Reads != 0 {
		t.Errorf("%+v", s)
	}
}

// Recorders of several goroutines and ticks beside them lose and invent nothing.
func TestConcurrent(t *testing.T) {
	c := newCollector(t, Geometry{gib, 256 * kib}, nil)
	const workers, each = 4, 1500 // less than half a ring
	var wg sync.WaitGroup
	for w := range workers {
		wg.Go(func() {
			for range 3 {
				r := c.NewRecorder()
				for i := range int64(each) {
					r.Record(hpdi.OpRead, (i*37+int64(w))%4096*256*kib, 4*kib, start.Add(time.Duration(i)*time.Microsecond))
				}
				r.Close()
			}
		})
	}
	done := make(chan struct{})
	go func() { wg.Wait(); close(done) }()
	for ticking := true; ticking; {
		select {
		case <-done:
			ticking = false
		default:
		}
		c.Tick(start.Add(time.Second))
		c.Status()
	}
	s := c.Snapshot(start.Add(time.Minute), nil)
	if st := c.Status(); st.Counted != workers*each*3 || st.Lost != 0 {
		t.Errorf("%+v", st)
	}
	random, runs := sum(s)
	// A minute is a tenth of a window.
	near(t, "accesses", (random+runs)/10, workers*each*3, 0.01)
}

func TestNoAllocation(t *testing.T) {
	c := newCollector(t, Geometry{gib, 256 * kib}, func(p *Params) { p.Sample = 2 })
	r := c.NewRecorder()
	if n := testing.AllocsPerRun(1000, func() { r.Record(hpdi.OpRead, 123*4*kib, 4*kib, start) }); n != 0 {
		t.Errorf("%v allocations an access", n)
	}
}

// On a device of a pebibyte the hottest sets are known, in the memory that was given, and
// none is told to be hotter than it is.
func TestBounded(t *testing.T) {
	rnd := random(t)
	const hot, memory = 64, 256 * kib
	c := newCollector(t, Geometry{1 << 50, 64 * kib}, func(p *Params) { p.Memory = memory; p.Window = 24 * time.Hour })
	r := c.NewRecorder()
	now := start
	true_ := map[Set]int{}
	const n = 30_000
	for i := range n {
		set := Set(rnd.Uint64N(1 << 34))
		if rnd.IntN(5) == 0 {
			set = Set(rnd.IntN(hot)) * 1_000_003
		}
		true_[set]++
		now = now.Add(time.Millisecond)
		r.Record(hpdi.OpRead, int64(set)*64*kib+rnd.Int64N(16)*4*kib, 4*kib, now)
		if i%1500 == 0 {
			c.Tick(now)
		}
	}
	now = now.Add(time.Minute)
	f := float64(now.Sub(start)) / float64(24*time.Hour)
	s := c.Snapshot(now, nil)
	st := c.Status()
	if st.Bytes-c.history.bytes()-recorderBytes > memory || st.Sets > st.Most || st.Evicted < n/2 {
		t.Errorf("%+v", st)
	}
	for i := range s.Stats {
		if got, want := s.Stats[i].Accesses()*f, float64(true_[s.Stats[i].Set]); got > want*1.01+0.01 {
			t.Errorf("set %d: %g accesses are told, there were %g", s.Stats[i].Set, got, want)
		}
	}
	for i := range hot {
		set := Set(i) * 1_000_003
		one, _ := s.Find(set)
		near(t, fmt.Sprintf("hot set %d", set), one.Accesses()*f, float64(true_[set]), 0.1)
	}
}

// Parameters can be changed at any time, and what was counted stays as far as it can.
func TestUse(t *testing.T) {
	c := newCollector(t, Geometry{gib, 256 * kib}, nil)
	r := c.NewRecorder()
	now := start
	steady := func(d time.Duration) {
		for end := now.Add(d); now.Before(end); {
			now = now.Add(time.Second)
			r.Record(hpdi.OpRead, now.Unix()%100*256*kib+now.Unix()%7*8*kib, 4*kib, now)
			if now.Unix()%1000 == 0 {
				c.Tick(now)
			}
		}
		now = now.Add(time.Nanosecond)
	}
	all := func() float64 { n, _ := sum(c.Snapshot(now, nil)); return n }
	steady(25 * time.Minute)
	near(t, "at first", all(), 600, 0.03)
	for _, window := range []time.Duration{time.Hour, 5 * time.Minute} {
		if err := c.Use(testParams(func(p *Params) { p.Window = window; p.Decay = 0.3 }), now); err != nil {
			t.Fatal(err)
		}
		near(t, "with another window", all(), window.Seconds(), 0.05)
		steady(20 * time.Minute)
		near(t, "after a while", all(), window.Seconds(), 0.05)
	}
	if len(c.History()) != 4 {
		t.Errorf("%d windows are kept", len(c.History()))
	}
	classes := func(p *Params) { p.Window = 5 * time.Minute; p.Decay = 0.3; p.Classes = []config.Size{mib} }
	if err := c.Use(testParams(classes), now); err != nil || len(c.Status().Classes) != 2 || c.Status().Classes[0].Reads != 0 {
		t.Errorf("other classes: %v, %+v", err, c.Status())
	}
	near(t, "with other classes", all(), 300, 0.05)

	// A new set is hotter than all others when most are forgotten.
	for range 500 {
		r.Record(hpdi.OpWrite, 777*mib, 4*kib, now)
	}
	small := func(p *Params) { classes(p); p.Memory = minMemory; p.Sample = 2; p.HistoryWindows = 0 }
	for range 2000 {
		// More sets than there will be room for.
		r.Record(hpdi.OpRead, int64(c.made+uint64(now.UnixNano()))%gib/4096*4096, 4*kib, now)
		now = now.Add(time.Millisecond * 1027)
		c.Tick(now)
	}
	if err := c.Use(testParams(small), now); err != nil {
		t.Fatal(err)
	}
	st := c.Status()
	if hot, ok := c.Snapshot(now, nil).Find(777 * mib / (256 * kib)); !ok || hot.Writes == 0 || st.Sets != st.Most || st.Evicted == 0 {
		t.Errorf("with less memory: %+v, %+v", st, hot)
	}
	if len(c.History()) != 0 || c.Params().Sample != 2 {
		t.Errorf("history %d, params %+v", len(c.History()), c.Params())
	}
	if err := c.Use(testParams(func(p *Params) { p.Sample = 0 }), now); err == nil || c.Params().Sample != 2 {
		t.Errorf("wrong parameters count: %v", err)
	}
}

// A clock that jumps neither loses the windows for long nor stops them.
func TestClock(t *testing.T) {
	c := newCollector(t, Geometry{gib, 256 * kib}, nil)
	r := c.NewRecorder()
	now := start.Add(time.Hour)
	for _, jump := range []time.Duration{0, -48 * time.Hour, 24 * 365 * time.Hour} {
		now = now.Add(jump)
		for range 1800 {
			now = now.Add(time.Second)
			r.Record(hpdi.OpRead, now.Unix()%10*mib, 4*kib, now)
			if now.Unix()%100 == 0 {
				c.Tick(now)
			}
		}
		n, _ := sum(c.Snapshot(now, nil))
		near(t, fmt.Sprintf("half an hour after a jump of %v", jump), n, 600, 0.15)
	}
}

func TestHistory(t *testing.T) {
	c := newCollector(t, Geometry{gib, 256 * kib}, func(p *Params) { p.HistoryWindows = 3; p.History = config.Size(3 * (windowBytes + 4*usedBytes)) })
	r := c.NewRecorder()
	now := start
	for w := range 5 {
		for set := range int64(8) {
			for i := range set + 1 {
				r.Record(hpdi.OpWrite, set*8*mib+i*16*kib, int64(w+1)*4*kib, now)
			}
		}
		for i := range int64(16) {
			r.Record(hpdi.OpRead, 512*mib+i*128*kib, 128*kib, now)
		}
		now = now.Add(10 * time.Minute)
		c.Tick(now.Add(-time.Minute))
	}
	c.Tick(now)
	ws := c.History()
	if len(ws) != 3 || !ws[0].Start.Equal(start.Add(20*time.Minute)) || c.history.bytes() > 3*(windowBytes+4*usedBytes)+windowBytes {
		t.Fatalf("%d windows, %d bytes: %+v", len(ws), c.history.bytes(), ws)
	}
	for i, w := range ws {
		if w.Reads != 0 || w.Writes != 36 || w.Runs != 16 || len(w.Sets) != 4 {
			t.Errorf("window %d: %+v", i, w)
		}
		for k, u := range w.Sets {
			set := Set(4+k) * 32
			if u.Set != set || u.Writes != float32(5+k) || u.Random() != 1 || u.Size != float32(i+3)*4*kib {
				t.Errorf("window %d, set %d: %+v", i, set, u)
			}
		}
	}
}

func TestRefused(t *testing.T) {
	for name, change := range map[string]func(*Params){
		"operations": func(p *Params) { p.Operations = "some" }, "sample": func(p *Params) { p.Sample = 0 },
		"window": func(p *Params) { p.Window = 0 }, "decay": func(p *Params) { p.Decay = math.NaN() },
		"classes": func(p *Params) { p.Classes = []config.Size{8, 8} }, "run": func(p *Params) { p.Run = 0 },
		"pause": func(p *Params) { p.Pause = time.Hour }, "memory": func(p *Params) { p.Memory = 0 },
		"history": func(p *Params) { p.History = -1 }, "history_windows": func(p *Params) { p.HistoryWindows = -1 },
	} {
		p := Defaults()
		change(&p)
		err := p.Validate()
		if err == nil || err.Error()[:len(name)+1] != name+":" {
			t.Errorf("%s: %v", name, err)
		}
		if _, err := New(Geometry{gib, 64 * kib}, p, start); err == nil {
			t.Errorf("%s: a collector was made", name)
		}
	}
	p := Defaults()
	p.Classes = make([]config.Size, 9)
	if p.Validate() == nil {
		t.Error("nine classes")
	}
	p.Classes = []config.Size{0}
	if p.Validate() == nil {
		t.Error("a class of nothing")
	}
	for _, g := range []Geometry{{}, {gib, 32 * kib}, {gib, 2 * mib}, {gib, 96 * kib}, {0, 64 * kib}} {
		if _, err := New(g, Defaults(), start); err == nil {
			t.Errorf("a collector of %+v", g)
		}
	}
	if p := Defaults(); p.Validate() != nil {
		t.Error(p.Validate())
	}
}
