package mirror

import (
	"errors"
	"strings"
	"sync"
	"sync/atomic"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/stack"
)

// Mirror is an open mirror. Its methods may be called concurrently unless they
// say otherwise.
type Mirror struct {
	id     ID
	info   hpdi.Info
	shift  uint // log2 of the blocks of a region
	copies []*copyOf

	// stored are the regions that the map on some copy may name. Those of them
	// whose bits are durable on all copies that are there are live: a bit of live
	// is set only after that. Both change with mark held.
	stored, live stack.Bits
	// old are the regions in which copies may differ.
	old stack.Bits
	// touched are the regions that a write began in since Tidy looked, and
	// writers counts those under way.
	touched stack.Bits
	writers []atomic.Int32

	// verified is where the bytes begin that whoever reads them checks, see
	// Verified; the size of the mirror until it is called.
	verified atomic.Int64
	// unused tells what nobody reads, see Unused; nil until it is called.
	unused atomic.Pointer[func(off, n int64) bool]

	stripes stripes

	mark   stack.Lock
	head   header                 // the newest durable one; guarded by mark, as all that follows
	tried  uint64                 // highest generation of a header that was begun
	page   []byte                 // memory for what is written: a header, the map
	shown  atomic.Pointer[header] // a copy of head for Status, which does not hold mark
	doubts uint64                 // how often something became old since the mirror was opened
	// remember is Options.Remember, or does nothing.
	remember func(ID, uint64)

	queuesMu sync.Mutex
	queues   map[*queue]struct{} // that are open; guarded by queuesMu

	resync resync
	reads  atomic.Uint32 // takes turns between copies that are equally busy
	closed atomic.Bool
}

var _ hpdi.Copies = (*Mirror)(nil)

// Info describes the mirror. It does not change while the mirror is open, but for Rotates: it
// does as long as one of the copies that are there does.
func (m *Mirror) Info() hpdi.Info {
	info := m.info
	for _, c := range m.copies {
		if d := c.disk.Load(); d != nil {
			info.Rotates = info.Rotates || d.dev.Info().Rotates
		}
	}
	return info
}

// ID returns the mirror's identity.
func (m *Mirror) ID() ID { return m.id }

// Generation returns that of the newest header, see [Options.Known].
func (m *Mirror) Generation() uint64 {
	m.mark.Lock()
	defer m.mark.Unlock()
	return m.head.generation
}

// Register makes memory known to all copies.
func (m *Mirror) Register(mem []byte) error {
	return m.each(func(d hpdi.Device) error { return d.Register(mem) })
}

// Unregister makes all copies forget memory, those that came later and have never
// known it included.
func (m *Mirror) Unregister(mem []byte) error {
	return m.each(func(d hpdi.Device) error { return d.Unregister(mem) })
}

// each calls a function with the devices of the copies that are there.
func (m *Mirror) each(do func(hpdi.Device) error) error {
	var errs []error
	for _, c := range m.copies {
		if d := c.present(); d != nil && d.use() {
			errs = append(errs, do(d.dev), d.unuse())
		}
	}
	return errors.Join(errs...)
}

// Close closes the copies. All queues must have been closed, and nothing else
// may be under way.
func (m *Mirror) Close() error {
	if m.closed.Swap(true) {
		return hpdi.ErrClosed
	}
	errs := []error{m.free()}
	for _, c := range m.copies {
		if d := c.disk.Load(); d != nil {
			errs = append(errs, d.retire())
		}
	}
	return errors.Join(errs...)
}

func (m *Mirror) free() error { return errors.Join(hpdi.Free(m.page), hpdi.Free(m.resync.buf)) }

// describe makes the Info of a mirror of devices.
func describe(devs []hpdi.Device) hpdi.Info {
	var names []string
	info := hpdi.Info{Driver: "mirror", BlockSize: block.Size, Discard: true, Zeroes: true, Durable: true}
	for _, d := range devs {
		i := d.Info()
		names = append(names, i.Name)
		info.Direct = info.Direct || i.Direct
		info.Discard = info.Discard && i.Discard
		info.Zeroes = info.Zeroes && i.Zeroes
		info.Durable = info.Durable && i.Durable
	}
	info.Name = "mirror of " + strings.Join(names, ", ")
	return info
}

// Verified says that whoever reads bytes from off on, a multiple of 1 MiB, knows
// their checksum and turns to ReadGood when it is wrong, and that what was being
// written when the mirror was used last is of interest to nobody. There copies
// in sync are not made equal after a crash: that would copy the decay of one
// over the sound block of the other.
func (m *Mirror) Verified(off int64) {
	m.verified.Store((off + block.TrackBytes - 1) / block.TrackBytes * block.TrackBytes)
}

// Unused says with a function of what lies in the verified part that nobody reads it
// before it is written again. Resync does not fill copies with it.
func (m *Mirror) Unused(unused func(off, n int64) bool) { m.unused.Store(&unused) }

// unread reports whether nobody reads what is in a range of one track, which the
// caller has alone, before it is written again.
func (m *Mirror) unread(off, n int64) bool {
	unused := m.unused.Load()
	return unused != nil && m.trusted(off) && (*unused)(off, n)
}

// regions returns how many regions the mirror has.
func (m *Mirror) regions() int { return len(m.writers) }

// regionsOf returns the regions of a range of bytes as [lo, hi).
func (m *Mirror) regionsOf(off, n int64) (lo, hi int) {
	if n == 0 {
		return 0, 0
	}
	return int(off / block.Size >> m.shift), int((off+n-1)/block.Size>>m.shift) + 1
}

// trusted reports whether copies in sync need not be made equal in what lies
// from off on.
func (m *Mirror) trusted(off int64) bool { return off >= m.verified.Load() }

// isOld reports whether copies may differ in a range.
func (m *Mirror) isOld(off, n int64) bool {
	lo, hi := m.regionsOf(off, n)
	i := m.old.Next(lo)
	return i >= 0 && i < hi
}

// begin announces writes to ranges, each an offset and a length: it returns when
// the bits of their regions are durable. end must follow unless it fails.
func (m *Mirror) begin(ranges ...[2]int64) error {
	known := true
	for _, r := range ranges {
		lo, hi := m.regionsOf(r[0], r[1])
		for i := lo; i < hi; i++ {
			// In this order, which Tidy relies on.
			m.writers[i].Add(1)
			m.touched.Set(i)
			known = known && m.live.Has(i)
		}
	}
	if known {
		return nil
	}
	m.mark.Lock()
	defer m.mark.Unlock()
	var regions [][2]int
	for _, r := range ranges {
		lo, hi := m.regionsOf(r[0], r[1])
		regions = append(regions, [2]int{lo, hi})
	}
	if err := m.markLocked(regions...); err != nil {
		for _, r := range ranges {
			m.end(r[0], r[1])
		}
		return err
	}
	return nil
}

// end says that a write is complete.
func (m *Mirror) end(off, n int64) {
	lo, hi := m.regionsOf(off, n)
	for i := lo; i < hi; i++ {
		m.writers[i].Add(-1)
	}
}

// distrust makes a range one in which copies may differ.
func (m *Mirror) distrust(off, n int64) {
	m.mark.Lock()
	defer m.mark.Unlock()
	lo, hi := m.regionsOf(off, n)
	for i := lo; i < hi; i++ {
		m.old.Set(i)
	}
	m.doubts++
}

// CopyStatus describes a copy.
type CopyStatus struct {
	ID    block.DeviceID
	Info  hpdi.Info // of its device; zero while there is none
	State State
	// Errors of the device since the mirror was opened, and ranges that were
	// written again because they could not be read or were wrong.
	ReadErrors, WriteErrors, Repaired uint64
}

// Status describes a mirror.
type Status struct {
	Generation uint64
	Copies     []CopyStatus
	// Bytes in regions that Resync has yet to visit, and in regions that are
	// marked on the copies.
	OldBytes, MarkedBytes int64
}

// Status returns the present state.
func (m *Mirror) Status() Status {
	head := m.shown.Load() // who holds mark may wait for a device
	region := int64(block.Size) << m.shift
	s := Status{Generation: head.generation, OldBytes: int64(m.old.Count()) * region, MarkedBytes: int64(m.stored.Count()) * region}
	for i, c := range m.copies {
		cs := CopyStatus{ID: head.copies[i].id, State: State(c.state.Load()),
			ReadErrors: c.readErrors.Load(), WriteErrors: c.writeErrors.Load(), Repaired: c.repaired.Load()}
		if d := c.disk.Load(); d != nil {
			cs.Info = d.dev.Info()
		}
		s.Copies = append(s.Copies, cs)
	}
	return s
}

// errNoCopy says that nothing is left that could be asked.
var errNoCopy = errors.New("no copy that is in sync can be reached")
