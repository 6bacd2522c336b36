package nbd

import (
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"net"
	"os"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	proto "github.com/pollux-storage/pollux/internal/nbdproto"
)

var errRefused = errors.New("nobody listens")

// seedOf returns the seed of a random test and prints it.
func seedOf(t *testing.T) uint64 {
	seed := rand.Uint64()
	if v := os.Getenv("POLLUX_SEED"); v != "" {
		var err error
		seed, err = strconv.ParseUint(v, 10, 64)
		must(t, err)
	}
	t.Logf("seed %d (POLLUX_SEED=%d repeats this run)", seed, seed)
	return seed
}

// What was under way when a connection ended is done on the next one, and the application
// only waits for as long as that takes to come.
func TestReplay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(1 << 20)
		hang := true
		s.asked = func(c *serving, q asked) (bool, error) {
			return hang && c.s.live != nil, nil
		}
		var down atomic.Bool
		dial := s.dial(true)
		d := s.open(t, Options{Reconnect: time.Minute, Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			if down.Load() {
				return nil, errRefused
			}
			return dial(ctx, network, address)
		}})
		q, err := d.NewQueue(8)
		must(t, err)
		mem := make([]byte, 8192)
		for i := range mem {
			mem[i] = byte(i >> 8)
		}
		back := make([]byte, 4096)
		reqs := []*hpdi.Request{
			{Op: hpdi.OpWrite, Offset: 4096, Vec: [][]byte{mem}}, {Op: hpdi.OpRead, Offset: 65536, Vec: [][]byte{back}}, {Op: hpdi.OpFlush},
			{Op: hpdi.OpDiscard, Offset: 1 << 19, Length: 4096},
		}
		must(t, q.Submit(reqs...))
		synctest.Wait()
		down.Store(true)
		s.cut()
		began := time.Now()
		synctest.Wait()
		hang = false
		more := &hpdi.Request{Op: hpdi.OpRead, Offset: 4096, Vec: [][]byte{make([]byte, 512)}}
		must(t, q.Submit(more)) // does not wait
		time.Sleep(10 * time.Second)
		down.Store(false)
		done, err := q.Wait(5, nil)
		must(t, err)
		if len(done) != 5 {
			t.Fatalf("%d requests are complete", len(done))
		}
		for _, r := range done {
			must(t, r.Err)
		}
		if took := time.Since(began); took < 10*time.Second || took > 10*time.Second+mostPause {
			t.Errorf("they waited for %v", took)
		}
		if string(s.data[4096:][:8192]) != string(mem) {
			t.Error("the write was lost")
		}
		must(t, q.Close())
		must(t, d.Close())
	})
}

// Without a new connection in time requests fail, those that are made meanwhile at once; and
// when there is one again, all is well.
func TestTooLong(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := newServer(1 << 20)
		var down atomic.Bool
		var hang atomic.Bool
		s.asked = func(*serving, asked) (bool, error) { return hang.Load(), nil }
		dial := s.dial(true)
		d := s.open(t, Options{Reconnect: 5 * time.Second, Dial: func(ctx context.Context, network, address string) (net.Conn, error) {
			if down.Load() {
				<-ctx.Done() // a host that has gone answers nothing
				return nil, ctx.Err()
			}
			return dial(ctx, network, address)
		}})
		q, err := d.NewQueue(8)
		must(t, err)
		request := func() *hpdi.Request { return &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{make([]byte, 4096)}} }
		hang.Store(true)
		r := request()
		must(t, q.Submit(r))
		synctest.Wait()
		down.Store(true)
		s.cut()
		began := time.Now()
		_, err = q.Wait(1, nil)
		must(t, err)
		if took := time.Since(began); took != 5*time.Second || r.Err == nil || !strings.Contains(r.Err.Error(), "no new connection for 5s") {
			t.Errorf("after %v: %v", took, r.Err)
		}
		if err := hpdi.Do(q, request()); err == nil || time.Since(began) != 5*time.Second {
			t.Errorf("another one after %v: %v", time.Since(began), err)
		}
		down.Store(false)
		hang.Store(false)
		time.Sleep(DefaultHandshake + 2*mostPause) // the attempt under way has to end
		must(t, hpdi.Do(q, request()))
		must(t, q.Close())
		must(t, d.Close())
	})
}

// Without Options.Reconnect the first end is the last.
func TestNoReconnect(t *testing.T) {
	s := newServer(1 << 20)
	s.asked = func(*serving, asked) (bool, error) { return true, errLeft }
	d := s.open(t, Options{})
	q, err := d.NewQueue(1)
	must(t, err)
	for range 2 {
		if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpFlush}); err == nil || !strings.Contains(err.Error(), "nbd://test/disk") {
			t.Error(err)
		}
	}
	must(t, q.Close())
	must(t, d.Close())
	if s.conns != 1 {
		t.Errorf("%d connections", s.conns)
	}
}

// An export that is another one by the time of the new connection is none.
func TestChanged(t *testing.T) {
	for name, change := range map[string]func(*server){
		"smaller":          func(s *server) { s.data = s.data[:1<<19] },
		"read-only":        func(s *server) { s.flags |= proto.FlagReadOnly },
		"no flush":         func(s *server) { s.flags &^= proto.FlagSendFlush },
		"not several":      func(s *server) { s.flags &^= proto.FlagMultiConn },
		"larger blocks":    func(s *server) { s.least, s.most = 4096, 1<<20 },
		"smaller payloads": func(s *server) { s.least, s.most = 1, 1<<20 },
	} {
		synctest.Test(t, func(t *testing.T) {
			s := newServer(1 << 20)
			var hang atomic.Bool
			s.asked = func(*serving, asked) (bool, error) { return hang.Load(), nil }
			d := s.open(t, Options{Connections: 2, Reconnect: 2 * time.Second, Dial: s.dial(true)})
			q, err := d.NewQueue(1)
			must(t, err)
			hang.Store(true)
			r := &hpdi.Request{Op: hpdi.OpFlush}
			must(t, q.Submit(r))
			synctest.Wait()
			s.mu.Lock()
			change(s)
			s.mu.Unlock()
			s.cut()
			_, err = q.Wait(1, nil)
			must(t, err)
			if r.Err == nil || !strings.Contains(r.Err.Error(), "now") && !strings.Contains(r.Err.Error(), "any more") {
				t.Errorf("%s: %v", name, r.Err)
			}
			must(t, q.Close())
			must(t, d.Close())
		})
	}
}

// A server that says that it shuts down is left for the next one.
func TestShutdown(t *testing.T) {
	s := newServer(1 << 20)
	var asks atomic.Int32
	s.asked = func(c *serving, q asked) (bool, error) {
		if asks.Add(1) > 1 {
			return false, nil
		}
		return true, c.write(uint32(proto.MagicSimple), uint32(proto.ESHUTDOWN), q.cookie)
	}
	d := s.open(t, Options{Reconnect: time.Minute})
	q, err := d.NewQueue(1)
	must(t, err)
	must(t, hpdi.Do(q, &hpdi.Request{Op: hpdi.OpFlush}))
	must(t, q.Close())
	must(t, d.Close())
	if s.conns != 2 {
		t.Errorf("%d connections", s.conns)
	}
}

// Whenever connections end, in the middle of requests and of replies, each write is there in
// the end and each read has what was written.
func TestCuts(t *testing.T) {
	seed := seedOf(t)
	rng := rand.New(rand.NewPCG(seed, 1))
	s := newServer(1 << 20)
	var left atomic.Int64 // commands until the next cut
	s.asked = func(c *serving, q asked) (bool, error) {
		if left.Add(-1) > 0 {
			return false, nil
		}
		left.Store(20 + int64(q.off>>12)%40) // more than are under way, or it would never end
		if q.kind == proto.CmdRead {         // half of the reply comes
			c.s.mu.Lock()
			defer c.s.mu.Unlock()
			head := make([]byte, 0, 64)
			head = binary.BigEndian.AppendUint32(head, proto.MagicStructured)
			head = binary.BigEndian.AppendUint16(head, proto.ChunkDone)
			head = binary.BigEndian.AppendUint16(head, proto.ChunkOffsetData)
			head = binary.BigEndian.AppendUint64(head, q.cookie)
			head = binary.BigEndian.AppendUint32(head, q.n+8)
			head = binary.BigEndian.AppendUint64(head, q.off)
			_, _ = c.conn.Write(append(head, c.s.data[q.off:][:q.n/2]...))
		}
		return true, errLeft
	}
	d := s.open(t, Options{Connections: 2, Reconnect: time.Minute})
	const blocks, size = 64, 4096
	var model [blocks]byte
	q, err := d.NewQueue(16)
	must(t, err)
	mem := make([]byte, 16*size)
	for range 150 {
		var reqs []*hpdi.Request
		var want []byte
		for i, b := range rng.Perm(blocks)[:16] {
			p := mem[i*size:][:size]
			r := &hpdi.Request{Op: hpdi.OpRead, Offset: int64(b) * size, Vec: [][]byte{p[:1024], p[1024:]}}
			if rng.IntN(2) == 0 {
				r.Op = hpdi.OpWrite
				model[b]++
				for j := range p {
					p[j] = model[b]
				}
			} else {
				clear(p)
			}
			reqs, want = append(reqs, r), append(want, model[b])
		}
		must(t, hpdi.Do(q, reqs...))
		for i := range reqs {
			for _, b := range mem[i*size:][:size] {
				if b != want[i] {
					t.Fatalf("block %d holds version %d, not %d", reqs[i].Offset/size, b, want[i])
				}
			}
		}
	}
	must(t, q.Close())
	must(t, d.Close())
	s.mu.Lock()
	defer s.mu.Unlock()
	for b, v := range model {
		for _, x := range s.data[b*size:][:size] {
			if x != v {
				t.Fatalf("block %d holds version %d at the server, not %d", b, x, v)
			}
		}
	}
	if s.conns < 20 {
		t.Errorf("only %d connections", s.conns)
	}
}
