package ring

import (
	"encoding/binary"
	"errors"
	"net"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
)

// liar is a back-end that has the ring in its hands and writes what it likes.
type liar struct {
	t    *testing.T
	c    *net.UnixConn
	mem  []byte
	fds  []int
	tell func(mem []byte) // what it says of its device
	mute uint32           // the kind of question that it does not answer, and ends at
}

// places in the ring, as docs/format/ring.md has them.
const (
	factsAt = 2*4096 + 128
	queueAt = 3 * 4096
	ctailAt = queueAt + 4096
)

func word(mem []byte, at int, v uint64) { binary.LittleEndian.PutUint64(mem[at:], v) }

// goodFacts tells of a device of 1 MiB.
func goodFacts(mem []byte) {
	for i, v := range []uint64{2, 1 << 20, 4096, 1 << 20, 0} {
		word(mem, factsAt+8*i, v)
	}
}

// lie listens at a socket and lets one front-end attach.
func lie(t *testing.T, tell func(mem []byte), attached func(l *liar)) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "s")
	ln, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan bool)
	go func() {
		defer close(done)
		c, err := ln.AcceptUnix()
		if err != nil {
			return
		}
		l := &liar{t: t, c: c, tell: tell}
		defer l.end()
		l.serve(attached)
	}()
	t.Cleanup(func() {
		ln.Close()
		<-done
	})
	return path
}

func (l *liar) serve(attached func(l *liar)) {
	var buf [1024]byte
	oob := make([]byte, 4096)
	for {
		n, oobn, _, _, err := l.c.ReadMsgUnix(buf[:], oob)
		if err != nil || n < 24 {
			return
		}
		msgs, _ := syscall.ParseSocketControlMessage(oob[:oobn])
		for i := range msgs {
			fds, _ := syscall.ParseUnixRights(&msgs[i])
			l.fds = append(l.fds, fds...)
		}
		kind := binary.LittleEndian.Uint32(buf[:])
		if kind == 5 || kind == l.mute {
			return
		}
		if kind == 1 {
			size := binary.LittleEndian.Uint64(buf[8:])
			if l.mem, err = unix.Mmap(l.fds[0], 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
				l.t.Error(err)
				return
			}
			l.tell(l.mem)
		}
		l.say(6, kind)
		if kind == 4 {
			attached(l)
		}
	}
}

func (l *liar) say(kind, number uint32) {
	p := make([]byte, 24)
	binary.LittleEndian.PutUint32(p, kind)
	binary.LittleEndian.PutUint32(p[4:], 1)
	binary.LittleEndian.PutUint32(p[8:], number)
	_, _ = l.c.Write(p)
}

func (l *liar) end() {
	l.c.Close()
	for _, fd := range l.fds {
		unix.Close(fd)
	}
	if l.mem != nil {
		_ = unix.Munmap(l.mem)
	}
}

// wake wakes the front-end's first queue.
func (l *liar) wake() { _, _ = unix.Write(l.fds[2], []byte{1, 0, 0, 0, 0, 0, 0, 0}) }

// Whatever a back-end writes, requests end with an error that says so, and nothing else happens.
func TestHostileBackEnd(t *testing.T) {
	// The queue of four entries: submissions, then completions.
	const cq = queueAt + 8192 + 8*4
	for want, do := range map[string]func(l *liar){
		"9 completions":      func(l *liar) { word(l.mem, ctailAt, 9) },
		"of slot 77":         func(l *liar) { word(l.mem, cq, 1); word(l.mem, cq+8, 77); word(l.mem, ctailAt, 1) },
		"of request 5":       func(l *liar) { word(l.mem, cq, 5); word(l.mem, ctailAt, 1) },
		"of text":            func(l *liar) { word(l.mem, cq, 1); word(l.mem, cq+8, 1<<60); word(l.mem, ctailAt, 1) },
		"nobody asked":       func(l *liar) { l.say(6, 2); l.say(6, 2); l.say(6, 2) },
		"kind 99":            func(l *liar) { l.say(99, 0) },
		"attach from the":    func(l *liar) { l.say(1, 0) },
		"back-end has gone?": func(l *liar) { l.c.Close() },
	} {
		t.Run(want, func(t *testing.T) {
			go1 := make(chan bool)
			path := lie(t, goodFacts, func(l *liar) {
				<-go1
				do(l)
				l.wake()
			})
			d := open(t, path, Options{Queues: 1, Entries: 4})
			q, err := d.NewQueue(4)
			if err != nil {
				t.Fatal(err)
			}
			mem := pages(t, 1)
			if err := d.Register(mem[:0]); err != nil {
				t.Fatal(err)
			}
			r := &hpdi.Request{Op: hpdi.OpFlush}
			if err := q.Submit(r); err != nil {
				t.Fatal(err)
			}
			close(go1)
			done, err := q.Wait(1, nil)
			if err != nil || len(done) != 1 || !errors.Is(r.Err, hpdi.ErrDisconnected) {
				t.Errorf("%d came, %v; %v", len(done), err, r.Err)
			}
			if !strings.HasSuffix(want, "?") && (r.Err == nil || !strings.Contains(r.Err.Error(), want)) {
				t.Errorf("it says %v", r.Err)
			}
			if err := errors.Join(q.Close(), d.Close()); err != nil {
				t.Error(err)
			}
		})
	}
}

// A device that makes no sense is not opened.
func TestHostileFacts(t *testing.T) {
	for name, facts := range map[string][]uint64{
		"nothing":       {0},
		"never at rest": {3, 1 << 20, 4096, 4096, 0},
		"blocks":        {2, 1 << 20, 4097, 4096, 0},
		"no blocks":     {2, 1 << 20, 0, 4096, 0},
		"size":          {2, 1<<20 + 1, 4096, 4096, 0},
		"endless":       {2, 1 << 63, 4096, 4096, 0},
		"longest":       {2, 1 << 20, 4096, 1 << 35, 0},
		"shortest":      {2, 1 << 20, 4096, 512, 0},
	} {
		path := lie(t, func(mem []byte) {
			for i, v := range facts {
				word(mem, factsAt+8*i, v)
			}
		}, func(*liar) {})
		if d, err := Open(t.Context(), path, Options{Queues: 1, Entries: 4}); err == nil {
			t.Errorf("%s: opened %+v", name, d.Info())
			d.Close()
		}
	}
}

// A block status that makes no sense is an error of that request.
func TestHostileExtents(t *testing.T) {
	const (
		cq      = queueAt + 8192 + 8*4
		answers = queueAt + 8192 + 4*(8+16+8+64+512)
	)
	for name, c := range map[string]struct {
		n       uint64
		extents []uint64
	}{
		"none":          {0, nil},
		"no bytes":      {1, []uint64{0, 0}},
		"part of block": {1, []uint64{100, 0}},
		"endless":       {1, []uint64{1 << 63, 0}},
		"state":         {1, []uint64{4096, 9}},
		"good":          {2, []uint64{4096, 1, 1 << 40, 0}},
	} {
		t.Run(name, func(t *testing.T) {
			go1 := make(chan bool)
			path := lie(t, func(mem []byte) { goodFacts(mem); word(mem, factsAt+32, 8) }, func(l *liar) {
				<-go1
				for i, v := range c.extents {
					word(l.mem, answers+8*i, v)
				}
				word(l.mem, cq, 1)
				word(l.mem, cq+8, c.n<<32)
				word(l.mem, ctailAt, 1)
				l.wake()
			})
			d := open(t, path, Options{Queues: 1, Entries: 4, Reconnect: time.Second})
			q, err := d.NewQueue(1)
			if err != nil {
				t.Fatal(err)
			}
			r := &hpdi.Request{Op: hpdi.OpStatus, Length: 1 << 20, Extents: make([]hpdi.Extent, 0, 4)}
			if err := q.Submit(r); err != nil {
				t.Fatal(err)
			}
			close(go1)
			if _, err := q.Wait(1, nil); err != nil {
				t.Fatal(err)
			}
			if name == "good" {
				if r.Err != nil || len(r.Extents) != 2 || r.Extents[1].Length != 1<<20-4096 {
					t.Errorf("%v, %v", r.Extents, r.Err)
				}
			} else if !errors.Is(r.Err, hpdi.ErrIO) {
				t.Errorf("%v, %v", r.Extents, r.Err)
			}
			if err := errors.Join(q.Close(), d.Close()); err != nil {
				t.Error(err)
			}
		})
	}
}
