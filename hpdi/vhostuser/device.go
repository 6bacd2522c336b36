package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/vhost"
	"github.com/pollux-storage/pollux/internal/virtio"
)

// device is an open block device.
type device struct {
	path string
	o    Options

	// Set when it was opened.
	features    virtio.Features // as negotiated
	block       int
	flush       bool  // there is a cache to be flushed
	mostDiscard int64 // bytes of a command
	mostZeroes  int64
	zeroFlags   uint32
	slots       int // regions that the back-end takes
	rings       []*vring
	own         []byte // the virtqueues' memory
	errIO       error
	errUnknown  error

	info  atomic.Pointer[hpdi.Info]
	mem   atomic.Pointer[memory] // written under mu
	cur   atomic.Pointer[link]   // the last one that was made
	fatal atomic.Pointer[error]  // the back-end broke a rule; there is no other one then

	stop   context.CancelFunc
	ctx    context.Context // ends with the device
	keeper sync.WaitGroup

	mu       sync.Mutex // guards the rest
	link     *link      // nil: there is none that is complete
	inflight *record    // of the back-end; nil: it keeps none
	closed   bool
	queues   int
}

// record is the area in which the back-end keeps what it has in flight.
type record struct {
	fd int
	d  vhost.Inflight
}

func (r *record) close() {
	if r != nil {
		_ = unix.Close(r.fd) // of memory there is nothing to lose
	}
}

// Open connects to the back-end that listens at the unix socket path. The context bounds
// that alone.
func Open(ctx context.Context, path string, o Options) (hpdi.Device, error) {
	d, err := open(ctx, path, o)
	if err != nil {
		return nil, fmt.Errorf("open vhost-user:%s: %w", path, err)
	}
	return d, nil
}

func open(ctx context.Context, path string, o Options) (*device, error) {
	if err := o.fill(); err != nil {
		return nil, err
	}
	d := &device{path: path, o: o}
	d.errIO = fmt.Errorf("%s: %w", path, hpdi.ErrIO)
	d.errUnknown = fmt.Errorf("%s: %w", path, hpdi.ErrUnsupported)
	d.ctx, d.stop = context.WithCancel(context.Background())
	d.mem.Store(&memory{})
	l, err := d.connect(ctx)
	if err != nil {
		d.stop()
		d.keeper.Wait()
		return nil, errors.Join(err, d.release())
	}
	d.keeper.Go(func() { d.keep(l) })
	return d, nil
}

// connect makes a connection and brings the device up on it. A back-end that is slow with
// each message is not waited for without end: whoever needs device.mu waits, too.
func (d *device) connect(ctx context.Context) (*link, error) {
	most := 2 * d.o.Timeout
	ctx, cancel := context.WithTimeoutCause(ctx, most, fmt.Errorf("the back-end has not brought the device up within %v: %w", most, os.ErrDeadlineExceeded))
	defer cancel()
	l, err := dial(ctx, d.path, d.o.Timeout)
	if err != nil {
		return nil, err
	}
	end := context.AfterFunc(ctx, func() { l.end(context.Cause(ctx)) })
	err = d.begin(l)
	if !end() && err == nil {
		err = context.Cause(ctx)
	}
	if err != nil {
		l.close(err)
		return nil, err
	}
	return l, nil
}

func (d *device) begin(l *link) error {
	offer, err := d.negotiate(l)
	if err != nil {
		return err
	}
	if d.rings == nil {
		if err := d.choose(offer); err != nil {
			return err
		}
		if err := d.build(offer); err != nil {
			return err
		}
	} else if err := d.fits(offer); err != nil {
		return err
	}
	return d.attach(l, offer)
}

// build makes the virtqueues.
func (d *device) build(offer *offer) error {
	chain := offer.segments(d.o.QueueSize) + 2
	_, _, _, _, each := ringBytes(d.o.QueueSize, chain, d.features)
	n := min(d.o.Queues, offer.queues)
	own, err := hpdi.Alloc(n * each)
	if err != nil {
		return err
	}
	d.own = own
	r, err := newRegion(own)
	if err != nil {
		return err
	}
	d.mem.Store(&memory{regions: []*region{r}, freed: hpdi.Freed()})
	d.slots = offer.slots
	for i := range n {
		v, err := d.newRing(i, own[i*each:(i+1)*each], chain)
		if err != nil {
			return err
		}
		v.segMost, v.most = offer.segmentBytes(d.block), mostCommand
		d.rings = append(d.rings, v)
	}
	return nil
}

// release frees what the device has, apart from the connection.
func (d *device) release() error {
	for _, v := range d.rings {
		v.free()
	}
	for _, r := range d.mem.Load().regions {
		r.close()
	}
	d.inflight.close()
	return hpdi.Free(d.own)
}

// failure returns the error of a request for the status that the back-end gave it.
func (d *device) failure(status byte) error {
	switch status {
	case virtio.BlkIOError:
		return d.errIO
	case virtio.BlkUnsupported:
		return d.errUnknown
	case noStatus:
		return fmt.Errorf("%s: the back-end has completed a request without a status: %w", d.path, hpdi.ErrIO)
	}
	return fmt.Errorf("%s: the back-end has completed a request with the unknown status %d: %w", d.path, status, hpdi.ErrIO)
}

// broken ends the device: what the back-end has written to a virtqueue cannot be.
func (d *device) broken(v *vring, err error) {
	err = fmt.Errorf("%s: queue %d: %w: %w", d.path, v.index, hpdi.ErrDisconnected, err)
	if !d.fatal.CompareAndSwap(nil, &err) {
		err = *d.fatal.Load()
	}
	v.killLocked(err)
	d.cur.Load().end(err) // the keeper ends the others
}

// Info describes the device as it is now: it may become larger.
func (d *device) Info() hpdi.Info { return *d.info.Load() }

// Close takes the queues from the back-end and ends the connection.
func (d *device) Close() error {
	d.mu.Lock()
	if d.closed {
		d.mu.Unlock()
		return nil
	}
	if d.queues > 0 {
		defer d.mu.Unlock()
		return fmt.Errorf("%s: %d queues are still open, close them first", d.path, d.queues)
	}
	d.closed = true
	l := d.link
	d.link = nil
	d.mu.Unlock()
	if l != nil {
		d.detach(l)
	}
	d.stop()
	if l != nil {
		l.close(hpdi.ErrClosed)
	}
	d.keeper.Wait()
	return d.release()
}

// detach takes the virtqueues from the back-end, which has nothing in flight. What it
// answers does not matter any more.
func (d *device) detach(l *link) {
	for _, v := range d.rings {
		if r, err := l.ask(vhost.GetVringBase, vhost.VringState{Index: uint32(v.index)}.Append(nil)); err == nil {
			r.close()
		}
	}
	switch {
	case l.proto.Has(vhost.PStatus):
		_ = l.tell(vhost.SetStatus, vhost.AppendU64(nil, 0))
	case l.proto.Has(vhost.PResetDevice):
		_ = l.tell(vhost.ResetDevice, nil)
	}
}
