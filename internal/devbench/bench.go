package devbench

import (
	"context"
	"errors"
	"fmt"
	"runtime"
	"slices"
	"sync"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
)

// Mode says what is measured.
type Mode string

// The modes, named as fio does.
const (
	Read      Mode = "read"      // in sequence
	Write     Mode = "write"     // in sequence
	RandRead  Mode = "randread"  // blocks anywhere
	RandWrite Mode = "randwrite" // blocks anywhere
	RandRW    Mode = "randrw"    // reads and writes in turn by chance, half of each
)

// Modes lists them.
var Modes = []Mode{Read, Write, RandRead, RandWrite, RandRW}

// Writes reports whether the mode changes the device.
func (m Mode) Writes() bool { return m == Write || m == RandWrite || m == RandRW }

// Options are what is measured, and for how long.
type Options struct {
	Mode     Mode
	Size     int           // bytes of a request
	Depth    int           // requests in flight of a queue
	Queues   int           // queues
	Time     time.Duration // when the last requests begin
	Requests int64         // or after so many; 0: no bound
	Range    int64         // bytes of the device from its beginning; 0: all
	Seed     uint64
	Durable  bool // writes are durable when they complete
	Verify   bool // prove at the end what was written
}

// Result is what was measured. The durations are in nanoseconds in JSON.
type Result struct {
	Requests int64         `json:"requests"`
	Reads    int64         `json:"reads"`
	Writes   int64         `json:"writes"`
	Bytes    int64         `json:"bytes"`
	Verified int64         `json:"verified"` // bytes
	Elapsed  time.Duration `json:"elapsed_ns"`
	CPU      time.Duration `json:"cpu_ns"` // user and system time of the whole process
	Mean     time.Duration `json:"mean_ns"`
	P50      time.Duration `json:"p50_ns"`
	P99      time.Duration `json:"p99_ns"`
	P999     time.Duration `json:"p99_9_ns"`
	Max      time.Duration `json:"max_ns"`
}

// The bounds of options.
const (
	MaxSize   = 64 << 20
	MaxDepth  = 4096
	MaxQueues = 256
	// maxMemory is for the requests' data and for what was written where.
	maxMemory = 4 << 30
)

// ErrWrong is what a verification ends with that finds other data than was written.
var ErrWrong = errors.New("the device returns other data than was written")

// OptionsError says what is wrong with the options of a measurement, which did not begin.
type OptionsError struct{ Err error }

func (e *OptionsError) Error() string { return e.Err.Error() }

// Unwrap returns what is wrong.
func (e *OptionsError) Unwrap() error { return e.Err }

// validate says what is wrong, and fills in what follows from the device.
func (o *Options) validate(info hpdi.Info) error {
	if o.Range == 0 {
		o.Range = info.Size
	}
	parts := int64(o.Queues) * int64(o.Size)
	switch {
	case !slices.Contains(Modes, o.Mode):
		return fmt.Errorf("mode %q: must be one of %v", o.Mode, Modes)
	case o.Size < info.BlockSize || o.Size > MaxSize || o.Size%info.BlockSize != 0:
		return fmt.Errorf("requests of %d bytes: %s takes multiples of %d, up to %d here", o.Size, info.Name, info.BlockSize, MaxSize)
	case o.Depth < 1 || o.Depth > MaxDepth:
		return fmt.Errorf("depth %d: must be from 1 to %d", o.Depth, MaxDepth)
	case o.Queues < 1 || o.Queues > MaxQueues:
		return fmt.Errorf("%d queues: must be from 1 to %d", o.Queues, MaxQueues)
	case o.Time <= 0 && o.Requests <= 0:
		return errors.New("neither a time nor a number of requests bounds the measurement")
	case o.Range < 0 || o.Range > info.Size:
		return fmt.Errorf("range of %d bytes: %s has %d", o.Range, info.Name, info.Size)
	case o.Range/parts < int64(o.Depth):
		return fmt.Errorf("range of %d bytes: %d requests of %d bytes in flight on each of %d queues need %d", o.Range, o.Depth, o.Size, o.Queues, parts*int64(o.Depth))
	case parts*int64(o.Depth) > maxMemory || o.Verify && o.Range/int64(o.Size)*4 > maxMemory:
		return fmt.Errorf("that takes more than %d bytes of memory: use a smaller depth or range", maxMemory)
	case o.Mode.Writes() && info.ReadOnly:
		return fmt.Errorf("%s: %w", info.Name, hpdi.ErrReadOnly)
	case o.Durable && (!info.Durable || !o.Mode.Writes()):
		return fmt.Errorf("durable writes: %w", hpdi.ErrUnsupported)
	case o.Verify && !o.Mode.Writes():
		return fmt.Errorf("mode %s writes nothing that could be verified", o.Mode)
	}
	return nil
}

// Run measures a device. Requests that fail end it with their error, and options that cannot
// be with an *OptionsError. Nothing is in flight when it returns, unless a queue cannot be
// closed: then the memory of its requests stays.
func Run(ctx context.Context, dev hpdi.Device, o Options) (Result, error) {
	info := dev.Info()
	if err := o.validate(info); err != nil {
		return Result{}, &OptionsError{err}
	}
	mem, err := hpdi.Alloc(o.Queues * o.Depth * o.Size)
	if err != nil {
		return Result{}, err
	}
	workers := make([]*worker, o.Queues)
	blocks := o.Range / int64(o.Size) / int64(o.Queues)
	per := o.Depth * o.Size
	for i := range workers {
		workers[i] = newWorker(o, i, blocks, mem[i*per:][:per])
	}
	err = dev.Register(mem)
	for _, w := range workers {
		if err == nil {
			w.q, err = dev.NewQueue(o.Depth)
		}
	}
	var r Result
	if err == nil {
		r, err = measure(ctx, workers, o, info.Thread)
	}
	var closing []error
	for _, w := range workers {
		if w.q != nil {
			closing = append(closing, w.q.Close())
		}
	}
	ending := errors.Join(closing...)
	if ending == nil { // else somebody may write to the memory yet
		ending = errors.Join(dev.Unregister(mem), hpdi.Free(mem))
	}
	if err = errors.Join(err, ending); err != nil {
		err = fmt.Errorf("%s: %w", info.Name, err)
	}
	return r, err
}

// measure runs the workers, and has them prove what they wrote. Each has a goroutine from
// beginning to end, and a thread of its own where queues are bound to threads.
func measure(ctx context.Context, workers []*worker, o Options, thread bool) (Result, error) {
	outer := ctx
	ctx, stop := context.WithCancel(ctx)
	defer stop()
	var hands sync.WaitGroup
	defer hands.Wait()
	for _, w := range workers {
		w.calls = make(chan func())
		defer close(w.calls)
		hands.Go(func() {
			if thread {
				runtime.LockOSThread()
				defer runtime.UnlockOSThread()
			}
			for f := range w.calls {
				f()
			}
		})
	}
	each := func(do func(w *worker) error) error {
		var wg sync.WaitGroup
		wg.Add(len(workers))
		for _, w := range workers {
			w.calls <- func() {
				defer wg.Done()
				if w.err = do(w); w.err != nil {
					stop() // the others measure nothing of use any more
				}
			}
		}
		wg.Wait()
		var errs []error
		for _, w := range workers {
			if outer.Err() != nil || !errors.Is(w.err, context.Canceled) {
				errs = append(errs, w.err)
			}
		}
		return errors.Join(errs...)
	}
	began, used := time.Now(), CPU()
	err := each(func(w *worker) error { return w.run(ctx, began) })
	r := Result{Elapsed: time.Since(began), CPU: CPU() - used}
	var h histogram
	for _, w := range workers {
		h.merge(&w.latency)
		r.Reads += w.reads
		r.Writes += w.writes
	}
	r.Requests, r.Bytes = int64(h.n), int64(h.n)*int64(o.Size)
	if h.n > 0 {
		r.Mean = h.sum / time.Duration(h.n)
	}
	r.P50, r.P99, r.P999, r.Max = h.rank(.5), h.rank(.99), h.rank(.999), h.most
	if err == nil && o.Mode.Writes() {
		err = each(func(w *worker) error { return hpdi.Do(w.q, &hpdi.Request{Op: hpdi.OpFlush}) })
	}
	if err == nil && o.Verify {
		err = each(func(w *worker) error { return w.prove(ctx) })
		for _, w := range workers {
			r.Verified += w.verified
		}
	}
	return r, err
}
