package nbd

import (
	"crypto/tls"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"

	proto "github.com/pollux-storage/pollux/internal/nbdproto"
)

const (
	maxName  = proto.MaxStringBytes
	maxReply = 64 << 10 // bytes of the reply to an option
	// maxReplies is how many replies to one option are read.
	maxReplies = 64
)

// export is what a server has said of an export.
type export struct {
	size       uint64
	flags      uint16
	structured bool
	status     bool // it tells holes from data, by the context whose number follows
	context    uint32
	least      uint32 // smallest block, 0 if nothing was said
	most       uint32 // largest payload
}

// errProtocol is what a server did that the protocol does not allow.
var errProtocol = errors.New("the server breaks the protocol")

func broken(format string, args ...any) error {
	return fmt.Errorf("%w: %s", errProtocol, fmt.Sprintf(format, args...))
}

// client is the handshake of one connection.
type client struct {
	conn net.Conn
	t    target
	tls  *tls.Config
	exp  export
}

// negotiate chooses the export, and returns the connection to go on with: that of TLS, where
// it was asked for. A deadline of conn bounds how long it takes.
func negotiate(conn net.Conn, t target, config *tls.Config) (net.Conn, export, error) {
	c := &client{conn: conn, t: t, tls: config}
	plain, err := c.greet()
	if err != nil {
		return nil, export{}, err
	}
	if t.tls {
		if err := c.startTLS(); err != nil {
			return nil, export{}, err
		}
	}
	if c.exp.structured, err = c.ask(proto.OptStructured, nil, 0, nil); err != nil {
		return nil, export{}, err
	}
	if c.exp.structured {
		if err := c.askForStatus(); err != nil {
			return nil, export{}, err
		}
	}
	chosen, err := c.choose()
	if err == nil && !chosen {
		err = c.byName(plain)
	}
	if err != nil {
		return nil, export{}, fmt.Errorf("export %q: %w", t.export, err)
	}
	if c.exp.size > 1<<62 {
		return nil, export{}, broken("export %q of %d bytes", t.export, c.exp.size)
	}
	if c.exp.flags&proto.FlagHasFlags == 0 {
		c.exp.flags = 0
	}
	if c.exp.most == 0 {
		c.exp.most = defaultMost
	}
	return c.conn, c.exp, nil
}

// greet exchanges flags, and tells whether the server leaves out zeroes behind its answer to
// OptExportName.
func (c *client) greet() (noZeroes bool, err error) {
	var b [18]byte
	if _, err := io.ReadFull(c.conn, b[:]); err != nil {
		return false, fmt.Errorf("greeting: %w", err)
	}
	if m := binary.BigEndian.Uint64(b[:]); m != proto.MagicServer {
		return false, broken("it greets with %#x", m)
	}
	if m := binary.BigEndian.Uint64(b[8:]); m != proto.MagicOption {
		return false, broken("it speaks an old form of it, %#x", m)
	}
	flags := binary.BigEndian.Uint16(b[16:])
	if flags&proto.FlagFixedNewstyle == 0 {
		return false, broken("it does not know the fixed newstyle handshake")
	}
	flags &= proto.FlagFixedNewstyle | proto.FlagNoZeroes
	_, err = c.conn.Write(binary.BigEndian.AppendUint32(nil, uint32(flags)))
	return flags&proto.FlagNoZeroes != 0, err
}

func (c *client) send(option uint32, data []byte) error {
	b := binary.BigEndian.AppendUint64(nil, proto.MagicOption)
	b = binary.BigEndian.AppendUint32(b, option)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	_, err := c.conn.Write(append(b, data...))
	return err
}

// ask sends an option and reads what the server answers: each piece of information, which
// comes as one kind of reply, goes to info, and ok is false for an option that it does not
// know.
func (c *client) ask(option uint32, data []byte, of uint32, info func(b []byte) error) (ok bool, err error) {
	if err := c.send(option, data); err != nil {
		return false, err
	}
	for range maxReplies {
		kind, b, err := c.reply(option)
		switch {
		case err != nil:
			return false, err
		case kind == proto.RepAck:
			return true, nil
		case kind == proto.RepErrUnsup:
			return false, nil
		case kind == of && info != nil:
			if err := info(b); err != nil {
				return false, err
			}
		case kind>>31 != 0:
			return false, refusal(kind, b)
		default:
			return false, broken("reply %d to option %d", kind, option)
		}
	}
	return false, broken("more than %d replies to option %d", maxReplies, option)
}

// reply reads one reply to an option.
func (c *client) reply(option uint32) (kind uint32, data []byte, err error) {
	var h [20]byte
	if _, err := io.ReadFull(c.conn, h[:]); err != nil {
		return 0, nil, fmt.Errorf("reply to option %d: %w", option, err)
	}
	if m := binary.BigEndian.Uint64(h[:]); m != proto.MagicOptReply {
		return 0, nil, broken("a reply to an option begins with %#x", m)
	}
	if o := binary.BigEndian.Uint32(h[8:]); o != option {
		return 0, nil, broken("a reply to option %d, which was %d", o, option)
	}
	n := binary.BigEndian.Uint32(h[16:])
	if n > maxReply {
		return 0, nil, broken("a reply to option %d of %d bytes", option, n)
	}
	data = make([]byte, n)
	if _, err := io.ReadFull(c.conn, data); err != nil {
		return 0, nil, fmt.Errorf("reply to option %d: %w", option, err)
	}
	return binary.BigEndian.Uint32(h[12:]), data, nil
}

// errDenied is what a server has the right to answer.
var errDenied = errors.New("refused")

// refusal is the error of a reply that is one. The server's own words say most.
func refusal(kind uint32, text []byte) error {
	why := fmt.Sprintf("error %d", kind&^(1<<31))
	switch kind {
	case proto.RepErrPolicy:
		why = "the server's policy forbids it"
	case proto.RepErrTLSReqd:
		why = "the server demands TLS: use nbds://"
	case proto.RepErrUnknown:
		why = "the server has no such export"
	case proto.RepErrShutdown:
		why = "the server shuts down"
	}
	if len(text) > 0 {
		return fmt.Errorf("%w: %s (%.200q)", errDenied, why, text)
	}
	return fmt.Errorf("%w: %s", errDenied, why)
}

func (c *client) startTLS() error {
	ok, err := c.ask(proto.OptStartTLS, nil, 0, nil)
	if err == nil && !ok {
		err = errors.New("the server knows no TLS")
	}
	if err != nil {
		return fmt.Errorf("TLS: %w", err)
	}
	config := c.tls.Clone()
	if config == nil {
		config = &tls.Config{MinVersion: tls.VersionTLS12}
	}
	if config.ServerName == "" {
		config.ServerName = c.t.host
	}
	s := tls.Client(c.conn, config)
	if err := s.Handshake(); err != nil {
		return fmt.Errorf("TLS: %w", err)
	}
	c.conn = s
	return nil
}

// askForStatus chooses the context that tells holes from data. A server that refuses does so
// for reasons that choose hears as well, or has no such context: then there is none.
func (c *client) askForStatus() error {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(c.t.export)))
	b = append(b, c.t.export...)
	b = binary.BigEndian.AppendUint32(b, 1)
	b = binary.BigEndian.AppendUint32(b, uint32(len(proto.ContextAllocation)))
	b = append(b, proto.ContextAllocation...)
	_, err := c.ask(proto.OptSetContext, b, proto.RepMetaContext, func(b []byte) error {
		if len(b) < 4 || string(b[4:]) != proto.ContextAllocation || c.exp.status {
			return broken("context %.80q, where %s was asked for", b, proto.ContextAllocation)
		}
		c.exp.status, c.exp.context = true, binary.BigEndian.Uint32(b)
		return nil
	})
	if errors.Is(err, errDenied) {
		c.exp.status, err = false, nil
	}
	return err
}

// choose asks for the export with OptGo, and reports whether the server knows that.
func (c *client) choose() (bool, error) {
	b := binary.BigEndian.AppendUint32(nil, uint32(len(c.t.export)))
	b = append(b, c.t.export...)
	b = binary.BigEndian.AppendUint16(b, 1)
	b = binary.BigEndian.AppendUint16(b, proto.InfoBlockSize)
	told := false
	ok, err := c.ask(proto.OptGo, b, proto.RepInfo, func(b []byte) error {
		if len(b) < 2 {
			return broken("information of %d bytes", len(b))
		}
		switch kind := binary.BigEndian.Uint16(b); kind {
		case proto.InfoExport:
			if len(b) != 12 {
				return broken("information about the export of %d bytes", len(b))
			}
			told = true
			c.exp.size, c.exp.flags = binary.BigEndian.Uint64(b[2:]), binary.BigEndian.Uint16(b[10:])
		case proto.InfoBlockSize:
			if len(b) != 14 {
				return broken("information about block sizes of %d bytes", len(b))
			}
			c.exp.least, c.exp.most = binary.BigEndian.Uint32(b[2:]), binary.BigEndian.Uint32(b[10:])
			if l := c.exp.least; l == 0 || l&(l-1) != 0 || l > 64<<10 || c.exp.most < l || c.exp.most != ^uint32(0) && c.exp.most%l != 0 {
				return broken("blocks from %d to %d bytes", l, c.exp.most)
			}
		}
		return nil
	})
	if err == nil && ok && !told {
		err = broken("it does not tell the size")
	}
	return ok, err
}

// byName asks for the export as servers know it that do not know OptGo. One that refuses
// ends the connection.
func (c *client) byName(noZeroes bool) error {
	if err := c.send(proto.OptExportName, []byte(c.t.export)); err != nil {
		return err
	}
	b := make([]byte, 10, 134)
	if !noZeroes {
		b = b[:134]
	}
	if _, err := io.ReadFull(c.conn, b); err != nil {
		return fmt.Errorf("the server knows no such export, or the connection has ended: %w", err)
	}
	c.exp.size, c.exp.flags = binary.BigEndian.Uint64(b), binary.BigEndian.Uint16(b[8:])
	return nil
}
