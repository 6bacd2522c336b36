package nbd

import (
	"errors"

	"github.com/pollux-storage/pollux/internal/block"
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
func errnoOf(err error) errno {
	switch {
	case err == nil:
		return eOK
	case errors.Is(err, block.ErrClosed), errors.Is(err, block.ErrStale):
		return eShutdown
	case errors.Is(err, block.ErrNoSpace):
		return eNoSpace
	case errors.Is(err, block.ErrReadOnly):
		return ePerm
	case errors.Is(err, block.ErrInvalid):
		return eInval
	case errors.Is(err, block.ErrUnsupported):
		return eNotSup
	default: // corrupt data, a device's error, anything not foreseen
		return eIO
	}
}

// forCommand adjusts the number to what the protocol allows command to answer:
// ENOTSUP belongs to a fast zero alone.
func (e errno) forCommand(cmd, flags uint16) errno {
	if e == eNotSup && (cmd != cmdWriteZeroes || flags&cmdFlagFastZero == 0) {
		return eInval
	}
	return e
}
