package devices

import (
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

// paced is a device that moves so many bytes a second, one request after the
// other, in virtual time, and remembers how many were under way at most.
type paced struct {
	hpdi.Device
	perSecond int64

	mu   sync.Mutex // guards what follows
	free time.Time  // when the device has done all that was submitted
	out  int64
	most int64
}

func (d *paced) NewQueue(int) (hpdi.Queue, error) { return &pacedQueue{d: d}, nil }

type pacedQueue struct {
	hpdi.Plain
	d     *paced
	reqs  []*hpdi.Request
	bytes int64
	until time.Time
}

func (q *pacedQueue) Submit(reqs ...*hpdi.Request) error {
	d := q.d
	d.mu.Lock()
	defer d.mu.Unlock()
	if now := time.Now(); d.free.Before(now) {
		d.free = now
	}
	for _, r := range reqs {
		q.bytes += r.Bytes()
	}
	q.reqs = reqs
	d.free = d.free.Add(time.Duration(q.bytes * int64(time.Second) / d.perSecond))
	q.until = d.free
	d.out += q.bytes
	d.most = max(d.most, d.out)
	return nil
}

func (q *pacedQueue) Wait(_ int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	time.Sleep(time.Until(q.until))
	q.d.mu.Lock()
	defer q.d.mu.Unlock()
	q.d.out -= q.bytes
	q.bytes = 0
	return append(done, q.reqs...), nil
}

func (q *pacedQueue) Close() error { return nil }

// take returns the most bytes that were under way since the last call.
func (d *paced) take() int64 {
	d.mu.Lock()
	defer d.mu.Unlock()
	n := d.most
	d.most = d.out
	return n
}

// Whatever readers and writers ask for together, what is under way is what the
// device does in about 20 ms, on a slow one and on a fast one.
func TestBytesUnderWay(t *testing.T) {
	for name, perSecond := range map[string]int64{"disk": 150 << 20, "flash": 2 << 30} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				dev := &paced{Device: blocktest.NewCrash(1<<30, 1), perSecond: perSecond}
				s := NewSet([]hpdi.Device{dev})
				defer s.Close()
				mem := make([]byte, 256<<10)
				load := func(rounds int) {
					var wg sync.WaitGroup
					for w := range 24 { // each with 8 MiB
						wg.Go(func() {
							var ios []*IO
							for i := range 32 {
								op := hpdi.OpWrite
								if w%2 == 0 {
									op = hpdi.OpRead
								}
								ios = append(ios, &IO{Op: op, At: block.At(0, uint64(i*64)), Vec: [][]byte{mem}})
							}
							for range rounds {
								if err := s.Do(ios); err != nil {
									t.Error(err)
								}
							}
						})
					}
					wg.Wait()
				}
				load(4) // it learns
				if most := dev.take(); most > max(limitFirst, perSecond/50) {
					t.Errorf("%d bytes were under way while it learned", most)
				}
				load(2)
				want := perSecond * int64(fenceTime) / int64(time.Second)
				if most := dev.take(); most > want*5/4 || most < want/2 {
					t.Errorf("%d bytes were under way, want about %d", most, want)
				}
			})
		})
	}
}

// A load that never waits says nothing of the device.
func TestLightLoadLimitsNothing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dev := &paced{Device: blocktest.NewCrash(1<<20, 1), perSecond: 1 << 20}
		s := NewSet([]hpdi.Device{dev})
		defer s.Close()
		for range 100 {
			if err := s.Do([]*IO{{Op: hpdi.OpRead, Vec: [][]byte{make([]byte, block.Size)}}}); err != nil {
				t.Fatal(err)
			}
		}
		if n := s.devs[0].limit.limit(); n != limitFirst {
			t.Errorf("the limit is %d", n)
		}
	})
}

// The limit is no less than one transfer, and whoever came first goes first.
func TestLimiterOrder(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		l := newLimiter()
		l.acquire(2 * limitFirst) // alone, it may
		var mu sync.Mutex
		var order []int
		for i, n := range []int64{limitFirst, 1, limitFirst - 1} {
			go func() {
				l.acquire(n)
				mu.Lock()
				defer mu.Unlock()
				order = append(order, i)
			}()
			synctest.Wait()
		}
		if len(order) != 0 {
			t.Fatalf("%v went past the limit", order)
		}
		l.release(2 * limitFirst)
		synctest.Wait()
		if len(order) != 1 || order[0] != 0 {
			t.Fatalf("%v, the first waited longest", order)
		}
		l.release(limitFirst)
		synctest.Wait()
		if len(order) != 3 {
			t.Errorf("%v: what fits together goes together", order)
		}
	})
}
