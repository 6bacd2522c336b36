package ring

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	core "github.com/pollux-storage/pollux/internal/ring"
)

// device is an open ring.
type device struct {
	path  string
	o     Options
	m     *core.Memory
	mem   []byte
	fd    int
	bells []*core.Bell // of each queue the back-end's, and that of this side
	ctx   context.Context
	stop  context.CancelFunc
	ended chan struct{} // closed when the goroutine that connects has ended

	info  atomic.Pointer[facts]
	table atomic.Pointer[table]
	// attached says that a back-end may run what is in the ring. It is set under mu, before
	// a back-end is told to start, and cleared when its connection has ended.
	attached atomic.Bool
	// dead says that nobody will run what is in the ring any more; err is why.
	dead   atomic.Bool
	death  sync.Once // sets err, then dead
	err    error
	ending sync.Once      // of broken
	tasks  sync.WaitGroup // that of broken
	closed atomic.Bool
	life   sync.RWMutex // held where the ring must stay mapped, by whoever has no queue

	mu     sync.Mutex // guards the following, setting closed, and replacing table
	link   *core.Link
	last   error // why the last back-end went or would not come
	fronts []*core.Front
	used   []bool // queues that the application has
}

// facts is what the back-end said of its device, and when.
type facts struct {
	hpdi.Info
	seq  uint64
	most int64 // bytes of a part of a request
}

// Open opens a ring. At path a back-end listens, which must be there; or path is a file that
// both sides map, in which a ring is made, and Open waits for its back-end. ctx is for opening
// alone.
func Open(ctx context.Context, path string, o Options) (hpdi.Device, error) {
	if st, err := os.Stat(path); err == nil && st.Mode()&os.ModeSocket == 0 {
		return openMapped(ctx, path, o)
	}
	shape, err := o.shape()
	if err != nil {
		return nil, err
	}
	d := newDevice(path, o)
	d.used = make([]bool, shape.Queues)
	if err = d.prepare(shape); err == nil {
		err = d.connect(ctx)
	}
	if err == nil {
		err = d.refresh()
		// They may be changing just now.
		for try := 0; err != nil && try < 20 && ctx.Err() == nil; try++ {
			time.Sleep(time.Millisecond)
			err = d.refresh()
		}
	}
	if err != nil {
		if d.link != nil {
			d.link.Drop() // nothing was submitted
		}
		d.free()
		return nil, d.wrap(err)
	}
	go d.stay()
	return d, nil
}

func newDevice(path string, o Options) *device {
	d := &device{path: path, o: o, fd: -1, ended: make(chan struct{})}
	d.ctx, d.stop = context.WithCancel(context.Background())
	return d
}

func (d *device) wrap(err error) error { return fmt.Errorf("ring %s: %w", d.path, err) }

// prepare makes memory, bells and queues.
func (d *device) prepare(shape core.Shape) (err error) {
	if d.m, d.mem, d.fd, err = core.NewMemory(shape); err != nil {
		return err
	}
	d.table.Store(&table{freed: hpdi.Freed()})
	for q := range shape.Queues {
		for range 2 {
			b, err := core.NewBell()
			if err != nil {
				return err
			}
			d.bells = append(d.bells, b)
		}
		d.fronts = append(d.fronts, core.NewFront(d.m, q))
	}
	d.m.SetFront(true)
	return nil
}

// connect tries once to find a back-end and have it serve. The error stays in last.
func (d *device) connect(ctx context.Context) error {
	link, err := core.Dial(ctx, d.path)
	if err == nil {
		err = d.introduce(link)
	}
	if err != nil {
		d.mu.Lock()
		d.last = err
		d.mu.Unlock()
	}
	return err
}

// introduce hands everything over to a back-end. With an error it has begun if attached is
// set.
func (d *device) introduce(link *core.Link) error {
	// Until Start nothing of the ring is run, so that requests can be called off, and the
	// back-end may take its time.
	if err := link.Attach(d.fd, int64(len(d.mem)), d.bells); err != nil {
		link.Cut()
		return err
	}
	var has told
	for {
		d.mu.Lock()
		next := d.nextLocked(&has)
		if next == nil {
			d.link = link
			d.attached.Store(true)
		}
		d.mu.Unlock()
		if next == nil {
			return link.Start()
		}
		if err := next(link); err != nil {
			link.Cut()
			return err
		}
	}
}

// The pauses between attempts to find a back-end.
const (
	firstPause   = time.Millisecond
	longestPause = 100 * time.Millisecond
)

// stay looks for a back-end whenever there is none, until the device is closed or nobody
// comes for too long.
func (d *device) stay() {
	defer close(d.ended)
	for {
		if !d.untilGone() {
			return
		}
		err := d.link.Err()
		d.mu.Lock()
		d.last = err
		d.mu.Unlock()
		if errors.Is(err, core.ErrBroken) && !errors.Is(err, core.ErrGone) {
			d.die(err)
			return
		}
		if !d.again() {
			return
		}
	}
}

// untilGone waits until no back-end is attached any more. It returns false when the device is to
// end instead.
func (d *device) untilGone() bool {
	select {
	case <-d.ctx.Done():
		return false
	case <-d.link.Gone():
	}
	d.attached.Store(false)
	d.wakeAll() // what was cancelled can be retracted now
	return true
}

// again finds the next back-end. It returns false when the device has ended instead.
func (d *device) again() bool {
	until := time.Now().Add(d.o.Reconnect)
	for pause := firstPause; ; pause = min(2*pause, longestPause) {
		if time.Now().Before(until) || d.o.Reconnect > 0 && pause == firstPause {
			ctx, cancel := context.WithDeadline(d.ctx, until)
			err := d.connect(ctx)
			cancel()
			if err == nil {
				return true
			}
			if d.attached.Load() && !d.untilGone() {
				return false
			}
		}
		if d.ctx.Err() != nil {
			return false
		}
		if time.Now().Add(pause).After(until) {
			d.mu.Lock()
			err := d.last
			d.mu.Unlock()
			if d.o.Reconnect > 0 {
				err = fmt.Errorf("no back-end has come for %v: %w", d.o.Reconnect, err)
			}
			d.die(err)
			return false
		}
		select {
		case <-d.ctx.Done():
			return false
		case <-time.After(pause):
		}
	}
}

// die makes everything fail from now on. No back-end is attached.
func (d *device) die(err error) {
	d.death.Do(func() {
		d.err = fmt.Errorf("ring %s: %w: %w", d.path, err, hpdi.ErrDisconnected)
		d.dead.Store(true)
	})
	d.wakeAll()
}

// broken is called by a queue that has found what no back-end writes. It ends the
// connection; then the device is dead.
func (d *device) broken(err error) {
	d.ending.Do(func() {
		d.stop()
		d.tasks.Go(func() {
			<-d.ended
			d.mu.Lock()
			link := d.link
			d.mu.Unlock()
			d.m.SetFront(false)
			if link != nil {
				link.Drop()
			}
			d.attached.Store(false)
			d.die(err)
		})
	})
}

// wakeAll lets each queue look at the state of the device.
func (d *device) wakeAll() {
	for i := 1; i < len(d.bells); i += 2 {
		d.bells[i].Ring()
	}
}

// refresh reads what the back-end tells of its device.
func (d *device) refresh() error {
	f, seq, err := d.m.Facts()
	if err != nil {
		return err
	}
	info := hpdi.Info{
		Name: d.path, Driver: "ring", Size: f.Size, BlockSize: f.BlockSize, Direct: f.Direct, SharedMemory: true,
		Discard: f.Discard, Zeroes: f.Zeroes, Durable: f.Durable, ReadOnly: f.ReadOnly, Rotates: f.Rotates, Status: f.Status,
		Event: d.m.Shape().Bells, Cancel: hpdi.CancelQueued,
	}
	if f.CancelAll {
		info.Cancel = hpdi.CancelAll
	}
	d.info.Store(&facts{Info: info, seq: seq, most: f.MaxLength})
	return nil
}

// known returns what is known of the device now.
func (d *device) known() *facts {
	k := d.info.Load()
	if d.m.FactsSeq() == k.seq {
		return k
	}
	// What the back-end says now and what makes no sense is left aside; requests that do
	// not fit the device any more fail there.
	if d.refresh() == nil {
		k = d.info.Load()
	}
	return k
}

// Info describes the device.
func (d *device) Info() hpdi.Info {
	d.life.RLock()
	defer d.life.RUnlock()
	if d.closed.Load() {
		return d.info.Load().Info
	}
	return d.known().Info
}

// NewQueue returns one of the queues of the ring.
func (d *device) NewQueue(depth int) (hpdi.Queue, error) {
	if depth < 1 {
		return nil, d.wrap(fmt.Errorf("queue depth %d is less than 1", depth))
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed.Load() {
		return nil, d.wrap(hpdi.ErrClosed)
	}
	if d.dead.Load() {
		return nil, d.err
	}
	for i, used := range d.used {
		if !used {
			d.used[i] = true
			return newQueue(d, i, depth), nil
		}
	}
	return nil, d.wrap(fmt.Errorf("all %d queues are in use: open the ring with queues=%d or more", len(d.used), len(d.used)+1))
}

// mayClose sets closed unless queues are open.
func (d *device) mayClose() error {
	d.mu.Lock()
	defer d.mu.Unlock()
	open := 0
	for _, used := range d.used {
		if used {
			open++
		}
	}
	if open > 0 {
		return d.wrap(fmt.Errorf("%d queues are still open, close them first", open))
	}
	d.closed.Store(true)
	return nil
}

// Close says good-bye to the back-end and frees everything.
func (d *device) Close() error {
	if d.closed.Load() {
		return nil
	}
	if err := d.mayClose(); err != nil {
		return err
	}
	d.stop()
	<-d.ended
	d.tasks.Wait()
	d.life.Lock()
	defer d.life.Unlock()
	d.m.SetFront(false)
	if d.link != nil {
		d.link.Bye()
	}
	d.free()
	return nil
}

// free returns memory and descriptors.
func (d *device) free() {
	d.stop()
	for _, b := range d.bells {
		b.Close()
	}
	if d.mem != nil {
		_ = unix.Munmap(d.mem)
		unix.Close(d.fd)
	}
}
