package devices

import (
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/mem"
	"github.com/pollux-storage/pollux/internal/block"
)

// watched counts the requests under way at a device.
type watched struct {
	hpdi.Device
	under, flushes atomic.Int64
}

type watchedQueue struct {
	hpdi.Queue
	d *watched
}

func (d *watched) NewQueue(depth int) (hpdi.Queue, error) {
	q, err := d.Device.NewQueue(depth)
	return &watchedQueue{q, d}, err
}

func (q *watchedQueue) Submit(reqs ...*hpdi.Request) error {
	for _, r := range reqs {
		if r.Op == hpdi.OpFlush {
			q.d.flushes.Add(1)
		}
	}
	q.d.under.Add(int64(len(reqs)))
	return q.Queue.Submit(reqs...)
}

func (q *watchedQueue) Wait(n int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	before := len(done)
	done, err := q.Queue.Wait(n, done)
	q.d.under.Add(-int64(len(done) - before))
	return done, err
}

// TestExchange exchanges a device again and again while others use it: nothing fails, nothing
// is under way at the old one afterwards, and a sync covers what was written to it.
func TestExchange(t *testing.T) {
	dev, err := mem.New("disk", 64*block.Size)
	if err != nil {
		t.Fatal(err)
	}
	now := &watched{Device: dev}
	s := NewSet([]hpdi.Device{now})
	stop := make(chan struct{})
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			buf, err := hpdi.AllocPrivate(block.Size)
			if err != nil {
				t.Error(err)
				return
			}
			defer func() { _ = hpdi.Free(buf) }()
			for n := 0; ; n++ {
				select {
				case <-stop:
					return
				default:
				}
				op := []hpdi.Op{hpdi.OpRead, hpdi.OpWrite}[n%2]
				if err := s.Do([]*IO{{Op: op, At: block.At(0, uint64(i)), Vec: [][]byte{buf}}}); err != nil {
					t.Error(err)
					return
				}
				if n%8 == 0 {
					if err := s.ReadCopy(0, block.At(0, uint64(i)), buf); err != nil {
						t.Error(err)
						return
					}
				}
			}
		})
	}
	for range 200 {
		old := now
		now = &watched{Device: dev}
		if err := s.Exchange(0, now); err != nil {
			t.Fatal(err)
		}
		if n := old.under.Load(); n != 0 {
			t.Fatalf("%d requests are under way at the old device", n)
		}
	}
	close(stop)
	wg.Wait()
	buf, err := hpdi.AllocPrivate(block.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = hpdi.Free(buf) }()
	if err := s.Sync(); err != nil {
		t.Fatal(err)
	}
	if err := s.Do([]*IO{{Op: hpdi.OpWrite, At: block.At(0, 1), Vec: [][]byte{buf}}}); err != nil {
		t.Fatal(err)
	}
	last := &watched{Device: dev}
	if err := s.Exchange(0, last); err != nil {
		t.Fatal(err)
	}
	if err := s.Sync(); err != nil || last.flushes.Load() != 1 {
		t.Fatalf("%d flushes of what was written before: %v", last.flushes.Load(), err)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
}

// held holds reads back until it is told.
type held struct {
	*watched
	until chan struct{}
}

func (d *held) NewQueue(depth int) (hpdi.Queue, error) {
	q, err := d.watched.NewQueue(depth)
	return &heldQueue{q, d}, err
}

type heldQueue struct {
	hpdi.Queue
	d *held
}

func (q *heldQueue) Submit(reqs ...*hpdi.Request) error {
	if reqs[0].Op == hpdi.OpRead {
		<-q.d.until
	}
	return q.Queue.Submit(reqs...)
}

// TestExchangeAndSync: a sync covers what was written to a device that another one is taking
// the place of, while somebody still uses that; and who waits for its end waits in a way that
// a simulated clock sees.
func TestExchangeAndSync(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dev, err := mem.New("disk", 64*block.Size)
		if err != nil {
			t.Fatal(err)
		}
		old, next := &held{&watched{Device: dev}, make(chan struct{})}, &watched{Device: dev}
		s := NewSet([]hpdi.Device{old})
		bufs := [2][]byte{make([]byte, block.Size), make([]byte, block.Size)}
		var wg sync.WaitGroup
		wg.Go(func() {
			if err := s.Read(block.At(0, 0), bufs[0]); err != nil {
				t.Error(err)
			}
		})
		synctest.Wait()
		if err := s.Do([]*IO{{Op: hpdi.OpWrite, At: block.At(0, 1), Vec: [][]byte{bufs[1]}}}); err != nil {
			t.Fatal(err)
		}
		exchanged := false
		wg.Go(func() {
			if err := s.Exchange(0, next); err != nil {
				t.Error(err)
			}
			exchanged = true
		})
		synctest.Wait()
		if exchanged {
			t.Error("it did not wait for who uses the device")
		}
		if err := s.Sync(); err != nil || next.flushes.Load() != 1 {
			t.Errorf("%d flushes: %v", next.flushes.Load(), err)
		}
		close(old.until)
		wg.Wait()
		if err := s.Close(); err != nil {
			t.Error(err)
		}
	})
}
