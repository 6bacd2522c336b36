package flashmap

import (
	"errors"
	"fmt"
	"math"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/stack"
)

// Device is a primary device whose data sets may be on flash. It is an [hpdi.Copies]
// when the primary or the flash device is one.
type Device interface {
	hpdi.Device
	// OnFlash tells whether the byte at off is on flash, where no seek is needed to
	// reach it, and where the range of bytes ends of which that is known. It takes no
	// longer than looking up one data set.
	OnFlash(off int64) (on bool, end int64)
	// NextOnFlash returns the first range of bytes from off on that is on flash,
	// as [start, end); without one start and end are the size of the device. Whoever
	// looks for free blocks in cheap places goes from one to the next. Data sets that
	// are lost count as well: they are no place for anything, and writes to them fail.
	NextOnFlash(off int64) (start, end int64)
	// Reach returns how many bytes at the front of the primary the map has room for: what
	// lies behind stays there.
	Reach() int64
	// LeastCopies returns how many copies there are of each block at least, wherever its
	// data set is.
	LeastCopies() int
	// Detach is Close that leaves the primary open, and returns it.
	Detach() (hpdi.Device, error)
	// Busy reports whether requests of users, those of moves apart, are under way at the
	// primary. Moves that wait until none are delay users least.
	Busy() bool
}

// Range is a range of bytes of a device.
type Range struct{ Offset, Length int64 }

// Primary says what a primary device is.
type Primary struct {
	Number int            // less than MaxPrimaries: by it the flash device knows it
	ID     block.DeviceID // which device it is: another one of this number is refused
	// Fixed are ranges that are never on flash: labels, superblocks, journal.
	Fixed []Range
	// Unused, if set, says of a range, in bytes, that nobody reads it before it is written
	// again: then the copies of a mirror need not be alike there when it is moved. It is
	// asked for blocks of 4 KiB and more, and must not use the device.
	Unused func(off, n int64) bool
	// Clock tells the time, from any moment on, for how long requests take; nil is the
	// system's monotonic clock.
	Clock func() time.Duration
	// Observe, if set, is called for each queue that is opened, and returns who is told
	// of its requests.
	Observe func() Observer
}

// Observer is told how a device is used through one queue, by whoever uses the queue.
type Observer interface {
	// Record tells of a request that is well formed and no flush, when it is submitted:
	// n bytes from off on. It must not block.
	Record(op hpdi.Op, off, n int64)
	// Close tells that the queue is closed.
	Close()
}

// device is a Device.
type device struct {
	f       *Flash
	p       *primary
	primary hpdi.Device
	io      *stack.Queues // of the primary
	info    hpdi.Info
	sets    Set // that can be on flash
	fixed   []Range
	observe func() Observer
	clock   func() time.Duration
	unused  atomic.Pointer[func(off, n int64) bool] // Primary.Unused, or what came in its place
	closed  atomic.Bool

	queuesMu sync.Mutex // guards queues
	queues   map[*queue]struct{}
}

// Over returns a device that is primary with the data sets that are on flash there. It
// closes primary; after an error it is the caller's. A primary that the flash device
// does not know yet becomes known, under its number and identity, until Forget. Of one
// that is too large for the map only the data sets in front can be moved, and the Note
// of its Info says so.
func (f *Flash) Over(dev hpdi.Device, o Primary) (Device, error) {
	info := dev.Info()
	if o.Number < 0 || o.Number >= MaxPrimaries {
		return nil, fmt.Errorf("device %s as primary device %d of flash device %s; there are %d: %w", info.Name, o.Number, f.name, MaxPrimaries, block.ErrInvalid)
	}
	if f.SetBytes()%int64(info.BlockSize) != 0 || block.Size%info.BlockSize != 0 {
		return nil, fmt.Errorf("device %s has blocks of %d bytes, data sets on flash device %s have %d: %w", info.Name, info.BlockSize, f.name, f.SetBytes(), block.ErrUnsupported)
	}
	f.tableLock.Lock()
	defer f.tableLock.Unlock()
	if p := f.primaries[o.Number]; p != nil && p.dev.Load() != nil {
		return nil, fmt.Errorf("primary device %d of flash device %s is %s already: %w", o.Number, f.name, p.dev.Load().info.Name, block.ErrExists)
	}
	p, err := f.knownLocked(info, o)
	if err != nil {
		return nil, err
	}
	d := &device{queues: map[*queue]struct{}{}, f: f, p: p, primary: dev, io: stack.NewQueues(dev, changesAtOnce), fixed: slices.Clone(o.Fixed), observe: o.Observe}
	d.sets = min(p.sets, Set(info.Size>>f.shift))
	d.info = combine(info, f.info)
	if room := int64(p.sets) << f.shift; room < info.Size-f.SetBytes() {
		d.info.Note = strings.TrimPrefix(fmt.Sprintf("%s; flash device %s has a map for its first %d bytes only", info.Note, f.name, room), "; ")
	}
	if err := d.checkLocked(); err != nil {
		return nil, err
	}
	d.unused.Store(&o.Unused)
	if d.clock = o.Clock; d.clock == nil {
		start := time.Now()
		d.clock = func() time.Duration { return time.Since(start) }
	}
	p.dev.Store(d)
	mirror, primaryCopies := dev.(hpdi.Copies)
	if primaryCopies {
		mirror.Unused(d.unread)
	}
	_, flashCopies := f.io.Device.(hpdi.Copies)
	if primaryCopies || flashCopies {
		return &copies{d}, nil
	}
	return d, nil
}

// combine makes the Info of a primary with flash.
func combine(primary, flash hpdi.Info) hpdi.Info {
	return hpdi.Info{
		Name: primary.Name, Driver: "flashmap", Size: primary.Size,
		BlockSize: max(primary.BlockSize, flash.BlockSize),
		Direct:    primary.Direct || flash.Direct,
		// Data sets that are discarded give their slots up, whatever the devices do.
		Discard:  true,
		Zeroes:   primary.Zeroes && flash.Zeroes,
		Durable:  primary.Durable && flash.Durable,
		ReadOnly: primary.ReadOnly || flash.ReadOnly,
		Note:     primary.Note,
	}
}

// knownLocked returns the primary of a number, with as many data sets as the device
// has, or makes it known.
func (f *Flash) knownLocked(info hpdi.Info, o Primary) (*primary, error) {
	p := f.primaries[o.Number]
	sets := Set(info.Size >> f.shift)
	if p != nil && p.id != o.ID {
		return nil, fmt.Errorf("device %s is not primary device %d of flash device %s, which is %v: %w", info.Name, o.Number, f.name, p.id, block.ErrInvalid)
	}
	if p != nil && (sets <= p.sets || f.readOnly) {
		return p, nil
	}
	if f.readOnly {
		return &primary{number: o.Number, id: o.ID, use: &use{}}, nil
	}
	l := f.label.clone()
	sets = l.admit(member{o.Number, o.ID, sets})
	if p != nil && sets == p.sets {
		return p, nil // it is larger, and the map has room for no more of it
	}
	next := l.primary(member{o.Number, o.ID, sets})
	old := 0
	if p != nil {
		old = len(p.pages)
		next.bits, next.use = p.bits.Resized(len(next.bits)*64), p.use
	}
	// The pages are empty before the label makes them count.
	var changes []change
	for _, n := range next.pages[old:] {
		changes = append(changes, f.emptyMapChange(n))
	}
	err := f.storeNewLocked(changes)
	if err == nil {
		err = f.storeLabelLocked(l)
	}
	if err != nil {
		err = f.failedLocked(fmt.Errorf("make device %s known: %w", info.Name, err))
		if p != nil {
			return p, nil // with what it had, it serves as before
		}
		return nil, err
	}
	f.lockAll()
	f.primaries[o.Number] = next
	f.unlockAll()
	return next, nil
}

// Forget makes a primary unknown of which nothing is on flash. Its number can then be
// another device's.
func (f *Flash) Forget(number int) error {
	f.tableLock.Lock()
	defer f.tableLock.Unlock()
	p, err := f.absentLocked("forget", number)
	switch {
	case err != nil:
		return err
	case p.bits.Next(0) >= 0:
		return f.inUse("forget", number)
	}
	return f.forgetLocked(number)
}

// absentLocked returns a primary that is known and not there, of which the flash device is
// to give something up.
func (f *Flash) absentLocked(what string, number int) (*primary, error) {
	if number < 0 || number >= MaxPrimaries || f.primaries[number] == nil {
		return nil, fmt.Errorf("primary device %d of flash device %s: %w", number, f.name, block.ErrNotFound)
	}
	p := f.primaries[number]
	switch {
	case f.readOnly:
		return nil, fmt.Errorf("%s primary device %d of flash device %s: %w", what, number, f.name, hpdi.ErrReadOnly)
	case p.dev.Load() != nil:
		return nil, f.inUse(what, number)
	}
	return p, nil
}

func (f *Flash) inUse(what string, number int) error {
	return fmt.Errorf("%s primary device %d of flash device %s, which is in use: %w", what, number, f.name, ErrBusy)
}

func (f *Flash) forgetLocked(number int) error {
	l := f.label.clone()
	l.primaries = slices.DeleteFunc(l.primaries, func(m member) bool { return m.number == number })
	l.runs = slices.DeleteFunc(l.runs, func(r run) bool { return r.primary == number })
	if err := f.storeLabelLocked(l); err != nil {
		return f.failedLocked(fmt.Errorf("forget primary device %d: %w", number, err))
	}
	f.lockAll()
	f.primaries[number] = nil
	f.unlockAll()
	return nil
}

func (l label) clone() label {
	l.segments, l.primaries, l.runs = slices.Clone(l.segments), slices.Clone(l.primaries), slices.Clone(l.runs)
	return l
}

// admit gives a primary that is new, or larger than it was, its pages of the map, and
// returns for how many of its data sets there are some.
func (l *label) admit(m member) Set {
	at := slices.IndexFunc(l.primaries, func(x member) bool { return x.number == m.number })
	if at < 0 {
		at = len(l.primaries)
		l.primaries = append(l.primaries, member{number: m.number, id: m.id})
	}
	used := make([]bool, l.mapPages())
	for _, r := range l.runs {
		for i := range r.count {
			used[r.page+i] = true
		}
	}
	have := rangesOf(l.primaries[at].sets)
	for n := 0; have < rangesOf(m.sets) && len(l.runs) < maxRuns; {
		for n < len(used) && used[n] {
			n++
		}
		first := n
		for n < len(used) && !used[n] && have+n-first < rangesOf(m.sets) {
			n++
		}
		if n == first {
			break
		}
		l.runs = append(l.runs, run{m.number, have, first, n - first})
		have += n - first
	}
	l.primaries[at].sets = min(m.sets, Set(have*pageSets))
	return l.primaries[at].sets
}

// checkLocked checks that what is on flash of the device can be there, and gives up
// marks that stand for nothing.
func (d *device) checkLocked() error {
	if d.p.sets == 0 {
		return nil
	}
	for i := d.p.bits.Next(0); i >= 0; i = d.p.bits.Next(i + 1) {
		set := Set(i)
		switch on := d.f.lookup(keyOf(d.p.number, set)) != none; {
		case !on && d.isFixed(set):
			d.p.drop(set) // it was never moved, whatever is lost
		case d.isFixed(set):
			return fmt.Errorf("flash device %s has %v, which lies in a range that is not to be moved: %w", d.f.name, keyOf(d.p.number, set), block.ErrCorrupt)
		case set >= d.sets && on:
			return fmt.Errorf("device %s has shrunk to %d bytes, and %v is on flash device %s; make it as large as it was: %w", d.info.Name, d.info.Size, keyOf(d.p.number, set), d.f.name, block.ErrInvalid)
		}
	}
	return nil
}

// isFixed reports whether a data set has a byte in a range that is not to be moved.
func (d *device) isFixed(set Set) bool {
	from := int64(set) << d.f.shift
	to := from + 1<<d.f.shift
	return slices.ContainsFunc(d.fixed, func(r Range) bool { return r.Offset < to && from < r.Offset+r.Length })
}

// Info describes the primary, with what both devices can do. Whether it rotates is as the
// primary has it now: a range that is on flash has no seeks, and OnFlash tells which.
func (d *device) Info() hpdi.Info {
	info := d.info
	info.Rotates = d.primary.Info().Rotates
	return info
}

// Register makes memory known to both devices.
func (d *device) Register(mem []byte) error {
	return errors.Join(d.primary.Register(mem), d.f.io.Device.Register(mem))
}

// Unregister makes both devices forget memory.
func (d *device) Unregister(mem []byte) error {
	return errors.Join(d.primary.Unregister(mem), d.f.io.Device.Unregister(mem))
}

// Close closes the primary and leaves the flash device open.
func (d *device) Close() error {
	primary, err := d.Detach()
	if primary == nil {
		return err
	}
	return errors.Join(err, primary.Close())
}

// Detach ends the device and leaves both devices open. Without the primary it has been
// ended before.
func (d *device) Detach() (hpdi.Device, error) {
	if d.closed.Swap(true) {
		return nil, fmt.Errorf("%s: %w", d.info.Name, hpdi.ErrClosed)
	}
	d.p.dev.CompareAndSwap(d, nil)
	return d.primary, d.io.Release()
}

// Reach returns how many bytes at the front can be on flash.
func (d *device) Reach() int64 { return int64(d.sets) << d.f.shift }

// LeastCopies returns how many copies the side has that has fewer.
func (d *device) LeastCopies() int {
	n := math.MaxInt
	for _, dev := range []hpdi.Device{d.primary, d.f.io.Device} {
		n = min(n, numCopies(dev))
	}
	return n
}

// numCopies returns how many copies a device keeps.
func numCopies(dev hpdi.Device) int {
	if x, ok := dev.(hpdi.Copies); ok {
		return x.NumCopies()
	}
	return 1
}

// stays reports whether no byte of a range is on flash, nor lost. It takes no lock: who
// reads what has just come to flash reads from the primary what it was before, and goes
// before the writes to flash, none of which was complete when it began.
func (d *device) stays(off, n int64) bool {
	for set := Set(off >> d.f.shift); int64(set)<<d.f.shift < off+n; set++ {
		if d.p.has(set) {
			return false
		}
	}
	return true
}

// OnFlash tells whether a byte is on flash.
func (d *device) OnFlash(off int64) (on bool, end int64) {
	set := Set(off >> d.f.shift)
	end = min(int64(set+1)<<d.f.shift, d.info.Size)
	return d.f.onFlash(d.p, set), end
}

// Busy reports whether requests are under way at the primary.
func (d *device) Busy() bool {
	d.queuesMu.Lock()
	defer d.queuesMu.Unlock()
	for q := range d.queues {
		if q.busy.Load() {
			return true
		}
	}
	return false
}

// NextOnFlash returns the first range from off on that is on flash.
func (d *device) NextOnFlash(off int64) (start, end int64) {
	shift := d.f.shift
	i := d.p.bits.Next(int(off >> shift))
	if i < 0 || off >= d.info.Size {
		return d.info.Size, d.info.Size
	}
	last := i + 1
	for d.p.has(Set(last)) {
		last++
	}
	return max(off, int64(i)<<shift), min(int64(last)<<shift, d.info.Size)
}
