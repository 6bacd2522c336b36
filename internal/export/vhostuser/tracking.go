package vhostuser

import (
	"crypto/rand"
	"encoding/binary"
	"errors"
	"fmt"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/planted"
	"github.com/pollux-storage/pollux/internal/vhost"
	"github.com/pollux-storage/pollux/internal/virtio"
)

// tracking is what a connection keeps in its in-flight area.
type tracking struct {
	area    *vhost.Area // nil without one
	mapping []byte
	id      block.SessionID
	session block.Session
}

// getInflightFD makes a new area, with a new session, which counts at once. Most front-ends
// give it back by SET_INFLIGHT_FD right afterwards.
func (c *client) getInflightFD(m *vhost.Message, r *reply) error {
	v, err := c.inflightShape(m)
	if err != nil {
		return err
	}
	packed := c.features.Has(virtio.FRingPacked)
	v.Size, v.Offset = uint64(vhost.AreaBytes(int(v.Queues), int(v.QueueSize), packed)), 0
	fd, err := sealedFile("pollux in-flight", int64(v.Size))
	if err != nil {
		return fmt.Errorf("make an in-flight area: %w", err)
	}
	r.files = append(r.files, fd) // closed when it was sent
	t, err := c.mapArea(fd, v)
	if err != nil {
		return err
	}
	var id [8]byte
	for binary.LittleEndian.Uint64(id[:]) == 0 {
		_, _ = rand.Read(id[:]) // which does not fail
	}
	t.area.Format(binary.LittleEndian.Uint64(id[:]))
	t.area.SetWritethrough(!c.writeback.Load())
	r.payload = v.Append(nil)
	return c.track(t)
}

// sealedFile makes memory of n bytes that can be shared, and cannot change its size.
func sealedFile(name string, n int64) (int, error) {
	fd, err := unix.MemfdCreate(name, unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return -1, err
	}
	if err = unix.Ftruncate(fd, n); err == nil {
		_, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL)
	}
	if err != nil {
		_ = unix.Close(fd)
		return -1, err
	}
	return fd, nil
}

// inflightShape reads the description of an area.
func (c *client) inflightShape(m *vhost.Message) (vhost.Inflight, error) {
	v, err := vhost.ParseInflight(m.Payload)
	if err != nil {
		return v, err
	}
	if !c.protocol.Has(vhost.PInflightSHMFD) {
		return v, fmt.Errorf("%w: the feature was not negotiated", errRule)
	}
	if v.Queues == 0 || int(v.Queues) > c.s.o.Queues || v.QueueSize == 0 || int(v.QueueSize) > c.s.o.QueueSize {
		return v, fmt.Errorf("%w: an in-flight area for %d queues of %d descriptors, at most %d of %d are possible", errRule, v.Queues, v.QueueSize, c.s.o.Queues, c.s.o.QueueSize)
	}
	for _, q := range c.queues {
		if q.running {
			return v, fmt.Errorf("%w: an in-flight area while queue %d runs", errRule, q.index)
		}
	}
	return v, nil
}

// setInflightFD takes an area that comes back, perhaps from another back-end's time.
func (c *client) setInflightFD(m *vhost.Message, _ *reply) error {
	v, err := c.inflightShape(m)
	if err != nil {
		return err
	}
	fds, err := m.TakeFiles(1)
	if err != nil {
		return err
	}
	defer closeAll(fds)
	t, err := c.mapArea(fds[0], v)
	if err != nil {
		return err
	}
	return c.track(t)
}

// mapArea maps an area. The descriptor stays the caller's.
func (c *client) mapArea(fd int, v vhost.Inflight) (tracking, error) {
	i, err := inspect(fd)
	if err != nil {
		return tracking{}, err
	}
	packed := c.features.Has(virtio.FRingPacked)
	need := vhost.AreaBytes(int(v.Queues), int(v.QueueSize), packed)
	if !i.sealed || v.Size != uint64(need) {
		return tracking{}, fmt.Errorf("%w: an in-flight area of %d bytes, sealed %t, not the one of %d bytes that Pollux makes for %d queues of %d descriptors: the disk must be attached anew",
			errRule, v.Size, i.sealed, need, v.Queues, v.QueueSize)
	}
	var t tracking
	var mem []byte
	if t.mapping, mem, err = mapFile(fd, i, v.Offset, v.Size); err != nil {
		return tracking{}, fmt.Errorf("in-flight area: %w", err)
	}
	if t.area, err = vhost.OpenArea(mem, int(v.Queues), int(v.QueueSize), packed); err != nil {
		unmap(t.mapping)
	}
	return t, err
}

// track takes another area, and finds or makes the session that it names.
func (c *client) track(t tracking) error {
	id, err := t.area.Session()
	if err != nil {
		unmap(t.mapping)
		return err
	}
	through, err := t.area.Writethrough()
	if err != nil {
		unmap(t.mapping)
		return err
	}
	t.id = block.SessionID(id)
	if err := c.s.own(c, t.id); err != nil {
		unmap(t.mapping)
		return fmt.Errorf("session %016x of the in-flight area: %w", id, err)
	}
	// What the queues had in the area before is done, for none runs. The same session goes
	// on if the same area comes back.
	idle := t.id != c.inflight.id
	for _, q := range c.queues {
		idle = idle && q.retired()
		q.split, q.packed, q.track = nil, nil, nil
	}
	c.inflight.close(idle)
	c.s.mu.Lock()
	c.s.disownLocked(c, t.id)
	c.s.mu.Unlock()
	queues, slots := t.area.Shape()
	t.session, err = c.s.o.Volume.OpenSession(c.ctx, t.id, queues, slots)
	if errors.Is(err, block.ErrUnsupported) {
		// The volume does not know what it has done: what was in flight is run again.
		c.log.Warn("vhost-user: the volume keeps no sessions, requests of a dead server will be run again", "error", err)
		t.session, err = nil, nil
	}
	if err != nil {
		unmap(t.mapping)
		return fmt.Errorf("session %016x of the in-flight area: %w", id, err)
	}
	c.inflight = t
	c.writeback.Store(!through) // front-ends say it only when the driver changes it
	return nil
}

// close ends with the area: for ever, if nothing is in flight and all queues were left in
// good order.
func (t *tracking) close(idle bool) {
	if t.session != nil {
		if idle {
			t.session.Close()
		} else {
			t.session.Leave()
		}
	}
	unmap(t.mapping)
	*t = tracking{}
}

// trackSplit begins, or goes on, with what is tracked of a split queue. What a dead
// back-end had in flight is for resubmit.
func (q *queue) trackSplit(dev *virtio.DeviceSplit) error {
	a := q.c.inflight.area
	if q.track != nil || a == nil {
		return nil
	}
	t, subs, err := a.AttachSplit(q.index, dev.UsedIndex())
	if err != nil {
		return err
	}
	if t.Resumed {
		dev.Resume(len(subs))
	}
	q.split, q.track, q.subs = t, t, subs
	return nil
}

// trackPacked is trackSplit for a packed queue.
func (q *queue) trackPacked(dev *virtio.DevicePacked) error {
	a := q.c.inflight.area
	if q.track != nil || a == nil {
		return nil
	}
	t, used, avail, subs, err := a.AttachPacked(q.index, virtio.PositionOf(uint16(q.base>>16)), dev)
	if err != nil {
		return err
	}
	if t.Resumed {
		dev.Resume(avail, used)
	}
	q.packed, q.track, q.subs = t, t, subs
	return nil
}

// tracked returns an error if the in-flight area is not for this queue as it is now.
func (q *queue) tracked(packed bool) error {
	a := q.c.inflight.area
	if a == nil {
		return nil
	}
	queues, size := a.Shape()
	if q.index >= queues || q.size != size || q.track != nil && packed != (q.packed != nil) {
		return fmt.Errorf("%w: a queue of %d descriptors, packed %t, and an in-flight area for %d queues of %d", errRule, q.size, packed, queues, size)
	}
	return nil
}

// resubmit takes up what a dead back-end had in flight, in the order of submission.
func (q *queue) resubmit() error {
	q.mu.Lock()
	defer q.mu.Unlock()
	subs := q.subs
	q.subs = nil
	if len(subs) == 0 {
		return nil
	}
	q.done = q.done[:0]
	again, skipped, unknown := 0, 0, 0
	for i := range subs {
		sub := &subs[i]
		r := q.free[len(q.free)-1]
		if err := q.dev.Load(&r.chain, sub.Slot, sub.Descs); err != nil {
			return fmt.Errorf("request %d in the in-flight area: %w", sub.Counter, err)
		}
		r.slot, r.counter = sub.Slot, sub.Counter
		if err := q.took(r); err != nil {
			return err
		}
		switch known, err := q.fate(r); {
		case lost(err):
			return err
		case err != nil:
			unknown++
			r.fail("write of a dead server", err)
			q.done = append(q.done, r)
		case known:
			skipped++
			q.done = append(q.done, r)
		default:
			again++
			q.begin(r)
		}
	}
	q.c.s.count.resubmitted.Add(uint64(again))
	q.c.s.count.skipped.Add(uint64(skipped))
	q.c.log.Info("vhost-user: requests of a dead server taken up", "queue", q.index, "again", again, "logged", skipped, "unknown", unknown)
	q.finish(q.done)
	return nil
}

var errForgotten = errors.New("nobody knows whether the request was done: what the server knew of this connection was forgotten")

// fate reports whether a request that a dead back-end had in flight is done. An error says
// that nobody knows.
func (q *queue) fate(r *request) (bool, error) {
	s := q.c.inflight.session
	if s == nil || !r.changes() || planted.Has(planted.InflightRunAgain) {
		return false, nil
	}
	if s.Fresh() {
		return false, errForgotten
	}
	return s.Done(q.index, int(r.slot), r.counter)
}
