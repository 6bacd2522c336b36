package nbd

import (
	"bufio"
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"sync"
	"testing"

	proto "github.com/pollux-storage/pollux/internal/nbdproto"
)

// server is a server in memory, which does what a test tells it to.
type server struct {
	flags        uint16
	noStructured bool
	noGo         bool // knows exports by OptExportName alone
	noStatus     bool
	least, most  uint32

	// asked, if set, is called for each command before it is done, and may write something
	// else than the reply. With done it has, and with an error the connection ends.
	asked func(c *serving, q asked) (done bool, err error)

	mu    sync.Mutex
	data  []byte
	conns int // ever
	live  []net.Conn
}

// asked is a command as it came.
type asked struct {
	flags, kind uint16
	cookie, off uint64
	n           uint32
	payload     []byte
}

// serving is a connection of the server.
type serving struct {
	s    *server
	conn net.Conn
	in   *bufio.Reader
	form bool // structured replies
}

const allFlags = proto.FlagHasFlags | proto.FlagSendFlush | proto.FlagSendFUA | proto.FlagSendTrim | proto.FlagSendZeroes | proto.FlagMultiConn

func newServer(size int) *server { return &server{flags: allFlags, data: make([]byte, size)} }

// dial is for Options.Dial: each connection is a pipe, or a pair of sockets.
func (s *server) dial(pipe bool) func(context.Context, string, string) (net.Conn, error) {
	return func(ctx context.Context, _, _ string) (net.Conn, error) {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		a, b := net.Pipe()
		if !pipe {
			ln, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return nil, err
			}
			defer ln.Close()
			if a, err = net.Dial("tcp", ln.Addr().String()); err != nil {
				return nil, err
			}
			if b, err = ln.Accept(); err != nil {
				return nil, err
			}
		}
		s.mu.Lock()
		s.conns++
		s.live = append(s.live, b)
		s.mu.Unlock()
		go func() {
			defer b.Close()
			c := &serving{s: s, conn: b, in: bufio.NewReader(b)}
			if c.shake() == nil {
				_ = c.serve() // it ended because the client has left, or the test has it so
			}
		}()
		return a, nil
	}
}

// cut ends all connections.
func (s *server) cut() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for _, c := range s.live {
		_ = c.Close()
	}
	s.live = nil
}

func (s *server) open(t testing.TB, o Options) *device {
	t.Helper()
	if o.Dial == nil {
		o.Dial = s.dial(false)
	}
	d, err := Open(t.Context(), "nbd://test/disk", o)
	if err != nil {
		t.Fatal(err)
	}
	return d.(*device)
}

func (c *serving) write(parts ...any) error {
	var b []byte
	for _, p := range parts {
		var err error
		if b, err = binary.Append(b, binary.BigEndian, p); err != nil {
			return err
		}
	}
	_, err := c.conn.Write(b)
	return err
}

func (c *serving) read(into any) error { return binary.Read(c.in, binary.BigEndian, into) }

// shake is the server's side of the handshake.
func (c *serving) shake() error {
	s := c.s
	if err := c.write(uint64(proto.MagicServer), uint64(proto.MagicOption), uint16(proto.FlagFixedNewstyle|proto.FlagNoZeroes)); err != nil {
		return err
	}
	var flags uint32
	if err := c.read(&flags); err != nil {
		return err
	}
	for {
		var h struct {
			Magic    uint64
			Opt, Len uint32
		}
		if err := c.read(&h); err != nil {
			return err
		}
		data := make([]byte, h.Len)
		if _, err := io.ReadFull(c.in, data); err != nil {
			return err
		}
		reply := func(kind uint32, data ...any) error {
			n := uint32(0)
			for _, d := range data {
				n += uint32(binary.Size(d))
			}
			return c.write(append([]any{uint64(proto.MagicOptReply), h.Opt, kind, n}, data...)...)
		}
		var err error
		switch {
		case h.Opt == proto.OptStructured && !s.noStructured:
			c.form = true
			err = reply(proto.RepAck)
		case h.Opt == proto.OptSetContext && !s.noStatus:
			if !bytes.HasSuffix(data, []byte("disk\x00\x00\x00\x01\x00\x00\x00\x0fbase:allocation")) {
				return errors.New("a context was chosen wrongly")
			}
			if err = reply(proto.RepMetaContext, uint32(contextID), []byte(proto.ContextAllocation)); err == nil {
				err = reply(proto.RepAck)
			}
		case h.Opt == proto.OptGo && !s.noGo:
			err = reply(proto.RepInfo, uint16(proto.InfoExport), uint64(len(s.data)), s.flags)
			if err == nil && s.least > 0 {
				err = reply(proto.RepInfo, uint16(proto.InfoBlockSize), s.least, s.least, s.most)
			}
			if err == nil {
				return reply(proto.RepAck)
			}
		case h.Opt == proto.OptExportName:
			return c.write(uint64(len(s.data)), s.flags)
		default:
			err = reply(proto.RepErrUnsup)
		}
		if err != nil {
			return err
		}
	}
}

var errLeft = errors.New("the client has left")

// serve answers commands.
func (c *serving) serve() error {
	for {
		var h struct {
			Magic       uint32
			Flags, Kind uint16
			Cookie, Off uint64
			N           uint32
		}
		if err := c.read(&h); err != nil {
			return err
		}
		q := asked{flags: h.Flags, kind: h.Kind, cookie: h.Cookie, off: h.Off, n: h.N}
		if h.Kind == proto.CmdDisc {
			return errLeft
		}
		if h.Kind == proto.CmdWrite {
			q.payload = make([]byte, h.N)
			if _, err := io.ReadFull(c.in, q.payload); err != nil {
				return err
			}
		}
		if c.s.asked != nil {
			if done, err := c.s.asked(c, q); err != nil {
				return err
			} else if done {
				continue
			}
		}
		if err := c.do(q); err != nil {
			return err
		}
	}
}

// do does a command and answers.
func (c *serving) do(q asked) error {
	c.s.mu.Lock()
	defer c.s.mu.Unlock()
	at := c.s.data[q.off:][:q.n]
	if q.kind == proto.CmdBlockStatus {
		return c.status(q, at)
	}
	switch q.kind {
	case proto.CmdRead:
		if !c.form {
			return c.write(uint32(proto.MagicSimple), uint32(0), q.cookie, at)
		}
		return c.chunk(proto.ChunkDone, proto.ChunkOffsetData, q, q.off, at)
	case proto.CmdWrite:
		copy(at, q.payload)
	case proto.CmdTrim, proto.CmdWriteZeroes:
		clear(at)
	}
	return c.write(uint32(proto.MagicSimple), uint32(0), q.cookie)
}

// contextID is the number of base:allocation.
const contextID = 7

// status tells zeroes from data by the block of 4 KiB, zeroes in blocks of odd numbers as
// allocated.
func (c *serving) status(q asked, at []byte) error {
	parts := []any{uint32(contextID)}
	for from := 0; from < len(at); {
		n := min(4096-int(q.off)%4096, len(at)-from)
		flags := uint32(0)
		if block := at[from:][:n]; bytes.Count(block, []byte{0}) == n {
			flags = proto.StateZero | proto.StateHole
			if (int(q.off)+from)/4096%2 == 1 {
				flags = proto.StateZero
			}
		}
		parts = append(parts, uint32(n), flags)
		if from += n; q.flags&proto.CmdFlagReqOne != 0 {
			break
		}
	}
	return c.chunk(proto.ChunkDone, proto.ChunkBlockStatus, q, parts...)
}

// chunk sends a structured chunk of whatever.
func (c *serving) chunk(flags, kind uint16, q asked, parts ...any) error {
	n := 0
	for _, p := range parts {
		n += binary.Size(p)
	}
	return c.write(append([]any{uint32(proto.MagicStructured), flags, kind, q.cookie, uint32(n)}, parts...)...)
}
