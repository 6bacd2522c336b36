package devices

import (
	"errors"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

var errBroken = errors.New("broken")

// flawed is a device whose queues fail as a whole, not request by request.
type flawed struct {
	hpdi.Device
	open, submit, wait, close error
	swallow                   bool // Wait returns without the requests
	opened, closed            int
}

func (d *flawed) NewQueue(depth int) (hpdi.Queue, error) {
	if d.open != nil {
		return nil, d.open
	}
	q, err := d.Device.NewQueue(depth)
	if err == nil {
		d.opened++
	}
	return &flawedQueue{q, d}, err
}

type flawedQueue struct {
	hpdi.Queue
	d *flawed
}

func (q *flawedQueue) Submit(reqs ...*hpdi.Request) error {
	if q.d.submit != nil {
		return q.d.submit
	}
	return q.Queue.Submit(reqs...)
}

func (q *flawedQueue) Wait(n int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	if q.d.wait != nil || q.d.swallow {
		return done, q.d.wait
	}
	return q.Queue.Wait(n, done)
}

func (q *flawedQueue) Close() error {
	q.d.closed++
	return errors.Join(q.d.close, q.Queue.Close())
}

func newFlawed(name string) *flawed {
	return &flawed{Device: blocktest.NewCrashWith(blocktest.CrashOptions{Name: name, Size: 1 << 20})}
}

// An error of a queue is that of each transfer on it; its queue is not used
// again, and other devices are not concerned.
func TestQueueErrors(t *testing.T) {
	for name, spoil := range map[string]func(*flawed){
		"open":   func(d *flawed) { d.open = errBroken },
		"submit": func(d *flawed) { d.submit = errBroken },
		"wait":   func(d *flawed) { d.wait = errBroken },
		"lost":   func(d *flawed) { d.swallow = true },
	} {
		t.Run(name, func(t *testing.T) {
			want := errBroken
			if name == "lost" {
				want = errLost
			}
			good, bad := newFlawed("good"), newFlawed("bad")
			s := NewSet([]hpdi.Device{good, bad})
			buf := make([]byte, block.Size)
			io := func(dev int) *IO { return &IO{Op: hpdi.OpRead, At: block.At(dev, 3), Vec: [][]byte{buf}} }
			spoil(bad)
			ios := []*IO{io(1), io(0), io(1)}
			if err := s.Do(ios); !errors.Is(err, want) || !strings.Contains(err.Error(), "read block 1:3") {
				t.Errorf("%v", err)
			}
			if ios[1].Err != nil || !errors.Is(ios[2].Err, want) {
				t.Errorf("%v, %v", ios[1].Err, ios[2].Err)
			}
			// A write that may have happened is to be synced, as long as it takes.
			if err := s.Do([]*IO{{Op: hpdi.OpWrite, At: block.At(1, 3), Vec: [][]byte{buf}}}); !errors.Is(err, want) {
				t.Errorf("write: %v", err)
			}
			for range 2 {
				if err := s.Sync(); !errors.Is(err, want) || !strings.Contains(err.Error(), "sync device bad") {
					t.Errorf("sync: %v", err)
				}
			}
			bad.open, bad.submit, bad.wait, bad.swallow = nil, nil, nil, false
			if err := s.Sync(); err != nil {
				t.Errorf("well again: %v", err)
			}
			if err := s.Do([]*IO{io(0), io(1)}); err != nil {
				t.Errorf("well again: %v", err)
			}
			if err := s.ReleaseQueues(); err != nil {
				t.Error(err)
			}
			if good.opened != good.closed || bad.opened != bad.closed {
				t.Errorf("queues opened %d and %d, closed %d and %d", good.opened, bad.opened, good.closed, bad.closed)
			}
		})
	}
}

// A device that is not there is a damaged address, for a caller as for another
// that wants a queue.
func TestNoSuchDevice(t *testing.T) {
	s := NewSet([]hpdi.Device{newFlawed("only")})
	err := s.Do([]*IO{{Op: hpdi.OpRead, At: block.At(4, 0), Vec: [][]byte{make([]byte, block.Size)}}})
	if !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), "device index 4") {
		t.Errorf("%v", err)
	}
	if q, err := s.Queue(1); !errors.Is(err, block.ErrCorrupt) || q != nil {
		t.Errorf("%v", err)
	}
}

// A device that is taken back leaves no queue behind, and its index to the next.
func TestRemoveLast(t *testing.T) {
	first, second := newFlawed("first"), newFlawed("second")
	s := NewSet([]hpdi.Device{first})
	if i := s.Add(second); i != 1 {
		t.Fatalf("index %d", i)
	}
	if err := s.Do([]*IO{{Op: hpdi.OpRead, At: block.At(1, 0), Vec: [][]byte{make([]byte, block.Size)}}}); err != nil {
		t.Fatal(err)
	}
	s.RemoveLast()
	if second.opened != 1 || second.closed != 1 || s.Len() != 1 || s.Device(0) != first {
		t.Errorf("%d queues opened, %d closed, %d devices", second.opened, second.closed, s.Len())
	}
	if i := s.Add(second); i != 1 || s.Info(1).Name != "second" {
		t.Errorf("index %d", i)
	}
	first.close = errBroken
	if err := s.Do([]*IO{{Op: hpdi.OpRead, At: block.At(0, 0), Vec: [][]byte{make([]byte, block.Size)}}}); err != nil {
		t.Fatal(err)
	}
	if err := s.Close(); !errors.Is(err, errBroken) || s.Len() != 0 {
		t.Errorf("%v", err)
	}
}
