package devcopy

import (
	"context"
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/hpdi"
)

// Options are how a copy is made.
type Options struct {
	Depth  int   // pieces in flight, 8 if 0
	Piece  int64 // bytes of one, a multiple of both block sizes; 1 MiB if 0
	Verify bool  // read both devices again and compare them
	// Progress, if set, is told how many bytes of how many are behind, in the pass that
	// compares as well. It is called by the goroutine that copies, often.
	Progress func(verifying bool, done, total int64)
}

// Result is what a copy has moved, in bytes.
type Result struct {
	Copied   int64 // read and written
	Zeroed   int64 // written as zeroes
	Skipped  int64 // that are holes on both sides
	Verified int64 // compared
}

// The bounds of options.
const (
	MaxDepth = 256
	MaxPiece = 64 << 20
)

// zeroSpan is how much of what reads as zero is one piece.
const zeroSpan = 1 << 30

// ErrDiffers is what a comparison ends with that finds a difference.
var ErrDiffers = errors.New("the target differs from the source")

// Copy makes the beginning of dst what src is, and makes it durable. Nothing is in flight
// when it returns. The error names the device, and where on it.
func Copy(ctx context.Context, src, dst hpdi.Device, o Options) (Result, error) {
	c := &copier{o: o, src: side{dev: src, info: src.Info()}, dst: side{dev: dst, info: dst.Info()}}
	if err := c.prepare(); err != nil {
		return Result{}, err
	}
	err := c.open()
	if err == nil {
		if err = c.pass(ctx, false); err == nil {
			err = c.flush()
		}
		if err == nil && o.Verify {
			err = c.pass(ctx, true)
		}
	}
	return c.result, errors.Join(err, c.close())
}

// prepare checks what was asked for, and fills in what was not.
func (c *copier) prepare() error {
	from, to := c.src.info, c.dst.info
	if c.o.Depth == 0 {
		c.o.Depth = 8
	}
	if c.o.Piece == 0 {
		c.o.Piece = 1 << 20
	}
	bs := int64(max(from.BlockSize, to.BlockSize)) // powers of two, both
	switch {
	case c.o.Depth < 1 || c.o.Depth > MaxDepth:
		return fmt.Errorf("%d pieces in flight: from 1 to %d are possible", c.o.Depth, MaxDepth)
	case c.o.Piece < bs || c.o.Piece > MaxPiece || c.o.Piece%bs != 0:
		return fmt.Errorf("pieces of %d bytes: a multiple of %d up to %d is possible", c.o.Piece, bs, MaxPiece)
	case to.ReadOnly:
		return fmt.Errorf("%s: %w", to.Name, hpdi.ErrReadOnly)
	case to.Size < from.Size:
		return fmt.Errorf("%s has %d bytes, and %s has %d: %w", from.Name, from.Size, to.Name, to.Size, hpdi.ErrNoSpace)
	case from.Size%int64(to.BlockSize) != 0:
		return fmt.Errorf("%s has %d bytes, and %s takes multiples of %d: %w", from.Name, from.Size, to.Name, to.BlockSize, hpdi.ErrAlign)
	}
	c.block, c.total = bs, from.Size
	return nil
}

// side is one of the devices.
type side struct {
	dev    hpdi.Device
	info   hpdi.Info
	q      hpdi.Queue
	flying int
	done   []*hpdi.Request
}

// run is a range of the device that is alike throughout.
type run struct {
	off, n int64
	zero   bool
}

// copier is the state of one copy. All of it belongs to one goroutine.
type copier struct {
	o          Options
	src, dst   side
	block      int64
	total      int64
	mem, zeros []byte
	all, slots []*slot // slots are those that are free
	canceled   bool
	ask        hpdi.Request
	asking     bool

	verify bool
	at     int64 // up to where the source was asked
	todo   []run // what was told and is not begun, in order
	behind int64
	err    error // the first
	result Result
}

// step is what a slot waits for.
type step uint8

const (
	reading   step = iota // the source
	writing               // the target, or zeroing it
	checking              // whether the target is a hole
	comparing             // the target is read
)

// slot is one piece that is under way.
type slot struct {
	hpdi.Request
	step     step
	off, n   int64
	zero     bool
	buf, own []byte // the source's data, and the target's when they are compared
	vec      [1][]byte
	told     [16]hpdi.Extent
	known    int64 // of a zero piece: up to where the target has told
	left     []run // of that: what is not a hole
}

func (c *copier) open() error {
	var err error
	if c.src.q, err = c.src.dev.NewQueue(c.o.Depth + 1); err != nil { // and one that asks
		return fmt.Errorf("%s: %w", c.src.info.Name, err)
	}
	if c.dst.q, err = c.dst.dev.NewQueue(c.o.Depth); err != nil {
		return fmt.Errorf("%s: %w", c.dst.info.Name, err)
	}
	per := int(c.o.Piece)
	bufs := 1
	if c.o.Verify {
		bufs = 2
	}
	if c.mem, err = hpdi.Alloc((c.o.Depth*bufs + 1) * per); err != nil {
		return err
	}
	for _, s := range []*side{&c.src, &c.dst} {
		if err := s.dev.Register(c.mem); err != nil {
			return fmt.Errorf("%s: %w", s.info.Name, err)
		}
	}
	c.zeros = c.mem[:per]
	for i := range c.o.Depth {
		s := &slot{buf: c.mem[(1+i)*per:][:per]}
		if c.o.Verify {
			s.own = c.mem[(1+c.o.Depth+i)*per:][:per]
		}
		s.User = s
		c.all = append(c.all, s)
	}
	c.slots = append(c.slots, c.all...)
	c.ask.Extents = make([]hpdi.Extent, 0, 256)
	return nil
}

// close frees everything. Nothing is in flight, or a queue is broken and its Close waits.
// The memory stays where a Close fails: somebody may write to it yet.
func (c *copier) close() error {
	var errs []error
	for _, s := range []*side{&c.src, &c.dst} {
		if s.q != nil {
			errs = append(errs, s.q.Close())
		}
	}
	if err := errors.Join(errs...); err != nil {
		return err
	}
	for _, s := range []*side{&c.src, &c.dst} {
		errs = append(errs, s.dev.Unregister(c.mem))
	}
	return errors.Join(append(errs, hpdi.Free(c.mem))...)
}

func (c *copier) flush() error {
	if err := hpdi.Do(c.dst.q, &hpdi.Request{Op: hpdi.OpFlush}); err != nil {
		return fmt.Errorf("%s: %w", c.dst.info.Name, err)
	}
	return nil
}

// pass goes over the whole source once.
func (c *copier) pass(ctx context.Context, verify bool) error {
	c.verify, c.at, c.todo, c.behind = verify, 0, c.todo[:0], 0
	c.progress(0)
	for {
		if c.err == nil {
			c.err = ctx.Err()
		}
		if c.err == nil {
			c.begin()
		}
		if c.src.flying+c.dst.flying == 0 {
			return c.err
		}
		if err := c.wait(ctx); err != nil {
			return err // the queue's Close waits for what is under way
		}
	}
}

// begin starts what there is room for.
func (c *copier) begin() {
	for c.err == nil && len(c.slots) > 0 {
		if len(c.todo) == 0 {
			if c.at == c.total || c.asking {
				return
			}
			c.inquire()
			continue
		}
		r := &c.todo[0]
		s := c.slots[len(c.slots)-1]
		s.off, s.n, s.zero = r.off, min(r.n, zeroSpan), r.zero
		if !r.zero || c.verify {
			s.n = min(s.n, c.o.Piece-r.off%c.o.Piece)
		}
		if r.off, r.n = r.off+s.n, r.n-s.n; r.n == 0 {
			c.todo = c.todo[1:]
		}
		c.slots = c.slots[:len(c.slots)-1]
		switch {
		case s.zero && c.verify:
			c.submit(&c.dst, s, comparing, hpdi.OpRead, s.own)
		case s.zero && c.dst.info.Status:
			s.known = s.off
			c.check(s)
		case s.zero:
			s.left = append(s.left[:0], run{off: s.off, n: s.n})
			c.zero(s)
		default:
			c.submit(&c.src, s, reading, hpdi.OpRead, s.buf)
		}
	}
}

// inquire asks the source what comes next, or takes it for data.
func (c *copier) inquire() {
	n := c.total - c.at
	if !c.src.info.Status {
		c.todo = c.todo[:0]
		c.add(c.total, false)
		return
	}
	c.ask = hpdi.Request{Op: hpdi.OpStatus, Offset: c.at, Length: n, Extents: c.ask.Extents[:0]}
	c.asking = true
	c.hand(&c.src, &c.ask)
}

// answered takes what the source has told. A block of the target in which a border lies is
// data.
func (c *copier) answered() {
	c.asking = false
	if c.ask.Err != nil {
		c.fail(&c.src, &c.ask)
		return
	}
	up := func(n int64) int64 { return (n + c.block - 1) / c.block * c.block }
	c.todo = c.todo[:0]
	end := c.ask.Offset
	for _, e := range c.ask.Extents {
		start := end
		if end += e.Length; e.State == hpdi.Data {
			c.add(up(end), false)
		} else if start = up(start); start < end/c.block*c.block {
			c.add(start, false)
			c.add(end/c.block*c.block, true)
		}
	}
	if len(c.todo) == 0 { // less than a block of the target was told
		c.add(c.at+c.block, false)
	}
}

// add notes what the source is made of, from where was known before up to an offset.
func (c *copier) add(to int64, zero bool) {
	if to <= c.at {
		return
	}
	c.todo = append(c.todo, run{off: c.at, n: to - c.at, zero: zero})
	c.at = to
}
