package devbench

import (
	"context"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/mem"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

func memory(t *testing.T) hpdi.Device {
	t.Helper()
	d, err := mem.New("disk", 4<<20)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := d.Close(); err != nil {
			t.Error(err)
		}
	})
	return d
}

// Each mode does what it says, as often as it was asked to, and proves what it wrote.
func TestModes(t *testing.T) {
	for _, mode := range Modes {
		d := blocktest.NewFault(memory(t), 1)
		o := Options{Mode: mode, Size: 8192, Depth: 4, Queues: 3, Requests: 1000, Seed: 5, Verify: mode.Writes(), Durable: mode == Write}
		r, err := Run(t.Context(), d, o)
		if err != nil {
			t.Fatalf("%s: %v", mode, err)
		}
		if r.Requests != 1000 || r.Reads+r.Writes != 1000 || r.Bytes != 8192*1000 || r.P50 <= 0 || r.P50 > r.P99 || r.P99 > r.P999 || r.P999 > r.Max || r.Mean > r.Max || r.Elapsed <= 0 {
			t.Errorf("%s: %+v", mode, r)
		}
		if mixed := r.Reads > 300 && r.Writes > 300; mixed != (mode == RandRW) || !mixed && r.Writes > 0 != mode.Writes() {
			t.Errorf("%s: %d reads, %d writes", mode, r.Reads, r.Writes)
		}
		// A thousand writes reach most of the 512 blocks, in sequence all of each part.
		if least := map[Mode]int64{Write: 510 * 8192, RandWrite: 350 * 8192, RandRW: 250 * 8192}[mode]; r.Verified < least || !mode.Writes() && r.Verified > 0 {
			t.Errorf("%s: %d bytes were verified", mode, r.Verified)
		}
	}
}

// bound is a device whose queues belong to the threads that use them first.
type bound struct{ hpdi.Device }

func (d bound) Info() hpdi.Info {
	i := d.Device.Info()
	i.Thread = true
	return i
}

func (d bound) NewQueue(depth int) (hpdi.Queue, error) {
	q, err := d.Device.NewQueue(depth)
	return &boundQueue{Queue: q}, err
}

type boundQueue struct {
	hpdi.Queue
	thread int
}

func (q *boundQueue) Submit(reqs ...*hpdi.Request) error {
	if q.thread == 0 {
		q.thread = unix.Gettid()
	}
	if q.thread != unix.Gettid() {
		return errors.New("submitted on another thread")
	}
	return q.Queue.Submit(reqs...)
}

// A queue that belongs to a thread is used on that one alone, from the first request to
// the proof.
func TestThreads(t *testing.T) {
	o := Options{Mode: RandWrite, Size: 4096, Depth: 2, Queues: 3, Requests: 300, Verify: true}
	if r, err := Run(t.Context(), bound{memory(t)}, o); err != nil || r.Requests != 300 || r.Verified == 0 {
		t.Errorf("%+v, %v", r, err)
	}
}

// A measurement ends when its time is over, or its context.
func TestTime(t *testing.T) {
	began := time.Now()
	r, err := Run(t.Context(), memory(t), Options{Mode: RandRead, Size: 4096, Depth: 1, Queues: 1, Time: 20 * time.Millisecond})
	if err != nil || r.Elapsed < 20*time.Millisecond || r.Requests == 0 || time.Since(began) > 20*time.Second {
		t.Errorf("%+v, %v", r, err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if r, err = Run(ctx, memory(t), Options{Mode: RandRead, Size: 4096, Depth: 1, Queues: 1, Time: time.Hour}); err != nil || r.Requests == 0 {
		t.Errorf("%+v, %v", r, err)
	}
	if _, err = Run(ctx, memory(t), Options{Mode: RandRead, Size: 4096, Depth: 1, Queues: 1, Requests: 1 << 60}); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("not all of what was asked for: %v", err)
	}
}

// A device that loses, misplaces or spoils what is written is found out.
func TestVerify(t *testing.T) {
	for name, rule := range map[string]blocktest.Rule{
		"a write is lost":      {Op: hpdi.OpWrite, Skip: 500, Count: 1, Lose: true},
		"a write is misplaced": {Op: hpdi.OpWrite, Skip: 500, Count: 1, Misdirect: 4096},
	} {
		d := blocktest.NewFault(memory(t), 1)
		d.Add(rule)
		_, err := Run(t.Context(), d, Options{Mode: Write, Size: 4096, Depth: 1, Queues: 1, Requests: 1000, Verify: true})
		if !errors.Is(err, ErrWrong) || !strings.HasPrefix(err.Error(), "disk: ") || !strings.Contains(err.Error(), "where write 1 was the last") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A request that fails ends the measurement, with its place.
func TestErrors(t *testing.T) {
	d := blocktest.NewFault(memory(t), 1)
	d.Add(blocktest.Rule{Op: hpdi.OpRead, Offset: 1 << 20, Length: 1, Err: hpdi.ErrIO})
	r, err := Run(t.Context(), d, Options{Mode: Read, Size: 65536, Depth: 2, Queues: 2, Time: time.Minute})
	if !errors.Is(err, hpdi.ErrIO) || !strings.Contains(err.Error(), "disk: read of 65536 bytes at 1048576") || r.Elapsed > 50*time.Second {
		t.Errorf("%v", err)
	}
}

// queues is a device whose queues fail when they are made or closed.
type queues struct {
	hpdi.Device
	made, closed error
	mem          []byte
}

type closing struct {
	hpdi.Queue
	err error
}

func (q closing) Close() error { return errors.Join(q.Queue.Close(), q.err) }

func (d *queues) Register(mem []byte) error {
	d.mem = mem
	return d.Device.Register(mem)
}

func (d *queues) NewQueue(depth int) (hpdi.Queue, error) {
	if d.made != nil {
		return nil, d.made
	}
	q, err := d.Device.NewQueue(depth)
	return closing{q, d.closed}, err
}

// Only what is wrong with the options is said to be that, and memory that a queue still has
// is not freed.
func TestQueuesFail(t *testing.T) {
	broken := errors.New("the peer is gone")
	o := Options{Mode: Read, Size: 4096, Depth: 1, Queues: 2, Requests: 10}
	var wrong *OptionsError
	d := &queues{Device: memory(t), made: broken}
	if _, err := Run(t.Context(), d, o); !errors.Is(err, broken) || errors.As(err, &wrong) {
		t.Errorf("no queue: %v", err)
	}
	if hpdi.Free(d.mem) == nil {
		t.Error("memory that nobody has was left")
	}
	d = &queues{Device: memory(t), closed: broken}
	if _, err := Run(t.Context(), d, o); !errors.Is(err, broken) || errors.As(err, &wrong) {
		t.Errorf("closed: %v", err)
	}
	if err := hpdi.Free(d.mem); err != nil {
		t.Errorf("memory that a queue has was freed: %v", err)
	}
	o.Depth = 0
	if _, err := Run(t.Context(), d, o); !errors.As(err, &wrong) {
		t.Errorf("options: %v", err)
	}
}

func TestRefused(t *testing.T) {
	good := Options{Mode: RandWrite, Size: 4096, Depth: 4, Queues: 2, Requests: 1}
	info := memory(t).Info()
	for want, change := range map[string]func(*Options, *hpdi.Info){
		`mode "walk"`:             func(o *Options, _ *hpdi.Info) { o.Mode = "walk" },
		"requests of 512 bytes":   func(o *Options, _ *hpdi.Info) { o.Size = 512 },
		"depth 0":                 func(o *Options, _ *hpdi.Info) { o.Depth = 0 },
		"257 queues":              func(o *Options, _ *hpdi.Info) { o.Queues = 257 },
		"neither a time":          func(o *Options, _ *hpdi.Info) { o.Requests = 0 },
		"range of 8388608 bytes":  func(o *Options, _ *hpdi.Info) { o.Range = 8 << 20 },
		"need 32768":              func(o *Options, _ *hpdi.Info) { o.Range = 16384 },
		"bytes of memory":         func(o *Options, i *hpdi.Info) { i.Size = 1 << 50; o.Range, o.Verify = 1<<50, true },
		"open for reading only":   func(_ *Options, i *hpdi.Info) { i.ReadOnly = true },
		"durable writes":          func(o *Options, i *hpdi.Info) { i.Durable, o.Durable = false, true },
		"randread writes nothing": func(o *Options, _ *hpdi.Info) { o.Mode, o.Verify = RandRead, true },
	} {
		o, i := good, info
		change(&o, &i)
		if err := o.validate(i); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %s", o, err, want)
		}
	}
	if err := good.validate(info); err != nil {
		t.Error(err)
	}
}

// A rank of the histogram is never less than the true one, and at most 1/32 more.
func TestHistogram(t *testing.T) {
	var h, other histogram
	var all []time.Duration
	for i := range 10000 {
		d := time.Duration(i) * time.Duration(i) * 37
		all = append(all, d)
		if i%2 == 0 {
			h.add(d)
		} else {
			other.add(d)
		}
	}
	h.merge(&other)
	slices.Sort(all)
	for _, p := range []float64{0.0001, .01, .5, .9, .99, .999, 1} {
		want := all[max(0, int(p*10000+.5)-1)]
		if got := h.rank(p); got < want || float64(got) > float64(want)*(1+1./32)+1 {
			t.Errorf("rank %v is %v, want %v", p, got, want)
		}
	}
	if h.most != all[9999] || h.n != 10000 {
		t.Errorf("%v of %d", h.most, h.n)
	}
	for _, v := range []uint64{0, 1, 31, 32, 33, 63, 64, 1 << 40, 1<<63 - 1} {
		if i := step(v); top(i) < v || i > 0 && top(i-1) >= v {
			t.Errorf("%d is in step %d, up to %d", v, i, top(i))
		}
	}
	if (&histogram{}).rank(.5) != 0 {
		t.Error("a rank of nothing")
	}
}

// A request costs no allocation.
func TestAllocations(t *testing.T) {
	w := newWorker(Options{Mode: RandRW, Size: 4096, Depth: 4, Queues: 1, Requests: 1 << 40, Verify: true}, 0, 1024, make([]byte, 4*4096))
	q, err := memory(t).NewQueue(4)
	if err != nil {
		t.Fatal(err)
	}
	w.q = q
	var failed error
	if n := testing.AllocsPerRun(1000, func() {
		p := w.free[len(w.free)-1]
		w.free = w.free[:len(w.free)-1]
		w.prepare(p, time.Now())
		w.batch = append(w.batch[:0], &p.Request)
		if err := q.Submit(w.batch...); err != nil {
			t.Fatal(err)
		}
		if err := w.collect(&failed); err != nil || failed != nil {
			t.Fatal(err, failed)
		}
	}); n != 0 {
		t.Errorf("%v allocations", n)
	}
	if err := q.Close(); err != nil {
		t.Error(err)
	}
}
