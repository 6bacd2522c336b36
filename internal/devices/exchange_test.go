package devices

import (
	"sync"
	"sync/atomic"
	"testing"

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
			buf, err := hpdi.Alloc(block.Size)
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
	buf, err := hpdi.Alloc(block.Size)
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
