package file

import (
	"time"

	"github.com/pollux-storage/pollux/hpdi"
)

// Cancel asks the kernel to give up requests. It can where they wait for one of its
// goroutines, or for a descriptor to become ready; a disk has to do what it was given.
func (q *uringQueue) Cancel(reqs ...*hpdi.Request) {
	if q.usable() != nil {
		return
	}
	defer q.show()
	for _, r := range reqs {
		for i := range q.slot {
			if s := &q.slot[i]; s.req == r && !s.stopped {
				s.stopped = true
				if q.cancel(uint32(i)) != nil {
					return // the ring is broken; the next Submit or Wait says so
				}
				break
			}
		}
	}
	_ = q.push() // likewise
}

// cancel prepares the entry that cancels what is under way for slot i. The kernel looks for
// it when it takes the entry, so it cannot meet a later request in that slot.
func (q *uringQueue) cancel(i uint32) error {
	if q.ring.room() == 0 {
		if err := q.push(); err != nil {
			return err
		}
		if q.slot[i].req == nil { // it came back meanwhile
			return nil
		}
	}
	e := q.ring.next()
	e.opcode, e.fd, e.addr, e.userData = ringOpCancel, -1, uint64(i), aside
	return nil
}

// limit links a timeout to the entry of s, which has a deadline.
func (q *uringQueue) limit(e *sqe, s *slot) {
	left := max(time.Until(s.req.Deadline), 1) // the kernel refuses less than nothing
	*s.timeout = timespec{int64(left / time.Second), int64(left % time.Second)}
	e.flags |= ringLink
	t := q.ring.next()
	t.opcode, t.fd, t.len, t.userData = ringOpLinkTimeout, -1, 1, aside
	t.addr = s.timeout.address()
}

// over returns why a request is not to be handed in again, or nil.
func (s *slot) over() error {
	if s.stopped {
		return hpdi.ErrCanceled
	}
	if s.req.Deadline.IsZero() {
		return nil
	}
	return s.req.Late(time.Now())
}
