package ring

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/hpditest"
	front "github.com/pollux-storage/pollux/hpdi/ring"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/export/nbd/nbdtest"
	core "github.com/pollux-storage/pollux/internal/ring"
)

// serving is a server that can be ended, and comes again.
type serving struct {
	t    testing.TB
	vol  block.Volume
	path string
	s    *Server
	l    *net.UnixListener
	done chan error
}

func serve(t testing.TB, vol block.Volume) *serving {
	t.Helper()
	v := &serving{t: t, vol: vol, path: filepath.Join(t.TempDir(), "ring.sock")}
	v.start()
	t.Cleanup(func() { v.end(time.Minute) })
	return v
}

func (v *serving) start() {
	v.t.Helper()
	var err error
	if v.s, err = New(Options{Volume: v.vol, Poll: 20 * time.Microsecond, Workers: 4}); err != nil {
		v.t.Fatal(err)
	}
	if v.l, err = front.Listen(v.path); err != nil {
		v.t.Fatal(err)
	}
	v.done = make(chan error, 1)
	go func(s *Server, l *net.UnixListener) { v.done <- s.Serve(l) }(v.s, v.l)
}

// end ends the server, which may wait for what runs for d.
func (v *serving) end(d time.Duration) {
	v.t.Helper()
	if v.s == nil {
		return
	}
	ctx, cancel := context.WithTimeout(context.Background(), d)
	defer cancel()
	v.s.Shutdown(ctx)
	if err := <-v.done; err != nil {
		v.t.Error(err)
	}
	v.l.Close()
	v.s = nil
}

func (v *serving) open(o front.Options) hpdi.Device {
	v.t.Helper()
	o.Reconnect = time.Minute
	d, err := front.Open(v.t.Context(), v.path, o)
	if err != nil {
		v.t.Fatal(err)
	}
	return d
}

func TestConformance(t *testing.T) {
	hpditest.Run(t, func(t *testing.T) hpdi.Device {
		vol := nbdtest.New("volume", hpditest.MinSize)
		t.Cleanup(func() {
			if n := vol.Staged(); n != 0 {
				t.Errorf("%d writes are left staged", n)
			}
		})
		return serve(t, vol).open(front.Options{Queues: 8, Entries: 64, Poll: 20 * time.Microsecond})
	})
}

// The same with a volume that declines what it is asked to do at once every other time.
func TestConformanceSlow(t *testing.T) {
	hpditest.Run(t, func(t *testing.T) hpdi.Device {
		vol := nbdtest.New("volume", hpditest.MinSize)
		var n atomic.Int64
		vol.Hook = func(_ context.Context, op nbdtest.Op, _, _ int64) error {
			if (op == nbdtest.OpTryRead || op == nbdtest.OpTryStage || op == nbdtest.OpTryCommit) && n.Add(1)%2 == 0 {
				return nbdtest.ErrWouldWait
			}
			return nil
		}
		return serve(t, vol).open(front.Options{Queues: 8, Entries: 64})
	})
}

// gate lets calls of a volume wait.
type gate struct {
	op      atomic.Value // nbdtest.Op that waits
	err     atomic.Value // what it gives then, if not nothing
	waiting chan struct{}
	open    chan struct{}
}

func newGate(vol *nbdtest.Volume) *gate {
	g := &gate{waiting: make(chan struct{}, 64), open: make(chan struct{})}
	g.op.Store(nbdtest.Op(""))
	vol.Hook = func(ctx context.Context, op nbdtest.Op, _, _ int64) error {
		if op == nbdtest.OpTryRead || op == nbdtest.OpTryStage {
			return nbdtest.ErrWouldWait
		}
		if op != g.op.Load() {
			return nil
		}
		g.waiting <- struct{}{}
		select {
		case <-g.open:
			err, _ := g.err.Load().(error)
			return err
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return g
}

func pages(t testing.TB, n int) []byte {
	t.Helper()
	p, err := hpdi.Alloc(n * 4096)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := hpdi.Free(p); err != nil {
			t.Error(err)
		}
	})
	return p
}

func queueOf(t testing.TB, d hpdi.Device, depth int) hpdi.Queue {
	t.Helper()
	q, err := d.NewQueue(depth)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := errors.Join(q.Close(), d.Close()); err != nil {
			t.Error(err)
		}
	})
	return q
}

// Kinds of error reach the application.
func TestErrorKinds(t *testing.T) {
	vol := nbdtest.New("volume", 1<<20)
	var fail atomic.Pointer[error]
	vol.Hook = func(_ context.Context, op nbdtest.Op, _, _ int64) error {
		if op == nbdtest.OpTryRead || op == nbdtest.OpTryStage {
			return nbdtest.ErrWouldWait
		}
		if e := fail.Load(); e != nil {
			return *e
		}
		return nil
	}
	v := serve(t, vol)
	q := queueOf(t, v.open(front.Options{}), 4)
	mem := pages(t, 1)
	for _, c := range []struct{ volume, want error }{
		{block.ErrNoSpace, hpdi.ErrNoSpace},
		{block.ErrReadOnly, hpdi.ErrReadOnly},
		{block.ErrUnsupported, hpdi.ErrUnsupported},
		{&block.CorruptError{What: "block", Where: "1:2", Why: "a test says so"}, hpdi.ErrIO},
		{errors.New("anything"), hpdi.ErrIO},
	} {
		fail.Store(&c.volume)
		for _, r := range []*hpdi.Request{
			{Op: hpdi.OpRead, Vec: [][]byte{mem}}, {Op: hpdi.OpWrite, Vec: [][]byte{mem}}, {Op: hpdi.OpFlush},
			{Op: hpdi.OpDiscard, Length: 4096}, {Op: hpdi.OpWriteZeroes, Length: 4096},
			{Op: hpdi.OpStatus, Length: 4096, Extents: make([]hpdi.Extent, 0, 1)},
		} {
			if err := hpdi.Do(q, r); !errors.Is(err, c.want) {
				t.Errorf("%s of a volume that says %v: %v", r.Op, c.volume, err)
			}
		}
	}
	if st := v.s.Stats(); st.Errors != 30 {
		t.Errorf("%d errors are counted, want 30", st.Errors)
	}
}

// A durable write is one that a flush has covered.
func TestDurable(t *testing.T) {
	vol := nbdtest.New("volume", 1<<20)
	v := serve(t, vol)
	q := queueOf(t, v.open(front.Options{}), 4)
	mem := pages(t, 1)
	if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpWrite, Vec: [][]byte{mem}}); err != nil || vol.Unstable() == 0 {
		t.Fatalf("a plain write: %v, %d not flushed", err, vol.Unstable())
	}
	if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpWrite, Vec: [][]byte{mem}, Durable: true}); err != nil || vol.Unstable() != 0 {
		t.Fatalf("a durable write: %v, %d not flushed", err, vol.Unstable())
	}
}

// What waits is called off when the application says so, and holds up nothing else.
func TestCancel(t *testing.T) {
	vol := nbdtest.New("volume", 1<<20)
	g := newGate(vol)
	q := queueOf(t, serve(t, vol).open(front.Options{}), 8)
	mem := pages(t, 2)
	g.op.Store(nbdtest.OpRead)
	slow := &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{mem[:4096]}}
	late := &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{mem[4096:]}, Deadline: time.Now().Add(50 * time.Millisecond)}
	other := &hpdi.Request{Op: hpdi.OpFlush}
	if err := q.Submit(slow, late, other); err != nil {
		t.Fatal(err)
	}
	if done, err := q.Wait(1, nil); err != nil || len(done) != 1 || done[0] != other || other.Err != nil {
		t.Fatalf("the flush behind what waits: %v, %v", done, err)
	}
	<-g.waiting
	<-g.waiting
	q.Cancel(slow)
	if _, err := q.Wait(2, nil); err != nil || !errors.Is(slow.Err, hpdi.ErrCanceled) || !errors.Is(late.Err, hpdi.ErrDeadline) {
		t.Fatalf("%v; %v, %v", err, slow.Err, late.Err)
	}
}

// A guest ends, or loses the volume, with requests that wait: nothing fails, the next one
// does them, and does none twice.
func TestHandover(t *testing.T) {
	for _, how := range []string{"shutdown", "closed"} {
		t.Run(how, func(t *testing.T) {
			vol := nbdtest.New("volume", 1<<20)
			g := newGate(vol)
			v := serve(t, vol)
			q := queueOf(t, v.open(front.Options{Queues: 1, Entries: 8}), 8)
			mem := pages(t, 4)
			g.op.Store(nbdtest.OpCommit)
			reqs := make([]*hpdi.Request, 4)
			for i := range reqs {
				mem[4096*i] = byte(i + 1)
				reqs[i] = &hpdi.Request{Op: hpdi.OpWrite, Offset: int64(i) * 4096, Vec: [][]byte{mem[4096*i : 4096*(i+1)]}}
			}
			if err := q.Submit(reqs...); err != nil {
				t.Fatal(err)
			}
			<-g.waiting
			if how == "shutdown" {
				v.end(10 * time.Millisecond)
				g.op.Store(nbdtest.Op(""))
				v.start()
			} else {
				g.err.Store(fmt.Errorf("handed over: %w", block.ErrClosed))
				g.op.Store(nbdtest.Op(""))
				close(g.open)
			}
			if done, err := q.Wait(4, nil); err != nil || len(done) != 4 {
				t.Fatalf("%d came, %v", len(done), err)
			}
			for i, r := range reqs {
				if r.Err != nil {
					t.Errorf("write %d: %v", i, r.Err)
				}
				if got := vol.Bytes(int64(i)*4096, 1)[0]; got != byte(i+1) {
					t.Errorf("block %d holds %d", i, got)
				}
			}
			if st := v.s.Stats(); st.Again == 0 {
				t.Error("nothing was found in the ring")
			}
		})
	}
}

// A request whose change is in the log when its server goes is not run again: what was
// written over it since stays.
func TestExactlyOnce(t *testing.T) {
	if err := exactlyOnce(t); err != nil {
		t.Error(err)
	}
}

func exactlyOnce(t *testing.T) error {
	vol := nbdtest.New("volume", 1<<20)
	g := newGate(vol)
	v := serve(t, vol)
	d := v.open(front.Options{Queues: 2, Entries: 8})
	q := queueOf(t, d, 8)
	other, err := d.NewQueue(8)
	if err != nil {
		t.Fatal(err)
	}
	defer other.Close()
	mem := pages(t, 2)
	mem[0], mem[4096] = 1, 2
	g.op.Store(nbdtest.OpFlush)
	durable := &hpdi.Request{Op: hpdi.OpWrite, Vec: [][]byte{mem[:4096]}, Durable: true}
	if err := q.Submit(durable); err != nil {
		t.Fatal(err)
	}
	<-g.waiting // its change is in the log, its flush is not done
	if err := hpdi.Do(other, &hpdi.Request{Op: hpdi.OpWrite, Vec: [][]byte{mem[4096:]}}); err != nil {
		t.Fatal(err)
	}
	g.err.Store(fmt.Errorf("handed over: %w", block.ErrStale))
	g.op.Store(nbdtest.Op(""))
	close(g.open)
	if _, err := q.Wait(1, nil); err != nil || durable.Err != nil {
		t.Fatal(err, durable.Err)
	}
	if got := vol.Bytes(0, 1)[0]; got != 2 {
		return fmt.Errorf("the block holds %d: the older write was run again", got)
	}
	if st := v.s.Stats(); st.Again != 1 || st.Skipped != 1 || st.Rerun != 0 || vol.Unstable() != 0 {
		return fmt.Errorf("%+v, %d changes not flushed", st, vol.Unstable())
	}
	return nil
}

// left is a ring in which a back-end that is gone has left requests.
type left struct {
	m     *core.Memory
	fd    int
	f     *core.Front
	bells []*core.Bell
}

func newLeft(t *testing.T, session uint64) *left {
	t.Helper()
	l := &left{}
	var mem []byte
	var err error
	shape := core.Shape{Session: session, Queues: 1, Entries: 8, Data: 16 << 12, Bells: true}
	if l.m, mem, l.fd, err = core.NewMemory(shape); err != nil {
		t.Fatal(err)
	}
	for range 2 {
		b, err := core.NewBell()
		if err != nil {
			t.Fatal(err)
		}
		l.bells = append(l.bells, b)
	}
	l.f = core.NewFront(l.m, 0)
	l.m.Attach()
	t.Cleanup(func() {
		for _, b := range l.bells {
			b.Close()
		}
		if err := errors.Join(unix.Munmap(mem), unix.Close(l.fd)); err != nil {
			t.Error(err)
		}
	})
	return l
}

// finish lets a server do what is left, and returns the statuses in the order in which they
// come.
func (l *left) finish(t *testing.T, path string) []core.Status {
	t.Helper()
	link, err := core.Dial(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	defer link.Bye()
	n := l.f.InFlight()
	l.f.Arm()
	if err := errors.Join(link.Attach(l.fd, l.m.Shape().Size(), l.bells), link.Start()); err != nil {
		t.Fatal(err)
	}
	var got []core.Status
	for began := time.Now(); len(got) < n && time.Since(began) < 10*time.Second; {
		c, ok, err := l.f.Next()
		if err != nil {
			t.Fatal(err)
		}
		if !ok {
			if err := l.bells[1].Sleep(-1, 10*time.Millisecond); err != nil {
				t.Fatal(err)
			}
			continue
		}
		l.f.Release()
		got = append(got, c.Status)
	}
	return got
}

func (l *left) put(op core.Op, block int, value byte, tag core.Tag) *core.Entry {
	e := &core.Entry{Op: op, Offset: int64(block) * 4096, Length: 4096, Tag: tag}
	if op == core.OpWrite {
		at := (l.f.InFlight()) * 4096
		l.m.Data()[at] = value
		e.Segs = []core.Segment{{Addr: core.Addr(0, uint64(at)), Len: 4096}}
	}
	l.f.Put(e)
	return e
}

// Of what a dead back-end has left, what is in the log is not run, and the rest is, in the
// order in which it was submitted.
func TestLeftRequests(t *testing.T) {
	const session = 4711
	vol := nbdtest.New("volume", 1<<20)
	_, err := vol.OpenSession(t.Context(), session, 1, 8)
	if err != nil {
		t.Fatal(err)
	}
	var order []int64
	vol.Hook = func(_ context.Context, op nbdtest.Op, off, _ int64) error {
		if op == nbdtest.OpCommit || op == nbdtest.OpTrim || op == nbdtest.OpZero {
			order = append(order, off/4096) // one after the other, so without a lock
		}
		return nil
	}
	l := newLeft(t, session)
	for i, op := range []core.Op{core.OpWrite, core.OpWrite, core.OpDiscard, core.OpWriteZeroes, core.OpWrite} {
		e := l.put(op, i, byte(i+1), core.Tag{})
		if i == 0 || i == 2 { // done, and not completed
			if err := vol.Note(block.Tag{Session: session, Slot: uint16(e.Slot), Counter: e.Counter}); err != nil {
				t.Fatal(err)
			}
		}
	}
	l.put(core.OpFlush, 0, 0, core.Tag{})
	l.put(core.OpWrite, 9, 9, core.Tag{Session: session + 1, Counter: 1}) // of somebody else's session
	l.f.Publish()
	v := serve(t, vol)
	got := l.finish(t, v.path)
	if fmt.Sprint(got) != fmt.Sprint([]core.Status{0, 0, 0, 0, 0, 0, core.StatusInvalid}) {
		t.Errorf("statuses %v", got)
	}
	if fmt.Sprint(order) != "[1 3 4]" {
		t.Errorf("the volume has changed blocks %v", order)
	}
	if b := [2]byte{vol.Bytes(0, 1)[0], vol.Bytes(4*4096, 1)[0]}; b != [2]byte{0, 5} {
		t.Errorf("blocks hold %v", b)
	}
	if st := v.s.Stats(); st.Again != 6 || st.Skipped != 2 || st.Rerun != 4 {
		t.Errorf("%+v", st)
	}
}

// Where the session was forgotten nobody knows what was done, and all of it is done again.
func TestForgottenSession(t *testing.T) {
	vol := nbdtest.New("volume", 1<<20)
	l := newLeft(t, 99)
	for i := range 3 {
		l.put(core.OpWrite, i, byte(i+1), core.Tag{})
	}
	l.f.Publish()
	v := serve(t, vol)
	if got := l.finish(t, v.path); fmt.Sprint(got) != "[0 0 0]" {
		t.Errorf("statuses %v", got)
	}
	if b := [3]byte{vol.Bytes(0, 1)[0], vol.Bytes(4096, 1)[0], vol.Bytes(8192, 1)[0]}; b != [3]byte{1, 2, 3} {
		t.Errorf("blocks hold %v", b)
	}
	if st := v.s.Stats(); st.Again != 3 || st.Skipped != 0 || st.Rerun != 3 {
		t.Errorf("%+v", st)
	}
}

func TestOptions(t *testing.T) {
	vol := nbdtest.New("volume", 1<<20)
	for name, o := range map[string]Options{
		"no volume": {}, "workers": {Volume: vol, Workers: -1}, "rings": {Volume: vol, Rings: -1}, "poll": {Volume: vol, Poll: -1},
	} {
		if _, err := New(o); err == nil {
			t.Errorf("a server was made with bad options: %s", name)
		}
	}
}

// An application sees the new size of a volume, and reaches what was added.
func TestResized(t *testing.T) {
	vol := nbdtest.New("volume", 1<<20)
	v := serve(t, vol)
	d := v.open(front.Options{})
	q := queueOf(t, d, 1)
	vol.Grow(2 << 20)
	v.s.Resized()
	if n := d.Info().Size; n != 2<<20 {
		t.Errorf("%d bytes", n)
	}
	if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpWrite, Offset: 2<<20 - 4096, Vec: [][]byte{pages(t, 1)}}); err != nil {
		t.Error(err)
	}
}

// A session is there as long as its front-end, and stays when that has not said good-bye.
func TestSession(t *testing.T) {
	vol := nbdtest.New("volume", 1<<20)
	v := serve(t, vol)
	d := v.open(front.Options{Queues: 2, Entries: 8})
	if n := vol.Count(); n != 1 {
		t.Fatalf("%d sessions", n)
	}
	v.end(time.Second)
	if n := vol.Count(); n != 1 {
		t.Fatalf("%d sessions without a server", n)
	}
	v.start()
	q, err := d.NewQueue(1)
	if err != nil {
		t.Fatal(err)
	}
	if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpFlush}); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(q.Close(), d.Close()); err != nil {
		t.Fatal(err)
	}
	if n := vol.Count(); n != 0 {
		t.Errorf("%d sessions after the good-bye", n)
	}
}
