package nbd

import (
	"context"
	"errors"
	"net"
	"sync"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/hpditest"
	proto "github.com/pollux-storage/pollux/internal/nbdproto"
)

// unwell is a server that has faults as a test wants them.
type unwell struct {
	*server
	mu     sync.Mutex // guards the rest
	off, n int64
	kind   error
	short  bool
	delay  time.Duration
	held   chan struct{} // closed when requests go on; nil while none is held
}

func newUnwell() *unwell {
	u := &unwell{server: newServer(hpditest.MinSize)}
	u.asked = u.answer
	return u
}

func (u *unwell) answer(c *serving, q asked) (bool, error) {
	u.mu.Lock()
	off, n, kind, short, delay, held := u.off, u.n, u.kind, u.short, u.delay, u.held
	u.mu.Unlock()
	if held != nil {
		<-held
	}
	time.Sleep(delay)
	if (q.kind == proto.CmdRead || q.kind == proto.CmdWrite) && int64(q.off) < off+n && off < int64(q.off)+int64(q.n) {
		e := uint32(proto.EIO)
		if errors.Is(kind, hpdi.ErrNoSpace) {
			e = uint32(proto.ENOSPC)
		}
		return true, c.chunk(proto.ChunkDone, proto.ChunkError, q, e, uint16(0))
	}
	if short {
		return inPieces(c, q)
	}
	return false, nil
}

// with changes what the server does.
func (u *unwell) with(change func()) {
	u.mu.Lock()
	defer u.mu.Unlock()
	change()
}

func (u *unwell) faults() hpditest.Faults {
	return hpditest.Faults{
		Fail:       func(off, n int64, kind error) { u.with(func() { u.off, u.n, u.kind = off, n, kind }) },
		Kinds:      []error{hpdi.ErrIO, hpdi.ErrNoSpace},
		Short:      func(on bool) { u.with(func() { u.short = on }) },
		Delay:      func(d time.Duration) { u.with(func() { u.delay = d }) },
		Hold:       func() { u.with(func() { u.held = make(chan struct{}) }) },
		Release:    func() { u.with(func() { close(u.held); u.held = nil }) },
		Disconnect: u.cut,
	}
}

// Whatever goes wrong at the server or on the way to it, each request comes back once, with
// an error that says what it was, and its memory is left alone afterwards.
func TestFaults(t *testing.T) {
	for name, o := range map[string]Options{
		"one connection":   {},
		"four connections": {Connections: 4},
		"reconnecting":     {Connections: 2, Reconnect: time.Minute},
	} {
		t.Run(name, func(t *testing.T) {
			hpditest.RunFaults(t, func(t *testing.T) (hpdi.Device, hpditest.Faults) {
				u := newUnwell()
				f := u.faults()
				f.Recovers = o.Reconnect > 0
				return u.open(t, o), f
			})
		})
	}
}

// opened returns a queue of a device whose only server answers as it is told.
func opened(t *testing.T, pipe bool, o Options, answer func(c *serving, q asked) (bool, error)) (*server, *device, hpdi.Queue) {
	t.Helper()
	s := newServer(1 << 20)
	s.asked = answer
	dial := s.dial(pipe)
	o.Dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		return dial(ctx, network, address)
	}
	d := s.open(t, o)
	q, err := d.NewQueue(8)
	must(t, err)
	return s, d, q
}

// A read is given up while its payload comes: what has not come yet is thrown away, and the
// connection goes on.
func TestGiveUpMidPayload(t *testing.T) {
	for _, pipe := range []bool{false, true} {
		for _, deadline := range []bool{false, true} {
			half, rest := make(chan struct{}), make(chan struct{})
			_, d, q := opened(t, pipe, Options{}, func(c *serving, q asked) (bool, error) {
				if q.kind != proto.CmdRead || q.n != 64<<10 {
					return false, nil
				}
				ones := make([]byte, 32<<10)
				for i := range ones {
					ones[i] = 1
				}
				err := c.write(uint32(proto.MagicStructured), uint16(proto.ChunkDone), uint16(proto.ChunkOffsetData), q.cookie, uint32(8+64<<10), q.off, ones)
				close(half)
				<-rest
				return true, errors.Join(err, c.write(ones))
			})
			mem := make([]byte, 64<<10)
			r := &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{mem}}
			want := hpdi.ErrCanceled
			if deadline {
				r.Deadline, want = time.Now().Add(20*time.Millisecond), hpdi.ErrDeadline
			}
			must(t, q.Submit(r))
			<-half
			if !deadline {
				q.Cancel(r)
			}
			done, err := q.Wait(1, nil)
			must(t, err)
			if len(done) != 1 || !errors.Is(r.Err, want) {
				t.Fatalf("pipe %v: %d requests came, with %v", pipe, len(done), r.Err)
			}
			for i := range mem {
				mem[i] = 7
			}
			close(rest)
			small := make([]byte, 4096)
			small[9] = 9
			must(t, hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{small}}))
			if small[9] != 0 {
				t.Error("the next read got nothing")
			}
			for i, b := range mem {
				if b != 7 {
					t.Fatalf("pipe %v: byte %d of memory that was given back is %d", pipe, i, b)
				}
			}
			must(t, q.Close())
			must(t, d.Close())
		}
	}
}

// A write that was given up may run late: one to the same place that comes behind it waits
// for that, on whichever connection, and others do not.
func TestGivenUpWriteHoldsBack(t *testing.T) {
	const first, second = 1, 2
	hold, stuck := make(chan struct{}), make(chan struct{})
	s := newServer(1 << 20)
	s.asked = func(c *serving, q asked) (bool, error) {
		if q.kind == proto.CmdWrite && q.payload[0] == first {
			close(stuck)
			<-hold
		}
		return false, nil
	}
	d := s.open(t, Options{Connections: 2})
	q, err := d.NewQueue(8)
	must(t, err)
	other, err := d.NewQueue(8) // of the other connection
	must(t, err)
	page := func(v byte) []byte {
		p := make([]byte, 4096)
		for i := range p {
			p[i] = v
		}
		return p
	}
	lost := &hpdi.Request{Op: hpdi.OpWrite, Vec: [][]byte{page(first)}}
	must(t, q.Submit(lost))
	<-stuck
	q.Cancel(lost)
	done, err := q.Wait(1, nil)
	if must(t, err); len(done) != 1 || !errors.Is(lost.Err, hpdi.ErrCanceled) {
		t.Fatalf("%d requests came, with %v", len(done), lost.Err)
	}
	behind := &hpdi.Request{Op: hpdi.OpWrite, Vec: [][]byte{page(second)}}
	late := &hpdi.Request{Op: hpdi.OpWriteZeroes, Length: 8192, Deadline: time.Now().Add(20 * time.Millisecond)}
	beside := &hpdi.Request{Op: hpdi.OpWrite, Offset: 4096, Vec: [][]byte{page(second)}}
	must(t, other.Submit(behind, late, beside))
	done, err = other.Wait(2, nil)
	must(t, err)
	if len(done) != 2 || beside.Err != nil || !errors.Is(late.Err, hpdi.ErrDeadline) {
		t.Fatalf("%d requests came; beside it %v, with a deadline %v", len(done), beside.Err, late.Err)
	}
	close(hold)
	done, err = other.Wait(1, nil)
	if must(t, err); len(done) != 1 || behind.Err != nil {
		t.Fatalf("%d requests came, the one behind with %v", len(done), behind.Err)
	}
	s.mu.Lock()
	if s.data[0] != second || s.data[4095] != second || s.data[4096] != second {
		t.Errorf("the device holds %d, %d, %d", s.data[0], s.data[4095], s.data[4096])
	}
	s.mu.Unlock()
	must(t, errors.Join(q.Close(), other.Close()))
	must(t, d.Close())
}

// What was given up while there is no connection is not sent on the next one.
func TestGivenUpIsNotSentAgain(t *testing.T) {
	var mu sync.Mutex
	down, hang, writes := false, true, 0
	s := newServer(1 << 20)
	s.asked = func(c *serving, q asked) (bool, error) {
		mu.Lock()
		defer mu.Unlock()
		if q.kind == proto.CmdWrite && q.off == 0 {
			writes++
		}
		return hang, nil
	}
	dial := s.dial(false)
	d := s.open(t, Options{Reconnect: time.Minute, Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
		mu.Lock()
		no := down
		mu.Unlock()
		if no {
			return nil, errRefused
		}
		return dial(ctx, network, address)
	}})
	q, err := d.NewQueue(8)
	must(t, err)
	lost := &hpdi.Request{Op: hpdi.OpWrite, Vec: [][]byte{make([]byte, 4096)}}
	kept := &hpdi.Request{Op: hpdi.OpWrite, Offset: 8192, Vec: [][]byte{make([]byte, 4096)}}
	must(t, q.Submit(lost, kept))
	for waits := true; waits; {
		mu.Lock()
		waits = writes == 0
		mu.Unlock()
		time.Sleep(time.Millisecond) // until the server has it
	}
	mu.Lock()
	down, hang = true, false
	mu.Unlock()
	s.cut()
	q.Cancel(lost)
	done, err := q.Wait(1, nil)
	if must(t, err); len(done) != 1 || !errors.Is(lost.Err, hpdi.ErrCanceled) {
		t.Fatalf("%d requests came, with %v", len(done), lost.Err)
	}
	mu.Lock()
	down = false
	mu.Unlock()
	if done, err = q.Wait(1, nil); len(done) != 1 || kept.Err != nil {
		t.Fatalf("%d requests came, with %v, %v", len(done), kept.Err, err)
	}
	mu.Lock()
	if writes != 1 {
		t.Errorf("the write was sent %d times", writes)
	}
	mu.Unlock()
	must(t, q.Close())
	must(t, d.Close())
}

// A server that reads nothing ends the connection of a write that has a deadline.
func TestServerReadsNothing(t *testing.T) {
	stop := make(chan struct{})
	_, d, q := opened(t, true, Options{}, func(c *serving, q asked) (bool, error) {
		<-stop
		return false, errLeft
	})
	defer close(stop)
	mem := make([]byte, 4096)
	began := time.Now()
	reqs := []*hpdi.Request{{Op: hpdi.OpRead, Vec: [][]byte{mem}}}
	must(t, q.Submit(reqs...)) // the server has it, and reads no more
	w := &hpdi.Request{Op: hpdi.OpWrite, Vec: [][]byte{mem}, Deadline: time.Now().Add(10 * time.Millisecond)}
	must(t, q.Submit(w))
	done, err := q.Wait(2, nil)
	must(t, err)
	if len(done) != 2 || !errors.Is(w.Err, hpdi.ErrDeadline) || !errors.Is(reqs[0].Err, hpdi.ErrDisconnected) {
		t.Errorf("%d requests came, the write with %v, the read with %v", len(done), w.Err, reqs[0].Err)
	}
	if took := time.Since(began); took < grace || took > 20*grace {
		t.Errorf("after %v", took)
	}
	must(t, q.Close())
	must(t, d.Close())
}

// within ends a test that waits for ever.
func within(t *testing.T, what string, do func()) {
	t.Helper()
	done := make(chan struct{})
	go func() { defer close(done); do() }()
	select {
	case <-done:
	case <-time.After(20 * grace):
		t.Fatalf("%s takes longer than %v", what, 20*grace)
	}
}

// writes waits until a link is busy, or so many with deadlines wait for it.
func writes(l *link, due int) {
	for {
		l.mu.Lock()
		there := due == 0 && l.busy != nil || due > 0 && len(l.due) == due
		l.mu.Unlock()
		if there {
			return
		}
		time.Sleep(time.Millisecond)
	}
}

// A write without a deadline that the server does not read holds up no queue beside it whose
// requests have one, whether that comes while it is written or has waited before.
func TestServerReadsNothingOfAnother(t *testing.T) {
	for _, before := range []bool{false, true} {
		stop := make(chan struct{})
		_, d, q := opened(t, true, Options{}, func(c *serving, q asked) (bool, error) {
			<-stop
			return false, errLeft
		})
		other, err := d.NewQueue(8)
		must(t, err)
		l, mem := d.links[0], make([]byte, 4096)
		first := &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{mem}}
		must(t, q.Submit(first)) // the server has it, and reads no more
		timeless := &hpdi.Request{Op: hpdi.OpWrite, Vec: [][]byte{mem}}
		timed := &hpdi.Request{Op: hpdi.OpWrite, Offset: 4096, Vec: [][]byte{mem}, Deadline: time.Now().Add(10 * time.Millisecond)}
		var wg sync.WaitGroup
		submit := func(q hpdi.Queue, r *hpdi.Request) {
			wg.Go(func() {
				if err := q.Submit(r); err != nil {
					t.Error(err)
				}
			})
		}
		if before {
			timed.Deadline = time.Now().Add(time.Second)
			l.wmu.Lock()
			submit(other, timed)
			writes(l, 1)
			submit(q, timeless)
			var its []*command
			for len(its) == 0 {
				l.mu.Lock()
				for _, c := range l.flying {
					if c.op.r == timeless {
						its = append(its, c)
					}
				}
				l.mu.Unlock()
				time.Sleep(time.Millisecond)
			}
			within(t, "a write without a deadline", func() { l.transmit(its) })
			l.wmu.Unlock()
		} else {
			submit(q, timeless)
			writes(l, 0)
			submit(other, timed)
		}
		within(t, "to submit", wg.Wait)
		within(t, "to wait", func() {
			done, err := other.Wait(1, nil)
			if len(done) != 1 || err != nil || !errors.Is(timed.Err, hpdi.ErrDeadline) && !errors.Is(timed.Err, hpdi.ErrDisconnected) {
				t.Errorf("%d requests with a deadline came, with %v, %v", len(done), timed.Err, err)
			}
			done, err = q.Wait(2, nil)
			if len(done) != 2 || err != nil || !errors.Is(timeless.Err, hpdi.ErrDisconnected) || !errors.Is(first.Err, hpdi.ErrDisconnected) {
				t.Errorf("%d others came, with %v, %v, %v", len(done), timeless.Err, first.Err, err)
			}
		})
		if len(l.due) != 0 || l.busy != nil {
			t.Errorf("%d deadlines are left, %v is busy", len(l.due), l.busy)
		}
		close(stop)
		must(t, errors.Join(other.Close(), q.Close()))
		must(t, d.Close())
	}
}

// A write that is sent again to a server that does not read it can be cancelled.
func TestCancelWhileSending(t *testing.T) {
	stop := make(chan struct{})
	s, d, q := opened(t, true, Options{Reconnect: time.Minute}, func(c *serving, q asked) (bool, error) {
		if q.kind == proto.CmdFlush {
			return true, nil
		}
		<-stop
		return false, errLeft
	})
	defer close(stop)
	flush := &hpdi.Request{Op: hpdi.OpFlush}
	must(t, q.Submit(flush))
	mem := make([]byte, 4096)
	reqs := []*hpdi.Request{{Op: hpdi.OpRead, Vec: [][]byte{mem}}, {Op: hpdi.OpWrite, Vec: [][]byte{mem}}}
	must(t, q.Submit(reqs[0]))
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := q.Submit(reqs[1]); err != nil {
			t.Error(err)
		}
	})
	writes(d.links[0], 0)
	s.cut()
	within(t, "to submit", wg.Wait)
	for again := false; !again; time.Sleep(time.Millisecond) {
		d.links[0].mu.Lock()
		again = d.links[0].number == 2 && d.links[0].busy != nil
		d.links[0].mu.Unlock()
	}
	q.Cancel(flush, reqs[0], reqs[1])
	within(t, "to cancel", func() {
		done, err := q.Wait(3, nil)
		if len(done) != 3 || err != nil || !errors.Is(reqs[1].Err, hpdi.ErrCanceled) {
			t.Errorf("%d requests came, the write with %v, %v", len(done), reqs[1].Err, err)
		}
	})
	must(t, q.Close())
	must(t, d.Close())
}
