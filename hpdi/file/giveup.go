package file

import (
	"time"

	"github.com/pollux-storage/pollux/hpdi"
)

// Cancel asks the kernel to give up requests. It can where they wait for one of its
// own threads, or for a descriptor to become ready; a disk has to do what it was given.
//
// Submit and Wait leave nothing behind that the kernel has not taken, and no slot is
// cancelled twice, so there is an entry for each.
func (q *uringQueue) Cancel(reqs ...*hpdi.Request) {
	if q.usable() != nil {
		return
	}
	for _, r := range reqs {
		for i := range q.slot {
			if s := &q.slot[i]; s.req == r && !s.stopped {
				s.stopped = true
				// The kernel looks for what it cancels when it takes the entry: it
				// cannot be a later request in the same slot.
				e := q.ring.next()
				e.opcode, e.fd, e.addr, e.userData = ringOpCancel, -1, uint64(i), aside
				break
			}
		}
	}
	_ = q.push() // a ring that is broken says so at the next Submit or Wait
	q.show()
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
