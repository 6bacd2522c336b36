package flashmap

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

// copiesOf returns a function for each copy that the device may read a range from. A
// mirror need not have made its copies equal after a crash: see hpdi.Copies.Verified.
func (f *Flash) copiesOf() (reads []func(off int64, p []byte) error) {
	if c, ok := f.io.Device.(hpdi.Copies); ok {
		for i := range c.NumCopies() {
			reads = append(reads, func(off int64, p []byte) error { return c.ReadCopy(i, off, p) })
		}
	}
	return reads
}

// readAny reads from whichever copy the device chooses.
func (f *Flash) readAny(off int64, p []byte) error {
	return f.io.Do(&hpdi.Request{Op: hpdi.OpRead, Offset: off, Vec: [][]byte{p}})
}

// eachCopy reads a range from one copy after the other, those left out that are away,
// and calls use after each.
func (f *Flash) eachCopy(off int64, p []byte, use func(error)) {
	some := false
	for _, read := range f.copiesOf() {
		if err := read(off, p); !errors.Is(err, hpdi.ErrNoCopy) {
			some = true
			use(err)
		}
	}
	if !some {
		use(f.readAny(off, p))
	}
}

// readBlocks reads blocks of the flash device's own into p, and notes which of them
// could not be read. Of a mirror each comes from the copy that holds the newest, by
// the generation that decode returns, and the other copies are made like it: whoever
// reads next has to decide by the same. The error is that of making them so.
func (f *Flash) readBlocks(from uint64, p []byte, errs []error, decode func(i int, b []byte) (uint64, error)) error {
	copies := f.copiesOf()
	if len(copies) == 0 {
		readSingly(f.readAny, from, p, errs)
		return nil
	}
	buf, err := hpdi.AllocPrivate(len(p))
	if err != nil {
		return err
	}
	defer func() { _ = hpdi.Free(buf) }()
	for i := range errs {
		errs[i] = hpdi.ErrNoCopy
	}
	differ := make([]bool, len(errs))
	theirs := make([]error, len(errs))
	for _, read := range copies {
		readSingly(read, from, buf, theirs)
		for i := range errs {
			mine, other := p[i*block.Size:][:block.Size], buf[i*block.Size:][:block.Size]
			switch {
			case errors.Is(theirs[i], hpdi.ErrNoCopy):
				continue
			case !errors.Is(errs[i], hpdi.ErrNoCopy):
				differ[i] = differ[i] || errs[i] != nil || theirs[i] != nil || !bytes.Equal(mine, other)
			}
			if errors.Is(errs[i], hpdi.ErrNoCopy) || theirs[i] == nil && newer(i, other, mine, errs[i], decode) {
				copy(mine, other)
				errs[i] = theirs[i]
			}
		}
	}
	var unlike []error
	for i := range errs {
		b, off := p[i*block.Size:][:block.Size], int64(from+uint64(i))*block.Size
		if errors.Is(errs[i], hpdi.ErrNoCopy) {
			errs[i] = f.readAny(off, b) // nobody knows yet which copy is right, and the device decides
		}
		if !differ[i] || errs[i] != nil || f.readOnly {
			continue
		}
		if _, err := decode(i, b); err != nil {
			continue
		}
		if _, err := f.io.Device.(hpdi.Copies).Settle(off, b); err != nil {
			unlike = append(unlike, fmt.Errorf("make the copies of block %d alike: %w", from+uint64(i), err))
		}
	}
	return errors.Join(unlike...)
}

// newer reports whether other is to be believed more than mine, which could be read if
// err is nil.
func newer(i int, other, mine []byte, err error, decode func(i int, b []byte) (uint64, error)) bool {
	a, errA := decode(i, other)
	switch {
	case err != nil || errors.Is(errA, ondisk.ErrVersion):
		return true
	case errA != nil:
		return false
	}
	b, errB := decode(i, mine)
	return errB != nil && !errors.Is(errB, ondisk.ErrVersion) || errB == nil && a > b
}

// readSingly reads blocks into p, and notes which of them could not be read.
func readSingly(read func(off int64, p []byte) error, from uint64, p []byte, errs []error) {
	clear(errs)
	if read(int64(from)*block.Size, p) == nil {
		return
	}
	for i := range errs {
		errs[i] = read(int64(from+uint64(i))*block.Size, p[i*block.Size:][:block.Size])
	}
}
