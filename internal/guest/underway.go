package guest

import (
	"sync"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/file"
)

// underway knows the requests that the devices which a guest has open have not completed,
// by the names of the devices. Its zero value is ready.
type underway struct {
	mu      sync.Mutex // guards devices
	devices map[string]*watchedDevice
}

// watch returns a device that is d, whose requests are known until it is closed.
func (u *underway) watch(d hpdi.Device) hpdi.Device {
	w := &watchedDevice{Device: d, name: d.Info().Name, all: u, queues: map[*watchedQueue]struct{}{}}
	u.mu.Lock()
	defer u.mu.Unlock()
	if u.devices == nil {
		u.devices = map[string]*watchedDevice{}
	}
	u.devices[w.name] = w
	return w
}

// known returns what was found out about the device of that name when it was opened.
func (u *underway) known(name string) (k file.Known, ok bool) {
	u.mu.Lock()
	d := u.devices[name]
	u.mu.Unlock()
	if d == nil {
		return k, false
	}
	return file.KnownOf(d.Device)
}

// oldest returns what the device of that name has not completed for the longest time, and
// since when; ok is false when nothing is under way.
func (u *underway) oldest(name string) (op hpdi.Op, since time.Time, ok bool) {
	u.mu.Lock()
	d := u.devices[name]
	u.mu.Unlock()
	if d == nil {
		return 0, since, false
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for q := range d.queues {
		if o, s, under := q.oldest(); under && (!ok || s.Before(since)) {
			op, since, ok = o, s, true
		}
	}
	return op, since, ok
}

// watchedDevice is a device whose requests under way are known.
type watchedDevice struct {
	hpdi.Device
	name string
	all  *underway

	mu     sync.Mutex // guards queues; watchedQueue.mu may be taken under it
	queues map[*watchedQueue]struct{}
}

// NewQueue opens a queue.
func (d *watchedDevice) NewQueue(depth int) (hpdi.Queue, error) {
	q, err := d.Device.NewQueue(depth)
	if err != nil {
		return nil, err
	}
	w := &watchedQueue{Queue: q, of: d, under: make([]request, 0, depth)}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.queues[w] = struct{}{}
	return w, nil
}

// Close frees the device.
func (d *watchedDevice) Close() error {
	d.all.mu.Lock()
	if d.all.devices[d.name] == d { // it may have been opened again
		delete(d.all.devices, d.name)
	}
	d.all.mu.Unlock()
	return d.Device.Close()
}

// request is one that is under way.
type request struct {
	req   *hpdi.Request
	op    hpdi.Op // of req, which is the application's to change once it is complete
	since time.Time
}

type watchedQueue struct {
	hpdi.Queue
	of *watchedDevice

	mu    sync.Mutex // guards under; a leaf, and not held while the device is called
	under []request
}

// Submit hands requests to the device.
func (q *watchedQueue) Submit(reqs ...*hpdi.Request) error {
	now := time.Now()
	q.mu.Lock()
	for _, r := range reqs {
		q.under = append(q.under, request{r, r.Op, now})
	}
	q.mu.Unlock()
	err := q.Queue.Submit(reqs...)
	if err != nil {
		q.forget() // the queue works no more
	}
	return err
}

// Wait waits for requests.
func (q *watchedQueue) Wait(least int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	before := len(done)
	done, err := q.Queue.Wait(least, done)
	q.mu.Lock()
	defer q.mu.Unlock()
	if len(done)-before == len(q.under) {
		q.emptyLocked()
		return done, err
	}
	for _, r := range done[before:] {
		for i := range q.under {
			if q.under[i].req == r {
				last := len(q.under) - 1
				q.under[i], q.under[last] = q.under[last], request{}
				q.under = q.under[:last]
				break
			}
		}
	}
	return done, err
}

// Close waits for what is under way and frees the queue.
func (q *watchedQueue) Close() error {
	err := q.Queue.Close()
	q.forget()
	q.of.mu.Lock()
	defer q.of.mu.Unlock()
	delete(q.of.queues, q)
	return err
}

func (q *watchedQueue) forget() {
	q.mu.Lock()
	defer q.mu.Unlock()
	q.emptyLocked()
}

func (q *watchedQueue) emptyLocked() {
	clear(q.under) // nothing shall keep the requests' memory alive
	q.under = q.under[:0]
}

func (q *watchedQueue) oldest() (op hpdi.Op, since time.Time, ok bool) {
	q.mu.Lock()
	defer q.mu.Unlock()
	for _, r := range q.under {
		if !ok || r.since.Before(since) {
			op, since, ok = r.op, r.since, true
		}
	}
	return op, since, ok
}
