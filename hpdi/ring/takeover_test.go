package ring

import (
	"errors"
	"os"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/hpditest"
)

// Memory that was used and freed does not keep the next back-end away, and no other file that
// has its descriptor's number now is handed over.
func TestMemoryFreedWithoutBackEnd(t *testing.T) {
	d, q, path := killed(t, time.Minute)
	used, err := hpdi.Alloc(4096)
	if err != nil {
		t.Fatal(err)
	}
	kept := pages(t, 1)
	kept[0] = 7
	for _, mem := range [][]byte{used, kept} {
		if err := d.(*device).Register(mem); err != nil {
			t.Fatal(err)
		}
	}
	if err := hpdi.Free(used); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(os.DevNull) // it gets the number
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	serveAt(t, path, memory(t, hpditest.MinSize))
	w := &hpdi.Request{Op: hpdi.OpWrite, Vec: [][]byte{kept}, Deadline: time.Now().Add(10 * time.Second)}
	if err := hpdi.Do(q, w); err != nil {
		t.Fatal(err)
	}
	if n := len(d.(*device).table.Load().regions); n != 1 {
		t.Errorf("%d pieces of memory are known, one is left", n)
	}
	if err := errors.Join(q.Close(), d.Close()); err != nil {
		t.Error(err)
	}
}

// While a socket is there and nobody answers at it yet, as during a takeover, requests can be
// called off, and deadlines pass.
func TestCancelWhileNobodyAnswers(t *testing.T) {
	d, q, path := killed(t, time.Minute)
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	c, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	mem := pages(t, 1)
	off := &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{mem}}
	late := &hpdi.Request{Op: hpdi.OpFlush, Deadline: time.Now().Add(20 * time.Millisecond)}
	if err := q.Submit(off, late); err != nil {
		t.Fatal(err)
	}
	q.Cancel(off)
	began := time.Now()
	if _, err := q.Wait(2, nil); err != nil || !errors.Is(off.Err, hpdi.ErrCanceled) || !errors.Is(late.Err, hpdi.ErrDeadline) {
		t.Errorf("%v; %v, %v", err, off.Err, late.Err)
	}
	if d := time.Since(began); d > 5*time.Second {
		t.Errorf("it took %v", d)
	}
	if err := errors.Join(l.Close(), c.Close()); err != nil {
		t.Fatal(err)
	}
	serveAt(t, path, memory(t, hpditest.MinSize))
	if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpFlush}); err != nil {
		t.Error(err)
	}
	if err := errors.Join(q.Close(), d.Close()); err != nil {
		t.Error(err)
	}
}

// A back-end that is asked to start and goes over it is followed by the next one.
func TestDeathWhileStarting(t *testing.T) {
	d, q, path := killed(t, time.Minute)
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	c, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	x := &liar{t: t, c: c, tell: goodFacts, mute: 4}
	x.serve(func(*liar) {})
	if !d.(*device).attached.Load() {
		t.Error("a back-end that may have begun is not taken for one")
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	x.end()
	serveAt(t, path, memory(t, hpditest.MinSize))
	if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpFlush, Deadline: time.Now().Add(10 * time.Second)}); err != nil {
		t.Error(err)
	}
	if err := errors.Join(q.Close(), d.Close()); err != nil {
		t.Error(err)
	}
}

// A queue whose back-end has broken the rules, and hangs, sleeps until the device is dead.
func TestBrokenQueueSleeps(t *testing.T) {
	attached := make(chan *liar)
	end := make(chan bool)
	path := lie(t, goodFacts, func(l *liar) {
		attached <- l
		<-end
	})
	d := open(t, path, Options{Queues: 1, Entries: 4})
	l := <-attached
	hq, err := d.NewQueue(4)
	if err != nil {
		t.Fatal(err)
	}
	r := &hpdi.Request{Op: hpdi.OpFlush}
	if err := hq.Submit(r); err != nil {
		t.Fatal(err)
	}
	word(l.mem, ctailAt, 9)
	q := hq.(*queue)
	q.collect()
	if !q.broken || q.d.dead.Load() || q.ready() {
		t.Errorf("broken %v, dead %v: it does not sleep", q.broken, q.d.dead.Load())
	}
	close(end)
	l.c.Close()
	if _, err := q.Wait(1, nil); err != nil || !errors.Is(r.Err, hpdi.ErrDisconnected) {
		t.Errorf("%v; %v", err, r.Err)
	}
	if err := errors.Join(q.Close(), d.Close()); err != nil {
		t.Error(err)
	}
}
