package ring

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// disk is a target in memory. Requests that it holds are kept until somebody lets go.
type disk struct {
	mu       sync.Mutex // guards data
	data     []byte
	size     atomic.Int64 // that it tells
	hold     atomic.Bool
	attached atomic.Int32
	byes     atomic.Int32
	held     chan *held
}

type held struct {
	q *Queue
	r *Request
}

func newDisk() *disk {
	d := &disk{data: make([]byte, 1<<20), held: make(chan *held, 64)}
	d.size.Store(1 << 20)
	return d
}

func (d *disk) Facts() Facts {
	return Facts{Size: d.size.Load(), BlockSize: 4096, MaxLength: 1 << 20, Discard: true, Zeroes: true}
}

func (d *disk) Attach(Shape, int) (Runner, error) {
	d.attached.Add(1)
	return d, nil
}

func (d *disk) Detach(ended bool) {
	d.attached.Add(-1)
	if ended {
		d.byes.Add(1)
	}
}

func (d *disk) Run(q *Queue) error {
	for {
		r, err := q.Next()
		if err != nil {
			return err
		}
		switch {
		case r == nil:
			n := q.Reap()
			q.Flush()
			if q.Stopping() && q.Running() == 0 {
				return nil
			}
			if n == 0 {
				if err := q.Idle(-1, -1, nil); err != nil {
					return err
				}
			}
		case d.hold.Load():
			d.held <- &held{q, r}
		default:
			d.mu.Lock()
			at := d.data[r.Offset:]
			for _, v := range r.Vec {
				if r.Op == OpRead {
					copy(v, at)
				} else {
					copy(at, v)
				}
				at = at[len(v):]
			}
			d.mu.Unlock()
			q.Done(r, StatusOK, "")
		}
	}
}

// served returns a socket that a server of d listens at.
func served(t *testing.T, d *disk, o Options) (string, *Server) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	s := NewServer(d, o)
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
		l.Close()
		if n := d.attached.Load(); n != 0 {
			t.Errorf("%d rings are still attached", n)
		}
	})
	return path, s
}

// client is a front-end that can do wrong.
type client struct {
	t     *testing.T
	link  *Link
	m     *Memory
	mem   []byte
	fd    int
	bells []*Bell
	f     *Front
}

func newClient(t *testing.T, path string, s Shape) *client {
	t.Helper()
	c := &client{t: t}
	var err error
	if c.m, c.mem, c.fd, err = NewMemory(s); err != nil {
		t.Fatal(err)
	}
	for range 2 * s.Queues {
		b, err := NewBell()
		if err != nil {
			t.Fatal(err)
		}
		c.bells = append(c.bells, b)
	}
	c.f = NewFront(c.m, 0)
	if c.link, err = Dial(t.Context(), path); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.link.Drop()
		for _, b := range c.bells {
			b.Close()
		}
		if err := errors.Join(unix.Munmap(c.mem), unix.Close(c.fd)); err != nil {
			t.Error(err)
		}
	})
	return c
}

func (c *client) attach() error {
	return errors.Join(c.link.Attach(c.fd, int64(len(c.mem)), c.bells), c.link.Start())
}

// submit puts an entry and rings.
func (c *client) submit(e Entry) int {
	slot := c.f.Put(&e)
	c.f.Publish()
	c.bells[0].Ring()
	return slot
}

// answer waits for an answer, or for the end of the connection.
func (c *client) answer() (Completion, error) {
	c.f.Arm()
	for began := time.Now(); time.Since(began) < 10*time.Second; {
		got, ok, err := c.f.Next()
		if err != nil || ok {
			c.f.Release()
			return got, err
		}
		select {
		case <-c.link.Gone():
			return Completion{}, c.link.Err()
		default:
			if err := c.bells[1].Sleep(-1, 10*time.Millisecond); err != nil {
				return Completion{}, err
			}
		}
	}
	return Completion{}, errors.New("no answer in time")
}

func TestServe(t *testing.T) {
	d := newDisk()
	path, s := served(t, d, Options{})
	c := newClient(t, path, shape(2, 4))
	if err := c.attach(); err != nil {
		t.Fatal(err)
	}
	copy(c.m.Data()[page:], "payload")
	c.submit(Entry{Op: OpWrite, Offset: 8192, Length: 4096, Segs: []Segment{{Addr(0, page), 4096}}})
	if a, err := c.answer(); err != nil || a.Status != StatusOK {
		t.Fatalf("%+v, %v", a, err)
	}
	d.mu.Lock()
	arrived := bytes.HasPrefix(d.data[8192:], []byte("payload"))
	d.mu.Unlock()
	if !arrived {
		t.Fatal("the payload did not arrive")
	}
	f, seq, err := c.m.Facts()
	if err != nil || f != d.Facts() {
		t.Fatalf("facts %+v, %v", f, err)
	}
	d.size.Store(2 << 20)
	s.Changed()
	if g, now, err := c.m.Facts(); err != nil || g.Size != 2<<20 || now == seq || c.m.FactsSeq() != now {
		t.Fatalf("facts %+v after a change, %v", g, err)
	}
	if s.Rings() != 1 || !c.m.BackServes() {
		t.Errorf("%d rings", s.Rings())
	}
	c.link.Bye()
	if d.byes.Load() != 1 || c.m.BackServes() {
		t.Error("the good-bye was not heard")
	}
}

// What no device could do is answered, each with its own status, and the queue works on.
func TestAnswersByItself(t *testing.T) {
	path, _ := served(t, newDisk(), Options{})
	c := newClient(t, path, shape(1, 4))
	if err := c.attach(); err != nil {
		t.Fatal(err)
	}
	seg := func(off, n uint64) []Segment { return []Segment{{off, n}} }
	for want, e := range map[string]Entry{
		"read 2":         {Op: OpRead, Offset: 1 << 20, Length: 4096, Segs: seg(0, 4096)},
		"read -1":        {Op: OpRead, Offset: -4096, Length: 4096, Segs: seg(0, 4096)},
		"discard 2":      {Op: OpDiscard, Offset: 4096, Length: 1 << 20},
		"discard long":   {Op: OpDiscard, Offset: 1<<63 - 4096, Length: 1<<63 - 4096},
		"align":          {Op: OpRead, Offset: 512, Length: 4096, Segs: seg(0, 4096)},
		"align memory":   {Op: OpRead, Length: 4096, Segs: []Segment{{0, 1024}, {4096, 3072}}},
		"unsupported":    {Op: OpStatus, Length: 4096},
		"unknown":        {Op: 200, Length: 4096},
		"durable":        {Op: OpWrite, Flags: FlagDurable, Length: 4096, Segs: seg(0, 4096)},
		"keep and read":  {Op: OpRead, Flags: FlagKeep, Length: 4096, Segs: seg(0, 4096)},
		"none":           {Op: OpNone},
		"negative bytes": {Op: OpDiscard, Length: -4096},
	} {
		c.submit(e)
		a, err := c.answer()
		if err != nil {
			t.Fatalf("%s: %v", want, err)
		}
		status := map[string]Status{
			"read 2": StatusRange, "read -1": StatusRange, "discard 2": StatusRange, "discard long": StatusRange, "align": StatusAlign,
			"align memory": StatusAlign, "unsupported": StatusUnsupported, "unknown": StatusUnsupported, "durable": StatusUnsupported,
			"keep and read": StatusUnsupported, "none": StatusCanceled, "negative bytes": StatusRange,
		}[want]
		if a.Status != status || c.f.Text(a) == "" {
			t.Errorf("%s: status %d with %q, want %d", want, a.Status, c.f.Text(a), status)
		}
	}
}

// hostile are front-ends that break the rules behind start; the connection ends with an
// error that says what it was.
func TestHostileQueues(t *testing.T) {
	for want, do := range map[string]func(c *client){
		"of memory 0": func(c *client) {
			c.submit(Entry{Op: OpRead, Length: 4096, Segs: []Segment{{Addr(0, 2*page-1024), 4096}}})
		},
		"of memory 9": func(c *client) {
			c.submit(Entry{Op: OpRead, Length: 4096, Segs: []Segment{{Addr(9, 0), 4096}}})
		},
		"at 281474976710655 of memory 0": func(c *client) {
			c.submit(Entry{Op: OpRead, Length: 4096, Segs: []Segment{{1<<48 - 1, 4096}}})
		},
		"slot 7 of 4": func(c *client) {
			put(c.f.mem, c.f.sqAt(0), 7)
			c.f.store(tailAt, 1)
			c.bells[0].Ring()
		},
		"9 submissions": func(c *client) {
			c.f.store(tailAt, 9)
			c.bells[0].Ring()
		},
		"with segments of": func(c *client) {
			c.submit(Entry{Op: OpRead, Length: 8192, Segs: []Segment{{0, 4096}}})
		},
		"with flags": func(c *client) {
			c.submit(Entry{Op: OpFlush, Flags: 0x80})
		},
	} {
		t.Run(want, func(t *testing.T) {
			d := newDisk()
			path, _ := served(t, d, Options{})
			other := newClient(t, path, shape(1, 4))
			c := newClient(t, path, shape(1, 4))
			if err := errors.Join(c.attach(), other.attach()); err != nil {
				t.Fatal(err)
			}
			do(c)
			if _, err := c.answer(); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("ended with %v", err)
			}
			// Others do not notice.
			other.submit(Entry{Op: OpWrite, Length: 4096, Segs: []Segment{{0, 4096}}})
			if a, err := other.answer(); err != nil || a.Status != StatusOK {
				t.Errorf("another front-end is answered %+v, %v", a, err)
			}
		})
	}
}

// A front-end submits what is still running, and takes memory away that is in use.
func TestHostileWhileRunning(t *testing.T) {
	for want, do := range map[string]func(c *client, slot int) error{
		"still running": func(c *client, slot int) error {
			c.f.tail++
			c.f.store(c.f.slotAt(slot)+slotCounter, c.f.tail)
			put(c.f.mem, c.f.sqAt(c.f.tail-1), uint64(slot))
			c.f.Publish()
			c.bells[0].Ring()
			_, err := c.answer()
			return err
		},
		"memory 3 is to be forgotten while request 1": func(c *client, _ int) error { return c.link.Forget(3) },
	} {
		t.Run(want, func(t *testing.T) {
			d := newDisk()
			path, _ := served(t, d, Options{})
			c := newClient(t, path, shape(1, 4))
			if err := errors.Join(c.attach(), c.link.Memory(3, sealedFile(t, 8192), 8192)); err != nil {
				t.Fatal(err)
			}
			d.hold.Store(true)
			slot := c.submit(Entry{Op: OpRead, Length: 4096, Segs: []Segment{{Addr(3, 4096), 4096}}})
			h := <-d.held
			time.AfterFunc(20*time.Millisecond, func() { h.q.Later(h.r, StatusOK, "") })
			if err := do(c, slot); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("ended with %v", err)
			}
		})
	}
}

// sealedFile returns a memory that can be handed over.
func sealedFile(t *testing.T, size int64) int {
	t.Helper()
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	mem, err := fill(fd, size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(mem) })
	return fd
}

// Memory comes and goes, also many times, and what is forgotten is gone.
func TestMemoryComesAndGoes(t *testing.T) {
	path, _ := served(t, newDisk(), Options{Memory: 8 << 20})
	c := newClient(t, path, shape(2, 4))
	if err := c.attach(); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		if err := errors.Join(c.link.Memory(5, sealedFile(t, 1<<20), 1<<20), c.link.Forget(5)); err != nil {
			t.Fatal(err)
		}
	}
	c.submit(Entry{Op: OpRead, Length: 4096, Segs: []Segment{{Addr(5, 0), 4096}}})
	if _, err := c.answer(); err == nil || !strings.Contains(err.Error(), "memory 5, which has 0") {
		t.Errorf("forgotten memory: %v", err)
	}
}

// hello are messages that are wrong, in the order that they come in.
func TestHostileMessages(t *testing.T) {
	open := func(name string, size int64) int {
		f, err := os.Create(filepath.Join(t.TempDir(), name))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { f.Close() })
		if err := f.Truncate(size); err != nil {
			t.Fatal(err)
		}
		return int(f.Fd())
	}
	plain := open("file", 1<<20)
	before := descriptors(t)
	for want, do := range map[string]func(c *client) error{
		"sealed":               func(c *client) error { return c.link.Attach(plain, 1<<20, c.bells) },
		"bytes of a memory of": func(c *client) error { return c.link.Attach(c.fd, 8<<20, c.bells) },
		"an eventfd is needed": func(c *client) error {
			return c.link.Attach(c.fd, int64(len(c.mem)), []*Bell{{fd: plain}, {fd: plain}})
		},
		"descriptors":                  func(c *client) error { return c.link.Attach(c.fd, int64(len(c.mem)), c.bells[:1]) },
		"not a ring":                   func(c *client) error { c.mem[0]++; return c.attach() },
		"checksum":                     func(c *client) error { c.mem[60]++; return c.attach() },
		"and 4 bells":                  func(c *client) error { return c.link.Attach(c.fd, int64(len(c.mem)), append(c.bells, c.bells...)) },
		"start with 0 descriptors":     func(c *client) error { return c.link.Start() },
		"bye":                          func(c *client) error { send(c.link.c, message{kind: msgBye}); return c.link.Err() },
		"attach with 3 descriptors at": func(c *client) error { return errors.Join(c.attach(), c.attach()) },
		"numbers from 1":               func(c *client) error { return errors.Join(c.attach(), c.link.Memory(0, sealedFile(c.t, 4096), 4096)) },
		"there already": func(c *client) error {
			return errors.Join(c.attach(), c.link.Memory(1, sealedFile(c.t, 4096), 4096), c.link.Memory(1, sealedFile(c.t, 4096), 4096))
		},
		"may hand over": func(c *client) error {
			return errors.Join(c.attach(), c.link.Memory(1, sealedFile(c.t, 64<<20), 64<<20))
		},
		"not sealed":         func(c *client) error { return errors.Join(c.attach(), c.link.Memory(1, unsealed(c.t), 4096)) },
		"was never there":    func(c *client) error { return errors.Join(c.attach(), c.link.Forget(6)) },
		"message of 3 bytes": func(c *client) error { c.link.c.Write([]byte("abc")); return c.link.Err() },
		"version 9": func(c *client) error {
			p := message{kind: msgStart}.append(nil)
			p[4] = 9
			c.link.c.Write(p)
			return c.link.Err()
		},
		"kind 99":                           func(c *client) error { c.link.c.Write(message{kind: 99}.append(nil)); return c.link.Err() },
		"yes with 0 descriptors":            func(c *client) error { c.link.c.Write(message{kind: msgYes}.append(nil)); return c.link.Err() },
		"queue 0 with 0 submissions, 5 com": func(c *client) error { c.f.store(ctailAt, 5); return c.attach() },
	} {
		t.Run(want, func(t *testing.T) {
			d := newDisk()
			path, s := served(t, d, Options{Memory: 16 << 20})
			c := newClient(t, path, shape(1, 4))
			if err := do(c); err == nil || !strings.Contains(err.Error(), want) {
				t.Errorf("ended with %v", err)
			}
			<-c.link.Gone()
			for began := time.Now(); s.Rings() > 0 && time.Since(began) < 5*time.Second; {
				time.Sleep(time.Millisecond)
			}
			if s.Rings() != 0 {
				t.Error("the connection is still there")
			}
		})
	}
	if after := descriptors(t); after > before {
		t.Errorf("%d descriptors are open, %d were before", after, before)
	}
}

func unsealed(t *testing.T) int {
	t.Helper()
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	if err := unix.Ftruncate(fd, 4096); err != nil {
		t.Fatal(err)
	}
	return fd
}

func descriptors(t *testing.T) int {
	t.Helper()
	all, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}

// What all front-ends hand over together is bounded, and what is given back is free again.
func TestMemoryTogether(t *testing.T) {
	path, s := served(t, newDisk(), Options{Memory: 4 << 20, Together: 5 << 20})
	a, b := newClient(t, path, shape(1, 4)), newClient(t, path, shape(1, 4))
	if err := errors.Join(a.attach(), b.attach(), a.link.Memory(1, sealedFile(t, 3<<20), 3<<20)); err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(a.link.Forget(1), b.link.Memory(1, sealedFile(t, 3<<20), 3<<20)); err != nil {
		t.Fatal(err)
	}
	if err := a.link.Memory(1, sealedFile(t, 3<<20), 3<<20); err == nil || !strings.Contains(err.Error(), "all front-ends have handed over") {
		t.Errorf("more than all may: %v", err)
	}
	b.link.Bye()
	<-a.link.Gone()
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mapped != 0 {
		t.Errorf("%d bytes are counted and nobody is there", s.mapped)
	}
}

func TestTooManyFronts(t *testing.T) {
	path, _ := served(t, newDisk(), Options{Rings: 1})
	a := newClient(t, path, shape(1, 4))
	if err := a.attach(); err != nil {
		t.Fatal(err)
	}
	b := newClient(t, path, shape(1, 4))
	if err := b.attach(); err == nil || !strings.Contains(err.Error(), "as many as are allowed") {
		t.Errorf("the second front-end: %v", err)
	}
}

// A server that is closed ends what runs, and leaves the rest for the next one, which
// runs it.
func TestCloseLeavesTheRest(t *testing.T) {
	d := newDisk()
	path := filepath.Join(t.TempDir(), "s")
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	s := NewServer(d, Options{})
	go s.Serve(l)
	c := newClient(t, path, shape(1, 8))
	if err := c.attach(); err != nil {
		t.Fatal(err)
	}
	d.hold.Store(true)
	c.submit(Entry{Op: OpWrite, Length: 4096, Segs: []Segment{{0, 4096}}})
	h := <-d.held
	closed := make(chan bool)
	go func() {
		s.Close()
		close(closed)
	}()
	for s.ctx.Err() == nil {
		time.Sleep(time.Millisecond)
	}
	for !h.q.Stopping() {
		time.Sleep(time.Millisecond)
	}
	c.submit(Entry{Op: OpWrite, Offset: 4096, Length: 4096, Segs: []Segment{{0, 4096}}})
	select {
	case <-closed:
		t.Fatal("closed with a request running")
	case <-time.After(20 * time.Millisecond):
	}
	h.q.Later(h.r, StatusOK, "")
	<-closed
	l.Close()
	if a, err := c.answer(); err != nil || a.Counter != 1 {
		t.Fatalf("the request that ran: %+v, %v", a, err)
	}
	d.hold.Store(false)
	path2, _ := served(t, d, Options{})
	if c.link, err = Dial(context.Background(), path2); err != nil {
		t.Fatal(err)
	}
	if err := c.attach(); err != nil {
		t.Fatal(err)
	}
	if a, err := c.answer(); err != nil || a.Counter != 2 || a.Status != StatusOK {
		t.Fatalf("the request that was left: %+v, %v", a, err)
	}
}

// Golden bytes: the header of version 1, without its checksum and what is zero behind it.
func TestGoldenHeader(t *testing.T) {
	s := Shape{ID: [16]byte{0x10, 0x11, 0x12, 0x13, 0x14, 0x15, 0x16, 0x17, 0x18, 0x19, 0x1a, 0x1b, 0x1c, 0x1d, 0x1e, 0x1f}, Session: 0x1122334455667788, Queues: 4, Entries: 128, Data: 1 << 20, Bells: true}
	want, err := os.ReadFile("testdata/header.hex")
	if err != nil {
		t.Fatal(err)
	}
	if got := dumpHex(header(s)); got != string(want) {
		t.Errorf("the header is\n%s\nand was\n%s", got, want)
	}
	if got, err := decode(header(s), s.Size()); err != nil || got != s {
		t.Errorf("decoded %+v, %v", got, err)
	}
	if s.Size() != int64(binary.LittleEndian.Uint64(header(s)[16:])) {
		t.Error("the size is not the size")
	}
}

func dumpHex(p []byte) string {
	var b strings.Builder
	const digits = "0123456789abcdef"
	for i, c := range p {
		b.WriteByte(digits[c>>4])
		b.WriteByte(digits[c&15])
		if i%16 == 15 {
			b.WriteByte('\n')
		} else {
			b.WriteByte(' ')
		}
	}
	return b.String()
}
