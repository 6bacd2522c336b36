package devices

import (
	"sync"
	"time"
)

// What is under way at a device when its guest dies has to end before the
// partner may take over, so it is bounded to what the device does in about
// 20 ms. The bound begins at a guess for a fast disk; see noteLocked.
const (
	fenceTime  = 20 * time.Millisecond
	limitFirst = 16 << 20
	limitLeast = 1 << 20
	limitMost  = 64 << 20
)

// limiter bounds the bytes that are under way at one device. Who waits is
// served in the order of arrival.
//
//	out <= most, unless it is a single transfer
type limiter struct {
	mu      sync.Mutex // guards what follows; cond tells of each change
	cond    sync.Cond
	most    int64
	out     int64 // bytes under way
	arrived uint64
	served  uint64

	// Of the present measurement.
	since time.Time // zero when there is none
	moved int64     // bytes that ended since
}

func newLimiter() *limiter {
	l := &limiter{most: limitFirst}
	l.cond.L = &l.mu
	return l
}

// limit returns how many bytes may be under way.
func (l *limiter) limit() int64 {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.most
}

// acquire waits until n more bytes may be under way. More than the limit may
// when nothing else is. What moves nothing, a sync, never waits.
func (l *limiter) acquire(n int64) {
	if n == 0 {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	ticket := l.arrived
	l.arrived++
	for ticket != l.served || l.out > 0 && l.out+n > l.most {
		if l.since.IsZero() {
			l.since, l.moved = time.Now(), 0
		}
		l.cond.Wait()
	}
	l.served++
	l.out += n
	if l.served != l.arrived {
		l.cond.Broadcast() // the next may fit as well
	}
}

// release says that n bytes have ended.
func (l *limiter) release(n int64) {
	if n == 0 {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.out -= n
	l.noteLocked(n)
	if l.served != l.arrived {
		l.cond.Broadcast()
	}
}

// noteLocked measures the device's speed and sets the limit by it, a quarter of
// the way each time. It measures only while somebody waits: then the device,
// and not what was asked of it, made the speed.
func (l *limiter) noteLocked(n int64) {
	if l.since.IsZero() {
		return
	}
	l.moved += n
	took := time.Since(l.since)
	if l.moved >= l.most && took > 0 {
		now := int64(float64(l.moved) * float64(fenceTime) / float64(took))
		l.most = min(max(l.most+(now-l.most)/4, limitLeast), limitMost)
		l.since, l.moved = time.Now(), 0
	}
	if l.served == l.arrived {
		l.since = time.Time{}
	}
}
