package nbd

import (
	"context"
	"sync"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/nbdproto"
)

// request is what a worker gets.
type request struct {
	h       header
	charged int64          // bytes in flight
	write   block.Write    // complete, to be committed; nil when it was committed
	side    *segment       // payload that could not be staged at once
	ext     []block.Extent // memory for a block status
}

var requestPool = sync.Pool{New: func() any { return new(request) }}

func getRequest() *request { return requestPool.Get().(*request) }

func (r *request) release() {
	*r = request{ext: r.ext[:0]}
	requestPool.Put(r)
}

// cachePiece is how much a CACHE command reads at once, cacheMost how much of
// its range it reads at most.
const (
	cachePiece = 512 << 10
	cacheMost  = block.MaxIO
)

// execute does a request, sends its reply and ends its flight.
func (s *session) execute(ctx context.Context, r *request) {
	h := &r.h
	defer r.release()
	switch h.cmd {
	case nbdproto.CmdRead:
		s.executeRead(ctx, r)
		return
	case nbdproto.CmdBlockStatus:
		s.executeStatus(ctx, r)
		return
	}
	err := s.perform(ctx, r)
	if err != nil {
		s.replyError(ctx, r, err)
		return
	}
	seg := getSegment(nbdproto.SimpleSize)
	s.reply(r, seg, s.encodeDone(seg.mem, h))
}

// perform does the requests that have no payload in their reply.
func (s *session) perform(ctx context.Context, r *request) error {
	h := &r.h
	off, n := int64(h.off), int64(h.n)
	var err error
	switch h.cmd {
	case nbdproto.CmdWrite:
		err = s.executeWrite(ctx, r)
	case nbdproto.CmdTrim:
		err = s.vol.Trim(ctx, off, n, block.Tag{})
	case nbdproto.CmdWriteZeroes:
		// A range of zeroes is one record of the log, at most with two blocks
		// to complete at its ends: always faster than a write of that length,
		// so a fast zero needs no other way.
		err = s.vol.WriteZeroes(ctx, off, n, h.flags&nbdproto.CmdFlagNoHole == 0, block.Tag{})
	case nbdproto.CmdCache:
		return s.executeCache(ctx, off, n)
	case nbdproto.CmdFlush:
		return s.vol.Flush(ctx)
	}
	if err == nil && h.flags&nbdproto.CmdFlagFUA != 0 {
		err = s.vol.Flush(ctx)
	}
	return err
}

// executeWrite commits a payload; a write with neither side buffer nor staged
// memory was committed before and is here for its flush.
func (s *session) executeWrite(ctx context.Context, r *request) error {
	w := r.write
	if side := r.side; side != nil {
		r.side = nil
		defer side.release()
		var err error
		if w, err = s.vol.Stage(ctx, int64(r.h.off), int(r.h.n)); err != nil {
			return err
		}
		payload := side.mem[:r.h.n]
		for _, b := range w.Buffers() {
			payload = payload[copy(b, payload):]
		}
	}
	if w == nil {
		return nil
	}
	r.write = nil
	return w.Commit(ctx)
}

func (s *session) executeRead(ctx context.Context, r *request) {
	n, head := int(r.h.n), s.readHead()
	seg := getSegment(n)
	if err := s.vol.Read(ctx, seg.mem[head:head+n], int64(r.h.off)); err != nil {
		seg.release()
		s.replyError(ctx, r, err)
		return
	}
	s.reply(r, seg, s.encodeRead(seg.mem, n, &r.h))
}

func (s *session) executeStatus(ctx context.Context, r *request) {
	most := s.extents
	if r.h.flags&nbdproto.CmdFlagReqOne != 0 {
		most = 1
	}
	ext, err := s.vol.Status(ctx, int64(r.h.off), int64(r.h.n), most, r.ext[:0])
	if err != nil {
		s.replyError(ctx, r, err)
		return
	}
	r.ext = ext
	if len(ext) == 0 || ext[0].Length <= 0 {
		s.replyError(ctx, r, errNoExtents)
		return
	}
	seg := getSegment(statusBytes(min(len(ext), most)))
	s.reply(r, seg, s.encodeStatus(seg.mem, &r.h, ext[:min(len(ext), most)]))
}

// executeCache reads a range, or the beginning of a long one, to have the
// volume's cache filled.
func (s *session) executeCache(ctx context.Context, off, n int64) error {
	seg := getSegment(cachePiece)
	defer seg.release()
	for end := off + min(n, cacheMost); off < end; off += cachePiece {
		if err := s.vol.Read(ctx, seg.mem[:min(cachePiece, end-off)], off); err != nil {
			return err
		}
	}
	return nil
}

// reply sends the first n bytes of a segment as the whole reply to r.
func (s *session) reply(r *request, seg *segment, n int) {
	seg.data = seg.mem[:n]
	seg.requests, seg.bytes = 1, r.charged
	s.out.send(seg)
}

// replyError answers with what err means to the client. When the volume went
// away, or the request was called off because the connection is being cut, it
// does not answer: to the client that must not look like a failed disk.
func (s *session) replyError(ctx context.Context, r *request, err error) {
	e := forCommand(errnoOf(err), r.h.cmd, r.h.flags)
	if e == nbdproto.ESHUTDOWN || ctx.Err() != nil {
		if e == nbdproto.ESHUTDOWN {
			s.lost.Store(true)
		}
		s.in.stop()
		s.out.release(r.charged)
		return
	}
	s.fault(&r.h, e, err)
	seg := getSegment(errorReplyBytes)
	s.reply(r, seg, s.encodeError(seg.mem, &r.h, e, err.Error()))
}

// commandNames are those of the commands that a volume can fail.
var commandNames = map[uint16]string{
	nbdproto.CmdRead: "read", nbdproto.CmdWrite: "write", nbdproto.CmdFlush: "flush", nbdproto.CmdTrim: "trim",
	nbdproto.CmdCache: "cache", nbdproto.CmdWriteZeroes: "write zeroes", nbdproto.CmdBlockStatus: "block status",
}

// fault logs an error that the client only sees as EIO: damage and trouble with
// devices, of which whoever runs the server must learn the place. A client may
// try without end, so of its faults only the 1st, 2nd, 4th, 8th... are logged.
func (s *session) fault(h *header, e nbdproto.Errno, err error) {
	if e != nbdproto.EIO {
		return
	}
	if n := s.faults.Add(1); n&(n-1) == 0 {
		s.log.Error("nbd: request failed", "command", commandNames[h.cmd], "offset", h.off, "length", h.n, "error", err, "failed", n)
	}
}
