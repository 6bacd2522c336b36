package ring

import (
	"errors"
	"fmt"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/eventfd"
)

// Bell wakes a side that sleeps: an eventfd that both sides have. The zero Bell is for
// media without one; its Sleep is a nap.
type Bell struct {
	fd  int
	has bool
	nap time.Duration

	fds  [2]unix.PollFd // of a Sleep, here because they would be allocated each time
	ts   unix.Timespec
	rung eventfd.Reader
}

// The naps of a side that has no bell: what comes soon is noticed soon, and an idle
// ring costs some hundred short awakenings a second.
const (
	firstNap   = 20 * time.Microsecond
	longestNap = 2 * time.Millisecond
)

// NewBell returns a bell of its own.
func NewBell() (*Bell, error) {
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("make an event descriptor: %w", err)
	}
	return &Bell{fd: fd, has: true}, nil
}

// bellOf returns the bell that a descriptor is, which it has from then on. A descriptor
// that is something else is an error.
func bellOf(fd int) (*Bell, error) {
	if err := eventfd.Check(fd); err != nil {
		return nil, fmt.Errorf("%w: %w", err, ErrBroken)
	}
	return &Bell{fd: fd, has: true}, nil
}

// FD returns the descriptor, or -1.
func (b *Bell) FD() int {
	if !b.has {
		return -1
	}
	return b.fd
}

// Ring wakes who sleeps, or keeps it from sleeping. A bell that was rung too often
// for its counter is ringing already; whose peer has seen to it that ringing waits
// then is for unstick.
func (b *Bell) Ring() {
	if b.has {
		eventfd.Count(b.fd)
	}
}

// Sleep returns when the bell has rung, when other, unless it is -1, is readable,
// or when d has passed; d below 0 is for ever. It may return earlier.
func (b *Bell) Sleep(other int, d time.Duration) error {
	if !b.has {
		return b.napFor(other, d)
	}
	if err := b.poll(b.fd, other, d); err != nil {
		return err
	}
	if b.fds[0].Revents != 0 {
		b.Quiet()
	}
	return nil
}

// Quiet takes back what has rung.
func (b *Bell) Quiet() {
	if b.has {
		b.rung.Read(b.fd)
	}
}

// unstick makes sure that nobody who rings one of the bells waits for its peer, who could fill
// its counter. Call what it returns when that can be no more, and before a bell is closed.
func unstick(bells []*Bell) (stop func()) {
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		var r eventfd.Reader
		tick := time.NewTicker(20 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-done:
				return
			case <-tick.C:
			}
			for _, b := range bells {
				if b.has {
					r.Unstick(b.fd)
				}
			}
		}
	}()
	return func() {
		close(done)
		<-ended
	}
}

func (b *Bell) napFor(other int, d time.Duration) error {
	b.nap = min(max(2*b.nap, firstNap), longestNap)
	if d < 0 || d > b.nap {
		d = b.nap
	}
	if other >= 0 {
		return b.poll(other, -1, d)
	}
	time.Sleep(d)
	return nil
}

// Awake says that there was something to do: the next nap is short.
func (b *Bell) Awake() { b.nap = 0 }

// poll waits until one of two descriptors is readable, of which the second may be -1.
func (b *Bell) poll(fd, other int, d time.Duration) error {
	b.fds = [2]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}, {Fd: int32(other), Events: unix.POLLIN}}
	var ts *unix.Timespec
	if d >= 0 {
		b.ts = unix.NsecToTimespec(int64(d))
		ts = &b.ts
	}
	n := 1
	if other >= 0 {
		n = 2
	}
	if _, err := unix.Ppoll(b.fds[:n], ts, nil); err != nil && !errors.Is(err, unix.EINTR) {
		return fmt.Errorf("poll for an event: %w", err)
	}
	return nil
}

// Close frees the descriptor.
func (b *Bell) Close() {
	if b.has {
		b.has = false
		unix.Close(b.fd)
	}
}
