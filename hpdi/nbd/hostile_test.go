package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	proto "github.com/pollux-storage/pollux/internal/nbdproto"
)

// Whatever a server answers, the connection ends with an error that says what it was, and
// nothing is written beside the vectors.
func TestHostileReplies(t *testing.T) {
	const at, n = 8192, 4096
	for name, reply := range map[string]func(c *serving, q asked) error{
		"another magic":  func(c *serving, q asked) error { return c.write(uint32(1), make([]byte, 12)) },
		"another cookie": func(c *serving, q asked) error { return c.write(uint32(proto.MagicSimple), uint32(0), q.cookie+1) },
		"cookie 0":       func(c *serving, q asked) error { return c.write(uint32(proto.MagicSimple), uint32(0), uint64(0)) },
		"a simple reply to a read": func(c *serving, q asked) error {
			return c.write(uint32(proto.MagicSimple), uint32(0), q.cookie, make([]byte, n))
		},
		"before": func(c *serving, q asked) error {
			return c.chunk(1, proto.ChunkOffsetData, q, uint64(at-1), make([]byte, n))
		},
		"behind": func(c *serving, q asked) error {
			return c.chunk(1, proto.ChunkOffsetData, q, uint64(at+1), make([]byte, n))
		},
		"far away": func(c *serving, q asked) error {
			return c.chunk(1, proto.ChunkOffsetData, q, ^uint64(0)-7, make([]byte, 8))
		},
		"too much": func(c *serving, q asked) error {
			return c.chunk(1, proto.ChunkOffsetData, q, uint64(at), make([]byte, n+1))
		},
		"too little": func(c *serving, q asked) error {
			return c.chunk(1, proto.ChunkOffsetData, q, uint64(at), make([]byte, n-1))
		},
		"nothing": func(c *serving, q asked) error { return c.chunk(1, proto.ChunkOffsetData, q, uint64(at)) },
		"twice": func(c *serving, q asked) error {
			return errors.Join(c.chunk(0, proto.ChunkOffsetData, q, uint64(at), make([]byte, n)), c.chunk(1, proto.ChunkOffsetData, q, uint64(at), make([]byte, n)))
		},
		"done at once":     func(c *serving, q asked) error { return c.chunk(1, proto.ChunkNone, q) },
		"none, not done":   func(c *serving, q asked) error { return c.chunk(0, proto.ChunkNone, q) },
		"none with data":   func(c *serving, q asked) error { return c.chunk(1, proto.ChunkNone, q, uint64(1)) },
		"a hole before":    func(c *serving, q asked) error { return c.chunk(1, proto.ChunkOffsetHole, q, uint64(0), uint32(n)) },
		"a hole too large": func(c *serving, q asked) error { return c.chunk(1, proto.ChunkOffsetHole, q, uint64(at), ^uint32(0)) },
		"a hole too long": func(c *serving, q asked) error {
			return c.chunk(1, proto.ChunkOffsetHole, q, uint64(at), uint32(n), uint32(0))
		},
		"block status": func(c *serving, q asked) error {
			return c.chunk(1, proto.ChunkBlockStatus, q, uint32(1), uint32(1), uint32(1))
		},
		"an unknown chunk":   func(c *serving, q asked) error { return c.chunk(1, 77, q, uint64(1)) },
		"an error of 0":      func(c *serving, q asked) error { return c.chunk(1, proto.ChunkError, q, uint32(0), uint16(0)) },
		"an error cut short": func(c *serving, q asked) error { return c.chunk(1, proto.ChunkError, q, uint32(5)) },
		"an error with a text": func(c *serving, q asked) error {
			return c.chunk(1, proto.ChunkError, q, uint32(5), uint16(9), []byte("x"))
		},
		"an error too long": func(c *serving, q asked) error {
			return c.chunk(1, proto.ChunkError, q, uint32(5), uint16(9), make([]byte, 5000))
		},
		"the end": func(c *serving, q asked) error { return errLeft },
		"half a header": func(c *serving, q asked) error {
			return errors.Join(c.write(uint32(proto.MagicStructured), uint32(1)), errLeft)
		},
	} {
		s := newServer(1 << 20)
		s.asked = func(c *serving, q asked) (bool, error) {
			if err := reply(c, q); err != nil {
				return true, err
			}
			_, err := c.in.Peek(1) // until the client has left
			return true, err
		}
		d := s.open(t, Options{})
		q, err := d.NewQueue(1)
		must(t, err)
		mem := bytes.Repeat([]byte{7}, 3*n)
		err = hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Offset: at, Vec: [][]byte{mem[n : n+512], mem[n+512 : 2*n]}}, &hpdi.Request{Op: hpdi.OpFlush})
		if err == nil || !strings.Contains(err.Error(), "nbd://test/disk") {
			t.Errorf("%s: %v", name, err)
		}
		if _, said := map[string]bool{"the end": true, "half a header": true, "an error with a text": true}[name]; !said && !errors.Is(err, errProtocol) {
			t.Errorf("%s: %v", name, err)
		}
		if bytes.Count(mem[:n], []byte{7}) != n || bytes.Count(mem[2*n:], []byte{7}) != n {
			t.Errorf("%s: it has written beside the vectors", name)
		}
		must(t, q.Close())
		must(t, d.Close())
	}
}

// An error that comes in a chunk is the request's, with what the server says about it.
func TestErrorText(t *testing.T) {
	s := newServer(1 << 20)
	s.asked = func(c *serving, q asked) (bool, error) {
		if q.kind == proto.CmdRead {
			return true, errors.Join(c.chunk(0, proto.ChunkOffsetData, q, q.off, make([]byte, 1024)),
				c.chunk(0, proto.ChunkError+1, q, uint32(proto.EIO), uint16(6), []byte("rotten"), q.off+1024), c.chunk(proto.ChunkDone, proto.ChunkNone, q))
		}
		return true, c.chunk(proto.ChunkDone, proto.ChunkError, q, uint32(proto.ENOTSUP), uint16(0))
	}
	d := s.open(t, Options{})
	q, err := d.NewQueue(1)
	must(t, err)
	if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{make([]byte, 4096)}}); err == nil || !strings.Contains(err.Error(), "rotten") {
		t.Error(err)
	}
	if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpDiscard, Length: 4096}); !errors.Is(err, hpdi.ErrUnsupported) {
		t.Error(err)
	}
	must(t, q.Close())
	must(t, d.Close())
}

// greeting is what a server says first.
func greeting() []byte {
	b := binary.BigEndian.AppendUint64(nil, proto.MagicServer)
	b = binary.BigEndian.AppendUint64(b, proto.MagicOption)
	return binary.BigEndian.AppendUint16(b, proto.FlagFixedNewstyle|proto.FlagNoZeroes)
}

func answer(opt, kind uint32, data []byte) []byte {
	b := binary.BigEndian.AppendUint64(nil, proto.MagicOptReply)
	b = binary.BigEndian.AppendUint32(b, opt)
	b = binary.BigEndian.AppendUint32(b, kind)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	return append(b, data...)
}

func about(size uint64, flags uint16) []byte {
	b := binary.BigEndian.AppendUint16(nil, proto.InfoExport)
	b = binary.BigEndian.AppendUint64(b, size)
	return binary.BigEndian.AppendUint16(b, flags)
}

// said is a server that says something, whatever it is told.
func said(b []byte) func(context.Context, string, string) (net.Conn, error) {
	return func(context.Context, string, string) (net.Conn, error) {
		mine, other := net.Pipe()
		go func() { _, _ = io.Copy(io.Discard, other) }() // it ends with the client
		go func() {
			_, _ = other.Write(b)
			_ = other.Close()
		}()
		return mine, nil
	}
}

// A handshake that goes wrong is an error that says how.
func TestHostileHandshake(t *testing.T) {
	ok := append(append(greeting(), answer(proto.OptStructured, proto.RepAck, nil)...), answer(proto.OptSetContext, proto.RepErrUnsup, nil)...)
	join := func(parts ...[]byte) []byte { return bytes.Join(append([][]byte{ok}, parts...), nil) }
	sizes := func(least, most uint32) []byte {
		b := binary.BigEndian.AppendUint16(nil, proto.InfoBlockSize)
		for _, v := range []uint32{least, least, most} {
			b = binary.BigEndian.AppendUint32(b, v)
		}
		return answer(proto.OptGo, proto.RepInfo, b)
	}
	ack := answer(proto.OptGo, proto.RepAck, nil)
	info := answer(proto.OptGo, proto.RepInfo, about(1<<20, 1))
	context := func(replies ...[]byte) []byte {
		return bytes.Join(append([][]byte{greeting(), answer(proto.OptStructured, proto.RepAck, nil)}, replies...), nil)
	}
	meta := answer(proto.OptSetContext, proto.RepMetaContext, append([]byte{0, 0, 0, 1}, proto.ContextAllocation...))
	for name, x := range map[string]struct {
		said []byte
		want string
	}{
		"another context":      {context(answer(proto.OptSetContext, proto.RepMetaContext, []byte("\x00\x00\x00\x01qemu:x"))), "base:allocation was asked for"},
		"no context number":    {context(answer(proto.OptSetContext, proto.RepMetaContext, []byte("\x00"))), "base:allocation was asked for"},
		"a context twice":      {context(meta, meta), "base:allocation was asked for"},
		"contexts, then a cut": {context(meta), "option 10"},
		"nothing":              {nil, "greeting"},
		"another protocol":     {[]byte("HTTP/1.1 400 Bad Request\r\n"), "greets with"},
		"the old style":        {append(greeting()[:8], make([]byte, 10)...), "old form"},
		"no fixed newstyle":    {append(greeting()[:16], 0, 0), "fixed newstyle"},
		"another reply":        {append(greeting(), make([]byte, 20)...), "begins with"},
		"another option":       {append(greeting(), answer(77, proto.RepAck, nil)...), "option 77"},
		"a huge reply":         {append(greeting(), answer(proto.OptStructured, proto.RepAck, make([]byte, 70000))...), "70000 bytes"},
		"unknown":              {join(answer(proto.OptGo, proto.RepErrUnknown, []byte("none such"))), "none such"},
		"policy":               {join(answer(proto.OptGo, proto.RepErrPolicy, nil)), "policy"},
		"TLS":                  {join(answer(proto.OptGo, proto.RepErrTLSReqd, nil)), "nbds://"},
		"shutdown":             {join(answer(proto.OptGo, proto.RepErrShutdown, nil)), "shuts down"},
		"no size":              {join(ack), "size"},
		"too large":            {join(answer(proto.OptGo, proto.RepInfo, about(1<<63, 1)), ack), "bytes"},
		"a short info":         {join(answer(proto.OptGo, proto.RepInfo, []byte{0})), "1 bytes"},
		"a wrong info":         {join(answer(proto.OptGo, proto.RepInfo, about(1, 1)[:11])), "11 bytes"},
		"blocks of 0":          {join(info, sizes(0, 4096), ack), "blocks from 0"},
		"blocks of 3":          {join(info, sizes(3, 4096), ack), "blocks from 3"},
		"too small payloads":   {join(info, sizes(1, 100), ack), "less than a block"},
		"payloads below block": {join(info, sizes(4096, 512), ack), "blocks from 4096"},
		"replies without end":  {join(bytes.Repeat(info, maxReplies+1)), "more than"},
		"cut":                  {join(info), "option 7"},
	} {
		d, err := Open(t.Context(), "nbd://test/disk", Options{Dial: said(x.said)})
		if err == nil {
			t.Errorf("%s: it is open", name)
			must(t, d.Close())
		} else if !strings.Contains(err.Error(), x.want) || !strings.Contains(err.Error(), "nbd://test/disk") {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// A server that says nothing is waited for as long as a handshake may take, or the caller
// wants.
func TestSilence(t *testing.T) {
	silent := func(context.Context, string, string) (net.Conn, error) {
		mine, other := net.Pipe()
		go func() { _, _ = io.Copy(io.Discard, other) }()
		return mine, nil
	}
	if _, err := Open(t.Context(), "nbd://test/disk", Options{Dial: silent, Handshake: time.Millisecond}); !errors.Is(err, context.DeadlineExceeded) {
		t.Error(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := Open(ctx, "nbd://test/disk", Options{Dial: silent}); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

// FuzzHandshake: whatever a server says to begin with.
func FuzzHandshake(f *testing.F) {
	f.Add(append(append(greeting(), answer(proto.OptStructured, proto.RepAck, nil)...), append(answer(proto.OptGo, proto.RepInfo, about(1<<20, allFlags)), answer(proto.OptGo, proto.RepAck, nil)...)...))
	f.Add(append(append(greeting(), answer(proto.OptStructured, proto.RepErrUnsup, nil)...), append(answer(proto.OptGo, proto.RepErrUnsup, nil), make([]byte, 10)...)...))
	f.Add(greeting())
	f.Add(bytes.Join([][]byte{greeting(), answer(proto.OptStructured, proto.RepAck, nil), answer(proto.OptSetContext, proto.RepMetaContext, append([]byte{0, 0, 0, 9}, proto.ContextAllocation...)), answer(proto.OptSetContext, proto.RepAck, nil), answer(proto.OptGo, proto.RepInfo, about(1<<20, allFlags)), answer(proto.OptGo, proto.RepAck, nil)}, nil))
	f.Add(bytes.Join([][]byte{greeting(), answer(proto.OptStructured, proto.RepAck, nil), answer(proto.OptSetContext, proto.RepErrPolicy, nil), answer(proto.OptGo, proto.RepInfo, about(1<<20, allFlags)), answer(proto.OptGo, proto.RepAck, nil)}, nil))
	f.Fuzz(func(t *testing.T, b []byte) {
		d, err := Open(t.Context(), "nbd://test/disk", Options{Dial: said(b), Connections: 2})
		if err != nil {
			return
		}
		if i := d.Info(); i.Size < 0 || i.BlockSize < minBlock || i.Size%int64(i.BlockSize) != 0 {
			t.Errorf("%+v", i)
		}
		must(t, d.Close())
	})
}

// FuzzReplies: whatever a server sends while requests are under way. Each of them completes,
// and nothing beside their memory changes.
func FuzzReplies(f *testing.F) {
	record := func(reply func(c *serving) error) []byte {
		mine, other := net.Pipe()
		got := make(chan []byte)
		go func() {
			b, _ := io.ReadAll(mine)
			got <- b
		}()
		_ = reply(&serving{conn: other})
		_ = other.Close()
		return <-got
	}
	q := asked{cookie: 1, off: 4096, n: 4096}
	f.Add(true, true, record(func(c *serving) error {
		s := asked{cookie: 4}
		return errors.Join(c.chunk(0, proto.ChunkOffsetData, q, uint64(4096), make([]byte, 100)), c.chunk(0, proto.ChunkBlockStatus, s, uint32(0), []uint32{100, 3, 924, 0, 3072, 3}),
			c.chunk(1, proto.ChunkNone, s), c.chunk(1, proto.ChunkOffsetHole, q, uint64(4196), uint32(3996)))
	}))
	f.Add(false, true, record(func(c *serving) error {
		return errors.Join(c.chunk(0, proto.ChunkOffsetData, q, uint64(4096), make([]byte, 100)), c.chunk(1, proto.ChunkOffsetHole, q, uint64(4196), uint32(3996)))
	}))
	f.Add(false, true, record(func(c *serving) error {
		return errors.Join(c.chunk(1, proto.ChunkError, q, uint32(5), uint16(3), []byte("bad")), c.write(uint32(proto.MagicSimple), uint32(0), uint64(2)))
	}))
	f.Add(false, false, record(func(c *serving) error {
		return errors.Join(c.write(uint32(proto.MagicSimple), uint32(28), uint64(2)), c.write(uint32(proto.MagicSimple), uint32(0), uint64(1), make([]byte, 4096)))
	}))
	f.Fuzz(func(t *testing.T, cancel, structured bool, b []byte) {
		d := &device{uri: "nbd://test/disk", most: defaultMost, exp: export{flags: allFlags, structured: structured}}
		d.info = hpdi.Info{Name: d.uri, Driver: "nbd", Size: 1 << 20, BlockSize: minBlock, Discard: true, Status: true}
		mine, other := net.Pipe()
		go func() { _, _ = io.Copy(io.Discard, other) }()
		l := newLink(d, mine)
		d.links = []*link{l}
		l.open(mine)
		opened, err := d.NewQueue(4)
		must(t, err)
		mem := bytes.Repeat([]byte{7}, 3*4096)
		told := make([]hpdi.Extent, 3)
		reqs := []*hpdi.Request{{Op: hpdi.OpRead, Offset: 4096, Vec: [][]byte{mem[4096:4608], mem[4608:4608], mem[4608:8192]}},
			{Op: hpdi.OpWrite, Offset: 0, Vec: [][]byte{mem[:4096]}}, {Op: hpdi.OpDiscard, Length: 4096}, {Op: hpdi.OpStatus, Length: 4096, Extents: told[:0:2]}}
		must(t, opened.Submit(reqs...))
		from := 4096
		if half := len(b) / 2; cancel {
			_, _ = other.Write(b[:half])
			b = b[half:]
			opened.Cancel(reqs...)
		}
		done, err := opened.Wait(0, nil)
		must(t, err)
		if slices.Contains(done, reqs[0]) {
			from = 8192 // what is in its memory stays as it is
			for i := range mem[4096:8192] {
				mem[4096+i] = 7
			}
		}
		_, _ = other.Write(b)
		_ = other.Close()
		if done, err = opened.Wait(4-len(done), done); err != nil || len(done) != 4 {
			t.Fatalf("%d requests are complete, %v", len(done), err)
		}
		if from == 8192 && bytes.Count(mem[4096:8192], []byte{7}) != 4096 {
			t.Fatal("it has written to memory that was given back")
		}
		var n int64
		for _, e := range reqs[3].Extents {
			if n += e.Length; e.Length <= 0 || e.Length%minBlock != 0 || n > 4096 {
				t.Fatalf("extents %v", reqs[3].Extents)
			}
		}
		if told[2] != (hpdi.Extent{}) {
			t.Fatal("it has told more than there was place for")
		}
		if bytes.Count(mem[:4096], []byte{7}) != 4096 || bytes.Count(mem[8192:], []byte{7}) != 4096 {
			t.Fatal("it has written beside the vectors")
		}
		must(t, opened.Close())
		must(t, d.Close())
	})
}
