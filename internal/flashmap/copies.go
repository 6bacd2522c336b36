package flashmap

import (
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/stack"
)

// copies is a device of which one side at least keeps several copies. A range is
// asked of the side that it is on; a side that is no hpdi.Copies has one copy.
//
// A mirror that is the flash device is told nothing here of what is verified: it serves
// several devices. Whoever opens it may do so, if all of them are verified from their
// first byte on: the flash device looks for its own pages on each copy.
type copies struct{ *device }

var _ hpdi.Copies = (*copies)(nil)

// piece is a range of a request that lies in one place.
type piece struct {
	disk     *stack.Queues
	copies   hpdi.Copies // nil when the side has one copy
	from, to int64       // of the request
	at       int64       // on the disk
	fail     func(error) error
}

// newPiece returns n bytes from at on of a disk, whose errors fail names.
func newPiece(disk *stack.Queues, at, n int64, fail func(error) error) piece {
	p := piece{disk: disk, at: at, to: n, fail: fail}
	p.copies, _ = disk.Device.(hpdi.Copies)
	return p
}

// pieces calls fn with the pieces of a range while nothing is moved between them; as a
// write it marks what it may have changed.
func (c *copies) pieces(off, n int64, write bool, fn func([]piece) error) error {
	f, shift := c.f, c.f.shift
	op := hpdi.OpRead
	if write {
		op = hpdi.OpWrite
	}
	var out []piece
	var entered []entry
	leave := func() {
		at := off
		for _, e := range entered {
			set := Set(at >> shift)
			k := min(off+n, int64(set+1)<<shift) - at
			f.leave(c.p, set, e.slot, op, e.serial, at&(1<<shift-1), k)
			at += k
		}
		entered, out = nil, nil
	}
	for at := off; at < off+n; {
		set := Set(at >> shift)
		k := min(off+n, int64(set+1)<<shift) - at
		e := f.enter(c.p, set, write)
		if e.err != nil {
			leave()
			return e.err
		}
		if e.held != nil {
			// What holds it may wait for what was entered already.
			leave()
			<-e.held
			at = off
			continue
		}
		entered = append(entered, e)
		p := piece{disk: c.io, at: at, from: at - off, to: at - off + k, fail: func(err error) error { return err }}
		if e.slot != none {
			p.disk, p.at, p.fail = f.io, e.at+at&(1<<shift-1), f.fail
		}
		p.copies, _ = p.disk.Device.(hpdi.Copies)
		if last := len(out) - 1; last >= 0 && out[last].disk == p.disk && out[last].at+out[last].to-out[last].from == p.at {
			out[last].to = p.to
		} else {
			out = append(out, p)
		}
		at += k
	}
	defer leave()
	return fn(out)
}

// ReadGood reads a range from copies for which good returns true, see [hpdi.Copies].
func (c *copies) ReadGood(off int64, buf []byte, good func([]byte) bool) (repaired int, err error) {
	n := int64(len(buf))
	r := hpdi.Request{Op: hpdi.OpRead, Offset: off, Vec: [][]byte{buf}}
	if err := r.Check(c.info); err != nil || n == 0 || off/block.TrackBytes != (off+n-1)/block.TrackBytes {
		return 0, fmt.Errorf("read %d bytes at %d of %s from a good copy: %w", n, off, c.info.Name, errors.Join(err, block.ErrInvalid))
	}
	err = c.pieces(off, n, true, func(ps []piece) error {
		if p := ps[0]; len(ps) == 1 && p.copies != nil {
			repaired, err = p.copies.ReadGood(p.at, buf, good)
			return err
		}
		repaired, err = c.readGoodOf(ps, buf, good)
		return err
	})
	return repaired, err
}

// readGoodOf tries the copies of several pieces one after the other: the first of all,
// the second of all, and so on, with the last of those that have fewer. Whoever asks
// for blocks asks for one at a time, which are in one piece.
func (c *copies) readGoodOf(ps []piece, buf []byte, good func([]byte) bool) (repaired int, err error) {
	var errs []error
	for i := range c.NumCopies() {
		err := error(nil)
		for _, p := range ps {
			err = errors.Join(err, p.read(min(i, p.count()-1), buf[p.from:p.to]))
		}
		if err != nil {
			errs = append(errs, err)
			continue
		}
		if !good(buf) {
			continue
		}
		for _, p := range ps {
			if p.copies == nil {
				continue
			}
			n, err := p.copies.Settle(p.at, buf[p.from:p.to])
			if repaired += n; err != nil {
				return repaired, p.fail(err)
			}
		}
		return repaired, nil
	}
	return 0, errors.Join(append(errs, &block.CorruptError{What: "every copy of a block",
		Where: fmt.Sprintf("byte %d of %s", ps[0].from, c.info.Name), Why: "none has the expected checksum"})...)
}

// count returns how many copies a piece has.
func (p piece) count() int {
	if p.copies == nil {
		return 1
	}
	return p.copies.NumCopies()
}

// read reads copy i of a piece.
func (p piece) read(i int, vec ...[]byte) error {
	if p.copies == nil && i == 0 {
		return p.wrap(p.disk.Do(&hpdi.Request{Op: hpdi.OpRead, Offset: p.at, Vec: vec}))
	}
	if i >= p.count() {
		return hpdi.ErrNoCopy
	}
	return p.wrap(p.copies.ReadCopy(i, p.at, vec...))
}

// wrap names the flash device in an error of it; that a copy is away is none.
func (p piece) wrap(err error) error {
	if err == nil || errors.Is(err, hpdi.ErrNoCopy) {
		return err
	}
	return p.fail(err)
}

// NumCopies returns how many copies the side has that has more.
func (c *copies) NumCopies() int {
	return max(numCopies(c.primary), numCopies(c.f.io.Device))
}

// ReadCopy reads copy i alone, see [hpdi.Copies]. Where the range has fewer copies it
// returns hpdi.ErrNoCopy.
func (c *copies) ReadCopy(i int, off int64, vec ...[]byte) error {
	r := hpdi.Request{Op: hpdi.OpRead, Offset: off, Vec: vec}
	if err := r.Check(c.info); err != nil || i < 0 || i >= c.NumCopies() {
		return fmt.Errorf("read copy %d of %s at %d: %w", i+1, c.info.Name, off, errors.Join(err, block.ErrInvalid))
	}
	return c.pieces(off, r.Bytes(), false, func(ps []piece) error {
		cur := cursor{vec: vec}
		for _, p := range ps {
			if err := p.read(i, cur.take(nil, p.to-p.from)...); err != nil {
				return fmt.Errorf("copy %d of %s: %w", i+1, c.info.Name, err)
			}
		}
		return nil
	})
}

// Settle writes p to the copies that hold something else, see [hpdi.Copies].
func (c *copies) Settle(off int64, p []byte) (written int, err error) {
	r := hpdi.Request{Op: hpdi.OpRead, Offset: off, Vec: [][]byte{p}}
	if err := r.Check(c.info); err != nil || c.info.ReadOnly {
		return 0, err
	}
	err = c.pieces(off, int64(len(p)), true, func(ps []piece) error {
		for _, x := range ps {
			if x.copies == nil {
				continue // it was read from the only one
			}
			n, err := x.copies.Settle(x.at, p[x.from:x.to])
			if written += n; err != nil {
				return x.fail(err)
			}
		}
		return nil
	})
	return written, err
}

// ProveOwn proves what both devices keep for themselves, and the pages of the flash
// device, see [hpdi.Copies].
func (c *copies) ProveOwn() (mended int, err error) {
	var errs []error
	for _, dev := range []hpdi.Device{c.primary, c.f.io.Device} {
		if x, ok := dev.(hpdi.Copies); ok {
			n, err := x.ProveOwn()
			mended, errs = mended+n, append(errs, err)
		}
	}
	n, err := c.f.Prove()
	return mended + n, errors.Join(append(errs, err)...)
}

// Verified tells the primary what is verified by who reads it, see [hpdi.Copies].
func (c *copies) Verified(off int64) {
	if x, ok := c.primary.(hpdi.Copies); ok {
		x.Verified(off)
	}
}

// Unused says what nobody reads, see [hpdi.Copies] and Primary.Unused, which it replaces.
// The primary passes that over when it fills a copy, and what is on flash.
func (c *copies) Unused(unused func(off, n int64) bool) { c.unused.Store(&unused) }
