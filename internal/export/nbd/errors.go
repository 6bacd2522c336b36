package nbd

import (
	"errors"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/nbdproto"
)

// Errors that end a connection. They say what the client did.
var (
	errStopped     = errors.New("server stops serving this connection")
	errDisconnect  = errors.New("client disconnected")
	errHandover    = errors.New("volume was closed or is served by another guest now")
	errPayloadSlow = errors.New("client began a request and did not finish it in time")
	errProtocol    = errors.New("client broke the protocol")
)

// ErrServerClosed is returned by Serve of a server that was shut down.
var ErrServerClosed = errors.New("nbd: server was shut down")

// errnoOf maps the error kinds of the volume to the protocol's numbers. This
// is the only place that does. eShutdown never travels: it makes the caller cut
// the connection (see the package comment).
func errnoOf(err error) nbdproto.Errno {
	switch {
	case err == nil:
		return nbdproto.EOK
	case errors.Is(err, block.ErrClosed), errors.Is(err, block.ErrStale):
		return nbdproto.ESHUTDOWN
	case errors.Is(err, block.ErrNoSpace):
		return nbdproto.ENOSPC
	case errors.Is(err, block.ErrReadOnly):
		return nbdproto.EPERM
	case errors.Is(err, block.ErrInvalid):
		return nbdproto.EINVAL
	case errors.Is(err, block.ErrUnsupported):
		return nbdproto.ENOTSUP
	default: // corrupt data, a device's error, anything not foreseen
		return nbdproto.EIO
	}
}

// forCommand adjusts a number to what the protocol allows command to answer:
// ENOTSUP belongs to a fast zero alone.
func forCommand(e nbdproto.Errno, cmd, flags uint16) nbdproto.Errno {
	if e == nbdproto.ENOTSUP && (cmd != nbdproto.CmdWriteZeroes || flags&nbdproto.CmdFlagFastZero == 0) {
		return nbdproto.EINVAL
	}
	return e
}
