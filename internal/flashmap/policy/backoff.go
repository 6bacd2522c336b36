package policy

import (
	"errors"
	"time"
)

// ErrNoRoom is what a mover reports when there was no free slot for a set.
var ErrNoRoom = errors.New("no free slot on flash")

// Waits after failures.
const (
	setWait, maxSetWait       = time.Minute, 6 * time.Hour
	deviceWait, maxDeviceWait = 5 * time.Second, 10 * time.Minute
)

// maxFailures bounds how many sets with failures are remembered. Beyond it the wait of their
// device has to do.
const maxFailures = 4096

// failure is what is known of moves that failed.
type failure struct {
	times int
	until time.Time
	err   error
}

// again notes one more failure.
func (f failure) again(err error, now time.Time, first, most time.Duration) failure {
	wait := most
	if f.times < 20 {
		wait = min(first<<f.times, most)
	}
	return failure{f.times + 1, now.Add(wait), err}
}

// backoff remembers what failed.
type backoff struct {
	sets    map[key]failure
	devices map[int]failure
}

// failed notes that a move failed.
func (b *backoff) failed(k key, err error, now time.Time) {
	if errors.Is(err, ErrNoRoom) {
		return
	}
	b.devices[k.device] = b.devices[k.device].again(err, now, deviceWait, maxDeviceWait)
	if _, ok := b.sets[k]; !ok && len(b.sets) == maxFailures {
		// That which may be tried again first is the one to forget.
		var first key
		found := false
		for o, f := range b.sets {
			if g := b.sets[first]; !found || f.until.Before(g.until) || f.until.Equal(g.until) && o.less(first) {
				first, found = o, true
			}
		}
		delete(b.sets, first)
	}
	b.sets[k] = b.sets[k].again(err, now, setWait, maxSetWait)
}

// moved notes that a move succeeded.
func (b *backoff) moved(k key) {
	delete(b.sets, k)
	delete(b.devices, k.device)
}

// waits returns what keeps a set from being moved.
func (b *backoff) waits(k key, now time.Time) (failure, bool) {
	for _, f := range []failure{b.devices[k.device], b.sets[k]} {
		if now.Before(f.until) {
			return f, true
		}
	}
	return failure{}, false
}
