package nbd

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	proto "github.com/pollux-storage/pollux/internal/nbdproto"
)

// source is what comes from a server. Of a header it never takes more than that, so that
// payload is still in the socket when it is known where it belongs.
type source struct {
	l          *link
	conn       net.Conn
	raw        syscall.RawConn // nil where the connection has no descriptor
	structured bool
	context    uint32 // of base:allocation
	head       [proto.DataChunkSize]byte
	have       int // bytes of head
	vec        [][]byte
	text       []byte    // memory for what is read whole
	waste      [1][]byte // for payload that nobody waits for any more

	// Of a call of raw.Read, whose function is made once.
	got     int
	err     error
	scatter func(fd uintptr) bool
}

func newSource(l *link, conn net.Conn, exp export) *source {
	s := &source{l: l, conn: conn, structured: exp.structured, context: exp.context}
	if c, ok := conn.(syscall.Conn); ok {
		s.raw, _ = c.SyscallConn() // without it payload is read piece by piece
	}
	s.scatter = func(fd uintptr) bool {
		s.got, s.err = unix.Readv(int(fd), s.vec)
		return s.err != unix.EAGAIN
	}
	return s
}

// mostVectors is how many vectors one system call fills.
const mostVectors = 256

// read fills vec in part: at least one byte, or none when what is read may have been given
// up.
func (s *source) read() (int, error) {
	n, err := s.readSome()
	if errors.Is(err, os.ErrDeadlineExceeded) {
		s.l.nudged()
		err = nil
	}
	return n, err
}

func (s *source) readSome() (int, error) {
	if s.raw == nil {
		return io.ReadAtLeast(s.conn, s.vec[0], 1)
	}
	for {
		if err := s.raw.Read(s.scatter); err != nil {
			return 0, err
		}
		switch {
		case s.err == unix.EINTR:
		case s.err != nil:
			return 0, s.err
		case s.got == 0:
			return 0, io.EOF
		default:
			return s.got, nil
		}
	}
}

// room is how much of head may be read ahead: no more than the shortest header that payload
// follows.
func (s *source) room() int {
	if s.structured {
		return proto.DataChunkSize
	}
	return proto.SimpleSize
}

// need makes the first n bytes of head be there.
func (s *source) need(n int) error {
	for s.have < n {
		s.vec = append(s.vec[:0], s.head[s.have:s.room()])
		k, err := s.read()
		if err != nil {
			if s.have > 0 && errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		s.have += k
	}
	return nil
}

// drop takes the first n bytes off head.
func (s *source) drop(n int) {
	copy(s.head[:], s.head[n:s.have])
	s.have -= n
}

// mostWaste is how much is thrown away at once.
const mostWaste = 64 << 10

// payload reads n bytes into a command's memory from a byte of it on, and of what follows as
// much as need would. Of one that was given up, meanwhile perhaps, it reads them to nowhere.
func (s *source) payload(c *command, at, n int64) error {
	mem := c.vec
	for n > 0 {
		if c.op == nil {
			if s.waste[0] == nil {
				s.waste[0] = make([]byte, mostWaste)
			}
			mem, at = s.waste[:], 0
		}
		for at >= int64(len(mem[0])) {
			at -= int64(len(mem[0]))
			mem = mem[1:]
		}
		if s.have > 0 { // a server that answers in a form that was not agreed on
			k := copy(mem[0][at:], s.head[:min(int64(s.have), n)])
			s.drop(k)
			at, n = at+int64(k), n-int64(k)
			continue
		}
		s.vec = s.vec[:0]
		room := n
		for i, skip := 0, at; i < len(mem) && room > 0 && len(s.vec) < mostVectors; i, skip = i+1, 0 {
			v := mem[i][skip:]
			v = v[:min(int64(len(v)), room)]
			if room -= int64(len(v)); len(v) > 0 {
				s.vec = append(s.vec, v)
			}
		}
		if room == 0 && s.raw != nil {
			s.vec = append(s.vec, s.head[:s.room()])
		}
		k, err := s.read()
		clear(s.vec)
		if err != nil {
			if errors.Is(err, io.EOF) {
				err = io.ErrUnexpectedEOF
			}
			return err
		}
		if int64(k) > n {
			s.have, k = k-int(n), int(n)
		}
		at, n = at+int64(k), n-int64(k)
	}
	return nil
}

// small reads n bytes that are no payload; they are valid until the next call.
func (s *source) small(n int) ([]byte, error) {
	if cap(s.text) < n {
		s.text = make([]byte, n)
	}
	s.text = s.text[:n]
	k := copy(s.text, s.head[:min(s.have, n)])
	s.drop(k)
	for k < n {
		s.vec = append(s.vec[:0], s.text[k:])
		m, err := s.read()
		if err != nil {
			return nil, err
		}
		k += m
	}
	return s.text, nil
}

// replies reads replies until the connection ends, and says why it has.
func (s *source) replies() error {
	l := s.l
	for {
		if err := s.need(proto.SimpleSize); err != nil {
			return err
		}
		var err error
		switch m := binary.BigEndian.Uint32(s.head[:]); {
		case m == proto.MagicSimple:
			err = s.simple(l)
		case m == proto.MagicStructured && s.structured:
			err = s.chunk(l)
		default:
			err = broken("a reply begins with %#x", m)
		}
		if err != nil {
			return err
		}
		l.pause()
	}
}

// simple reads a reply of the simple form.
func (s *source) simple(l *link) error {
	e, cookie := binary.BigEndian.Uint32(s.head[4:]), binary.BigEndian.Uint64(s.head[8:])
	s.drop(proto.SimpleSize)
	c, err := l.find(cookie)
	if err != nil {
		return err
	}
	if c.kind == proto.CmdRead && s.structured || c.kind == proto.CmdBlockStatus {
		return broken("a simple reply to a read or block status")
	}
	if e != 0 {
		if err := l.refused(c, e, nil); err != nil {
			return err
		}
	} else if c.kind == proto.CmdRead {
		if err := s.payload(c, 0, c.n); err != nil {
			return err
		}
	}
	l.finish(c)
	return nil
}

// mostText is how long a chunk may be that has no payload.
const mostText = 16 + proto.MaxStringBytes

// chunk reads a chunk of a structured reply.
func (s *source) chunk(l *link) error {
	if err := s.need(proto.ChunkSize); err != nil {
		return err
	}
	flags, kind := binary.BigEndian.Uint16(s.head[4:]), binary.BigEndian.Uint16(s.head[6:])
	cookie, n := binary.BigEndian.Uint64(s.head[8:]), binary.BigEndian.Uint32(s.head[16:])
	c, err := l.find(cookie)
	if err != nil {
		return err
	}
	switch {
	case kind == proto.ChunkOffsetData && c.kind == proto.CmdRead && n > 8:
		err = s.data(c, int64(n)-8)
	case kind == proto.ChunkOffsetHole && c.kind == proto.CmdRead && n == 12:
		err = s.hole(c)
	case kind == proto.ChunkBlockStatus && c.kind == proto.CmdBlockStatus && n >= 12 && n%8 == 4:
		err = s.status(c, int64(n))
	case kind == proto.ChunkNone && n == 0 && flags&proto.ChunkDone != 0:
		s.drop(proto.ChunkSize)
	case kind>>15 != 0 && n >= 6 && n <= mostText:
		err = s.failure(l, c, int(n))
	default:
		err = broken("a chunk of kind %d, flags %#x and %d bytes in the reply to command %d", kind, flags, n, c.kind)
	}
	if err != nil || flags&proto.ChunkDone == 0 {
		return err
	}
	if c.kind == proto.CmdRead && c.err == nil && c.got != c.n {
		return broken("%d of %d bytes in the reply to a read", c.got, c.n)
	}
	if c.kind == proto.CmdBlockStatus && c.err == nil && c.got == 0 {
		return broken("no extent in the reply to a block status")
	}
	l.finish(c)
	return nil
}

// inside returns where n bytes from an offset of the export on are in what a read asked for.
func (c *command) inside(off uint64, n int64) (int64, error) {
	at := int64(off) - c.off
	if off > 1<<62 || at < 0 || n > c.n-at || n > c.n-c.got {
		return 0, broken("%d bytes at %d in the reply to a read of %d at %d, of which %d had come", n, off, c.n, c.off, c.got)
	}
	return at, nil
}

func (s *source) data(c *command, n int64) error {
	if err := s.need(proto.DataChunkSize); err != nil {
		return err
	}
	at, err := c.inside(binary.BigEndian.Uint64(s.head[proto.ChunkSize:]), n)
	if err != nil {
		return err
	}
	s.drop(proto.DataChunkSize)
	c.got += n
	return s.payload(c, at, n)
}

func (s *source) hole(c *command) error {
	s.drop(proto.ChunkSize)
	b, err := s.small(12)
	if err != nil {
		return err
	}
	n := int64(binary.BigEndian.Uint32(b[8:]))
	at, err := c.inside(binary.BigEndian.Uint64(b), n)
	if err != nil {
		return err
	}
	c.got += n
	for _, v := range c.vec {
		if k := min(int64(len(v))-at, n); k > 0 {
			clear(v[at:][:k])
			n -= k
			at = 0
		} else {
			at = max(0, at-int64(len(v)))
		}
	}
	return nil
}

// failure reads a chunk that says that the command has failed.
func (s *source) failure(l *link, c *command, n int) error {
	s.drop(proto.ChunkSize)
	b, err := s.small(n)
	if err != nil {
		return err
	}
	e, k := binary.BigEndian.Uint32(b), int(binary.BigEndian.Uint16(b[4:]))
	if e == 0 || k > n-6 {
		return broken("an error %d with a text of %d bytes in %d", e, k, n)
	}
	return l.refused(c, e, b[6:][:k])
}

// refused notes that the server has refused a command, unless that is better asked of the
// next connection: then it returns why this one ends.
func (l *link) refused(c *command, e uint32, text []byte) error {
	err := error(syscall.EINVAL) // what one is to take an unknown number for
	switch proto.Errno(e) {
	case proto.EPERM, proto.EIO, proto.ENOMEM, proto.ENOSPC, proto.EOVERFLOW:
		err = hpdi.Errno(syscall.Errno(e))
	case proto.ENOTSUP:
		err = hpdi.ErrUnsupported
	case proto.ESHUTDOWN:
		if l.d.o.Reconnect > 0 {
			return errors.New("the server shuts down")
		}
		err = hpdi.Errno(syscall.ESHUTDOWN)
	}
	if c.err != nil {
		return nil // the first counts
	}
	if c.err = fmt.Errorf("%s: the server refused it: %w", l.d.uri, err); len(text) > 0 {
		c.err = fmt.Errorf("%s: the server refused it (%.200q): %w", l.d.uri, text, err)
	}
	return nil
}
