// Package file is the HPDI driver for regular files and block devices.
//
// [Open] chooses, at run time, how I/O is done, and Info says what it chose
// and why nothing faster: direct I/O where the file system allows it, else the
// page cache; io_uring where the kernel allows it, else pread and pwrite on a
// few goroutines.
//
// # The lock
//
// With Options.Lock the file is locked (flock) on the very description that
// does the I/O. A process that is killed loses its descriptors at once, but
// requests that the kernel has already begun keep the description, and with it
// the lock, until they have ended. So whoever gets the lock knows that no
// write of the former holder can still arrive. For the same reason a locked
// file is not registered with the ring ("fixed files"): a ring is torn down
// long after its last request, and keeps the lock all that time. Under 64
// direct writes in flight, the lock came free 24 ms (median) after the killed
// process had been reaped with a registered file, 0.2 ms without; requests took
// equally long.
//
// # Cancelling
//
// What the kernel has given to a disk cannot be had back: it is the disk that
// has the memory. A request that is cancelled, or whose deadline passes, ends
// early where it waits for a goroutine (sync), or where the kernel has queued it
// for a thread of its own or waits for a descriptor to become ready (io_uring). Others
// complete as if nothing had been said. With io_uring the kernel watches
// deadlines, by a timeout that is linked to the request; the sync engine has a
// timer for each queue.
//
// # Invariants
//
//   - A queue belongs to one goroutine at a time and takes no lock that another
//     queue takes on the I/O path.
//   - Memory that the kernel may touch (vectors, iovec arrays) stays alive and
//     in place until the request has completed: iovec arrays lie outside the Go
//     heap, vectors that lie in it are pinned, and an open queue is reachable
//     from a package variable even if the application drops it.
//   - The description is closed only when no queue is open.
//
// Locks: device.mu guards what queues there are and what memory is registered,
// and is held while rings are told of memory; syncQueue.mu guards its requests;
// neither is held while taking the other. No ring has a lock: whoever registers
// memory publishes it to the owners of the rings by an atomic pointer. A ring that is
// bound to a thread takes memory from that thread alone: its queue finds what is to be
// registered in a list, under device.mu, when it is used next.
package file

import (
	"errors"
	"fmt"
	"strings"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
)

// BlockSize is the alignment and granularity of every request.
const BlockSize = 4096

// MaxDepth is the greatest depth of a queue.
const MaxDepth = 4096

// device is an open file or block device.
type device struct {
	info      hpdi.Info
	id        Identity
	fd        int
	block     bool // a block device, not a regular file
	lock      bool // fd holds the lock
	makeQueue func(d *device, depth int) (hpdi.Queue, error)

	// Ways that this kernel or file system refused once, which are not tried
	// again.
	noZeroRange    atomic.Bool // write zeroes by punching a hole instead
	noAsyncDiscard atomic.Bool // discard by ioctl instead

	opts Options // as it was opened; what it chose stands in info

	refused atomic.Pointer[string] // what Info.Note says of memory that is not registered

	mu     sync.Mutex // guards what follows
	queues int
	closed bool
	rings  map[*uringQueue]struct{} // those that memory is registered with
	memory []*registration
}

// Open opens the regular file or block device at path.
func Open(path string, opts Options) (hpdi.Device, error) {
	if err := opts.Validate(); err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	fd, err := openFile(path, opts)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	d := &device{fd: fd, lock: opts.Lock, opts: opts, rings: map[*uringQueue]struct{}{}, info: hpdi.Info{Name: path, BlockSize: BlockSize, Durable: true, ReadOnly: opts.ReadOnly}}
	if err := d.setUp(opts); err != nil {
		_ = unix.Close(fd) // the error before is the one to tell
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	return d, nil
}

// setUp finds out what d can do, after it was opened and locked.
func (d *device) setUp(opts Options) error {
	if err := d.measure(); err != nil {
		return err
	}
	if d.block && d.lock && !opts.ReadOnly {
		if err := refuseBusy(d.fd); err != nil {
			return err
		}
	}
	d.probeStatus()
	d.info.Event, d.info.Cancel = true, hpdi.CancelQueued
	if d.known(opts) {
		return nil
	}
	var notes []string
	if note, err := d.chooseDirect(opts.Direct); err != nil {
		return err
	} else if note != "" {
		notes = append(notes, note)
	}
	if note, err := d.chooseEngine(opts.Engine); err != nil {
		return err
	} else if note != "" {
		notes = append(notes, note)
	}
	d.probeDeallocate()
	d.probeMedium()
	d.info.Note = strings.Join(notes, "; ")
	return nil
}

// chooseEngine decides between io_uring and goroutines.
func (d *device) chooseEngine(want Engine) (note string, err error) {
	d.info.Driver, d.makeQueue = string(EngineSync), newSyncQueue
	if want == EngineSync {
		return "", nil
	}
	bound, err := probeURing(d.opts.Thread)
	if err != nil {
		if want == EngineURing {
			return "", fmt.Errorf("io_uring: %w", err)
		}
		return fmt.Sprintf("no io_uring: %v", err), nil
	}
	d.info.Driver, d.makeQueue, d.info.Thread = string(EngineURing), newURingQueue, bound
	if d.opts.Thread && !bound {
		return "queues are not bound to threads: it takes Linux 6.1", nil
	}
	return "", nil
}

// Info describes the device.
func (d *device) Info() hpdi.Info {
	info := d.info
	if refused := d.refused.Load(); refused != nil {
		if info.Note != "" {
			info.Note += "; "
		}
		info.Note += *refused
	}
	return info
}

// NewQueue returns a queue that takes up to depth requests at once.
func (d *device) NewQueue(depth int) (hpdi.Queue, error) {
	if depth < 1 || depth > MaxDepth {
		return nil, fmt.Errorf("%s: queue depth %d is not from 1 to %d", d.info.Name, depth, MaxDepth)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil, fmt.Errorf("%s: %w", d.info.Name, hpdi.ErrClosed)
	}
	q, err := d.makeQueue(d, depth)
	if err != nil {
		return nil, fmt.Errorf("%s: new %s queue: %w", d.info.Name, d.info.Driver, err)
	}
	d.queues++
	if q, ok := q.(*uringQueue); ok {
		d.rings[q] = struct{}{}
		for _, reg := range d.memory {
			q.attach(reg)
		}
		d.tellRefused()
	}
	return q, nil
}

// queueClosed is what a queue calls when the kernel has nothing of it left.
func (d *device) queueClosed() {
	d.mu.Lock()
	d.queues--
	d.mu.Unlock()
}

// forget is what a queue calls before its ring goes: no memory is registered with it
// from then on.
func (d *device) forget(q *uringQueue) {
	d.mu.Lock()
	delete(d.rings, q)
	d.mu.Unlock()
}

// Close releases the lock and closes the file. It refuses while a queue is
// open: its requests would outlive the lock.
func (d *device) Close() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return nil
	}
	if d.queues > 0 {
		return fmt.Errorf("close %s: %d queues are still open, close them first", d.info.Name, d.queues)
	}
	d.closed = true
	var err error
	if d.lock {
		// Every request has completed, but a kernel worker may hold on to the
		// description for a moment after it has said so. Unlocking does not
		// wait for it.
		err = flock(d.fd, unix.LOCK_UN)
	}
	if err = errors.Join(err, unix.Close(d.fd)); err != nil {
		return fmt.Errorf("close %s: %w", d.info.Name, err)
	}
	return nil
}

// fail wraps the error of a request with the device's name, and the kernel's with the
// kind that it is of.
func (d *device) fail(err error) error {
	if errno, ok := err.(unix.Errno); ok {
		err = hpdi.Errno(errno)
	}
	return fmt.Errorf("%s: %w", d.info.Name, err)
}
