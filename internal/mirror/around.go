package mirror

import (
	"bytes"
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/planted"
)

// readSafely reads a range from a copy in sync, and writes what it read to the
// copies that could not be read; where the range is old and not verified by who
// reads it, to all others. The caller holds no stripes.
func (m *Mirror) readSafely(r *hpdi.Request) error {
	n := r.Bytes()
	for done := int64(0); done < n; {
		off := r.Offset + done
		k := min(n-done, block.TrackBytes-off%block.TrackBytes)
		vec := cut(r.Vec, done, k)
		err := m.stripes.alone(off, func() error {
			return m.readAlone(off, k, vec, func(*copyOf) bool { return !m.trusted(off) })
		})
		if err != nil {
			return err
		}
		done += k
	}
	return nil
}

// readAlone reads a range within one track, which it has alone. Where it is old,
// what was read is written to the other copies for which fill returns true.
func (m *Mirror) readAlone(off, n int64, vec [][]byte, fill func(*copyOf) bool) error {
	old := m.isOld(off, n)
	var bad marked
	var errs []error
	source := -1
	for _, i := range m.sources(!old) {
		d := m.copies[i].present()
		if d == nil {
			continue
		}
		if err := d.transfer(hpdi.OpRead, off, vec...); err != nil {
			m.copies[i].readErrors.Add(1)
			bad[i] = d
			errs = append(errs, err)
			continue
		}
		source = i
		break
	}
	if source < 0 {
		return errors.Join(append(errs, errNoCopy)...)
	}
	if old {
		for i, c := range m.copies {
			if i != source && fill(c) {
				bad[i] = c.present()
			}
		}
	}
	// What was read of a region that is not old is right, whether or not the
	// bad copy can be mended.
	if err := m.rewrite(off, n, vec, bad, !old); err != nil && old {
		return err
	}
	return nil
}

// sources returns the copies to read from, the preferred one first. It is the
// same one each time. Copies that are being resilvered have everything but what
// is old.
func (m *Mirror) sources(resilvering bool) []int {
	order := make([]int, 0, MaxCopies)
	for i, c := range m.copies {
		if c.is(InSync) {
			order = append(order, i)
		}
	}
	for i, c := range m.copies {
		if resilvering && c.is(Resilvering) {
			order = append(order, i)
		}
	}
	return order
}

// rewrite writes what is right to copies where it is not. The caller has the
// track alone. Copies that do not take it are lost. repair counts it.
func (m *Mirror) rewrite(off, n int64, vec [][]byte, to marked, repair bool) error {
	if to.empty() || m.info.ReadOnly {
		return nil
	}
	if err := m.begin([2]int64{off, n}); err != nil {
		return err
	}
	defer m.end(off, n)
	var lost marked
	var errs []error
	for i, d := range to {
		if d == nil {
			continue
		}
		if err := d.transfer(hpdi.OpWrite, off, vec...); err != nil {
			m.copies[i].writeErrors.Add(1)
			lost[i] = d
			errs = append(errs, err)
			continue
		}
		if repair {
			m.copies[i].repaired.Add(1)
		}
	}
	return m.lose(lost, errors.Join(errs...))
}

// ReadGood reads a range that lies within one track from a copy for which good
// returns true, and makes all others like it. With none it returns an error of
// kind block.ErrCorrupt, or that of the devices.
//
// buf must suit direct I/O. good is called while nothing is written to the
// track: a block that was written anew since its checksum was looked up is good
// on no copy, and stays as it is.
func (m *Mirror) ReadGood(off int64, buf []byte, good func([]byte) bool) (repaired int, err error) {
	n := int64(len(buf))
	r := hpdi.Request{Op: hpdi.OpRead, Offset: off, Vec: [][]byte{buf}}
	if err := r.Check(m.info); err != nil || n == 0 || track(off) != track(off+n-1) {
		return 0, fmt.Errorf("read %d bytes at %d of %s from a good copy: %w", n, off, m.info.Name, errors.Join(err, block.ErrInvalid))
	}
	err = m.stripes.alone(off, func() error {
		repaired, err = m.heal(off, n, r.Vec, func() bool { return good(buf) })
		return err
	})
	return repaired, err
}

// heal is ReadGood in a track that it has alone; good looks at vec. It reads every
// copy: it was called because one of them is bad, and that need not be the one
// that is read first.
func (m *Mirror) heal(off, n int64, vec [][]byte, good func() bool) (repaired int, err error) {
	var bad, sound marked
	var errs []error
	last := -1 // whose bytes are in vec, if it is a sound one
	// A checksum proves also what a copy holds that lacks the newest; in what is
	// not verified good knows less.
	for _, i := range m.sources(m.trusted(off) || !m.isOld(off, n)) {
		c := m.copies[i]
		d := c.present()
		if d == nil {
			continue
		}
		if err := d.transfer(hpdi.OpRead, off, vec...); err != nil {
			c.readErrors.Add(1)
			errs = append(errs, err)
		} else if good() {
			sound[i], last = d, i
			continue
		}
		bad[i], last = d, -1
	}
	// What was read last may be a bad one. A copy that was sound need not be so
	// when it is read again.
	for i, d := range sound {
		if d == nil || last >= 0 {
			continue
		}
		if planted.Has(planted.MirrorHealsWithBad) {
			last = i
			break
		}
		err := d.transfer(hpdi.OpRead, off, vec...)
		if err == nil && good() {
			last = i
			continue
		}
		errs = append(errs, err)
		sound[i], bad[i] = nil, d
	}
	if last < 0 {
		return 0, errors.Join(append(errs, &block.CorruptError{What: "every copy of a block",
			Where: fmt.Sprintf("byte %d of %s", off, m.info.Name), Why: "none has the expected checksum"})...)
	}
	for _, d := range bad {
		if d != nil {
			repaired++
		}
	}
	differ := m.isOld(off, n) && !m.trusted(off)
	if differ {
		// Sound copies, too: all become what was decided by.
		bad = m.disks()
		bad[last] = nil
	}
	return repaired, m.rewrite(off, n, vec, bad, !differ)
}

// Settle writes p to the copies that hold something else at off, and makes it
// durable, see [hpdi.Copies]. p must suit direct I/O.
func (m *Mirror) Settle(off int64, p []byte) (written int, err error) {
	r := hpdi.Request{Op: hpdi.OpRead, Offset: off, Vec: [][]byte{p}}
	if err := r.Check(m.info); err != nil || m.info.ReadOnly {
		return 0, err
	}
	buf, err := hpdi.AllocPrivate(min(len(p), block.TrackBytes))
	if err != nil {
		return 0, err
	}
	defer func() { _ = hpdi.Free(buf) }()
	for done := int64(0); done < r.Bytes(); {
		at := off + done
		n := min(r.Bytes()-done, block.TrackBytes-at%block.TrackBytes)
		part := p[done:][:n]
		err := m.stripes.alone(at, func() error {
			other := m.disks()
			for i, d := range other {
				if d != nil && d.transfer(hpdi.OpRead, at, buf[:n]) == nil && bytes.Equal(buf[:n], part) {
					other[i] = nil
				} else if d != nil {
					written++
				}
			}
			return m.rewrite(at, n, [][]byte{part}, other, false)
		})
		if err != nil {
			return written, err
		}
		done += n
	}
	if written == 0 {
		return 0, nil
	}
	m.mark.Lock()
	defer m.mark.Unlock()
	return written, m.storeLocked((*disk).flush)
}

// NumCopies returns how many copies the mirror has, absent ones included.
func (m *Mirror) NumCopies() int { return len(m.copies) }

// ReadCopy reads at off from copy i alone, see [hpdi.Copies].
func (m *Mirror) ReadCopy(i int, off int64, vec ...[]byte) error {
	r := hpdi.Request{Op: hpdi.OpRead, Offset: off, Vec: vec}
	if err := r.Check(m.info); err != nil || i < 0 || i >= len(m.copies) {
		return fmt.Errorf("read copy %d of %s at %d: %w", i+1, m.info.Name, off, errors.Join(err, block.ErrInvalid))
	}
	c := m.copies[i]
	d := c.present()
	if d == nil || !c.is(InSync) || !m.trusted(off) && m.isOld(off, r.Bytes()) {
		return fmt.Errorf("copy %d of %s: %w", i+1, m.info.Name, hpdi.ErrNoCopy)
	}
	err := d.transfer(hpdi.OpRead, off, vec...)
	if errors.Is(err, errRetired) {
		return fmt.Errorf("copy %d of %s: %w", i+1, m.info.Name, hpdi.ErrNoCopy)
	}
	if err != nil {
		c.readErrors.Add(1)
	}
	return err
}

// cut returns the bytes [from, from+n) of vec.
func cut(vec [][]byte, from, n int64) [][]byte {
	var out [][]byte
	for _, v := range vec {
		if size := int64(len(v)); from >= size {
			from -= size
			continue
		}
		v = v[from:]
		from = 0
		if int64(len(v)) > n {
			v = v[:n]
		}
		if len(v) > 0 {
			out = append(out, v)
		}
		if n -= int64(len(v)); n == 0 {
			break
		}
	}
	return out
}
