package mirror

import (
	"errors"
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/planted"
)

// marked is a set of copies with the disks that are meant: a copy that has got
// another disk since is not meant.
type marked [MaxCopies]*disk

func (s marked) empty() bool { return s == marked{} }

// storeLocked calls write for the disk of each copy that is there. Those that
// fail are lost; an error says that without them no copy would be in sync.
func (m *Mirror) storeLocked(write func(d *disk) error) error {
	var lost marked
	var errs []error
	for i, c := range m.copies {
		d := c.present()
		if d == nil {
			continue
		}
		if err := write(d); err != nil {
			c.writeErrors.Add(1)
			lost[i] = d
			errs = append(errs, err)
		}
	}
	return m.loseLocked(lost, errors.Join(errs...))
}

// lose leaves copies out because of an error, and returns when the others know
// it durably: only then may something be acknowledged that the lost ones do not
// have. It returns an error, and leaves nobody out, when no copy that is in sync
// would remain.
func (m *Mirror) lose(lost marked, cause error) error {
	if lost.empty() {
		return nil
	}
	defer m.sweep()
	m.mark.Lock()
	defer m.mark.Unlock()
	for i, d := range lost {
		if d != nil && m.copies[i].present() != d {
			lost[i] = nil // it is out already
		}
	}
	return m.loseLocked(lost, cause)
}

func (m *Mirror) loseLocked(lost marked, cause error) error {
	if lost.empty() {
		return nil
	}
	for {
		h := m.nextHeaderLocked()
		left := false // a copy that is in sync and here; the header may count on one that is missing
		for i, d := range lost {
			if d != nil {
				h.copies[i].state, h.copies[i].since = Absent, h.generation
			} else if i < len(m.copies) && m.copies[i].present() != nil {
				left = left || h.copies[i].state == InSync
			}
		}
		if !left {
			return errors.Join(errNoCopy, cause)
		}
		if planted.Has(planted.MirrorLossUnrecorded) {
			break
		}
		more, err := m.writeHeadersLocked(h, lost)
		if more.empty() {
			m.install(h)
			break
		}
		cause = errors.Join(cause, err)
		for i, d := range more {
			if d != nil {
				lost[i] = d
			}
		}
	}
	for i, d := range lost {
		if d != nil {
			m.copies[i].state.Store(uint32(Absent))
			_ = d.retire() // it has failed already
		}
	}
	return nil
}

// changeLocked changes what the newest header says of the copies, durably on all
// that are there, and gives the copies the states that it names. A copy that does
// not take the header is lost, and the change is made without it, unless it is
// need. After an error the headers say what they said before, but that more
// copies may be lost.
func (m *Mirror) changeLocked(need *disk, change func(copies []member)) error {
	before := m.disks()
	for {
		h := m.nextHeaderLocked()
		change(h.copies)
		for i, d := range before {
			if d != nil && m.copies[i].present() == nil {
				h.copies[i] = m.head.copies[i] // it was lost below
			}
		}
		lost, err := m.writeHeadersLocked(h, marked{})
		if lost.empty() {
			m.install(h)
			for i, c := range m.copies {
				c.state.Store(uint32(h.copies[i].state))
			}
			return nil
		}
		if e := m.loseLocked(lost, err); e != nil {
			return e
		}
		if need != nil && slices.Contains(lost[:], need) {
			return err
		}
	}
}

// install takes a header that is durable on the copies for the newest.
func (m *Mirror) install(h header) {
	m.head = h
	m.show()
	m.remember(m.id, h.generation)
}

// show lets Status see the newest header.
func (m *Mirror) show() {
	h := m.head
	h.copies = slices.Clone(h.copies)
	m.shown.Store(&h)
}

// disks returns the disks that writes go to.
func (m *Mirror) disks() (ds marked) {
	for i, c := range m.copies {
		ds[i] = c.present()
	}
	return ds
}

// writeHeadersLocked writes a header to all copies that are there, less those
// that are meant by but, and returns those that did not take it and why.
func (m *Mirror) writeHeadersLocked(h header, but marked) (failed marked, cause error) {
	for i, d := range m.disks() {
		if d == nil || but[i] != nil {
			continue
		}
		if err := m.writeHeaderLocked(d, i, h); err != nil {
			m.copies[i].writeErrors.Add(1)
			failed[i], cause = d, errors.Join(cause, err)
		}
	}
	return failed, cause
}

// nextHeaderLocked returns a copy of the newest header with a generation that no
// header had, be it one that was not completed.
func (m *Mirror) nextHeaderLocked() header {
	h := m.head
	h.copies = slices.Clone(h.copies)
	m.tried = max(m.tried, h.generation) + 1
	h.generation = m.tried
	return h
}

// writeHeaderLocked writes a header durably to the slot of the disk that does
// not hold the newest one.
func (m *Mirror) writeHeaderLocked(d *disk, index int, h header) error {
	h.index = index
	buf := m.page[:block.Size]
	copy(buf, h.encode())
	slot := 1 - d.slot
	if err := writeBlock(d, headerSlots[slot], buf); err != nil {
		return fmt.Errorf("header of copy %d: %w", index+1, err)
	}
	d.slot = slot
	return nil
}

// writeBlock writes a block of what is reserved and makes it durable.
func writeBlock(d *disk, n uint64, buf []byte) error {
	if err := d.do(&hpdi.Request{Op: hpdi.OpWrite, Offset: int64(n) * block.Size, Vec: [][]byte{buf}}); err != nil {
		return err
	}
	return d.flush()
}

// markLocked makes the bits of the regions [lo, hi) durable on all copies that
// are there.
func (m *Mirror) markLocked(ranges ...[2]int) error {
	var pages [mapPages]bool
	for _, r := range ranges {
		for i := r[0]; i < r[1]; i++ {
			if !m.live.Has(i) {
				m.stored.Set(i)
				pages[i/pageBits] = true
			}
		}
	}
	if planted.Has(planted.MirrorMarkMissing) {
		m.live.Or(m.stored)
		return nil
	}
	if err := m.storeMapLocked(pages); err != nil {
		// The bits stay in stored: they may be on some copy, and are no harm.
		return fmt.Errorf("mark regions before a write: %w", err)
	}
	return nil
}

// storeMapLocked writes the chosen pages of the map to all copies that are there.
// What they name is live then.
func (m *Mirror) storeMapLocked(pages [mapPages]bool) error {
	reqs := m.encodeMapLocked(pages)
	if len(reqs) == 0 {
		return nil
	}
	if err := m.storeLocked(func(d *disk) error { return writeMap(d, reqs) }); err != nil {
		return err
	}
	for n, written := range pages {
		if lo, hi := n*pageBits/64, min((n+1)*pageBits/64, len(m.stored)); written && lo < hi {
			m.live[lo:hi].Or(m.stored[lo:hi])
		}
	}
	return nil
}

func writeMap(d *disk, reqs []*hpdi.Request) error {
	if err := d.do(reqs...); err != nil {
		return fmt.Errorf("map of regions: %w", err)
	}
	return d.flush()
}

// encodeMapLocked makes requests that write pages of the map.
func (m *Mirror) encodeMapLocked(pages [mapPages]bool) (reqs []*hpdi.Request) {
	for n, wanted := range pages {
		if wanted && n*pageBits < m.regions() {
			p := m.page[(1+n)*block.Size:][:block.Size]
			encodeMapPage(p, m.id, n, m.stored)
			reqs = append(reqs, &hpdi.Request{Op: hpdi.OpWrite, Offset: int64(mapStart+n) * block.Size, Vec: [][]byte{p}})
		}
	}
	return reqs
}

var allPages = func() (all [mapPages]bool) {
	for i := range all {
		all[i] = true
	}
	return all
}()

// Tidy clears the marks of regions that had no write since the call before, once
// everything written to them is durable on all copies. While a copy is absent
// it does nothing: the marks say what that copy lacks. It is to be called every
// few seconds.
func (m *Mirror) Tidy() error {
	m.sweep()
	m.mark.Lock()
	defer m.mark.Unlock()
	var idle []int
	for i := m.stored.Next(0); i >= 0; i = m.stored.Next(i + 1) {
		if m.touched.Has(i) {
			m.touched.Clear(i)
		} else if m.writers[i].Load() == 0 && !m.old.Has(i) {
			idle = append(idle, i)
		}
	}
	if len(idle) == 0 || !m.completeLocked() {
		return nil
	}
	if err := m.storeLocked((*disk).flush); err != nil {
		return fmt.Errorf("flush a mirror: %w", err)
	}
	if !m.completeLocked() {
		return nil
	}
	var pages [mapPages]bool
	for _, i := range idle {
		// A write that begins now either sees the bit gone, and waits for
		// mark, or is seen here.
		live := m.live.Has(i)
		m.live.Clear(i)
		if m.writers[i].Load() > 0 || m.touched.Has(i) {
			if live {
				m.live.Set(i)
			}
			continue
		}
		m.stored.Clear(i)
		pages[i/pageBits] = true
	}
	if err := m.storeMapLocked(pages); err != nil {
		return fmt.Errorf("unmark regions of a mirror: %w", err)
	}
	return nil
}

// completeLocked reports whether no copy is absent.
func (m *Mirror) completeLocked() bool {
	return planted.Has(planted.MirrorMarkClearedEarly) || !slices.ContainsFunc(m.copies, func(c *copyOf) bool { return c.is(Absent) })
}
