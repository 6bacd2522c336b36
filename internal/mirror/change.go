package mirror

import (
	"errors"
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/planted"
)

// ErrTakenOut is why a copy is absent that was taken out by command.
var ErrTakenOut = errors.New("taken out by command")

// Detach takes copy i out, as if it had failed, and closes its device once
// nobody uses it. It is refused when no copy in sync would remain.
func (m *Mirror) Detach(i int) error {
	if i < 0 || i >= len(m.copies) {
		return fmt.Errorf("copy %d of %s, which has %d: %w", i+1, m.info.Name, len(m.copies), block.ErrNotFound)
	}
	var lost marked
	lost[i] = m.copies[i].present()
	return m.lose(lost, ErrTakenOut)
}

// Attach takes a copy back that was absent. It gets what it missed by Resync.
// The mirror closes the device, after an error at once.
func (m *Mirror) Attach(dev hpdi.Device) error {
	f, err := readHeader(dev)
	if err != nil {
		return errors.Join(err, dev.Close())
	}
	m.mark.Lock()
	defer m.mark.Unlock()
	err = m.fits(dev)
	if err == nil && f.id != m.id {
		err = fmt.Errorf("device %s is a copy of mirror %v, not of %v: %w", dev.Info().Name, f.id, m.id, block.ErrInvalid)
	}
	var i int
	if err == nil {
		i, err = m.placeOf(f)
	}
	if err == nil && !m.copies[i].is(Absent) {
		err = fmt.Errorf("copy %d of %s is there: %w", i+1, m.info.Name, block.ErrExists)
	}
	if err == nil {
		err = writeMap(f.disk, m.encodeMapLocked(allPages))
	}
	if err == nil {
		err = m.admitLocked(f.disk, i, m.head.copies[i].id)
	}
	if err != nil {
		return errors.Join(err, f.disk.retire())
	}
	return nil
}

// Replace puts a device that is no copy of anything in the place of copy i, and
// leaves that one out. Resync fills it. The mirror closes the device, after an
// error at once.
func (m *Mirror) Replace(i int, dev hpdi.Device) error {
	m.mark.Lock()
	defer m.mark.Unlock()
	d := newDisk(dev)
	if err := m.replaceLocked(i, d); err != nil {
		return errors.Join(err, d.retire())
	}
	return nil
}

func (m *Mirror) replaceLocked(i int, d *disk) error {
	if i < 0 || i >= len(m.copies) {
		return fmt.Errorf("copy %d of %s, which has %d: %w", i+1, m.info.Name, len(m.copies), block.ErrNotFound)
	}
	if err := m.fits(d.dev); err != nil {
		return err
	}
	if !slices.ContainsFunc(m.copies, func(c *copyOf) bool { return c != m.copies[i] && c.is(InSync) }) {
		return fmt.Errorf("replace copy %d of %s, the only one that has everything: %w", i+1, m.info.Name, block.ErrInvalid)
	}
	// Out first: from here on the marks say what it lacks.
	var lost marked
	lost[i] = m.copies[i].present()
	if err := m.loseLocked(lost, ErrTakenOut); err != nil {
		return err
	}
	m.stored.Fill(m.regions())
	if err := m.storeMapLocked(allPages); err != nil {
		return err
	}
	if err := m.formatLocked(d); err != nil {
		return err
	}
	return m.admitLocked(d, i, newDeviceID())
}

// fits checks that a device can be a copy.
func (m *Mirror) fits(dev hpdi.Device) error {
	info := dev.Info()
	switch {
	case info.ReadOnly:
		return fmt.Errorf("device %s for %s: %w", info.Name, m.info.Name, hpdi.ErrReadOnly)
	case uint64(info.Size)/block.Size < m.head.blocks+reserved:
		return fmt.Errorf("device %s has %d blocks, a copy of %s needs %d: %w", info.Name, info.Size/block.Size, m.info.Name, m.head.blocks+reserved, block.ErrInvalid)
	case info.Direct && !m.info.Direct, !info.Discard && m.info.Discard, !info.Zeroes && m.info.Zeroes, !info.Durable && m.info.Durable:
		return fmt.Errorf("device %s does not do what the other copies of %s can (discard, write zeroes, durable writes, unaligned memory); open the mirror with it: %w", info.Name, m.info.Name, block.ErrUnsupported)
	}
	return nil
}

// admitLocked makes a disk that has the map copy i, with an identity. It is
// resilvering.
func (m *Mirror) admitLocked(d *disk, i int, id block.DeviceID) error {
	// What was marked while the copy was away it lacks. Old before present, so
	// that nobody reads from it what it has not.
	if !planted.Has(planted.MirrorReturnNotFilled) {
		m.old.Or(m.stored)
	}
	m.doubts++
	m.copies[i].disk.Store(d)
	m.copies[i].state.Store(uint32(Resilvering))
	err := m.changeLocked(d, func(copies []member) { copies[i] = member{id: id, state: Resilvering} })
	if err != nil {
		// The headers say that it is absent, or will; its own may say more.
		m.copies[i].state.Store(uint32(Absent))
		m.head.copies[i].since = m.tried
		return fmt.Errorf("make device %s copy %d of %s: %w", d.dev.Info().Name, i+1, m.info.Name, err)
	}
	return nil
}
