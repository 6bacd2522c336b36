package main

import (
	"math"
	"slices"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

// drive is what serves requests in virtual time, one behind the other as they arrive, and
// returns when each is complete. Times of arrival must not go back.
type drive interface {
	serve(at time.Duration, op hpdi.Op, off, n int64) time.Duration
	rotates() bool
	// busy is how long it was not free for the next request.
	busy() time.Duration
}

// spread is a modelled disk of which data sets are all over, each in one piece.
type spread struct {
	*blocktest.Disk
	setBytes, stride int64
	free             time.Duration
}

func newSpread(t blocktest.DiskType, sets int, setBytes int64) *spread {
	return &spread{Disk: blocktest.NewDisk(t), setBytes: setBytes, stride: t.Size / int64(sets) / setBytes * setBytes}
}

func (d *spread) serve(at time.Duration, _ hpdi.Op, off, n int64) time.Duration {
	at = max(at, d.free)
	d.free = at + d.Service((off/d.setBytes*d.stride+off%d.setBytes)/block.Size, n/block.Size)
	return d.free
}

func (d *spread) rotates() bool { return true }

func (d *spread) busy() time.Duration { return d.Count().Busy }

// ssd is a modelled flash drive.
type ssd struct {
	*blocktest.SSD
	t    blocktest.SSDType
	used time.Duration
}

func newSSD(t blocktest.SSDType) *ssd { return &ssd{SSD: blocktest.NewSSD(t), t: t} }

func (d *ssd) serve(at time.Duration, op hpdi.Op, _, n int64) time.Duration {
	s := d.t.Read
	if op == hpdi.OpWrite {
		s = d.t.Write
	}
	d.used += max(time.Second/time.Duration(s.PerSecond), time.Duration(float64(n)/float64(s.Rate)*float64(time.Second)))
	return d.Serve(at, op, n)
}

func (d *ssd) rotates() bool { return false }

func (d *ssd) busy() time.Duration { return d.used }

// never is a time that does not come.
const never = time.Duration(math.MaxInt64)

// clock is virtual time for two who use devices at once: clients, whose requests come by
// themselves, and a mover, which waits for each of its own. All of it happens in one
// goroutine: before the mover asks anything, what clients ask until then is asked.
type clock struct {
	now    time.Duration // of the mover
	client time.Duration // of the newest event of clients
	// opening says that the queues that are opened are those of clients.
	opening bool
	queues  []*timedQueue // of clients
	until   func(time.Duration)
}

// next returns when the next request of clients that is under way is complete.
func (c *clock) next() time.Duration {
	first := never
	for _, q := range c.queues {
		for i := range q.flying {
			first = min(first, q.flying[i].done)
		}
	}
	return first
}

// timed is a device with a drive below it that takes its time. What the clients write and
// read is nowhere, what a mover does is in dev, if there is one.
type timed struct {
	hpdi.Device
	c     *clock
	d     drive // nil while nothing takes time
	empty bool
}

func (t *timed) Info() hpdi.Info {
	info := t.Device.Info().Plain()
	info.Rotates = t.d != nil && t.d.rotates()
	return info
}

func (t *timed) NewQueue(depth int) (hpdi.Queue, error) {
	q, err := t.Device.NewQueue(depth)
	if err != nil {
		return nil, err
	}
	out := &timedQueue{Queue: q, t: t, clients: t.c.opening}
	if out.clients {
		t.c.queues = append(t.c.queues, out)
	}
	return out, nil
}

// timedQueue is a path to a timed device.
type timedQueue struct {
	hpdi.Queue
	t       *timed
	clients bool
	flying  []flight
}

// flight is a request that is under way.
type flight struct {
	r    *hpdi.Request
	done time.Duration
}

func (q *timedQueue) Submit(reqs ...*hpdi.Request) error {
	c := q.t.c
	at := c.client
	if !q.clients {
		if c.until != nil {
			c.until(c.now)
		}
		at = c.now
	}
	info := q.t.Device.Info()
	for _, r := range reqs {
		r.Err = r.Check(info)
		done := at
		if r.Err == nil && !q.clients && !q.t.empty {
			if err := hpdi.Do(q.Queue, r); err != nil {
				return err
			}
		}
		if r.Err == nil && q.t.d != nil && (r.Op == hpdi.OpRead || r.Op == hpdi.OpWrite) {
			done = q.t.d.serve(at, r.Op, r.Offset, r.Bytes())
		}
		q.flying = append(q.flying, flight{r, done})
	}
	return nil
}

// Wait returns what is complete by the clients' time, and for the mover has the time come
// when all is.
func (q *timedQueue) Wait(_ int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	c := q.t.c
	q.flying = slices.DeleteFunc(q.flying, func(f flight) bool {
		if q.clients && f.done > c.client {
			return false
		}
		if !q.clients {
			c.now = max(c.now, f.done)
		}
		done = append(done, f.r)
		return true
	})
	return done, nil
}
