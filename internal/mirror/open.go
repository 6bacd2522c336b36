package mirror

import (
	crand "crypto/rand"
	"errors"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"sync/atomic"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/planted"
	"github.com/pollux-storage/pollux/internal/stack"
)

// Create makes a mirror of devices, all in sync: what nobody has written yet may
// read differently from each. The mirror is as large as the smallest of them,
// less 1 MiB. The devices remain open.
func Create(devs []hpdi.Device) (ID, error) {
	var id ID
	if len(devs) < 2 || len(devs) > MaxCopies {
		return id, fmt.Errorf("a mirror of %d devices; 2 to %d are possible: %w", len(devs), MaxCopies, block.ErrInvalid)
	}
	_, _ = crand.Read(id[:]) // documented never to fail
	h := header{id: id, generation: 1, blocks: block.MaxDeviceBlocks}
	for _, d := range devs {
		h.blocks = min(h.blocks, uint64(d.Info().Size)/block.Size)
		h.copies = append(h.copies, member{id: newDeviceID(), state: InSync})
	}
	if h.blocks < 2*reserved {
		return id, fmt.Errorf("the smallest device of the mirror has %d blocks, it needs at least %d: %w", h.blocks, 2*reserved, block.ErrInvalid)
	}
	h.blocks -= reserved
	h.shift = shiftFor(h.blocks)
	m, err := newMirror(h, devs)
	if err != nil {
		return id, err
	}
	defer func() { _ = m.free() }()
	for i, dev := range devs {
		d := newDisk(dev)
		if err := errors.Join(m.formatLocked(d), m.writeHeaderLocked(d, i, h), d.queues.Release()); err != nil {
			return id, fmt.Errorf("make device %s a copy of a mirror: %w", dev.Info().Name, err)
		}
	}
	return id, nil
}

func newDeviceID() (id block.DeviceID) {
	_, _ = crand.Read(id[:]) // documented never to fail
	return id
}

// newMirror returns a mirror without copies.
func newMirror(h header, devs []hpdi.Device) (*Mirror, error) {
	m := &Mirror{id: h.id, info: describe(devs), head: h, tried: h.generation, mark: stack.NewLock(), remember: func(ID, uint64) {}, queues: map[*queue]struct{}{}}
	m.fit()
	m.show()
	m.stripes.init()
	var err error
	if m.page, err = hpdi.AllocPrivate((1 + mapPages) * block.Size); err == nil {
		m.resync.buf, err = hpdi.AllocPrivate(block.TrackBytes)
	}
	if err != nil {
		return nil, errors.Join(err, m.free())
	}
	return m, nil
}

// fit makes the mirror one of as many blocks as its header says. Nobody uses it yet.
func (m *Mirror) fit() {
	blocks := m.head.blocks
	m.shift, m.info.Size = m.head.shift, int64(blocks)*block.Size
	m.verified.Store(m.info.Size)
	n := int((blocks-1)>>m.shift) + 1
	for _, b := range []*stack.Bits{&m.live, &m.old, &m.touched, &m.stored} {
		*b = b.Resized(n)
	}
	m.writers = make([]atomic.Int32, n)
}

// formatLocked prepares a disk to be a copy: what an earlier mirror left there is
// overwritten before the header that makes it one.
func (m *Mirror) formatLocked(d *disk) error {
	zero := m.page[:block.Size]
	clear(zero)
	for _, b := range headerSlots {
		if err := writeBlock(d, b, zero); err != nil {
			return err
		}
	}
	return writeMap(d, m.encodeMapLocked(allPages))
}

// found is a device with what its newest header says.
type found struct {
	disk *disk
	header
}

// readHeader returns the newest header of a device. ondisk.ErrMagic says that it
// is no copy of a mirror.
func readHeader(dev hpdi.Device) (*found, error) {
	buf, err := hpdi.AllocPrivate(block.Size)
	if err != nil {
		return nil, err
	}
	defer func() { _ = hpdi.Free(buf) }()
	f := &found{disk: newDisk(dev)}
	var errs []error
	for slot, b := range headerSlots {
		err := f.disk.do(&hpdi.Request{Op: hpdi.OpRead, Offset: int64(b) * block.Size, Vec: [][]byte{buf}})
		var h header
		if err == nil {
			h, err = decodeHeader(buf)
		}
		switch {
		case errors.Is(err, ondisk.ErrVersion):
			return nil, errors.Join(fmt.Errorf("device %s: %w", dev.Info().Name, err), f.disk.queues.Release())
		case err != nil:
			errs = append(errs, fmt.Errorf("block %d: %w", b, err))
		case h.generation > f.generation:
			f.header, f.disk.slot = h, slot
		}
	}
	if f.generation == 0 {
		return nil, errors.Join(fmt.Errorf("device %s is no copy of a mirror: %w", dev.Info().Name, errors.Join(errs...)), f.disk.queues.Release())
	}
	return f, nil
}

// Options says which mirror to open.
type Options struct {
	// Devices are copies of one mirror, in any order, opened under their
	// locks. The mirror closes them; after an error they are the caller's.
	Devices []hpdi.Device
	// Degraded opens the mirror although copies are missing that were in sync
	// when it was written last.
	Degraded bool
	// Known, if set, returns the newest generation of a mirror that Remember
	// was told, 0 for none. A mirror of which only older copies are given is
	// refused: they were left out, and lack what was written then. After an
	// error all copies that the newest of them names must be given.
	Known func(ID) (uint64, error)
	// Remember, if set, is told each generation as soon as it is durable on the
	// copies, and before anything is acknowledged that a copy lacks which was
	// left out with it. What it is told must survive what devices survive.
	Remember func(id ID, generation uint64)
	// ReadOnly writes nothing. Copies that lack something are left alone.
	ReadOnly bool
	// LeftOut, if set, is told of a device that cannot be the copy that it once
	// was, because it has shrunk or was replaced, and why. The mirror is opened
	// without it; Open has closed it. Otherwise such a device is an error.
	LeftOut func(dev hpdi.Device, why error)
	// Each, if set, calls f with 0 to n-1 and returns when all calls have returned. It
	// may call f for several at once: then so many mirrors are looked at together, and
	// Known and Remember are called by several. One after the other if nil.
	Each func(n int, f func(i int))
}

// each is Each, or one after the other.
func (o *Options) each(n int, f func(i int)) {
	if o.Each != nil {
		o.Each(n, f)
		return
	}
	for i := range n {
		f(i)
	}
}

// ErrMissing says that a copy is missing which was in sync.
var ErrMissing = errors.New("a copy that was in sync is missing; give it, or open the mirror degraded")

// Open opens a mirror. Regions that were being written to when it was used last,
// and copies that were absent, are made equal by Resync.
func Open(o Options) (*Mirror, error) {
	founds, err := readHeaders(o.Devices)
	if err != nil {
		return nil, err
	}
	m, err := openFound(founds, o)
	if err != nil {
		return nil, err
	}
	m.leaveOut(o)
	return m.mirror, nil
}

// opening is a mirror that was opened, and the devices that it was opened without.
type opening struct {
	mirror *Mirror
	unfit  []misfit
}

// leaveOut closes those devices, and tells of them.
func (m *opening) leaveOut(o Options) {
	for _, f := range m.unfit {
		_ = f.disk.retire() // what it holds is of no use
		o.LeftOut(f.disk.dev, f.why)
	}
}

// openFound is Open for devices of one mirror whose headers were read. The caller leaves
// out what is unfit.
func openFound(founds []*found, o Options) (_ opening, err error) {
	defer func() {
		if err != nil {
			for _, f := range founds {
				err = errors.Join(err, f.disk.queues.Release())
			}
		}
	}()
	newest := founds[0].header
	var devs []hpdi.Device
	for _, f := range founds {
		devs = append(devs, f.disk.dev)
		if f.generation > newest.generation {
			newest = f.header
		}
	}
	m, err := newMirror(newest, devs)
	if err != nil {
		return opening{}, err
	}
	m.info.ReadOnly = o.ReadOnly
	if o.Remember != nil && !o.ReadOnly {
		m.remember = o.Remember
	}
	for range newest.copies {
		m.copies = append(m.copies, &copyOf{})
	}
	unfit, err := m.assemble(founds, o)
	if err != nil {
		return opening{}, errors.Join(err, m.free())
	}
	return opening{m, unfit}, nil
}

// readHeaders reads the headers of devices that must be of one mirror.
func readHeaders(devs []hpdi.Device) ([]*found, error) {
	if len(devs) == 0 {
		return nil, fmt.Errorf("a mirror needs at least one of its devices: %w", block.ErrInvalid)
	}
	var founds []*found
	for _, dev := range devs {
		f, err := readHeader(dev)
		if err == nil && len(founds) > 0 && f.id != founds[0].id {
			err = errors.Join(fmt.Errorf("device %s is a copy of mirror %v, device %s of %v: %w",
				dev.Info().Name, f.id, devs[0].Info().Name, founds[0].id, block.ErrInvalid), f.disk.queues.Release())
		}
		if err != nil {
			for _, f := range founds {
				err = errors.Join(err, f.disk.queues.Release())
			}
			return nil, err
		}
		founds = append(founds, f)
	}
	return founds, nil
}

// misfit is a device that cannot be the copy that it was, and why.
type misfit struct {
	*found
	why error
}

// ErrOld says that only copies are there that were left out of a mirror.
var ErrOld = errors.New("it lacks what was written after it had been left out: give the other copy, or set accept_loss for the pool to go on without that")

// assemble puts the disks into their places, writes a new header if states have
// changed, and returns the disks that have no place.
func (m *Mirror) assemble(founds []*found, o Options) (unfit []misfit, err error) {
	m.mark.Lock()
	defer m.mark.Unlock()
	var known uint64
	var unknown error
	if o.Known != nil {
		known, unknown = o.Known(m.id)
	}
	if m.head.generation < known {
		return nil, fmt.Errorf("%s: the newest copy given is of generation %d, there was one of %d: %w", m.info.Name, m.head.generation, known, ErrOld)
	}
	next := m.head
	next.copies = slices.Clone(next.copies)
	var back []returning
	behind := false // a copy does not have the newest header: its writing was interrupted
	for _, f := range founds {
		i, err := m.placeOf(f)
		if err == nil && m.copies[i].disk.Load() != nil {
			err = fmt.Errorf("device %s is a second one of copy %d of %s: %w", f.disk.dev.Info().Name, i+1, m.info.Name, block.ErrInvalid)
		}
		switch {
		case err != nil && o.LeftOut == nil:
			return nil, err
		case err != nil:
			unfit = append(unfit, misfit{f, err})
			continue
		}
		m.copies[i].disk.Store(f.disk)
		if next.copies[i].state == Absent && !o.ReadOnly {
			back = append(back, returning{f, i})
			next.copies[i].state = Resilvering
		}
		behind = behind || f.generation < m.head.generation && !planted.Has(planted.MirrorHeaderBehind)
	}
	var missing []string
	for i, c := range m.copies {
		if c.disk.Load() == nil && unknown != nil {
			return nil, fmt.Errorf("%s without copy %d: %w", m.info.Name, i+1, unknown)
		}
		if c.disk.Load() == nil && next.copies[i].state != Absent {
			missing = append(missing, fmt.Sprint(i+1))
			next.copies[i].state, next.copies[i].since = Absent, m.head.generation
		}
	}
	switch {
	case next.wrong() != "":
		return nil, fmt.Errorf("%s: only copies that lack something were given: %w", m.info.Name, ErrMissing)
	case len(missing) > 0 && !o.Degraded:
		return nil, fmt.Errorf("%s: copy %s: %w", m.info.Name, strings.Join(missing, ", "), ErrMissing)
	}
	mute, err := m.startLocked(next, back, behind)
	if err == nil && !o.ReadOnly {
		err = m.growLocked()
	}
	switch {
	case err != nil:
		return nil, err
	case len(mute) > 0 && o.LeftOut == nil:
		return nil, mute[0].why
	case m.head.generation > known && !o.ReadOnly:
		m.remember(m.id, m.head.generation)
	}
	return append(unfit, mute...), nil
}

// returning is a device that is copy index of a mirror, and was absent.
type returning struct {
	*found
	index int
}

// startLocked reads the map and begins with the states of a header, which it writes
// if they are new or a copy is behind: whoever remembers the newest generation would
// not take that copy alone. back are the copies that were absent. It returns those of
// them that take no writes: they remain absent.
func (m *Mirror) startLocked(next header, back []returning, behind bool) (mute []misfit, err error) {
	if err := m.loadMapLocked(); err != nil {
		return nil, err
	}
	for _, f := range back {
		if err := writeMap(f.disk, m.encodeMapLocked(allPages)); err != nil {
			mute = append(mute, misfit{f.found, fmt.Errorf("device %s of %s: %w", f.disk.dev.Info().Name, m.info.Name, err)})
			next.copies[f.index] = m.head.copies[f.index]
			m.copies[f.index].disk.Store(nil)
		}
	}
	changed := behind || !slices.Equal(next.copies, m.head.copies)
	for i, c := range m.copies {
		if c.disk.Load() != nil {
			c.state.Store(uint32(next.copies[i].state))
		}
	}
	if !changed || m.info.ReadOnly {
		return mute, nil
	}
	// A copy that is missing may be opened elsewhere, by itself, or have been,
	// and go on counting. So that both do not count alike, the generation jumps.
	m.tried += jump + uint64(rand.Uint32()>>8)
	return mute, m.changeLocked(nil, func(copies []member) { copy(copies, next.copies) })
}

// jump is more than a mirror changes while it is open.
const jump = 1 << 20

// placeOf returns which copy a device is.
func (m *Mirror) placeOf(f *found) (int, error) {
	name := f.disk.dev.Info().Name
	own := f.copies[f.index].id
	i := slices.IndexFunc(m.head.copies, func(c member) bool { return c.id == own })
	switch {
	case i < 0:
		return 0, fmt.Errorf("device %s was a copy of %s and has been replaced since: %w", name, m.info.Name, block.ErrInvalid)
	case uint64(f.disk.dev.Info().Size)/block.Size < m.head.blocks+reserved:
		return 0, fmt.Errorf("device %s of %s has shrunk to %d blocks; make it as large as it was: %w", name, m.info.Name, f.disk.dev.Info().Size/block.Size, block.ErrInvalid)
	case m.head.copies[i].state == Absent && f.generation > m.head.copies[i].since:
		return 0, fmt.Errorf("device %s and the others of %s have each been written to without the other; replace the one that is to be given up: %w", name, m.info.Name, block.ErrInvalid)
	}
	return i, nil
}

// readMapPageLocked adds page n of the map of a disk to words.
func (m *Mirror) readMapPageLocked(d *disk, n int, words stack.Bits) error {
	buf := m.page[:block.Size]
	if err := d.do(&hpdi.Request{Op: hpdi.OpRead, Offset: int64(mapStart+n) * block.Size, Vec: [][]byte{buf}}); err != nil {
		return err
	}
	return decodeMapPage(buf, m.id, n, words)
}

// loadMapLocked reads the map of the copies in sync: what any of them names is
// old. A page that none of them has whole names everything.
//
// Nothing is live yet: a guest that died while it wrote the map has left a mark on
// one copy alone, or where a power cut takes it. The first write stores it again.
func (m *Mirror) loadMapLocked() error {
	for n := range mapPages {
		lo, hi := n*pageBits, min((n+1)*pageBits, m.regions())
		if lo >= hi {
			break
		}
		whole := 0
		for i, c := range m.copies {
			d := c.disk.Load()
			if d == nil || m.head.copies[i].state != InSync {
				continue
			}
			err := m.readMapPageLocked(d, n, m.stored)
			switch {
			case errors.Is(err, ondisk.ErrVersion):
				return fmt.Errorf("map of %s: %w", m.info.Name, err)
			case err == nil:
				whole++
			}
		}
		for i := lo; whole == 0 && i < hi; i++ {
			m.stored.Set(i)
		}
	}
	m.old.Or(m.stored)
	return nil
}
