package mirror

import (
	"errors"
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/internal/block"
)

// resync is how far Resync has come. It belongs to who calls it.
type resync struct {
	buf    []byte // a track
	region int    // being visited
	track  int64  // next track of it, counted from its first
	begun  bool   // the region was entered
	doubts uint64 // Mirror.doubts when it was
	unread bool   // something of it could not be read
}

// skipsAtOnce is how many tracks one call of Resync passes over at most: a
// few milliseconds of one processor.
const skipsAtOnce = 4096

// Resync makes copies equal in at most n tracks of 1 MiB of the regions that are
// old, not counting those that nobody uses, and takes copies that have everything
// back into sync. It returns true when there is nothing to do. Clients go on
// meanwhile. One caller at a time may use it.
//
// Blocks that no copy in sync can read are part of the error, and their region
// remains old: a later call tries again, after the other regions. Resync returns
// after such a region, so that who calls it can wait.
func (m *Mirror) Resync(n int) (done bool, err error) {
	s := &m.resync
	for skips := 0; n > 0 && skips < skipsAtOnce; {
		if !s.begun && !m.enterRegion() {
			return m.resilvered()
		}
		first := int64(s.region) << m.shift * block.Size
		off := first + s.track*block.TrackBytes
		end := min(first+int64(block.Size)<<m.shift, m.info.Size)
		copied, e := m.copyTrack(off, min(block.TrackBytes, end-off))
		s.unread = s.unread || e != nil
		if err = errors.Join(err, e); copied {
			n--
		} else {
			skips++
		}
		if s.track++; off+block.TrackBytes >= end {
			m.leaveRegion()
			if err != nil {
				break
			}
		}
	}
	return false, err
}

// enterRegion finds the next region that is old, after the one visited last.
func (m *Mirror) enterRegion() bool {
	m.mark.Lock()
	defer m.mark.Unlock()
	s := &m.resync
	i := m.old.Next(s.region + 1)
	if i < 0 {
		i = m.old.Next(0)
	}
	if i < 0 {
		return false
	}
	s.region, s.track, s.begun, s.doubts, s.unread = i, 0, true, m.doubts, false
	return true
}

// leaveRegion says that a region is the same on all copies, unless one was added
// or a write failed since it was entered, or something of it could not be read:
// then it is visited again.
func (m *Mirror) leaveRegion() {
	m.mark.Lock()
	defer m.mark.Unlock()
	s := &m.resync
	if s.begun = false; s.doubts == m.doubts && !s.unread {
		m.old.Clear(s.region)
		// Marked until Tidy has made the copies durable.
		m.touched.Set(s.region)
	}
}

// copyTrack makes the copies equal in a range of one track. What is verified by
// who reads it is copied only to those that lack it, and what nobody uses to none:
// copied tells whether anything was to be done.
func (m *Mirror) copyTrack(off, n int64) (copied bool, err error) {
	fill := func(c *copyOf) bool { return !m.trusted(off) || c.is(Resilvering) }
	if !slices.ContainsFunc(m.copies, func(c *copyOf) bool { return c.present() != nil && fill(c) }) {
		return false, nil
	}
	read := func(at, n int64) error {
		vec := [][]byte{m.resync.buf[at:][:n]}
		return m.stripes.alone(off, func() error {
			if m.unread(off+at, n) {
				return nil
			}
			copied = true
			return m.readAlone(off+at, n, vec, fill)
		})
	}
	if read(0, n) == nil {
		return copied, nil
	}
	// Block by block: one bad sector must not keep its neighbours apart.
	var errs []error
	for at := int64(0); at < n; at += block.Size {
		if err := read(at, block.Size); err != nil {
			errs = append(errs, fmt.Errorf("resilver block %d of %s: %w", (off+at)/block.Size, m.info.Name, err))
		}
	}
	return copied, errors.Join(errs...)
}

// resilvered takes copies that have everything into sync.
func (m *Mirror) resilvered() (bool, error) {
	m.mark.Lock()
	defer m.mark.Unlock()
	if m.old.Next(0) >= 0 {
		return false, nil
	}
	if !slices.ContainsFunc(m.copies, func(c *copyOf) bool { return c.is(Resilvering) }) {
		return true, nil
	}
	if err := m.storeLocked((*disk).flush); err != nil {
		return false, fmt.Errorf("flush copies that are resilvered: %w", err)
	}
	err := m.changeLocked(nil, func(copies []member) {
		for i := range copies {
			if copies[i].state == Resilvering {
				copies[i].state = InSync
			}
		}
	})
	if err != nil {
		return false, fmt.Errorf("take copies into sync: %w", err)
	}
	return true, nil
}
