package ring

import (
	"context"
	"fmt"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	core "github.com/pollux-storage/pollux/internal/ring"
)

// Allocator is what a device implements whose ring is a file that both sides map: nothing can be
// handed over there, so the memory of requests lies in the ring itself. Of memory that comes
// from elsewhere requests end with hpdi.ErrMemory.
type Allocator interface {
	// Alloc returns n bytes of the ring, aligned to a page. What they hold is undefined.
	Alloc(n int) ([]byte, error)
	// Free returns what Alloc has given, with no request on it in flight.
	Free(mem []byte) error
}

// mapped is a device without a socket.
type mapped struct {
	*device
	f    *os.File
	done chan struct{} // closed when the goroutine that watches has ended

	mu    sync.Mutex // guards the following
	data  []byte
	taken []bool      // of each page of data
	sizes map[int]int // pages that begin at this one
}

const page = 4096

// openMapped makes a ring in a file, and waits for its back-end.
func openMapped(ctx context.Context, path string, o Options) (_ hpdi.Device, err error) {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return nil, fmt.Errorf("ring: %w", err)
	}
	d := &mapped{device: newDevice(path, o), f: f, done: make(chan struct{}), sizes: map[int]int{}}
	close(d.ended) // nobody connects
	defer func() {
		if err != nil {
			d.free()
			f.Close()
			err = d.wrap(err)
		}
	}()
	if err = core.LockFile(f, core.FrontLock); err != nil {
		return nil, fmt.Errorf("front-end: %w", err)
	}
	size := o.Size
	if size == 0 {
		st, err := f.Stat()
		if err != nil {
			return nil, err
		}
		if size = st.Size(); size == 0 {
			return nil, fmt.Errorf("the size of the memory is not known: say size=BYTES")
		}
	}
	if d.mem, err = core.Map(int(f.Fd()), size); err != nil {
		return nil, err
	}
	if err = d.leaveOld(ctx); err != nil {
		return nil, err
	}
	shape, err := o.shape()
	if err != nil {
		return nil, err
	}
	shape.Bells = false
	room := (size - shape.Size()) / page * page
	if room < page {
		return nil, fmt.Errorf("memory of %d bytes: %d queues of %d entries and a page of data need %d", size, shape.Queues, shape.Entries, shape.Size()+page)
	}
	shape.Data = room
	clear(d.mem[:size-room])
	if d.m, err = core.Format(d.mem, shape); err != nil {
		return nil, err
	}
	d.data = d.m.Data()
	d.taken = make([]bool, room/page)
	for q := range shape.Queues {
		d.bells = append(d.bells, &core.Bell{}, &core.Bell{})
		d.fronts = append(d.fronts, core.NewFront(d.m, q))
	}
	d.used = make([]bool, shape.Queues)
	d.table.Store(&table{freed: hpdi.Freed(), regions: []region{{mem: d.data, begin: begin(d.data), fixed: true}}})
	d.attached.Store(true)
	d.m.SetFront(true)
	if err = d.await(ctx); err != nil {
		d.m.SetFront(false)
		return nil, err
	}
	go d.watch()
	return d, nil
}

// leaveOld ends the ring that an earlier front-end has left in the memory: a back-end that
// lives may still be running its requests, and must have ended them.
func (d *mapped) leaveOld(ctx context.Context) error {
	old, err := core.Open(d.mem)
	if err != nil {
		return nil // there is none
	}
	old.SetFront(false)
	var back core.Watch
	for now := time.Now(); old.BackServes(); now = time.Now() {
		_, beat := old.Beats()
		if lives := back.Lives(beat, now); !lives && back.Known(now) {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("a back-end is still busy with what the last front-end has left: %w", ctx.Err())
		case <-time.After(core.Beat):
		}
	}
	return nil
}

// await waits for a back-end.
func (d *mapped) await(ctx context.Context) error {
	for !d.m.BackServes() {
		d.m.BeatFront()
		select {
		case <-ctx.Done():
			return fmt.Errorf("no back-end has come: %w", ctx.Err())
		case <-time.After(core.Beat):
		}
	}
	return d.refresh()
}

// watch shows the back-end that this side lives, and looks whether there is one.
func (d *mapped) watch() {
	defer close(d.done)
	tick := time.NewTicker(core.Beat)
	defer tick.Stop()
	var back core.Watch
	var gone time.Time // since when nobody serves
	for {
		select {
		case <-d.ctx.Done():
			return
		case now := <-tick.C:
			d.m.BeatFront()
			_, beat := d.m.Beats()
			if lives := back.Lives(beat, now); lives || !back.Known(now) {
				gone = time.Time{}
				continue
			}
			if gone.IsZero() {
				gone = now
			}
			if now.Sub(gone) >= d.o.Reconnect {
				// Who comes now finds that it has nothing to do here.
				d.m.SetFront(false)
				d.die(fmt.Errorf("no back-end has shown itself for %v", d.o.Reconnect+core.Silence))
				return
			}
		}
	}
}

// Close says that the front-end has ended, and unmaps the ring.
func (d *mapped) Close() error {
	if d.closed.Load() {
		return nil
	}
	if err := d.mayClose(); err != nil {
		return err
	}
	d.stop()
	<-d.done
	d.tasks.Wait()
	d.life.Lock()
	defer d.life.Unlock()
	d.m.SetFront(false)
	d.free()
	return d.f.Close()
}

// free unmaps the memory.
func (d *mapped) free() {
	d.stop()
	if d.mem != nil {
		_ = unix.Munmap(d.mem)
	}
}

// Alloc returns memory of the ring.
func (d *mapped) Alloc(n int) ([]byte, error) {
	d.mu.Lock()
	defer d.mu.Unlock()
	pages := (n + page - 1) / page
	if n <= 0 {
		return nil, d.wrap(fmt.Errorf("%d bytes of memory", n))
	}
	for run, i := 0, 0; i < len(d.taken); i++ {
		if run++; d.taken[i] {
			run = 0
		}
		if run == pages {
			first := i + 1 - pages
			for k := first; k <= i; k++ {
				d.taken[k] = true
			}
			d.sizes[first] = pages
			return d.data[first*page : first*page+n : (i+1)*page], nil
		}
	}
	return nil, d.wrap(fmt.Errorf("%d bytes of memory: the ring has %d, and no free piece of that size", n, len(d.data)))
}

// Free returns memory of the ring.
func (d *mapped) Free(mem []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	at := begin(mem) - begin(d.data)
	first := int(at / page)
	pages, ok := d.sizes[first]
	if len(mem) == 0 || at >= uintptr(len(d.data)) || at%page != 0 || !ok || (len(mem)+page-1)/page != pages {
		return d.wrap(fmt.Errorf("free %d bytes of memory that are no piece of the ring", len(mem)))
	}
	delete(d.sizes, first)
	clear(d.taken[first : first+pages])
	return nil
}

// ServeFile serves the ring in a file that both sides map, of size bytes; 0 is those of the
// file. It waits for front-ends, one after the other, and returns after Close.
func (s *Server) ServeFile(path string, size int64) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return fmt.Errorf("ring: %w", err)
	}
	defer f.Close()
	if size == 0 {
		st, err := f.Stat()
		if err != nil {
			return fmt.Errorf("ring: %w", err)
		}
		size = st.Size()
	}
	return s.core.ServeFile(f, size)
}
