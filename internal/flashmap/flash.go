package flashmap

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/stack"
)

// Flash is an open flash device. Its methods may be called concurrently unless they
// say otherwise.
type Flash struct {
	io       *stack.Queues
	name     string
	info     hpdi.Info
	readOnly bool
	id       ID
	shift    uint // log2 of the bytes of a data set

	stripes [stripeCount]stripe

	// tableLock guards what is on the flash device beside data, and is held while it
	// is written. Of keys it guards every entry, too: who changes one holds it and the
	// stripe of its data set. The slices themselves, label and primaries change only
	// with all stripes held.
	tableLock  stack.Lock
	label      label
	labelSheet sheet
	labelDoubt bool // it is not known whether label is what the device says
	behind     bool // there may be sheets of which one place is behind
	table      []sheet
	maps       []sheet
	keys       []key  // by slot; 0 for none
	page       []byte // memory for what is read and written

	notes [noteCount]noteState

	primaries [MaxPrimaries]*primary // known by the label
	twice     map[key]bool           // data sets with two entries; guarded by tableLock

	// unwanted are the slots whose data sets were discarded whole; changed with their
	// stripe held.
	unwanted stack.Bits

	slotsMu sync.Mutex // guards the three below
	taken   stack.Bits // slots that nothing may be put into
	free    int        // that are not
	limit   slotNumber // slots from here on are not filled

	tidyMu    sync.Mutex       // guards the two below
	abandoned map[key]struct{} // lost, and discarded whole since
	lingering []*Move          // that Tidy has begun

	lostPages atomic.Int32 // of the table
	// failure is why the table could not be written; nil when it could last.
	failure atomic.Pointer[error]
	// unsettled is why the table may say more than counts, since the device was opened; nil
	// when it does not.
	unsettled atomic.Pointer[error]
	// Guarded by tableLock: sure says that what was read when the device was opened is
	// durable, owed names the pages that are to be written before it says no more than
	// counts, and again that nothing else is in the way.
	sure, again bool
	owed        struct {
		label       bool
		table, maps map[int]bool
	}

	// written counts writes that have completed at the flash device, and flushed says
	// how many of them are durable.
	written, flushed atomic.Uint64

	// moved is told of data sets that have come and gone, see OnMoved.
	moved atomic.Pointer[func(number int, set Set, on bool)]

	wake   chan struct{}
	closed atomic.Bool
}

// primary is a primary device as the flash device knows it.
type primary struct {
	number int
	id     block.DeviceID
	sets   Set // data sets of it that can be on flash
	bits   stack.Bits
	pages  []int // of the map, by range of pageSets
	dev    atomic.Pointer[device]
	use    *use
	// unknown are ranges of which it is not known which data sets are on flash.
	unknown []int
}

// has reports whether a data set is on flash, or was before its entry was lost.
func (p *primary) has(set Set) bool {
	w := int(set / 64)
	return w < len(p.bits) && p.bits[w].Load()&(1<<(set%64)) != 0
}

func (p *primary) put(set Set)  { p.bits[set/64].Or(1 << (set % 64)) }
func (p *primary) drop(set Set) { p.bits[set/64].And(^(uint64(1) << (set % 64))) }

// The errors of moves and of data sets, beside those of the devices. All name the
// flash device.
var (
	// ErrFull: there is no free slot.
	ErrFull = fmt.Errorf("no free slot on flash: %w", block.ErrNoSpace)
	// ErrBusy: the data set is on the move already.
	ErrBusy = errors.New("the data set is on the move")
	// ErrFixed: the data set is never to be on flash, or does not lie wholly on the
	// primary device.
	ErrFixed = fmt.Errorf("the data set has to stay on the primary device: %w", block.ErrInvalid)
	// ErrLost: the page of the table that said where the data set is can not be read.
	ErrLost = fmt.Errorf("its place on flash is lost: %w", block.ErrCorrupt)
	// ErrCopiesDiffer: the copies of a mirror are not alike in what is to be moved, and
	// which of them is right only who knows its checksum can tell.
	ErrCopiesDiffer = fmt.Errorf("the copies differ: %w", block.ErrCorrupt)
	// ErrFailed: the flash device failed a request. Data sets that are on it can not
	// be reached where it fails, and nothing more is moved to it while its table
	// cannot be written. It is for an alert.
	ErrFailed = errors.New("the flash device failed")
)

// ID returns the flash device's identity.
func (f *Flash) ID() ID { return f.id }

// SetBytes returns the size of a data set in bytes.
func (f *Flash) SetBytes() int64 { return 1 << f.shift }

// Woken returns a channel that yields when a move that waits for requests of clients
// may be able to go on. It yields once, for whichever move: one goroutine should drive
// all of them.
func (f *Flash) Woken() <-chan struct{} { return f.wake }

func (f *Flash) wakeUp() {
	select {
	case f.wake <- struct{}{}:
	default:
	}
}

// OnMoved has fn called for each data set of a primary that has come to flash, when its
// move is over, and for each that has left it: moved back, or given up by Tidy. It takes
// the place of the function that was there; nil is none. fn is called by whoever calls
// Step or Tidy, with no locks held; so calls come in order if one goroutine does both.
// What is on flash before, Device.NextOnFlash tells.
func (f *Flash) OnMoved(fn func(number int, set Set, on bool)) {
	if fn == nil {
		f.moved.Store(nil)
		return
	}
	f.moved.Store(&fn)
}

// tell says that a data set has come to flash or left it.
func (f *Flash) tell(k key, on bool) {
	if fn := f.moved.Load(); fn != nil {
		(*fn)(k.primary(), k.set(), on)
	}
}

// fail names the flash device in an error of it.
func (f *Flash) fail(err error) error {
	return fmt.Errorf("flash device %s: %w: %w", f.name, ErrFailed, err)
}

// failedLocked notes that the table could not be written.
func (f *Flash) failedLocked(err error) error {
	err = f.fail(err)
	f.failure.Store(&err)
	return err
}

func (f *Flash) lostError(k key) error {
	return fmt.Errorf("flash device %s: %v: %w; write what it held anew after discarding all of it, or bring back the device as it was", f.name, k, ErrLost)
}

// Close closes the flash device. The devices over it, and moves, must have ended.
func (f *Flash) Close() error {
	if f.closed.Swap(true) {
		return fmt.Errorf("flash device %s: %w", f.name, hpdi.ErrClosed)
	}
	return errors.Join(f.end(), f.io.Device.Close())
}

// Detach is Close that leaves the device open.
func (f *Flash) Detach() error {
	if f.closed.Swap(true) {
		return fmt.Errorf("flash device %s: %w", f.name, hpdi.ErrClosed)
	}
	return f.end()
}

// end ends what still goes on, and gives back memory and queues.
func (f *Flash) end() error {
	for _, m := range f.lingering {
		_, _ = m.Step() // nobody reads any more; what is in doubt is settled when it is opened
		m.free()
	}
	return f.giveBack()
}

// giveBack gives back memory and queues.
func (f *Flash) giveBack() error { return errors.Join(f.io.Release(), hpdi.Free(f.page)) }

// Status describes a flash device.
type Status struct {
	ID       ID
	Info     hpdi.Info
	SetBytes int64
	// Slots that there are, that are free, and that are filled.
	Slots, Free, Used int
	// Lost counts data sets that cannot be reached since their entries are lost.
	Lost int
	// LostPages counts pages of the table that cannot be read: while there are some
	// nothing is moved to flash.
	LostPages int
	// Grown is how many more slots the device has room for, see Grow.
	Grown int
	// Failure is why the table could not be written, nil when it could.
	Failure error
}

// Status returns the present state. It looks at all data sets, and waits for no device.
func (f *Flash) Status() Status {
	f.stripes[0].mu.Lock()
	l, primaries := f.label, f.primaries // who changes them has all stripes
	f.stripes[0].mu.Unlock()
	s := Status{ID: l.id, Info: f.info, SetBytes: 1 << l.shift, Slots: l.slots(), LostPages: int(f.lostPages.Load())}
	if more, ok := l.grown(f.info.Size); ok {
		s.Grown = more.slots
	}
	if err := f.unsettled.Load(); err != nil {
		s.Failure = *err
	}
	if err := f.failure.Load(); err != nil {
		s.Failure = *err
	}
	marks := 0
	for _, p := range primaries {
		if p != nil {
			marks += p.bits.Count()
		}
	}
	for i := range f.stripes {
		st := &f.stripes[i]
		st.mu.Lock()
		s.Used += st.used
		st.mu.Unlock()
	}
	s.Lost = max(0, marks-s.Used)
	f.slotsMu.Lock()
	defer f.slotsMu.Unlock()
	s.Free = f.free
	return s
}

// Known is a primary that a flash device knows, whether or not it is there.
type Known struct {
	Number int
	ID     block.DeviceID
	Sets   Set // data sets that it had when it was largest, as far as the map has room
	On     int // of them on flash, or lost
}

// Primaries returns the primaries that the flash device knows, in the order of their numbers.
func (f *Flash) Primaries() (all []Known) {
	f.stripes[0].mu.Lock()
	primaries := f.primaries // who changes them has all stripes
	f.stripes[0].mu.Unlock()
	for _, p := range primaries {
		if p != nil {
			all = append(all, Known{p.number, p.id, p.sets, p.bits.Count()})
		}
	}
	return all
}

// take returns a free slot, none when there is none.
func (f *Flash) take() slotNumber {
	f.slotsMu.Lock()
	defer f.slotsMu.Unlock()
	i := f.taken.Gap(0)
	if i < 0 || slotNumber(i) >= f.limit {
		return none
	}
	f.taken.Set(i)
	f.free--
	return slotNumber(i)
}

// release makes a slot free.
func (f *Flash) release(slot slotNumber) {
	f.slotsMu.Lock()
	defer f.slotsMu.Unlock()
	f.taken.Clear(int(slot))
	if slot < f.limit {
		f.free++
	}
}

// offset returns where a slot begins on the flash device, in bytes. The caller holds a
// stripe.
func (f *Flash) offset(slot slotNumber) int64 {
	page := int(slot) / pageWords
	for i := range f.label.segments {
		s := &f.label.segments[i]
		if n := s.tablePages; page >= n {
			page -= n
			continue
		}
		in := int64(page*pageWords + int(slot)%pageWords)
		return int64(s.data(f.shift))*block.Size + in<<f.shift
	}
	panic(fmt.Sprintf("flashmap: slot %d", slot))
}
