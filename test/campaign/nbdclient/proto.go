package nbdclient

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"github.com/pollux-storage/pollux/internal/nbdproto"
)

const (
	repErr        = 1 << 31 // the bit that errors have
	chunkErrorBit = 1 << 15

	maxReply = 64 << 20 // of one chunk or option reply
)

// Errno is an error that the server answered a request with.
type Errno uint32

// The error numbers that tests ask for by name.
const (
	EIO       Errno = 5
	EINVAL    Errno = 22
	ENOSPC    Errno = 28
	ESHUTDOWN Errno = 108
)

// Error names the number.
func (e Errno) Error() string {
	switch e {
	case EIO:
		return "NBD error EIO"
	case EINVAL:
		return "NBD error EINVAL"
	case ENOSPC:
		return "NBD error ENOSPC"
	case ESHUTDOWN:
		return "NBD error ESHUTDOWN"
	}
	return fmt.Sprintf("NBD error %d", uint32(e))
}

// RefusedError is a server's refusal of an export in the negotiation.
type RefusedError struct {
	Reply uint32
	Text  string
}

// Error shows the server's own words.
func (e *RefusedError) Error() string {
	return fmt.Sprintf("the server refuses the export (reply %#x): %s", e.Reply, e.Text)
}

// errProtocol is what a server must never send.
var errProtocol = errors.New("the server breaks the NBD protocol")

// negotiate goes through the handshake up to the transmission phase and
// returns the size and the transmission flags of the export.
func negotiate(w io.Writer, r *bufio.Reader, export string, structured bool) (size int64, flags uint16, err error) {
	var hello [18]byte
	if _, err := io.ReadFull(r, hello[:]); err != nil {
		return 0, 0, err
	}
	be := binary.BigEndian
	if be.Uint64(hello[:]) != nbdproto.MagicServer || be.Uint64(hello[8:]) != nbdproto.MagicOption {
		return 0, 0, fmt.Errorf("%w: greeting % x", errProtocol, hello)
	}
	if be.Uint16(hello[16:])&nbdproto.FlagFixedNewstyle == 0 {
		return 0, 0, fmt.Errorf("%w: no fixed newstyle", errProtocol)
	}
	if _, err := w.Write(be.AppendUint32(nil, nbdproto.FlagFixedNewstyle|nbdproto.FlagNoZeroes)); err != nil {
		return 0, 0, err
	}
	if structured {
		if err := option(w, nbdproto.OptStructured, nil); err != nil {
			return 0, 0, err
		}
		if kind, data, err := optionReply(r, nbdproto.OptStructured); err != nil {
			return 0, 0, err
		} else if kind != nbdproto.RepAck {
			return 0, 0, &RefusedError{kind, string(data)}
		}
	}
	data := be.AppendUint32(nil, uint32(len(export)))
	data = append(data, export...)
	data = be.AppendUint16(data, 0)
	if err := option(w, nbdproto.OptGo, data); err != nil {
		return 0, 0, err
	}
	for {
		kind, data, err := optionReply(r, nbdproto.OptGo)
		switch {
		case err != nil:
			return 0, 0, err
		case kind == nbdproto.RepAck && flags != 0:
			return size, flags, nil
		case kind == nbdproto.RepInfo && len(data) >= 12 && be.Uint16(data) == nbdproto.InfoExport:
			size, flags = int64(be.Uint64(data[2:])), be.Uint16(data[10:])
		case kind == nbdproto.RepInfo:
		case kind&repErr != 0:
			return 0, 0, &RefusedError{kind, string(data)}
		default:
			return 0, 0, fmt.Errorf("%w: reply %#x to GO", errProtocol, kind)
		}
	}
}

func option(w io.Writer, opt uint32, data []byte) error {
	b := binary.BigEndian.AppendUint64(nil, nbdproto.MagicOption)
	b = binary.BigEndian.AppendUint32(b, opt)
	b = binary.BigEndian.AppendUint32(b, uint32(len(data)))
	_, err := w.Write(append(b, data...))
	return err
}

func optionReply(r io.Reader, opt uint32) (kind uint32, data []byte, err error) {
	var h [20]byte
	if _, err := io.ReadFull(r, h[:]); err != nil {
		return 0, nil, err
	}
	be := binary.BigEndian
	n := be.Uint32(h[16:])
	if be.Uint64(h[:]) != nbdproto.MagicOptReply || be.Uint32(h[8:]) != opt || n > maxReply {
		return 0, nil, fmt.Errorf("%w: reply to option %d: % x", errProtocol, opt, h)
	}
	data = make([]byte, n)
	_, err = io.ReadFull(r, data)
	return be.Uint32(h[12:]), data, err
}

// appendRequest appends the header of a request.
func appendRequest(b []byte, r *Request, cookie uint64) []byte {
	var flags uint16
	if r.FUA {
		flags |= nbdproto.CmdFlagFUA
	}
	if r.NoHole {
		flags |= nbdproto.CmdFlagNoHole
	}
	b = binary.BigEndian.AppendUint32(b, nbdproto.MagicRequest)
	b = binary.BigEndian.AppendUint16(b, flags)
	b = binary.BigEndian.AppendUint16(b, uint16(r.Command))
	b = binary.BigEndian.AppendUint64(b, cookie)
	b = binary.BigEndian.AppendUint64(b, uint64(r.Offset))
	return binary.BigEndian.AppendUint32(b, uint32(r.length()))
}

// reply is one simple reply or the header of one structured chunk.
type reply struct {
	structured bool
	flags      uint16
	kind       uint16
	cookie     uint64
	errno      Errno  // simple
	length     uint32 // structured
}

func readReply(r *bufio.Reader) (reply, error) {
	be := binary.BigEndian
	var h [20]byte
	if _, err := io.ReadFull(r, h[:16]); err != nil {
		return reply{}, err
	}
	switch be.Uint32(h[:]) {
	case nbdproto.MagicSimple:
		return reply{errno: Errno(be.Uint32(h[4:])), cookie: be.Uint64(h[8:])}, nil
	case nbdproto.MagicStructured:
		if _, err := io.ReadFull(r, h[16:]); err != nil {
			return reply{}, err
		}
		p := reply{structured: true, flags: be.Uint16(h[4:]), kind: be.Uint16(h[6:]), cookie: be.Uint64(h[8:]), length: be.Uint32(h[16:])}
		if p.length > maxReply {
			return reply{}, fmt.Errorf("%w: a chunk of %d bytes", errProtocol, p.length)
		}
		return p, nil
	}
	return reply{}, fmt.Errorf("%w: reply % x", errProtocol, h[:16])
}
