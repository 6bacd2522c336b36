package hpdi_test

import (
	"bytes"
	"context"
	"errors"
	"io"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/mem"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

func blocking(t *testing.T, d hpdi.Device, calls int) *hpdi.Blocking {
	t.Helper()
	b, err := hpdi.NewBlocking(d, calls)
	must(t, err)
	t.Cleanup(func() { must(t, errors.Join(b.Close(), d.Close())) })
	return b
}

func TestBlocking(t *testing.T) {
	d, err := mem.New("disk", 1<<20)
	must(t, err)
	b := blocking(t, d, 3)
	page := bytes.Repeat([]byte{7}, 4096)
	ctx, cancel := context.WithTimeout(t.Context(), time.Hour)
	defer cancel()
	for _, ctx := range []context.Context{context.Background(), ctx} {
		got := make([]byte, 4096)
		must(t, b.Write(ctx, page, 8192))
		must(t, b.Read(ctx, got, 8192))
		if !bytes.Equal(got, page) {
			t.Error("something else was read")
		}
		must(t, b.WriteDurable(ctx, page, 16384))
		must(t, b.Flush(ctx))
		all, err := b.Status(ctx, 0, 1<<20, nil)
		must(t, err)
		if want := []hpdi.Extent{{Length: 8192, State: hpdi.Hole}, {Length: 4096}, {Length: 4096, State: hpdi.Hole}, {Length: 4096}, {Length: 1<<20 - 20480, State: hpdi.Hole}}; !slices.Equal(all, want) {
			t.Errorf("it is made of %v", all)
		}
		must(t, b.WriteZeroes(ctx, 8192, 4096))
		must(t, b.Discard(ctx, 16384, 4096))
		if all, err = b.Status(ctx, 0, 32768, all[:0]); err != nil || !slices.Equal(all, []hpdi.Extent{{Length: 32768, State: hpdi.Hole}}) {
			t.Errorf("it is made of %v, %v", all, err)
		}
	}
}

// More extents than one request has place for.
func TestBlockingStatusInPieces(t *testing.T) {
	d, err := mem.New("disk", 1<<20)
	must(t, err)
	b := blocking(t, d, 1)
	for off := int64(0); off < 1<<20; off += 8192 {
		must(t, b.Write(t.Context(), make([]byte, 4096), off))
	}
	all, err := b.Status(t.Context(), 0, 1<<20, nil)
	must(t, err)
	for i, e := range all {
		if e != (hpdi.Extent{Length: 4096, State: hpdi.ExtentState(i % 2)}) {
			t.Fatalf("extent %d is %v", i, e)
		}
	}
	if _, err := b.Status(t.Context(), 0, -4096, nil); !errors.Is(err, hpdi.ErrRange) {
		t.Errorf("a negative range: %v", err)
	}
	if len(all) != 256 {
		t.Errorf("%d extents", len(all))
	}
}

// It is what readers and writers of the standard library expect.
func TestBlockingReaderAt(t *testing.T) {
	d, err := mem.New("disk", 16384)
	must(t, err)
	b := blocking(t, d, 1)
	page := bytes.Repeat([]byte{9}, 8192)
	n, err := b.WriteAt(page, 8192)
	if must(t, err); n != 8192 {
		t.Errorf("%d bytes were written", n)
	}
	all, err := io.ReadAll(io.NewSectionReader(b, 0, 16384))
	if err == nil || len(all) != 0 {
		t.Errorf("memory that is not aligned: %d bytes, %v", len(all), err) // 512 bytes at first
	}
	got := make([]byte, 12288)
	if n, err = b.ReadAt(got, 8192); n != 8192 || err != io.EOF || !bytes.Equal(got[:n], page) {
		t.Errorf("over the end: %d bytes, %v", n, err)
	}
	if n, err = b.ReadAt(got, 16384); n != 0 || err != io.EOF {
		t.Errorf("at the end: %d bytes, %v", n, err)
	}
	for _, off := range []int64{-4096, 20480} {
		if n, err = b.ReadAt(got, off); n != 0 || !errors.Is(err, hpdi.ErrRange) {
			t.Errorf("at %d: %d bytes, %v", off, n, err)
		}
	}
	if n, err = b.WriteAt(page, 12288); n != 0 || !errors.Is(err, hpdi.ErrRange) || !strings.Contains(err.Error(), "write of 8192 bytes at 12288 of disk") {
		t.Errorf("a write over the end: %d bytes, %v", n, err)
	}
}

// hung is a device whose requests end only when they are cancelled or too late.
type hung struct {
	hpdi.Device
	info    hpdi.Info
	started chan struct{}
	broken  error
}

type hungQueue struct {
	hpdi.Queue
	d     *hung
	under []*hpdi.Request
	event hpdi.Signal
	done  []*hpdi.Request
}

func (d *hung) Info() hpdi.Info                  { return d.info }
func (d *hung) NewQueue(int) (hpdi.Queue, error) { return &hungQueue{d: d}, nil }
func (d *hung) Close() error                     { return nil }
func (q *hungQueue) Event() int                  { return q.event.Event() }
func (q *hungQueue) Close() error                { q.event.Close(); return nil }
func (q *hungQueue) end(r *hpdi.Request, why error) {
	r.Err = why
	q.done = append(q.done, r)
	q.event.Set(true)
}

func (q *hungQueue) Submit(reqs ...*hpdi.Request) error {
	if q.d.broken != nil {
		return q.d.broken
	}
	q.under = append(q.under, reqs...)
	q.d.started <- struct{}{}
	return nil
}

func (q *hungQueue) Cancel(reqs ...*hpdi.Request) {
	q.under = slices.DeleteFunc(q.under, func(r *hpdi.Request) bool {
		if slices.Contains(reqs, r) {
			q.end(r, hpdi.ErrCanceled)
			return true
		}
		return false
	})
}

func (q *hungQueue) Wait(least int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	for {
		q.under = slices.DeleteFunc(q.under, func(r *hpdi.Request) bool {
			if r.Late(time.Now()) != nil {
				q.end(r, hpdi.ErrDeadline)
				return true
			}
			return false
		})
		if len(q.done) >= least {
			done = append(done, q.done...)
			q.done = nil
			q.event.Set(false)
			return done, nil
		}
		time.Sleep(time.Millisecond) // until a deadline
	}
}

// The end of a context ends the request, and the error says both.
func TestBlockingContext(t *testing.T) {
	d := &hung{info: hpdi.Info{Name: "disk", Size: 1 << 20, BlockSize: 512, Event: true, Cancel: hpdi.CancelAll}, started: make(chan struct{}, 9)}
	b := blocking(t, d, 1)
	p := make([]byte, 512)
	for range 3 {
		ctx, cancel := context.WithCancel(t.Context())
		var wg sync.WaitGroup
		var err error
		wg.Go(func() { err = b.Read(ctx, p, 0) })
		<-d.started
		// Another call waits for the first, and its context ends as well.
		short, stop := context.WithTimeout(t.Context(), time.Millisecond)
		if err := b.Flush(short); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, hpdi.ErrCanceled) {
			t.Errorf("a call that did not begin: %v", err)
		}
		stop()
		cancel()
		wg.Wait()
		if !errors.Is(err, context.Canceled) || !errors.Is(err, hpdi.ErrCanceled) || !strings.Contains(err.Error(), "read of 512 bytes at 0 of disk") {
			t.Errorf("cancelled: %v", err)
		}
		if err := b.Read(ctx, p, 0); !errors.Is(err, context.Canceled) || len(d.started) > 0 {
			t.Errorf("cancelled before: %v", err)
		}
		ctx, cancel = context.WithTimeout(t.Context(), 5*time.Millisecond)
		if err := b.Write(ctx, p, 0); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, hpdi.ErrDeadline) && !errors.Is(err, hpdi.ErrCanceled) {
			t.Errorf("too late: %v", err)
		}
		<-d.started
		cancel()
	}
	// Without events the deadline is the driver's alone to keep.
	d.info.Event = false
	plain, err := hpdi.NewBlocking(d, 1)
	must(t, err)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Millisecond)
	defer cancel()
	if err := plain.Write(ctx, p, 0); !errors.Is(err, context.DeadlineExceeded) || !errors.Is(err, hpdi.ErrDeadline) {
		t.Errorf("too late, without events: %v", err)
	}
	must(t, plain.Close())
}

// odd is a memory device that tells of its blocks as a test wants it.
type odd struct {
	hpdi.Device
	info  hpdi.Info
	tell  func(r *hpdi.Request)
	queue error
}

type oddQueue struct {
	hpdi.Queue
	d *odd
}

func (d *odd) Info() hpdi.Info { return d.info }

func (d *odd) NewQueue(depth int) (hpdi.Queue, error) {
	if d.queue != nil {
		return nil, d.queue
	}
	q, err := d.Device.NewQueue(depth)
	return &oddQueue{q, d}, err
}

func (q *oddQueue) Submit(reqs ...*hpdi.Request) error {
	err := q.Queue.Submit(reqs...)
	for _, r := range reqs {
		if r.Op == hpdi.OpStatus {
			r.Extents = r.Extents[:0]
			q.d.tell(r)
		}
	}
	return err
}

// Block status that comes in pieces is put together, and one that does not come is an error.
func TestBlockingStatusOfOddDevices(t *testing.T) {
	d, err := mem.New("disk", 1<<20)
	must(t, err)
	o := &odd{Device: d, info: d.Info()}
	b := blocking(t, o, 1)
	o.tell = func(r *hpdi.Request) { r.AddExtent(4096, hpdi.Zero) } // a block at a time
	if all, err := b.Status(t.Context(), 0, 16384, nil); err != nil || !slices.Equal(all, []hpdi.Extent{{Length: 16384, State: hpdi.Zero}}) {
		t.Errorf("%v, %v", all, err)
	}
	o.tell = func(*hpdi.Request) {}
	if _, err := b.Status(t.Context(), 4096, 8192, nil); !errors.Is(err, hpdi.ErrIO) || !strings.Contains(err.Error(), "8192 bytes at 4096 told nothing") {
		t.Errorf("one that tells nothing: %v", err)
	}
	n := 0
	o.tell = func(r *hpdi.Request) {
		if n++; n == 2 {
			r.Err = hpdi.ErrDisconnected
		}
		r.AddExtent(4096, hpdi.Hole)
	}
	all, err := b.Status(t.Context(), 0, 8192, nil)
	if !errors.Is(err, hpdi.ErrDisconnected) || !slices.Equal(all, []hpdi.Extent{{Length: 4096, State: hpdi.Hole}}) {
		t.Errorf("one that fails halfway: %v, %v", all, err)
	}
}

// Where there are no durable writes a flush takes their place.
func TestBlockingDurable(t *testing.T) {
	d, err := mem.New("disk", 1<<20)
	must(t, err)
	o := &odd{Device: d, info: d.Info()}
	o.info.Durable = false
	b := blocking(t, o, 1)
	must(t, b.WriteDurable(t.Context(), bytes.Repeat([]byte{3}, 4096), 0))
	got := make([]byte, 4096)
	n, err := b.ReadAt(got, 0)
	if must(t, err); n != 4096 || got[4095] != 3 {
		t.Errorf("%d bytes, the last one %d", n, got[4095])
	}
	o.queue = errors.New("no queue is left")
	c, err := hpdi.NewBlocking(o, 1)
	must(t, err)
	if err := c.Flush(t.Context()); !errors.Is(err, o.queue) {
		t.Errorf("without a queue: %v", err)
	}
	must(t, c.Close())
}

// A queue that breaks is not used again, and closing the view ends it.
func TestBlockingBreaks(t *testing.T) {
	d := &hung{info: hpdi.Info{Name: "disk", Size: 1 << 20, BlockSize: 512}, broken: errors.New("the ring is gone"), started: make(chan struct{}, 9)}
	b, err := hpdi.NewBlocking(d, 2)
	must(t, err)
	if err := b.Flush(t.Context()); !errors.Is(err, d.broken) {
		t.Errorf("a queue that breaks: %v", err)
	}
	must(t, b.Close())
	if err := b.Flush(t.Context()); !errors.Is(err, hpdi.ErrClosed) {
		t.Errorf("after the end: %v", err)
	}
	if _, err := hpdi.NewBlocking(d, 0); err == nil {
		t.Error("a view for no call was made")
	}
}
