// Package mem is the HPDI driver for memory: a device that forgets everything
// when it is closed. It serves as a fast tier, as scratch space and in tests.
//
// Requests complete within Submit, in order, and copy between the vectors and
// the device's memory, which lies outside the Go heap. Reads run beside each
// other; whatever changes the device runs alone, so no reader sees half a
// request. As no request is ever under way, none is out of reach of its deadline
// or of Cancel.
//
// What was never written, or was discarded or zeroed since, is a hole.
//
// Lock order: Device.mu, then Device.data.
package mem

import (
	"fmt"
	"net/url"
	"sync"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
)

// BlockSize is the alignment and granularity of every request.
const BlockSize = 4096

// device is an open memory device.
type device struct {
	info hpdi.Info

	mu     sync.Mutex // guards queues and closed
	queues int
	closed bool

	data    sync.RWMutex // guards the contents of what follows
	mem     []byte
	written []uint64 // a bit for each block
}

// Options are how a device is made.
type Options struct {
	Size int64 // bytes, a positive multiple of BlockSize
}

// Properties is what URIs of this driver take.
var Properties = []hpdi.Property{
	{Name: "size", Type: hpdi.TypeSize, Default: "64MiB", Min: BlockSize, Max: 1 << 46, Meaning: "Bytes of memory, a multiple of 4KiB"},
}

// ParseOptions makes options of the query of a URI. Its errors wrap hpdi.ErrProperty.
func ParseOptions(values url.Values) (Options, error) {
	s, err := hpdi.ParseSettings(Properties, values)
	if err != nil {
		return Options{}, err
	}
	return Options{Size: s.Size("size")}, nil
}

// Open returns a device that reads as zero. Its name is for messages.
func Open(name string, o Options) (hpdi.Device, error) {
	if name == "" {
		name = "mem"
	}
	return New(name, o.Size)
}

// New returns a device of size bytes, a positive multiple of BlockSize, that
// reads as zero.
func New(name string, size int64) (hpdi.Device, error) {
	if size <= 0 || size%BlockSize != 0 {
		return nil, fmt.Errorf("memory device %s: size %d is not a positive multiple of %d bytes", name, size, BlockSize)
	}
	mem, err := hpdi.AllocPrivate(int(size))
	if err != nil {
		return nil, fmt.Errorf("memory device %s: %w", name, err)
	}
	return &device{
		info: hpdi.Info{
			Name:      name,
			Driver:    "mem",
			Size:      size,
			BlockSize: BlockSize,
			Discard:   true,
			Zeroes:    true,
			Durable:   true, // no less than after a flush
			Status:    true,
			Event:     true,
			Cancel:    hpdi.CancelAll,
		},
		mem:     mem,
		written: make([]uint64, (size/BlockSize+63)/64),
	}, nil
}

// Info describes the device.
func (d *device) Info() hpdi.Info { return d.info }

// Register does nothing: every access is a copy.
func (d *device) Register([]byte) error { return nil }

// Unregister does nothing.
func (d *device) Unregister([]byte) error { return nil }

// NewQueue returns a queue. Its depth does not matter, as requests complete
// when they are submitted.
func (d *device) NewQueue(depth int) (hpdi.Queue, error) {
	if depth < 1 {
		return nil, fmt.Errorf("memory device %s: queue depth %d is less than 1", d.info.Name, depth)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, fmt.Errorf("memory device %s: %w", d.info.Name, hpdi.ErrClosed)
	}
	d.queues++
	return &queue{dev: d}, nil
}

// Close frees the memory. It refuses while a queue is open, because the queue
// would go on to touch memory that is gone.
func (d *device) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil
	}
	if d.queues > 0 {
		return fmt.Errorf("memory device %s: %d queues are still open, close them first", d.info.Name, d.queues)
	}
	d.closed = true
	mem := d.mem
	d.mem = nil
	return hpdi.Free(mem)
}

// do carries out one well-formed request.
func (d *device) do(r *hpdi.Request) {
	if r.Op == hpdi.OpRead || r.Op == hpdi.OpStatus {
		d.data.RLock()
		defer d.data.RUnlock()
	} else {
		d.data.Lock()
		defer d.data.Unlock()
	}
	at := d.mem[r.Offset:]
	switch r.Op {
	case hpdi.OpRead:
		for _, v := range r.Vec {
			at = at[copy(v, at):]
		}
	case hpdi.OpWrite:
		for _, v := range r.Vec {
			at = at[copy(at, v):]
		}
		d.mark(r.Offset, r.Bytes(), true)
	case hpdi.OpDiscard, hpdi.OpWriteZeroes:
		clear(at[:r.Length])
		d.mark(r.Offset, r.Length, false)
	case hpdi.OpStatus:
		d.status(r)
	}
}

// mark notes that n bytes from off on are written, or a hole. data is held.
func (d *device) mark(off, n int64, written bool) {
	for b := off / BlockSize; b < (off+n)/BlockSize; b++ {
		if written {
			d.written[b/64] |= 1 << (b % 64)
		} else {
			d.written[b/64] &^= 1 << (b % 64)
		}
	}
}

// status tells what a range is made of. data is held.
func (d *device) status(r *hpdi.Request) {
	first, end := r.Offset/BlockSize, (r.Offset+r.Length)/BlockSize
	for b := first; b < end; {
		from, was := b, d.written[b/64]>>(b%64)&1
		for b++; b < end && d.written[b/64]>>(b%64)&1 == was; b++ {
		}
		state := hpdi.Hole
		if was == 1 {
			state = hpdi.Data
		}
		if !r.AddExtent((b-from)*BlockSize, state) {
			return
		}
	}
}

// queue is a path to the device for one goroutine at a time.
type queue struct {
	dev    *device
	done   []*hpdi.Request
	event  hpdi.Signal
	closed bool
}

// Submit carries out the requests.
func (q *queue) Submit(reqs ...*hpdi.Request) error {
	if q.closed {
		return fmt.Errorf("memory device %s: queue: %w", q.dev.info.Name, hpdi.ErrClosed)
	}
	for _, r := range reqs {
		r.Err = r.Check(q.dev.info)
		if r.Err == nil && !r.Deadline.IsZero() {
			r.Err = r.Late(time.Now())
		}
		if r.Err == nil && r.Op != hpdi.OpFlush {
			q.dev.do(r)
		}
		q.done = append(q.done, r)
	}
	q.event.Set(len(q.done) > 0)
	return nil
}

// Wait returns everything submitted so far, which has completed already.
func (q *queue) Wait(_ int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	if q.closed {
		return done, fmt.Errorf("memory device %s: queue: %w", q.dev.info.Name, hpdi.ErrClosed)
	}
	done = append(done, q.done...)
	clear(q.done) // the application owns the requests again
	q.done = q.done[:0]
	q.event.Set(false)
	return done, nil
}

// Cancel finds nothing to do: whatever was submitted has completed.
func (q *queue) Cancel(...*hpdi.Request) {}

// Event returns a descriptor that is readable while Wait would return a request.
func (q *queue) Event() int { return q.event.Event() }

// Close frees the queue.
func (q *queue) Close() error {
	if q.closed {
		return nil
	}
	q.closed = true
	q.done = nil
	q.event.Close()
	q.dev.mu.Lock()
	q.dev.queues--
	q.dev.mu.Unlock()
	return nil
}
