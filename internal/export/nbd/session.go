package nbd

import (
	"context"
	"encoding/binary"
	"fmt"
	"log/slog"
	"sync"
	"sync/atomic"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/nbdproto"
)

// header is a request as the client sent it.
type header struct {
	flags  uint16
	cmd    uint16
	cookie uint64
	off    uint64
	n      uint32
}

func parseHeader(b []byte) (header, error) {
	_ = b[nbdproto.RequestSize-1]
	if m := binary.BigEndian.Uint32(b); m != nbdproto.MagicRequest {
		return header{}, fmt.Errorf("%w: request starts with %#08x instead of %#08x", errProtocol, m, nbdproto.MagicRequest)
	}
	return header{
		flags:  binary.BigEndian.Uint16(b[4:]),
		cmd:    binary.BigEndian.Uint16(b[6:]),
		cookie: binary.BigEndian.Uint64(b[8:]),
		off:    binary.BigEndian.Uint64(b[16:]),
		n:      binary.BigEndian.Uint32(b[24:]),
	}, nil
}

// negotiated is what the handshake settled.
type negotiated struct {
	export     Export
	size       uint64
	flags      uint16
	structured bool
	allocation bool // base:allocation was selected
}

// session is the transmission phase of one connection.
type session struct {
	negotiated
	vol     block.Volume
	log     *slog.Logger
	in      *wire
	out     *replies
	extents int // Limits.Extents
	staged  *budget

	// The reader's own.
	batch   *segment // replies that have not left; nil when there are none
	workers int
	aside   [1][]byte // argument of wire.payload

	queue   chan *request  // what workers shall do
	pending atomic.Int32   // requests queued or being worked on
	wg      sync.WaitGroup // workers
	lost    atomic.Bool    // the volume went away

	requests atomic.Int64
	received atomic.Int64
	faults   atomic.Int64 // requests answered with EIO
}

// budget is a number of bytes that connections share.
type budget struct {
	used  atomic.Int64
	limit int64
}

// take reserves n bytes, or says that there is no room.
func (b *budget) take(n int64) bool {
	if b.used.Add(n) > b.limit {
		b.used.Add(-n)
		return false
	}
	return true
}

func (b *budget) give(n int64) { b.used.Add(-n) }

func newSession(n negotiated, in *wire, out *replies, l Limits, staged *budget, log *slog.Logger) *session {
	return &session{
		negotiated: n, vol: n.export.Volume, log: log, in: in, out: out,
		extents: l.Extents, staged: staged,
		queue: make(chan *request, l.Requests),
	}
}

// run serves requests until the client leaves, the connection is stopped or
// something is wrong with it; the error says which. When it returns, all
// requests in flight have been answered if the client can still hear.
func (s *session) run(ctx context.Context, kill func()) error {
	written := make(chan struct{})
	go func() { defer close(written); s.out.writer() }()

	err := s.read(ctx)
	switch {
	case s.lost.Load():
		err = errHandover
	case err == nil, err == errDisconnect, err == errStopped:
	default:
		kill() // nobody hears the answers
	}
	s.flush()
	if s.batch != nil {
		s.batch.release()
		s.batch = nil
	}
	close(s.queue)
	s.wg.Wait()
	s.out.drained()
	close(s.out.wake)
	<-written
	return err
}

// read is the reader's loop.
func (s *session) read(ctx context.Context) error {
	for {
		if s.in.buffered() < nbdproto.RequestSize {
			s.flush()
			s.received.Store(s.in.received)
			if err := s.in.more(s.in.buffered() > 0); err != nil {
				return err
			}
			continue
		}
		if s.lost.Load() {
			return errHandover
		}
		b, err := s.in.take(nbdproto.RequestSize)
		if err != nil {
			return err
		}
		h, err := parseHeader(b)
		if err != nil {
			return err
		}
		s.requests.Add(1)
		if err := s.handle(ctx, h); err != nil {
			return err
		}
	}
}

// allowedFlags are the flags that each command takes. FUA is allowed with all
// of them, by the protocol.
var allowedFlags = [...]uint16{
	nbdproto.CmdRead:        nbdproto.CmdFlagFUA | nbdproto.CmdFlagDF,
	nbdproto.CmdWrite:       nbdproto.CmdFlagFUA,
	nbdproto.CmdDisc:        0xffff,
	nbdproto.CmdFlush:       nbdproto.CmdFlagFUA,
	nbdproto.CmdTrim:        nbdproto.CmdFlagFUA,
	nbdproto.CmdCache:       nbdproto.CmdFlagFUA,
	nbdproto.CmdWriteZeroes: nbdproto.CmdFlagFUA | nbdproto.CmdFlagNoHole | nbdproto.CmdFlagFastZero,
	nbdproto.CmdBlockStatus: nbdproto.CmdFlagFUA | nbdproto.CmdFlagReqOne,
}

// validate checks a request against what was negotiated.
func (s *session) validate(h *header) (nbdproto.Errno, string) {
	if int(h.cmd) >= len(allowedFlags) {
		return nbdproto.EINVAL, "unknown command"
	}
	if h.flags&^allowedFlags[h.cmd] != 0 || h.flags&nbdproto.CmdFlagDF != 0 && !s.structured {
		return nbdproto.EINVAL, "flag does not apply to this command"
	}
	switch h.cmd {
	case nbdproto.CmdWrite, nbdproto.CmdTrim, nbdproto.CmdWriteZeroes:
		if s.flags&nbdproto.FlagReadOnly != 0 {
			return nbdproto.EPERM, "export is read-only"
		}
	case nbdproto.CmdFlush:
		if h.off != 0 || h.n != 0 {
			return nbdproto.EINVAL, "a flush has no offset and no length"
		}
		return nbdproto.EOK, ""
	case nbdproto.CmdBlockStatus:
		if !s.allocation {
			return nbdproto.EINVAL, "no metadata context was selected"
		}
		if h.n == 0 {
			return nbdproto.EINVAL, "block status of an empty range"
		}
	case nbdproto.CmdRead:
		if h.n > block.MaxIO {
			return unlessSimple(nbdproto.EOVERFLOW, s.structured), "read is larger than the maximum payload"
		}
	}
	if h.off > s.size || uint64(h.n) > s.size-h.off {
		if h.cmd == nbdproto.CmdWrite || h.cmd == nbdproto.CmdWriteZeroes {
			return nbdproto.ENOSPC, "beyond the end of the export"
		}
		return nbdproto.EINVAL, "beyond the end of the export"
	}
	return nbdproto.EOK, ""
}

// unlessSimple returns e under structured replies, which alone know EOVERFLOW
// as an answer to a read, and EINVAL otherwise.
func unlessSimple(e nbdproto.Errno, structured bool) nbdproto.Errno {
	if structured {
		return e
	}
	return nbdproto.EINVAL
}

// handle does a request or gives it to a worker.
func (s *session) handle(ctx context.Context, h header) error {
	if h.cmd == nbdproto.CmdDisc {
		return errDisconnect
	}
	e, why := s.validate(&h)
	if h.cmd == nbdproto.CmdWrite {
		return s.writeRequest(ctx, h, e, why)
	}
	s.in.done()
	switch {
	case e != nbdproto.EOK:
		return s.fail(&h, e, why)
	case h.n == 0 && h.cmd != nbdproto.CmdFlush:
		return s.succeed(&h)
	case h.cmd == nbdproto.CmdRead:
		return s.readRequest(ctx, h)
	}
	return s.dispatch(ctx, getRequest(), h, 0)
}
