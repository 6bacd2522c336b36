package nbd

import (
	"context"
	"encoding/binary"
	"io"
	"net"
	"runtime"
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/export/nbd/nbdtest"
	"github.com/pollux-storage/pollux/internal/nbdproto"
)

// A client that goes while its connection waits for room leaves nothing behind,
// whatever the request was that waited.
func TestClientGoesWhileWaiting(t *testing.T) {
	hook := func(refused ...nbdtest.Op) func(context.Context, nbdtest.Op, int64, int64) error {
		return func(_ context.Context, op nbdtest.Op, _, _ int64) error {
			if slices.Contains(refused, op) {
				return nbdtest.ErrWouldWait
			}
			return nil
		}
	}
	read := requestBytes(nbdproto.CmdRead, 0, 2, 0, 4096, nil)
	write := requestBytes(nbdproto.CmdWrite, 0, 2, 0, 4096, pattern(1, 4096))
	fua := requestBytes(nbdproto.CmdWrite, nbdproto.CmdFlagFUA, 2, 0, 4096, pattern(1, 4096))
	for name, x := range map[string]struct {
		hook    func(context.Context, nbdtest.Op, int64, int64) error
		request []byte
		written bool
	}{
		"a read":                     {hook(nbdtest.OpTryRead), read, false},
		"a write without memory":     {hook(nbdtest.OpTryRead, nbdtest.OpTryStage), write, false},
		"a write that cannot commit": {hook(nbdtest.OpTryRead, nbdtest.OpTryCommit), write, false},
		"a committed write to flush": {hook(nbdtest.OpTryRead), fua, true},
	} {
		t.Run(name, func(t *testing.T) {
			v := nbdtest.New("v", testSize)
			v.Hook = x.hook
			inBubble(t, v, Limits{Requests: 1}, func(t *testing.T, s *Server, dial func() *client) {
				c := dial().enter("v")
				c.write(requestBytes(nbdproto.CmdRead, 0, 1, 0, 4096, nil)) // its reply is not taken
				synctest.Wait()
				go func() { _, _ = c.nc.Write(x.request) }()
				synctest.Wait()
				if got := s.Connections(); len(got) != 1 || got[0].Requests != 2 || got[0].InFlight != 1 {
					t.Errorf("before: %+v", got)
				}
				c.nc.Close()
				synctest.Wait()
				if n := len(s.Connections()); n != 0 || v.Staged() != 0 {
					t.Errorf("%d connections and %d staged writes are left", n, v.Staged())
				}
				if got := v.Bytes(0, 1)[0] != 0; got != x.written {
					t.Errorf("written: %v", got)
				}
				other := dial().enter("v")
				other.expect(nbdproto.EOK, nbdproto.CmdRead, 0, 0, 512, nil)
			})
		})
	}
}

// A client that asks and asks and takes no answers makes the server hold no more
// than the limit, and gets every answer when it begins to listen.
func TestAnswersThatNobodyTakes(t *testing.T) {
	const limit, n = 1 << 20, 8192
	v := nbdtest.New("v", testSize)
	h := serveVolume(t, v, Limits{Bytes: limit})
	c := h.dialUnix().enter("v")
	c.expect(nbdproto.EOK, nbdproto.CmdWrite, 0, 0, 4096, pattern(1, 4096)) // or the answers are short
	sent := make(chan error, 1)
	go func() {
		var err error
		for i := uint64(1); i <= n && err == nil; i++ {
			_, err = c.nc.Write(requestBytes(nbdproto.CmdRead, 0, i, 0, 4096, nil))
		}
		sent <- err
	}()
	// The server stops taking requests: it has as many as before, and is full.
	for end, full := time.Now().Add(30*time.Second), 0; full < 1000; runtime.Gosched() {
		now := held(h.srv)
		if now > limit {
			full++
		}
		if now > limit+2*batchBytes {
			t.Fatalf("%d bytes are held, the limit is %d", now, limit)
		}
		if time.Now().After(end) {
			t.Fatalf("the flight never fills: %+v", h.srv.Connections())
		}
	}
	for i := uint64(1); i <= n; i++ {
		if r := c.receive(0, 4096, true); r.err != nbdproto.EOK || r.cookie != i || len(r.data) != 4096 {
			t.Fatalf("reply %d is %d, error %d, %d bytes", i, r.cookie, r.err, len(r.data))
		}
	}
	if err := <-sent; err != nil {
		t.Error(err)
	}
}

// held returns how many bytes of replies the only connection holds.
func held(s *Server) int64 {
	s.mu.Lock()
	defer s.mu.Unlock()
	for c := range s.conns {
		a := c.active.Load()
		if a == nil {
			continue
		}
		r := a.out
		r.mu.Lock()
		defer r.mu.Unlock()
		return r.bytes
	}
	return 0
}

// The time that a request has counts from its own beginning, even when it
// follows at once on one that took long.
func TestEachRequestHasItsTime(t *testing.T) {
	inBubble(t, nbdtest.New("v", testSize), Limits{Payload: 20 * time.Second}, func(t *testing.T, s *Server, dial func() *client) {
		c := dial().enter("v")
		for range 3 {
			r := requestBytes(nbdproto.CmdWrite, 0, 7, 0, 8192, pattern(1, 8192))
			c.write(r[:5000])
			time.Sleep(15 * time.Second)
			c.write(r[5000:])
			if r := c.receive(0, 0, false); r.err != nbdproto.EOK {
				t.Fatal(r.err)
			}
		}
		begin := time.Now()
		c.write(requestBytes(nbdproto.CmdRead, 0, 8, 0, 512, nil)[:20])
		c.nc.SetReadDeadline(time.Time{})
		c.expectCut()
		if took := time.Since(begin); took != 20*time.Second {
			t.Errorf("cut after %v", took)
		}
	})
}

// slowLookup is a provider that takes its time.
type slowLookup struct {
	exports
	asked, answer chan struct{}
}

func (l *slowLookup) Lookup(name string) (Export, error) {
	close(l.asked)
	<-l.answer
	return l.exports.Lookup(name)
}

// A connection that gets its export while the server is being shut down ends
// before it takes a request.
func TestShutdownDuringNegotiation(t *testing.T) {
	l := &slowLookup{exports{list: []Export{{Name: "v", Volume: nbdtest.New("v", testSize)}}}, make(chan struct{}), make(chan struct{})}
	h := start(t, Config{Exports: l})
	c := h.dialUnix().hello(nbdproto.FlagFixedNewstyle | nbdproto.FlagNoZeroes)
	c.write(optionBytes(nbdproto.OptGo, goData("v")))
	<-l.asked
	down := make(chan error, 1)
	go func() { down <- h.srv.Shutdown(context.Background()) }()
	for stopped := false; !stopped; runtime.Gosched() {
		h.srv.mu.Lock()
		for c := range h.srv.conns {
			stopped = c.in.isStopped()
		}
		h.srv.mu.Unlock()
	}
	close(l.answer)
	if err := <-down; err != nil {
		t.Error(err)
	}
	if b, err := io.ReadAll(c.nc); err != nil || binary.BigEndian.Uint32(b[len(b)-8:]) != nbdproto.RepAck {
		t.Errorf("the last the client hears is % x, %v", b, err)
	}
}

// A client that dies in the middle of a payload has written nothing, wherever
// the payload was received to, and however the client's system says it.
func TestClientDiesInPayload(t *testing.T) {
	for _, reset := range []bool{false, true} {
		for _, aside := range []bool{false, true} {
			v := nbdtest.New("v", testSize)
			begun := make(chan struct{}, 1)
			v.Hook = func(_ context.Context, op nbdtest.Op, _, _ int64) error {
				if op == nbdtest.OpTryStage {
					begun <- struct{}{}
					if aside {
						return nbdtest.ErrWouldWait
					}
				}
				return nil
			}
			h := serveVolume(t, v, Limits{})
			c := h.dialTCP().enter("v")
			c.write(requestBytes(nbdproto.CmdWrite, 0, 1, 0, 1<<20, pattern(1, 300<<10)))
			<-begun
			if reset {
				if err := c.nc.(*net.TCPConn).SetLinger(0); err != nil {
					t.Fatal(err)
				}
			}
			c.nc.Close()
			other := h.dialTCP().enter("v")
			other.expect(nbdproto.EOK, nbdproto.CmdRead, 0, 0, 512, nil)
			other.nc.Close()
			for len(h.srv.Connections()) > 0 {
				runtime.Gosched()
			}
			if v.Staged() != 0 || v.Bytes(0, 1)[0] != 0 {
				t.Errorf("reset %v, aside %v: half a write left something behind", reset, aside)
			}
		}
	}
}

// An error at the very end of a write is the answer to it.
func TestTryCommitFails(t *testing.T) {
	v := nbdtest.New("v", testSize)
	v.Hook = func(_ context.Context, op nbdtest.Op, _, _ int64) error {
		if op == nbdtest.OpTryCommit {
			return block.ErrNoSpace
		}
		return nil
	}
	c := serveVolume(t, v, Limits{}).dialUnix().enter("v")
	c.expect(nbdproto.ENOSPC, nbdproto.CmdWrite, 0, 0, 4096, pattern(1, 4096))
	if v.Staged() != 0 || v.Bytes(0, 1)[0] != 0 {
		t.Error("the write left something behind")
	}
	c.expect(nbdproto.EOK, nbdproto.CmdRead, 0, 0, 4096, nil)
}
