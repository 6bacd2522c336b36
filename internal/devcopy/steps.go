package devcopy

import (
	"bytes"
	"context"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
)

// submit sends the next request of a slot, of all its bytes.
func (c *copier) submit(d *side, s *slot, next step, op hpdi.Op, buf []byte) {
	s.step = next
	s.Request = hpdi.Request{Op: op, Offset: s.off, User: s}
	s.vec[0] = buf[:s.n]
	s.Vec = s.vec[:]
	c.hand(d, &s.Request)
}

// check asks what the target is made of, from where it has not told yet.
func (c *copier) check(s *slot) {
	s.step = checking
	s.Request = hpdi.Request{Op: hpdi.OpStatus, Offset: s.known, Length: s.off + s.n - s.known, Extents: s.told[:0], User: s}
	c.hand(&c.dst, &s.Request)
}

// hand submits one request. A queue that does not take it works no more, and gives
// nothing back.
func (c *copier) hand(d *side, r *hpdi.Request) {
	if err := d.q.Submit(r); err != nil {
		c.err = fmt.Errorf("%s: %w", d.info.Name, err)
		d.flying = 0
		return
	}
	d.flying++
}

// zero makes the next part of what is left of a slot read as zero, or ends it.
func (c *copier) zero(s *slot) {
	if len(s.left) == 0 {
		if c.dst.info.Status && s.known < s.off+s.n {
			c.check(s)
		} else {
			c.end(s)
		}
		return
	}
	r := &s.left[0]
	n := r.n
	s.step = writing
	if c.dst.info.Zeroes {
		s.Request = hpdi.Request{Op: hpdi.OpWriteZeroes, Offset: r.off, Length: n, User: s}
	} else {
		n = min(n, c.o.Piece)
		s.vec[0] = c.zeros[:n]
		s.Request = hpdi.Request{Op: hpdi.OpWrite, Offset: r.off, Vec: s.vec[:], User: s}
	}
	if r.off, r.n = r.off+n, r.n-n; r.n == 0 {
		s.left = s.left[1:]
	}
	c.result.Zeroed += n
	c.hand(&c.dst, &s.Request)
}

// end gives a slot back.
func (c *copier) end(s *slot) {
	c.slots = append(c.slots, s)
	c.progress(s.n)
}

func (c *copier) progress(n int64) {
	if c.behind += n; c.o.Progress != nil {
		c.o.Progress(c.verify, c.behind, c.total)
	}
}

// fail notes that a request has failed, unless another one had.
func (c *copier) fail(d *side, r *hpdi.Request) {
	if c.err == nil {
		c.err = fmt.Errorf("%s: %s of %d bytes at %d: %w", d.info.Name, r.Op, r.Bytes(), r.Offset, r.Err)
	}
}

// came takes a request that is complete to its next step.
func (c *copier) came(d *side, r *hpdi.Request) {
	d.flying--
	s, ok := r.User.(*slot)
	switch {
	case !ok:
		c.answered()
	case r.Err != nil:
		c.fail(d, r)
	case c.err != nil: // nothing new is begun
	case s.step == reading && c.verify:
		c.submit(&c.dst, s, comparing, hpdi.OpRead, s.own)
	case s.step == reading:
		c.result.Copied += s.n
		c.submit(&c.dst, s, writing, hpdi.OpWrite, s.buf)
	case s.step == checking:
		c.checked(s)
	case s.step == comparing:
		c.compare(s)
	case s.zero:
		c.zero(s)
	default:
		c.end(s)
	}
}

// checked leaves alone what is a hole of the target already. What the target has not told
// of is asked for when the rest is zero.
func (c *copier) checked(s *slot) {
	s.left = s.left[:0]
	end := s.off + s.n
	if len(s.Extents) == 0 { // it does not know
		s.left = append(s.left, run{off: s.known, n: end - s.known})
		s.known = end
	}
	for _, e := range s.Extents {
		n := min(e.Length, end-s.known)
		if e.State == hpdi.Hole {
			c.result.Skipped += n
		} else if last := len(s.left) - 1; last >= 0 && s.left[last].off+s.left[last].n == s.known {
			s.left[last].n += n
		} else {
			s.left = append(s.left, run{off: s.known, n: n})
		}
		s.known += n
	}
	c.zero(s)
}

// compare ends a slot whose data was read from both devices.
func (c *copier) compare(s *slot) {
	want, got := s.buf[:s.n], s.own[:s.n]
	if s.zero {
		want = c.zeros[:s.n]
	}
	if !bytes.Equal(want, got) {
		i := 0
		for want[i] == got[i] {
			i++
		}
		c.err = fmt.Errorf("%s and %s, byte %d: %w", c.src.info.Name, c.dst.info.Name, s.off+int64(i), ErrDiffers)
		return
	}
	c.result.Verified += s.n
	c.end(s)
}

// wait takes what has completed, at least one request. When the context ends it cancels
// what is under way, once, and begins nothing any more: that would not be cancelled.
func (c *copier) wait(ctx context.Context) error {
	sides := [2]*side{&c.dst, &c.src}
	for {
		came := false
		for _, d := range sides {
			if d.flying == 0 {
				continue
			}
			n, err := c.take(d, 0)
			if err != nil {
				return err
			}
			came = came || n > 0
		}
		if came || c.src.flying+c.dst.flying == 0 {
			return nil
		}
		if err := ctx.Err(); err != nil && !c.canceled {
			if c.err == nil {
				c.err = err
			}
			c.cancel()
			continue
		}
		if came, err := c.sleep(sides); came || err != nil {
			return err
		}
	}
}

// take takes what has completed on a device, waits for so many, and returns how many came.
func (c *copier) take(d *side, least int) (int, error) {
	var err error
	if d.done, err = d.q.Wait(least, d.done[:0]); err != nil {
		return 0, fmt.Errorf("%s: %w", d.info.Name, err)
	}
	for _, r := range d.done {
		c.came(d, r)
	}
	return len(d.done), nil
}

// cancel ends what is under way, as far as the drivers can.
func (c *copier) cancel() {
	c.canceled = true
	all := []*hpdi.Request{&c.ask}
	for _, s := range c.all {
		all = append(all, &s.Request)
	}
	c.src.q.Cancel(all...)
	c.dst.q.Cancel(all...)
}

// look is how often a copy that waits looks whether it is to end.
const look = 200 * time.Millisecond

// sleep waits until something has completed, or for a while: by the descriptors of the
// queues, or where one has none for one of the devices alone. Then it has taken what came.
func (c *copier) sleep(sides [2]*side) (came bool, err error) {
	var fds [2]unix.PollFd
	n := 0
	for _, d := range sides {
		if d.flying == 0 {
			continue
		}
		fd := d.q.Event()
		if fd < 0 {
			n, err := c.take(d, 1)
			return n > 0, err
		}
		fds[n] = unix.PollFd{Fd: int32(fd), Events: unix.POLLIN}
		n++
	}
	if _, err := unix.Poll(fds[:n], int(look.Milliseconds())); err != nil && err != unix.EINTR {
		return false, fmt.Errorf("poll: %w", err)
	}
	return false, nil
}
