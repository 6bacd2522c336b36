// Package devices makes the devices of one pool addressable by physical block.
// It hands each caller a queue of its own for the time of a call, so that
// readers, consistency points and flushes do not wait for each other's
// completions, and it knows which devices hold writes that no sync has covered.
//
// All callers together have no more bytes under way at a device than it moves in
// about 20 ms, because a takeover waits for what a dead guest had under way.
// Appends to the flush log, of 4 MiB a request, have a queue of their own and
// come on top.
//
// A device that was removed leaves a gap, whose index stays: requests to it fail like
// those to a block that does not exist.
//
// A device of which something must be proved before it is used can be in a set before that,
// see Set.Prove: whatever is asked of it first waits for the proof.
//
// Locks: Set.mu and limiter.mu are leaves; no device is called under them. Who calls a
// device is counted, and who takes it away waits until nobody does any more: it may hold
// nothing that callers need.
package devices

import (
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/planted"
)

// queueDepth is how many requests one caller has in flight at a device; idle
// is how many unused queues are kept for the next callers.
const (
	queueDepth = 64
	idle       = 16
)

// Set is an ordered list of devices. Block numbers address it by device index.
// Its methods may be called concurrently.
type Set struct {
	mu   sync.RWMutex // guards devs, whose elements do not change but in a copy
	devs []*member

	lookOnly bool
	mended   atomic.Uint64
}

// Errors counts what went wrong with a device since it came into the set.
type Errors struct {
	Reads, Writes uint64 // requests that failed; discards and syncs are writes
	Corrupt       uint64 // blocks read that were not what was written, and no copy was
}

// NewSet returns a set of devs, in order.
func NewSet(devs []hpdi.Device) *Set {
	s := &Set{}
	for _, d := range devs {
		s.Add(d)
	}
	return s
}

// Add appends a device and returns its index.
func (s *Set) Add(d hpdi.Device) int {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.devs = append(s.devs, newMember(d, len(s.devs)))
	return len(s.devs) - 1
}

// enter keeps device d open until leave of its member is called.
func (s *Set) enter(d int) (*member, error) {
	for {
		m, err := s.member(d)
		if err != nil {
			return nil, err
		}
		if err := m.enter(); err == nil {
			return m, nil
		} else if !m.other {
			return nil, err
		}
	}
}

// RemoveLast takes back the newest Add, before anything used the device. The
// device stays open.
func (s *Set) RemoveLast() {
	s.mu.Lock()
	defer s.mu.Unlock()
	_ = s.devs[len(s.devs)-1].releaseQueues() // nothing was in flight
	s.devs = s.devs[:len(s.devs)-1]
}

// AddGap appends an index without a device: it was removed.
func (s *Set) AddGap() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.devs = append(s.devs, newGap(len(s.devs)))
	return len(s.devs) - 1
}

// Remove takes a device out of the set and returns it, open, once nobody uses it any
// more. Its index becomes a gap.
func (s *Set) Remove(i int) (hpdi.Device, error) {
	s.mu.Lock()
	m := s.devs[i]
	s.setLocked(i, newGap(i))
	s.mu.Unlock()
	m.end()
	return m.dev, m.releaseQueues()
}

// Fill puts a device into a gap.
func (s *Set) Fill(i int, d hpdi.Device) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.setLocked(i, newMember(d, i))
}

// Exchange puts another device into the place of one, which reaches the same blocks, and
// returns once nobody uses the old one any more. Queues that Queue has opened are not the
// set's: they stay with the old one.
func (s *Set) Exchange(i int, d hpdi.Device) error {
	s.mu.Lock()
	old := s.devs[i]
	m := newMember(d, i)
	m.errs.reads.Store(old.errs.reads.Load())
	m.errs.writes.Store(old.errs.writes.Load())
	m.errs.corrupt.Store(old.errs.corrupt.Load())
	m.dirty.Store(true) // what is under way at the old one may be complete before anybody looks there
	s.setLocked(i, m)
	s.mu.Unlock()
	old.other = true
	if !planted.Has(planted.ExchangeInUse) {
		old.end()
	}
	return old.releaseQueues()
}

// setLocked changes a copy, for others look at devs without the lock.
func (s *Set) setLocked(i int, m *member) {
	s.devs = slices.Clone(s.devs)
	s.devs[i] = m
}

// Has reports whether index i has a device, and is no gap.
func (s *Set) Has(i int) bool {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.devs[i].dev != nil
}

// Len returns the number of devices, gaps included.
func (s *Set) Len() int {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return len(s.devs)
}

// Device returns device i, nil for a gap.
func (s *Set) Device(i int) hpdi.Device {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.devs[i].dev
}

// Info describes device i.
func (s *Set) Info(i int) hpdi.Info { return s.Device(i).Info() }

// IO is one transfer of consecutive blocks.
type IO struct {
	Op   hpdi.Op // OpRead, OpWrite or OpDiscard
	At   block.Physical
	Vec  [][]byte // of reads and writes; whole blocks
	N    int      // blocks of a discard
	Err  error    // result
	req  hpdi.Request
	done bool
}

// prepare makes the request of a transfer.
func (io *IO) prepare() {
	io.req = hpdi.Request{
		Op: io.Op, Offset: int64(io.At.Block()) * block.Size,
		Vec: io.Vec, Length: int64(io.N) * block.Size, User: io,
	}
	io.Err, io.done = nil, false
}

// Do carries out all ios, which may be on several devices, and waits for them.
// Each IO has its own result; the error returned is the first of them.
func (s *Set) Do(ios []*IO) error {
	if len(ios) == 0 {
		return nil
	}
	d := ios[0].At.Device()
	if slices.ContainsFunc(ios, func(io *IO) bool { return io.At.Device() != d }) {
		s.doOnSeveral(ios)
	} else {
		s.doOn(d, ios)
	}
	for _, io := range ios {
		if io.Err != nil {
			return io.Err
		}
	}
	return nil
}

// Read reads consecutive blocks.
func (s *Set) Read(at block.Physical, buf []byte) error {
	return s.Do([]*IO{{Op: hpdi.OpRead, At: at, Vec: [][]byte{buf}}})
}

// doOnSeveral carries out ios device by device, all devices at once.
func (s *Set) doOnSeveral(ios []*IO) {
	// Grouped in the order of first use, so that the same calls make the same
	// run.
	type group struct {
		device int
		ios    []*IO
	}
	var groups []group
	for _, io := range ios {
		d := io.At.Device()
		i := slices.IndexFunc(groups, func(g group) bool { return g.device == d })
		if i < 0 {
			i = len(groups)
			groups = append(groups, group{device: d})
		}
		groups[i].ios = append(groups[i].ios, io)
	}
	var wg sync.WaitGroup
	for _, g := range groups {
		wg.Go(func() { s.doOn(g.device, g.ios) })
	}
	wg.Wait()
}

// doOn carries out ios on device d and stores each one's result.
func (s *Set) doOn(d int, ios []*IO) {
	for _, io := range ios {
		io.prepare()
	}
	m, err := s.enter(d)
	if err == nil {
		defer m.leave()
		if ios[0].Op != hpdi.OpRead {
			m.dirty.Store(true)
		}
		err = m.run(ios)
	}
	for _, io := range ios {
		switch {
		case io.done && io.req.Err != nil:
			io.Err = fmt.Errorf("%s block %v of device %s: %w", io.Op, io.At, m.dev.Info().Name, io.req.Err)
		case !io.done:
			io.Err = fmt.Errorf("%s block %v: %w", io.Op, io.At, err)
		}
		if io.Err != nil && m != nil {
			m.failed(io.Op)
		}
	}
}

// Errors returns what went wrong with device i.
func (s *Set) Errors(i int) Errors {
	s.mu.RLock()
	defer s.mu.RUnlock()
	e := &s.devs[i].errs
	return Errors{Reads: e.reads.Load(), Writes: e.writes.Load(), Corrupt: e.corrupt.Load()}
}

// Ended returns how many reads, and how many other requests, have ended at the devices
// that are in the set. Those of queues that callers have to themselves do not count.
func (s *Set) Ended() (reads, others uint64) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	for _, m := range s.devs {
		reads += m.ended.reads.Load()
		others += m.ended.others.Load()
	}
	return reads, others
}

// NoteCorrupt counts a block that was read, is not what was written there, and has no
// copy that is.
func (s *Set) NoteCorrupt(at block.Physical) {
	if m, err := s.member(at.Device()); err == nil {
		m.errs.corrupt.Add(1)
	}
}

func (s *Set) member(d int) (*member, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if d >= len(s.devs) {
		return nil, &block.CorruptError{What: "block address", Where: fmt.Sprintf("device index %d", d),
			Why: fmt.Sprintf("the pool has %d devices", len(s.devs))}
	}
	return s.devs[d], nil
}

// ReadGood reads one block from a copy for which good returns true, and repairs
// the others, where the device keeps copies. It returns false where it does not,
// or none is good.
func (s *Set) ReadGood(at block.Physical, buf []byte, good func([]byte) bool) bool {
	_, err := s.Repair(at, buf, good)
	return err == nil
}

// Repair is ReadGood that tells how many copies it has repaired. A device that
// keeps one copy has none to repair it from.
func (s *Set) Repair(at block.Physical, buf []byte, good func([]byte) bool) (repaired int, err error) {
	m, err := s.enter(at.Device())
	if err != nil {
		return 0, err
	}
	defer m.leave()
	if c, ok := m.dev.(hpdi.Copies); ok {
		repaired, err = c.ReadGood(int64(at.Block())*block.Size, buf, good)
		if repaired > 0 {
			m.dirty.Store(true)
		}
		return repaired, err
	}
	return 0, &block.CorruptError{What: "the only copy of a block", Where: fmt.Sprintf("block %v of device %s", at, m.dev.Info().Name), Why: "there is none to repair it from"}
}

// ReadBest reads a block from the copy that rank likes best, 0 for what is worth
// nothing, and makes the others like it: a crash may have left some copies behind
// others. Where a device keeps one copy, or none is worth anything, it is read as
// it is.
func (s *Set) ReadBest(at block.Physical, buf []byte, rank func([]byte) uint64) error {
	best, bad := uint64(0), false
	copies := s.Copies(at.Device())
	for i := 0; copies > 1 && i < copies; i++ {
		err := s.ReadCopy(i, at, buf)
		if errors.Is(err, hpdi.ErrNoCopy) {
			continue
		}
		r := uint64(0)
		if err == nil {
			r = rank(buf)
		}
		if planted.Has(planted.StaleCopyWins) && best > 0 {
			continue
		}
		best, bad = max(best, r), bad || r == 0
	}
	switch {
	case best == 0:
		return s.Read(at, buf)
	case bad:
		// Not only behind: it counts as repaired.
		_, err := s.Repair(at, buf, func(p []byte) bool { return rank(p) == best })
		return err
	}
	for i := range copies {
		if s.ReadCopy(i, at, buf) == nil && rank(buf) == best {
			_, err := s.Settle(at, buf)
			return err
		}
	}
	return &block.CorruptError{What: "the best copy of a block", Where: at.String(), Why: "it is not what it was when it is read again"}
}

// Copies returns how many copies device i keeps of each block.
func (s *Set) Copies(i int) int {
	if c, ok := s.Device(i).(hpdi.Copies); ok {
		return c.NumCopies()
	}
	return 1
}

// LeastCopies returns how many copies device i keeps of each block at least: one that has
// several kinds of places may keep fewer in some than in others.
func (s *Set) LeastCopies(i int) int {
	if d, ok := s.Device(i).(interface{ LeastCopies() int }); ok {
		return d.LeastCopies()
	}
	return s.Copies(i)
}

// ReadCopy reads consecutive blocks from one copy alone, from 0. The error is of
// kind hpdi.ErrNoCopy when it is away or the device keeps fewer.
func (s *Set) ReadCopy(i int, at block.Physical, vec ...[]byte) error {
	m, err := s.enter(at.Device())
	if err != nil {
		return err
	}
	defer m.leave()
	c, ok := m.dev.(hpdi.Copies)
	switch {
	case !ok && i == 0:
		return s.Do([]*IO{{Op: hpdi.OpRead, At: at, Vec: vec}})
	case !ok || i >= c.NumCopies():
		return fmt.Errorf("copy %d of device %s: %w", i+1, m.dev.Info().Name, hpdi.ErrNoCopy)
	}
	n := (&hpdi.Request{Op: hpdi.OpRead, Vec: vec}).Bytes()
	m.limit.acquire(n)
	defer m.limit.release(n)
	if err := c.ReadCopy(i, int64(at.Block())*block.Size, vec...); err != nil {
		return fmt.Errorf("read block %v: %w", at, err)
	}
	return nil
}

// ProveOwn is [hpdi.Copies] for device i, and nothing where it keeps one copy.
func (s *Set) ProveOwn(i int) (mended int, err error) {
	if c, ok := s.Device(i).(hpdi.Copies); ok {
		return c.ProveOwn()
	}
	return 0, nil
}

// Settle is [hpdi.Copies] for blocks of a device, and nothing where it keeps one
// copy.
func (s *Set) Settle(at block.Physical, p []byte) (written int, err error) {
	if c, ok := s.Device(at.Device()).(hpdi.Copies); ok {
		if written, err = c.Settle(int64(at.Block())*block.Size, p); err != nil {
			return written, fmt.Errorf("block %v: %w", at, err)
		}
	}
	return written, nil
}

// Sync makes all completed writes to all devices durable. A device whose sync
// failed counts as unsynced, so that the next Sync tries it again.
func (s *Set) Sync() error {
	s.mu.RLock()
	devs := s.devs
	s.mu.RUnlock()
	errs := make([]error, len(devs))
	var wg sync.WaitGroup
	for i, m := range devs {
		if planted.Has(planted.SyncFirstDeviceOnly) && i > 0 {
			continue
		}
		if !m.dirty.Swap(false) {
			continue
		}
		sync := func() {
			io := &IO{Op: hpdi.OpFlush}
			io.prepare()
			now, err := s.enter(i)
			if err == nil {
				m = now // another one may have taken its place
				err = m.run([]*IO{io})
				m.leave()
			}
			if err == nil {
				err = io.req.Err
			}
			if err != nil {
				m.failed(io.Op)
				m.dirty.Store(true)
				errs[i] = fmt.Errorf("sync device %s: %w", m.dev.Info().Name, err)
			}
		}
		if len(devs) == 1 {
			sync()
			continue
		}
		wg.Go(sync)
	}
	wg.Wait()
	return errors.Join(errs...)
}

// Queue opens a queue of device i for the caller's own use.
func (s *Set) Queue(i int) (hpdi.Queue, error) {
	m, err := s.enter(i)
	if err != nil {
		return nil, err
	}
	defer m.leave()
	return m.dev.NewQueue(queueDepth)
}

// ReleaseQueues closes the set's queues and leaves the devices open, for an
// owner that keeps them. No call may be under way.
func (s *Set) ReleaseQueues() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	var errs []error
	for _, m := range s.devs {
		errs = append(errs, m.releaseQueues())
	}
	return errors.Join(errs...)
}

// Close closes all queues and devices; no call may be under way.
func (s *Set) Close() error {
	errs := []error{s.ReleaseQueues()}
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, m := range s.devs {
		if m.dev != nil {
			errs = append(errs, m.dev.Close())
		}
	}
	s.devs = nil
	return errors.Join(errs...)
}
