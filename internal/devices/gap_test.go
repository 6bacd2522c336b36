package devices

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

// counted is a device that knows how many queues are open.
type counted struct {
	hpdi.Device
	queues atomic.Int64
}

func (d *counted) NewQueue(depth int) (hpdi.Queue, error) {
	d.queues.Add(1)
	q, err := d.Device.NewQueue(depth)
	return &countedQueue{q, d}, err
}

type countedQueue struct {
	hpdi.Queue
	d *counted
}

func (q *countedQueue) Close() error {
	q.d.queues.Add(-1)
	return q.Queue.Close()
}

// A device that is removed leaves a gap: nobody uses it any more when it is handed
// out, whoever asks for it later finds a damaged address, and the others stay where
// they are.
func TestRemove(t *testing.T) {
	first, second, third := newFlawed("first"), &counted{Device: newFlawed("second").Device}, &counted{Device: newFlawed("third").Device}
	s := NewSet([]hpdi.Device{first, second, third})
	read := func(dev int) error {
		return s.Do([]*IO{{Op: hpdi.OpRead, At: block.At(dev, 3), Vec: [][]byte{make([]byte, block.Size)}}})
	}
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				if err := read(1); err != nil && !errors.Is(err, block.ErrCorrupt) {
					t.Error(err) // the device was closed under it
					return
				}
				if err := errors.Join(read(2), s.Sync()); err != nil {
					t.Error(err)
					return
				}
			}
		})
	}
	for range 100 {
		if err := read(1); err != nil {
			t.Fatal(err)
		}
	}
	d, err := s.Remove(1)
	if err != nil || d != second {
		t.Fatalf("%v %v", d, err)
	}
	if n := second.queues.Load(); n != 0 {
		t.Errorf("%d queues are open", n)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	close(stop)
	wg.Wait()
	if s.Len() != 3 || s.Has(1) || !s.Has(2) || s.Info(2).Name != "third" || s.Device(1) != nil || s.Copies(1) != 1 {
		t.Errorf("%d devices", s.Len())
	}
	page := make([]byte, block.Size)
	_, rerr := s.Repair(block.At(1, 3), page, func([]byte) bool { return true })
	_, qerr := s.Queue(1)
	for what, err := range map[string]error{
		"read": read(1), "copy": s.ReadCopy(0, block.At(1, 3), page), "second copy": s.ReadCopy(1, block.At(1, 3), page), "repair": rerr, "queue": qerr,
	} {
		if !errors.Is(err, block.ErrCorrupt) {
			t.Errorf("%s: %v", what, err)
		}
	}
	if err := s.Sync(); err != nil {
		t.Error(err)
	}
	s.Fill(1, newFlawed("fourth"))
	if err := read(1); err != nil || s.Info(1).Name != "fourth" {
		t.Errorf("%v %s", err, s.Info(1).Name)
	}
	if i := s.AddGap(); i != 3 || s.Has(3) {
		t.Errorf("index %d", i)
	}
	if err := s.Close(); err != nil {
		t.Error(err)
	}
}
