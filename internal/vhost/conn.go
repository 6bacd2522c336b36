package vhost

import (
	"errors"
	"fmt"
	"io"
	"net"

	"golang.org/x/sys/unix"
)

// Message is a message that was received. It is used again for the next one.
type Message struct {
	Request Request
	Flags   uint32
	Payload []byte // valid until the next Receive
	files   []int

	head [HeaderBytes]byte
	body [MaxPayload]byte
	oob  [oobBytes]byte
}

// oobBytes is room for one control message with MaxFiles descriptors. With less room than
// a message needs the kernel closes the rest and says that there was more.
const oobBytes = unix.SizeofCmsghdr + MaxFiles*4

// NeedReply reports whether the sender waits for an answer in any case.
func (m *Message) NeedReply() bool { return m.Flags&FlagNeedReply != 0 }

// Files returns how many descriptors came with the message and were not taken.
func (m *Message) Files() int { return len(m.files) }

// TakeFiles returns the descriptors that came with the message, which are the caller's
// then, as an error unless there are exactly n.
func (m *Message) TakeFiles(n int) ([]int, error) {
	if len(m.files) != n {
		return nil, fmt.Errorf("%v with %d descriptors, it has %d: %w", m.Request, len(m.files), n, ErrProtocol)
	}
	files := m.files
	m.files = nil
	return files, nil
}

// CloseFiles closes the descriptors that nobody has taken.
func (m *Message) CloseFiles() {
	for _, fd := range m.files {
		_ = unix.Close(fd)
	}
	m.files = nil
}

// Conn sends and receives messages over a unix socket. One goroutine may receive while
// another sends.
type Conn struct {
	c *net.UnixConn
}

// NewConn returns the connection over c, which stays the caller's to close.
func NewConn(c *net.UnixConn) *Conn { return &Conn{c: c} }

// Receive waits for a message and puts it into m, whose descriptors from before it closes.
// It returns io.EOF when the other side has closed the connection between two messages.
func (c *Conn) Receive(m *Message) error {
	m.CloseFiles()
	m.Payload = nil
	if err := c.fill(m, m.head[:]); err != nil {
		m.CloseFiles()
		return err
	}
	m.Request, m.Flags = Request(ne.Uint32(m.head[:])), ne.Uint32(m.head[4:])
	size := ne.Uint32(m.head[8:])
	var err error
	switch {
	case m.Flags&spokenMask != spoken:
		err = fmt.Errorf("%v of version %d of the protocol, version %d is spoken here: %w", m.Request, m.Flags&spokenMask, spoken, ErrProtocol)
	case size > MaxPayload:
		err = fmt.Errorf("%v of %d bytes, at most %d are possible: %w", m.Request, size, MaxPayload, ErrProtocol)
	default:
		m.Payload = m.body[:size]
		// Read without room for descriptors, so that the kernel closes those that come here.
		if _, err = io.ReadFull(c.c, m.Payload); err != nil {
			err = fmt.Errorf("%v ends within its %d bytes: %w", m.Request, size, noEOF(err))
		}
	}
	if err != nil {
		m.CloseFiles()
	}
	return err
}

// fill receives the header with the descriptors that come with it.
func (c *Conn) fill(m *Message, b []byte) error {
	for got := 0; got < len(b); {
		n, oobn, flags, _, err := c.c.ReadMsgUnix(b[got:], m.oob[:])
		if e := m.keep(m.oob[:oobn]); e != nil {
			return e
		}
		switch {
		case err == nil && flags&unix.MSG_CTRUNC != 0:
			return fmt.Errorf("a message with more than %d descriptors: %w", MaxFiles, ErrProtocol)
		case err != nil && !errors.Is(err, io.EOF):
			return fmt.Errorf("receive a message: %w", err)
		case n == 0 && got == 0:
			return io.EOF
		case n == 0:
			return fmt.Errorf("a message ends within its header: %w", io.ErrUnexpectedEOF)
		}
		got += n
	}
	return nil
}

// keep adds the descriptors in a control message to those of m.
func (m *Message) keep(oob []byte) error {
	if len(oob) == 0 {
		return nil
	}
	msgs, err := unix.ParseSocketControlMessage(oob)
	if err != nil {
		return fmt.Errorf("control data that came with a message: %w", err)
	}
	for i := range msgs {
		if msgs[i].Header.Level != unix.SOL_SOCKET || msgs[i].Header.Type != unix.SCM_RIGHTS {
			continue
		}
		fds, err := unix.ParseUnixRights(&msgs[i])
		if err != nil {
			return fmt.Errorf("descriptors that came with a message: %w", err)
		}
		m.files = append(m.files, fds...)
	}
	if len(m.files) > MaxFiles {
		return fmt.Errorf("a message with %d descriptors, at most %d are possible: %w", len(m.files), MaxFiles, ErrProtocol)
	}
	return nil
}

func noEOF(err error) error {
	if errors.Is(err, io.EOF) {
		return io.ErrUnexpectedEOF
	}
	return err
}

// Send sends a message with descriptors, which stay the caller's. The flags are FlagReply
// and FlagNeedReply.
func (c *Conn) Send(r Request, flags uint32, payload []byte, files ...int) error {
	if len(payload) > MaxPayload || len(files) > MaxFiles {
		return fmt.Errorf("send %v: %d bytes and %d descriptors, at most %d and %d are possible", r, len(payload), len(files), MaxPayload, MaxFiles)
	}
	b := make([]byte, 0, HeaderBytes+MaxPayload)
	b = ne.AppendUint32(ne.AppendUint32(b, uint32(r)), flags|spoken)
	b = append(ne.AppendUint32(b, uint32(len(payload))), payload...)
	var oob []byte
	if len(files) > 0 {
		oob = unix.UnixRights(files...)
	}
	for len(b) > 0 {
		n, _, err := c.c.WriteMsgUnix(b, oob, nil)
		if err != nil {
			return fmt.Errorf("send %v: %w", r, err)
		}
		b, oob = b[n:], nil // the descriptors went with the first byte
	}
	return nil
}
