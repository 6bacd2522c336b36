package flashmap

import (
	"bytes"
	"fmt"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/planted"
)

// read reads a piece of the data set into buf, from every copy that is there: what is
// moved becomes all that there is, and nothing here can tell which copy is right. A copy
// that cannot be read is read around, as it is for clients. It returns the blocks, as
// offsets in the data set, that are not alike.
func (m *Move) read(p piece, off int64, buf []byte) (differ []int64, err error) {
	have := false
	for i := 0; p.copies != nil && i < p.count(); i++ {
		if m.other == nil {
			if m.other, err = hpdi.AllocPrivate(len(m.buf)); err != nil {
				return nil, err
			}
		}
		to := buf
		if have {
			to = m.other[:len(buf)]
		}
		switch err := p.read(i, to); {
		case err != nil:
			continue
		case have && !planted.Has(planted.FlashCopyUnseen):
			differ = appendDiffering(differ, off, buf, to)
		}
		have = true
	}
	if have {
		return differ, nil
	}
	return nil, p.wrap(p.disk.Do(&hpdi.Request{Op: hpdi.OpRead, Offset: p.at, Vec: [][]byte{buf}}))
}

// appendDiffering appends where the blocks of a and b are not alike, the first of which
// is at off.
func appendDiffering(out []int64, off int64, a, b []byte) []int64 {
	if bytes.Equal(a, b) {
		return out
	}
	for i := 0; i < len(a); i += block.Size {
		if !bytes.Equal(a[i:][:block.Size], b[i:][:block.Size]) {
			out = append(out, off+int64(i))
		}
	}
	return out
}

// judge decides about blocks that were not alike when they were read. What has been
// written since the piece was marked, or is being written, is copied again: each copy
// may have been read at another moment. What nobody reads may be as it is.
func (m *Move) judge(differ []int64) error {
	f := m.f
	var used []int64
	for _, off := range differ {
		if !m.d.isUnused(int64(m.set)<<f.shift+off, block.Size) {
			used = append(used, off)
		}
	}
	s := f.lock(m.key)
	defer s.mu.Unlock()
	writes := s.activeLocked(m.key, true).writes
	var bad []int64
	for _, off := range used {
		if bit := uint64(1) << (off >> f.pieceShift()); writes > 0 || m.marks&bit != 0 {
			m.marks |= bit
		} else {
			bad = append(bad, off)
		}
	}
	if len(bad) == 0 {
		return nil
	}
	from, _ := m.sides(bad[0], block.Size)
	return fmt.Errorf("device %s at byte %d, and %d more blocks: %w", from.disk.Device.Info().Name, from.at, len(bad)-1, ErrCopiesDiffer)
}

// isUnused reports whether nobody reads a range of the device before it is written again,
// as far as its user has said so.
func (d *device) isUnused(off, n int64) bool {
	unused := d.unused.Load()
	return unused != nil && *unused != nil && (*unused)(off, n)
}

// unread reports whether nobody reads a range of the primary before it is written again:
// what its user does not use, and what is on flash. It is called by a mirror which has
// the range alone.
//
// A data set on its way back is read: what was copied need not be on a copy that came
// back since. Before, all that is there takes what a move writes.
func (d *device) unread(off, n int64) bool {
	shift := d.f.shift
	for at := off; at < off+n; {
		set := Set(at >> shift)
		k := min(off+n, int64(set+1)<<shift) - at
		if !d.f.restsOnFlash(d.p, set) && !d.isUnused(at, k) {
			return false
		}
		at += k
	}
	return true
}

// restsOnFlash reports whether a data set is on flash and not being moved. It does not
// wait: who asks may be waited for.
func (f *Flash) restsOnFlash(p *primary, set Set) bool {
	if !p.has(set) {
		return false
	}
	k := keyOf(p.number, set)
	h := hash(k)
	s := f.stripeOf(h)
	if !s.mu.TryLock() {
		return false
	}
	defer s.mu.Unlock()
	if s.findLocked(f.keys, k, h) == none {
		return false
	}
	a := s.activeLocked(k, false)
	return a == nil || a.move == nil || planted.Has(planted.FlashReturnUnseen)
}

// Unused reports whether nobody reads a range of the flash device, in bytes, before it is
// written again: whether it lies in slots that are free. A mirror that is the flash
// device is told so, and goes by it where what it holds is verified, see [hpdi.Copies];
// whoever tells it something else in its place has to ask here.
func (f *Flash) Unused(off, n int64) bool {
	if !f.stripes[0].mu.TryLock() {
		return false // as for restsOnFlash
	}
	segments := f.label.segments // who changes it changes a clone
	f.stripes[0].mu.Unlock()
	f.slotsMu.Lock()
	defer f.slotsMu.Unlock()
	first := 0 // slot of the segment
	for _, s := range segments {
		start := int64(s.data(f.shift)) * block.Size
		if end := start + int64(s.slots)<<f.shift; start <= off && off+n <= end {
			for i := (off - start) >> f.shift; i<<f.shift < off+n-start; i++ {
				if slot := first + int(i); slot >= len(f.taken)*64 || f.taken.Has(slot) {
					return false
				}
			}
			return n > 0
		}
		first += s.tablePages * pageWords
	}
	return false
}
