package blocktest

import (
	"fmt"
	"math/rand/v2"
	"sync/atomic"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

// CutMode says what a power cut does to operations that are not durable.
type CutMode int

// The modes of a power cut.
const (
	CutRandom CutMode = iota // each is kept, dropped or torn, by seed
	KeepAll                  // all are kept, in order
	DropAll                  // all are dropped
)

// CrashOptions describes a Crash. The zero value of each field has a meaning.
type CrashOptions struct {
	Name      string
	Size      int64  // bytes, a multiple of BlockSize; terabytes cost nothing
	Seed      uint64 // of discards and of the order of completion
	Clock     *Clock // nil: a clock of its own
	BlockSize int    // 0: block.Size; a multiple of SectorSize
	NoDiscard bool   // lacks OpDiscard
	NoZeroes  bool   // lacks OpWriteZeroes
	// Direct makes the device refuse vectors whose memory is not aligned to
	// BlockSize, as direct I/O does.
	Direct bool
	// Rotates is what it says of its medium.
	Rotates bool
}

// Crash is a handle to a device in memory whose power can be cut. See the
// package comment for what a cut does.
type Crash struct {
	opts   CrashOptions
	m      *medium
	closed atomic.Bool
}

// NewCrash returns a device of size zero bytes with a clock of its own.
func NewCrash(size int64, seed uint64) *Crash {
	return NewCrashWith(CrashOptions{Size: size, Seed: seed})
}

// NewCrash returns a device of size zero bytes that shares the clock.
func (c *Clock) NewCrash(size int64, seed uint64) *Crash {
	return NewCrashWith(CrashOptions{Size: size, Seed: seed, Clock: c})
}

// NewCrashWith returns a device that is described by opts and reads as zero.
func NewCrashWith(opts CrashOptions) *Crash {
	if opts.BlockSize == 0 {
		opts.BlockSize = block.Size
	}
	if opts.Name == "" {
		opts.Name = fmt.Sprintf("crash%d", opts.Seed)
	}
	if opts.BlockSize%SectorSize != 0 || opts.Size < 0 || opts.Size%int64(opts.BlockSize) != 0 {
		panic(fmt.Sprintf("blocktest: device of %d bytes in blocks of %d", opts.Size, opts.BlockSize))
	}
	return newHandle(opts, make(image))
}

func newHandle(opts CrashOptions, content image) *Crash {
	if opts.Clock == nil {
		opts.Clock = NewClock()
	}
	return &Crash{opts: opts, m: &medium{
		clock:   opts.Clock,
		seed:    opts.Seed,
		rng:     newRand(opts.Seed, 0),
		durable: content,
		visible: content.clone(),
	}}
}

// Clock returns the device's clock.
func (d *Crash) Clock() *Clock { return d.m.clock }

// Cut cuts the power of all devices on the clock, unless it is off already,
// and returns the device as it is found when power is back. The new device has
// a new clock of its own; use CutTo to give several devices one. Cut may be
// called again with other seeds, for other outcomes of the same power cut.
func (d *Crash) Cut(seed uint64) *Crash { return d.CutTo(NewClock(), CutRandom, seed) }

// CutTo is Cut with a mode and the clock that the device has afterwards.
func (d *Crash) CutTo(clock *Clock, mode CutMode, seed uint64) *Crash {
	d.m.clock.Cut()
	d.m.mu.Lock()
	content := d.m.afterCutLocked(mode, seed)
	d.m.mu.Unlock()
	opts := d.opts
	opts.Clock = clock
	opts.Seed = mix(opts.Seed, seed)
	return newHandle(opts, content)
}

// Reopen returns a new handle to the same device, as after the death of the
// process that had it open: the host lives, so what was written stays visible
// and what was not flushed stays so. The old handle is closed.
func (d *Crash) Reopen() *Crash {
	d.m.mu.Lock() // no operation of the old handle runs on
	d.closed.Store(true)
	// Nobody will ever see the completion of what was in flight, but it did
	// complete, and a flush of the new process covers it.
	for _, c := range d.m.pending {
		c.reaped = true
	}
	d.m.mu.Unlock()
	return &Crash{opts: d.opts, m: d.m}
}

// Resize is Reopen of a device that is larger or smaller since.
func (d *Crash) Resize(size int64) *Crash {
	n := d.Reopen()
	n.opts.Size = size
	return n
}

// Blocks returns how many blocks take memory: those that are not known to be zero.
func (d *Crash) Blocks() int {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	return len(d.m.visible)
}

// Unflushed returns how many operations a power cut now could undo.
func (d *Crash) Unflushed() int {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	return len(d.m.pending)
}

// Corrupt flips the bits of mask in the byte at off, on the medium itself and
// past all counting: decay at rest.
func (d *Crash) Corrupt(off int64, mask byte) {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	b := off / block.Size
	for _, im := range []image{d.m.visible, d.m.durable} {
		pg := im.copyOf(b)
		pg[off%block.Size] ^= mask
		im[b] = pg
	}
}

// Info describes the device.
func (d *Crash) Info() hpdi.Info {
	return hpdi.Info{
		Name: d.opts.Name, Driver: "crash", Size: d.opts.Size, BlockSize: d.opts.BlockSize,
		Direct: d.opts.Direct, Discard: !d.opts.NoDiscard, Zeroes: !d.opts.NoZeroes, Durable: true,
		Rotates: d.opts.Rotates,
	}
}

// Register does nothing.
func (d *Crash) Register([]byte) error { return d.usable() }

// Unregister does nothing.
func (d *Crash) Unregister([]byte) error { return d.usable() }

// Close ends this handle. Reopen gives another.
func (d *Crash) Close() error {
	if d.closed.Swap(true) {
		return hpdi.ErrClosed
	}
	return nil
}

func (d *Crash) usable() error {
	if d.m.clock.IsOff() {
		return ErrPowerCut
	}
	if d.closed.Load() {
		return hpdi.ErrClosed
	}
	return nil
}

// NewQueue returns a queue.
func (d *Crash) NewQueue(depth int) (hpdi.Queue, error) {
	if err := d.usable(); err != nil {
		return nil, err
	}
	if depth < 1 {
		return nil, fmt.Errorf("queue of depth %d", depth)
	}
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	return &crashQueue{d: d, rng: newRand(d.m.rng.Uint64(), 2)}, nil
}

// run carries r out and returns the change that it left pending, if any.
func (d *Crash) run(r *hpdi.Request) *change {
	m := d.m
	m.mu.Lock()
	defer m.mu.Unlock()
	if r.Err = d.usable(); r.Err != nil {
		return nil
	}
	if r.Err = r.Check(d.Info()); r.Err != nil {
		return nil
	}
	if r.Op == hpdi.OpRead {
		off := r.Offset
		for _, v := range r.Vec {
			m.readLocked(v, off)
			off += int64(len(v))
		}
		return nil
	}
	reached, ok := m.clock.tick()
	if !ok {
		r.Err = ErrPowerCut
	}
	if !reached {
		return nil
	}
	if r.Op == hpdi.OpFlush {
		if ok {
			m.flushLocked(func(c *change) bool { return c.reaped })
		}
		return nil
	}
	c := m.addLocked(r, 0)
	c.durable = r.Durable && ok
	return c
}

// crashQueue runs requests as they are submitted and returns them, in an order
// by seed, from Wait.
type crashQueue struct {
	hpdi.Plain
	d      *Crash
	rng    *rand.Rand
	done   []finished
	closed bool
}

type finished struct {
	req *hpdi.Request
	c   *change
}

func (q *crashQueue) Submit(reqs ...*hpdi.Request) error {
	if q.closed {
		return hpdi.ErrClosed
	}
	for _, r := range reqs {
		q.done = append(q.done, finished{r, q.d.run(r)})
	}
	return nil
}

func (q *crashQueue) Wait(_ int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	if q.closed {
		return done, hpdi.ErrClosed
	}
	q.rng.Shuffle(len(q.done), func(i, j int) { q.done[i], q.done[j] = q.done[j], q.done[i] })
	q.d.m.mu.Lock()
	defer q.d.m.mu.Unlock()
	for _, f := range q.done {
		if f.c != nil {
			q.d.m.reapLocked(f.c)
		}
		done = append(done, f.req)
	}
	clear(q.done)
	q.done = q.done[:0]
	return done, nil
}

func (q *crashQueue) Close() error {
	if q.closed {
		return hpdi.ErrClosed
	}
	_, err := q.Wait(0, nil)
	q.closed = true
	return err
}
