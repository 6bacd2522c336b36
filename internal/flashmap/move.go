package flashmap

import (
	"fmt"
	mathbits "math/bits"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/planted"
)

// Progress says how far a move is.
type Progress int

// The states of a move between two steps.
const (
	// Moving: there is more to do at once.
	Moving Progress = iota
	// Waiting: requests of clients have to complete first. Flash.Woken tells when a
	// step may get further.
	Waiting
	// Done: the data set is where it was to go, or the move was given up without an
	// error because it was discarded.
	Done
)

// Move takes one data set to flash or back. It is a machine of steps that whoever
// calls Step drives, one caller at a time; clients go on meanwhile.
type Move struct {
	f     *Flash
	d     *device
	set   Set
	key   key
	slot  slotNumber
	at    int64 // of the slot on the flash device, in bytes
	out   bool  // back to the primary
	stage stage
	turns int // how often pieces were copied again
	buf   []byte
	other []byte // for what another copy has, from when it is needed
	// todo are the pieces that are still to be copied in this turn, and copied the bytes
	// that were, in all turns.
	todo   uint64
	copied int64
	// most are the bytes of one request to the side that is read and that which is written.
	most [2]int64

	// What follows is guarded by the stripe of the data set.

	marks uint64 // pieces that are to be copied
	// held is not nil while writes are kept from the data set; who waits for them to
	// be let in waits until it is closed.
	held chan struct{}
	// doubt is why writes to the data set fail: it is not known whether the table
	// on the flash device names it.
	doubt error
	// left says that the data set is back on its primary, and readers of its slot are all
	// that the move waits for.
	left bool
}

var errNotThere = fmt.Errorf("it is not on flash: %w", block.ErrNotFound)

type stage int

const (
	copying stage = iota
	syncing
	closing // looks whether all is copied
	storing // the table
	leaving // waits for readers of a slot that is given up
	over
)

// maxTurns is how often what was written meanwhile is copied before new writes are
// held until the last of it is.
const maxTurns = 8

// Most bytes that a move asks of a device in one request. What clients ask for meanwhile
// waits behind it. A disk's arm has come for it, which takes several times as long as 256 KiB
// do; flash takes longer for each block.
const (
	mostOfDisk  = 256 << 10
	mostOfFlash = 16 << 10
)

func mostOf(info hpdi.Info) int64 {
	if info.Rotates {
		return mostOfDisk
	}
	return mostOfFlash
}

// pieceShift is log2 of the bytes of a piece, of which a data set has up to 64.
func (f *Flash) pieceShift() uint { return max(block.Shift, f.shift-6) }

// allPieces are the marks of a whole data set.
func (f *Flash) allPieces() uint64 { return ^uint64(0) >> (64 - 1<<(f.shift-f.pieceShift())) }

// markLocked says that n bytes of the data set from off on have changed.
func (m *Move) markLocked(off, n int64) {
	if n == 0 {
		return
	}
	shift := m.f.pieceShift()
	first, last := uint(off>>shift), uint((off+n-1)>>shift)
	m.marks |= ^uint64(0) << first & (^uint64(0) >> (63 - last))
}

// MoveIn begins to move a data set of a primary to flash. It returns ErrFull, ErrFixed,
// ErrBusy, block.ErrExists when it is there already, block.ErrNotFound when the primary
// is not, ErrLost while pages of the table are lost, and ErrFailed while the table cannot
// be written.
func (f *Flash) MoveIn(number int, set Set) (*Move, error) {
	m, err := f.newMove(number, set)
	if err != nil {
		return nil, err
	}
	switch err, unsettled := f.failure.Load(), f.unsettled.Load(); {
	case err != nil:
		return nil, m.refuse(fmt.Errorf("nothing is moved to flash: %w", *err))
	case unsettled != nil:
		return nil, m.refuse(fmt.Errorf("nothing is moved to flash as long as its table may say more than counts: %w", *unsettled))
	case f.readOnly || m.d.info.ReadOnly:
		return nil, m.refuse(hpdi.ErrReadOnly)
	case f.lostPages.Load() > 0:
		return nil, m.refuse(fmt.Errorf("pages of the table are lost: move back what can be reached, and create flash device %s anew: %w", f.name, ErrLost))
	case set >= m.d.sets || m.d.isFixed(set):
		return nil, m.refuse(ErrFixed)
	}
	if m.slot = f.take(); m.slot == none {
		return nil, m.refuse(ErrFull)
	}
	if err := m.register(); err != nil {
		f.release(m.slot)
		return nil, m.refuse(err)
	}
	return m, nil
}

// MoveOut begins to move a data set from flash back to its primary. It returns ErrBusy,
// ErrLost, and block.ErrNotFound when it is not on flash or the primary is not there.
func (f *Flash) MoveOut(number int, set Set) (*Move, error) {
	m, err := f.newMove(number, set)
	if err != nil {
		return nil, err
	}
	m.out = true
	m.most[0], m.most[1] = m.most[1], m.most[0]
	switch {
	case f.readOnly || m.d.info.ReadOnly:
		return nil, m.refuse(hpdi.ErrReadOnly)
	case set >= m.d.sets:
		return nil, m.refuse(errNotThere) // its key may be that of another one
	}
	if err := m.register(); err != nil {
		return nil, m.refuse(err)
	}
	return m, nil
}

func (f *Flash) newMove(number int, set Set) (*Move, error) {
	f.tableLock.Lock()
	defer f.tableLock.Unlock()
	if number < 0 || number >= MaxPrimaries || f.primaries[number] == nil || f.primaries[number].dev.Load() == nil {
		return nil, fmt.Errorf("primary device %d of flash device %s is not there: %w", number, f.name, block.ErrNotFound)
	}
	m := &Move{f: f, d: f.primaries[number].dev.Load(), set: set, key: keyOf(number, set), slot: none}
	m.most = [2]int64{mostOf(m.d.Info()), mostOf(f.info)}
	var err error
	m.buf, err = hpdi.AllocPrivate(1 << f.shift)
	return m, err
}

// refuse ends a move that has not begun, with an error that names its data set.
func (m *Move) refuse(err error) error {
	m.free()
	return fmt.Errorf("move %v: %w", m.key, err)
}

// register makes writes to the data set known to the move.
func (m *Move) register() error {
	f := m.f
	h := hash(m.key)
	s := f.lock(m.key)
	defer s.mu.Unlock()
	slot := s.findLocked(f.keys, m.key, h)
	switch {
	case slot == none && m.d.p.has(m.set):
		return f.lostError(m.key)
	case !m.out && slot != none:
		return fmt.Errorf("it is on flash already: %w", block.ErrExists)
	case m.out && slot == none:
		return errNotThere
	}
	a := s.activeLocked(m.key, true)
	if a.move != nil {
		return ErrBusy
	}
	a.move = m
	if m.out {
		m.slot = slot
	}
	m.at = f.offset(m.slot)
	m.marks = f.allPieces()
	return nil
}

// Step does a bounded part of the move: it waits for devices, never for clients. It copies
// at most what is asked of a disk at once, 256 KiB, or 16 KiB where no side rotates, unless
// writes are held: then it goes on until they are not. Who calls it decides how much time
// is left for clients between steps. After
// an error the move can be stepped again, or given up with Cancel. ErrCopiesDiffer says
// that somebody has to decide first which copy is right.
//
// A data set whose move fails while the table is written takes no writes until a step
// has gone well, or the flash device is opened anew: nobody knows where the table says
// it is. Reads go on.
func (m *Move) Step() (Progress, error) {
	for {
		before := m.stage
		p, err := m.step()
		if err != nil {
			m.letIn()
			m.turns = 0
			return p, fmt.Errorf("move %v: %w", m.key, err)
		}
		if m.stage == over && before != over {
			m.f.tell(m.key, !m.out)
		}
		// Writes that are kept out do not wait for the caller to come again.
		if p != Moving || m.held == nil || before == storing {
			return p, nil
		}
	}
}

func (m *Move) step() (Progress, error) {
	switch m.stage {
	case copying:
		return Moving, m.copy()
	case syncing:
		return Moving, m.sync()
	case closing:
		return m.close(), nil
	case storing:
		return m.store()
	case leaving:
		return m.leave(), nil
	}
	return Done, nil
}

// Copied returns how many bytes the steps have copied so far.
func (m *Move) Copied() int64 { return m.copied }

// copy copies some of what is marked.
func (m *Move) copy() error {
	s := m.f.lock(m.key)
	if m.todo == 0 {
		m.todo, m.marks = m.marks, 0
		if m.out && m.f.unwanted.Has(int(m.slot)) {
			m.todo = 0 // whatever it reads as will do
		}
	}
	s.mu.Unlock()
	if m.turns > 0 && planted.Has(planted.FlashMarkForgotten) {
		m.todo = 0
	}
	if m.todo != 0 {
		shift := m.f.pieceShift()
		first := mathbits.TrailingZeros64(m.todo)
		n := min(mathbits.TrailingZeros64(^(m.todo >> first)), int(max(m.most[0], m.most[1])>>shift))
		differ, err := m.transfer(int64(first)<<shift, int64(n)<<shift)
		if err == nil && len(differ) > 0 {
			err = m.judge(differ)
		}
		if err != nil {
			s.mu.Lock()
			defer s.mu.Unlock()
			m.marks |= m.todo
			m.todo = 0
			return err
		}
		m.copied += int64(n) << shift
		m.todo &^= (^uint64(0) >> (64 - n)) << first
	}
	if m.todo == 0 {
		m.stage = syncing
	}
	return nil
}

// transfer copies n bytes of the data set from off on. It returns the blocks, as offsets
// in the data set, that are not alike on all copies of where they come from.
func (m *Move) transfer(off, n int64) (differ []int64, err error) {
	for at := off; at < off+n; at += m.most[0] {
		k := min(m.most[0], off+n-at)
		from, _ := m.sides(at, k)
		some, err := m.read(from, at, m.buf[at:][:k])
		if err != nil {
			return nil, err
		}
		differ = append(differ, some...)
	}
	if !m.out {
		m.d.p.use.moved.Add(uint64(n))
	}
	for at := off; at < off+n; at += m.most[1] {
		k := min(m.most[1], off+n-at)
		_, to := m.sides(at, k)
		if err := to.wrap(to.disk.Do(&hpdi.Request{Op: hpdi.OpWrite, Offset: to.at, Vec: [][]byte{m.buf[at:][:k]}})); err != nil {
			return nil, err
		}
	}
	return differ, nil
}

// sides returns where n bytes of the data set from off on come from, and where they go.
func (m *Move) sides(off, n int64) (from, to piece) {
	f := m.f
	from = newPiece(m.d.io, int64(m.set)<<f.shift+off, n, func(err error) error { return err })
	to = newPiece(f.io, m.at+off, n, f.fail)
	if m.out {
		from, to = to, from
	}
	return from, to
}

// sync makes durable what was copied. What a sync that failed has left behind is
// unknown: all is copied again.
func (m *Move) sync() error {
	m.stage = closing
	if planted.Has(planted.FlashCopyNotSynced) {
		return nil
	}
	var err error
	if m.out {
		err = m.d.io.Flush()
	} else if err = m.f.io.Flush(); err != nil {
		err = m.f.fail(err)
	}
	if err != nil {
		s := m.f.lock(m.key)
		defer s.mu.Unlock()
		m.marks, m.stage = m.f.allPieces(), copying
	}
	return err
}

// close keeps writes from the data set when nothing of it is left to copy. A data set
// that is written to all the time is closed first, and the last pieces are copied then.
func (m *Move) close() Progress {
	s := m.f.lock(m.key)
	defer s.mu.Unlock()
	a := s.activeLocked(m.key, true)
	if m.held == nil && (a.writes == 0 && m.marks == 0 || m.turns >= maxTurns) {
		m.held = make(chan struct{})
	}
	switch {
	case m.marks != 0 && (a.writes == 0 || m.held == nil):
		m.turns++
		m.stage = copying
		return Moving
	case a.writes > 0:
		if m.held == nil {
			m.turns++
		}
		return Waiting
	}
	m.stage = storing
	return Moving
}

// store writes the table, and sends requests to where the data set is from now on.
func (m *Move) store() (Progress, error) {
	f := m.f
	f.tableLock.Lock()
	defer f.tableLock.Unlock()
	err := f.commitLocked(m.d.p, m.set, m.slot, !m.out)
	s := f.lock(m.key)
	defer s.mu.Unlock()
	m.doubt = nil
	if err != nil {
		m.doubt = fmt.Errorf("%v was being moved, and nobody knows where it is: %w", m.key, err)
		return Moving, err
	}
	m.letInLocked()
	if m.out {
		s.removeLocked(f.keys, m.slot)
		f.keys[m.slot] = 0
		m.d.p.drop(m.set)
		f.unwanted.Clear(int(m.slot))
		m.stage, m.left = leaving, true
		return Moving, nil
	}
	f.keys[m.slot] = m.key
	s.insertLocked(f.keys, m.slot)
	m.d.p.put(m.set)
	m.endLocked(s)
	return Done, nil
}

// letIn lets writes in again.
func (m *Move) letIn() {
	s := m.f.lock(m.key)
	defer s.mu.Unlock()
	m.letInLocked()
}

func (m *Move) letInLocked() {
	if m.held != nil {
		close(m.held)
		m.held = nil
	}
}

// leave frees the slot when nobody reads from it any more.
func (m *Move) leave() Progress {
	s := m.f.lock(m.key)
	defer s.mu.Unlock()
	if s.activeLocked(m.key, true).flash > 0 {
		return Waiting
	}
	m.f.release(m.slot)
	m.endLocked(s)
	return Done
}

// endLocked takes the move off its data set.
func (m *Move) endLocked(s *stripe) {
	m.stage, m.left = over, false
	a := s.activeLocked(m.key, true)
	a.move = nil
	s.restLocked(a)
	m.free()
}

func (m *Move) free() {
	_, _ = hpdi.Free(m.buf), hpdi.Free(m.other) // they were mapped
	m.buf, m.other = nil, nil
}

// Left reports whether the data set is back on its primary and the move waits for readers of
// its slot alone.
func (m *Move) Left() bool {
	s := m.f.lock(m.key)
	defer s.mu.Unlock()
	return m.left
}

// Cancel gives a move up that has not come to the table yet; the data set stays where
// it is. A move that is over is left alone, and so is one that waits for readers of its slot
// alone (Left), which is to be stepped on. With an error the data set is in doubt, see
// Step, and the move goes on to be the one that can end that.
func (m *Move) Cancel() error {
	s := m.f.lock(m.key)
	defer s.mu.Unlock()
	switch {
	case m.stage == over || m.stage == leaving:
		return nil
	case m.doubt != nil:
		return m.doubt
	}
	if !m.out {
		m.f.release(m.slot)
	}
	m.letInLocked()
	m.endLocked(s)
	return nil
}
