package vhostuser

import (
	"context"
	"fmt"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/virtio"
)

// request is one that was taken from a ring. It is the queue's, or a worker's.
type request struct {
	q       *queue
	chain   virtio.Chain
	slot    uint16 // its entry in the in-flight area
	counter uint64 // of its submission; 0 without an area

	kind    uint32
	off     int64
	bytes   int64    // of data
	data    [][]byte // in the driver's memory, to be read or written as the kind says
	status  []byte   // where the status byte goes, one byte of the driver's memory
	code    byte
	unmap   bool
	written uint32      // bytes of the driver's memory that were written
	write   block.Write // staged, until it is committed
	flush   bool        // committed, and to be flushed
}

// forget drops what refers to the driver's memory.
func (r *request) forget() {
	r.chain.Forget()
	clear(r.data[:cap(r.data)])
	r.data, r.status = r.data[:0], nil
}

// parse reads the header and finds data and status. The header may lie in any pieces, and
// so may the data; the status is the last byte.
func (r *request) parse() error {
	r.data, r.code, r.written, r.write, r.flush = r.data[:0], virtio.BlkOK, 0, nil, false
	c := &r.chain
	if c.OutBytes < virtio.BlkHeaderBytes {
		return fmt.Errorf("%w: %d bytes to be read, a header has %d", virtio.ErrBroken, c.OutBytes, virtio.BlkHeaderBytes)
	}
	if c.InBytes < 1 {
		return fmt.Errorf("%w: no room for the status", virtio.ErrBroken)
	}
	var head [virtio.BlkHeaderBytes]byte
	out, got := c.Out, 0
	for got < len(head) {
		n := copy(head[got:], out[0])
		got += n
		if n < len(out[0]) {
			r.data = append(r.data, out[0][n:])
		}
		out = out[1:]
	}
	h := virtio.ReadBlkHeader(head[:])
	last := c.In[len(c.In)-1]
	r.status = last[len(last)-1:]
	r.kind = h.Type
	if r.kind == virtio.BlkIn || r.kind == virtio.BlkGetID {
		r.data = r.data[:0]
		r.data = append(r.data, c.In[:len(c.In)-1]...)
		if len(last) > 1 {
			r.data = append(r.data, last[:len(last)-1])
		}
		r.bytes = c.InBytes - 1
	} else {
		r.data = append(r.data, out...)
		r.bytes = c.OutBytes - virtio.BlkHeaderBytes
	}
	var ok bool
	if r.off, ok = span(h.Sector, 0, r.q.c.s.size.Load()); !ok && (r.kind == virtio.BlkIn || r.kind == virtio.BlkOut) {
		r.off = -1
	}
	return nil
}

// seal writes the status, the last of the driver's memory before the driver sees that the
// request is done.
func (r *request) seal() {
	r.status[0] = r.code
	if r.kind == virtio.BlkIn || r.kind == virtio.BlkGetID {
		if r.code == virtio.BlkOK {
			r.written = uint32(min(r.chain.InBytes-1, int64(^uint32(0))-1))
		}
	}
	r.written++
	r.q.logData(r)
}

// counted adds the request to the server's sums.
func (r *request) counted() {
	n := &r.q.c.s.count
	if r.code != virtio.BlkOK {
		n.errors.Add(1)
	}
	switch r.kind {
	case virtio.BlkIn:
		n.reads.Add(1)
		if r.code == virtio.BlkOK {
			n.readBytes.Add(uint64(r.bytes))
		}
	case virtio.BlkOut:
		n.writes.Add(1)
		if r.code == virtio.BlkOK {
			n.writtenBytes.Add(uint64(r.bytes))
		}
	case virtio.BlkFlushCache:
		n.flushes.Add(1)
	case virtio.BlkDiscardRange:
		n.discards.Add(1)
	case virtio.BlkWriteZeroRange:
		n.zeroes.Add(1)
	}
}

// changes reports whether the request changes the volume.
func (r *request) changes() bool {
	return r.kind == virtio.BlkOut || r.kind == virtio.BlkDiscardRange || r.kind == virtio.BlkWriteZeroRange
}

// fail ends the request with an error of the volume.
func (r *request) fail(what string, err error) {
	r.code = virtio.BlkIOError
	// A driver may try without end: of its errors only the 1st, 2nd, 4th, 8th... are logged.
	if n := r.q.c.s.count.errors.Load() + 1; n&(n-1) == 0 {
		r.q.c.log.Error("vhost-user: request failed", "request", what, "offset", r.off, "length", r.bytes, "error", err, "failed", n)
	}
}

// refuse ends the request because a driver may not ask for that.
func (r *request) refuse(code byte) bool {
	r.code = code
	return true
}

// try does the request if that needs no wait, and reports whether it is done.
func (r *request) try() bool {
	switch r.kind {
	case virtio.BlkIn:
		return r.tryRead()
	case virtio.BlkOut:
		return r.tryWrite()
	case virtio.BlkFlushCache:
		return false
	case virtio.BlkGetID:
		return r.identify()
	case virtio.BlkDiscardRange, virtio.BlkWriteZeroRange:
		return r.checkRange()
	}
	return r.refuse(virtio.BlkUnsupported)
}

// sound reports whether offset and length are those of a read or write that can be.
func (r *request) sound() bool {
	size := r.q.c.s.size.Load()
	return r.off >= 0 && r.bytes > 0 && r.bytes%virtio.SectorBytes == 0 && r.bytes <= block.MaxIO && r.off <= size-r.bytes
}

func (r *request) tryRead() bool {
	if !r.sound() {
		return r.refuse(virtio.BlkIOError)
	}
	off := r.off
	for _, p := range r.data {
		ok, err := r.tryPiece(p, off)
		switch {
		case lost(err):
			return false // the worker will see it as well, and cut the connection
		case err != nil:
			r.fail("read", err)
			return true
		case !ok:
			return false
		}
		off += int64(len(p))
	}
	return true
}

// pieceBytes is the most that is read into private memory at once.
const pieceBytes = 256 << 10

// tryPiece is TryRead into memory of the driver.
func (r *request) tryPiece(p []byte, off int64) (bool, error) {
	v := r.q.c.s.o.Volume
	if r.q.sealed {
		return v.TryRead(p, off)
	}
	for len(p) > 0 {
		b := r.q.scratch.bytes(min(len(p), pieceBytes))
		if ok, err := v.TryRead(b, off); !ok || err != nil {
			return false, err
		}
		copy(p, b)
		p, off = p[len(b):], off+int64(len(b))
	}
	return true, nil
}

// scratch is private memory that what is read passes through.
type scratch []byte

// bytes returns n bytes of it.
func (s *scratch) bytes(n int) []byte {
	if len(*s) < n {
		*s = make([]byte, max(n, 4*block.Size))
	}
	return (*s)[:n]
}

func (r *request) tryWrite() bool {
	if !r.sound() || r.q.c.s.fixed {
		return r.refuse(virtio.BlkIOError)
	}
	if r.q.c.pool.unstaged.Load() > 0 {
		return false // those were first, and it would most likely be staged for nothing
	}
	w, err := r.q.c.s.o.Volume.TryStage(r.off, int(r.bytes))
	switch {
	case lost(err):
		return false
	case err != nil:
		r.fail("write", err)
		return true
	case w == nil:
		return false
	}
	r.receive(w)
	r.write = nil
	ok, err := w.TryCommit()
	switch {
	case lost(err):
		return false // as if it had not been tried
	case err != nil:
		r.fail("write", err)
		return true
	case !ok:
		r.write = w // held until a worker commits it, if the pool allows that
		return false
	}
	r.flush = r.q.c.writethrough(r.q.features)
	return !r.flush
}

// maxStaged is how many bytes of a connection may be staged and wait to be committed.
const maxStaged = 2 * block.MaxIO

// receive copies the data into a staged write, which is the request's meanwhile, so that it
// is not lost with the driver's memory.
func (r *request) receive(w block.Write) {
	r.write = w
	bufs, data := w.Buffers(), r.data
	var b, p []byte
	for {
		if len(p) == 0 {
			if len(data) == 0 {
				break
			}
			p, data = data[0], data[1:]
		}
		if len(b) == 0 {
			if len(bufs) == 0 {
				break
			}
			b, bufs = bufs[0], bufs[1:]
		}
		n := copy(b, p)
		b, p = b[n:], p[n:]
	}
	w.SetTag(r.q.c.inflight.tag(r.q.index, r.slot, r.counter))
}

// abort gives back what the request has of the volume.
func (r *request) abort() {
	if r.write != nil {
		r.write.Abort()
		r.write = nil
	}
}

// identify answers what the disk is called.
func (r *request) identify() bool {
	var id [virtio.BlkIDBytes]byte
	copy(id[:], r.q.c.s.o.Serial)
	rest := id[:]
	for _, p := range r.data {
		rest = rest[copy(p, rest):]
	}
	return true
}

// checkRange reads the range of a discard or a write of zeroes, and refuses what is none.
// What it accepts is for a worker.
func (r *request) checkRange() bool {
	const size = virtio.BlkRangeBytes
	s := r.q.c.s
	switch {
	case s.fixed:
		return r.refuse(virtio.BlkIOError)
	case r.bytes != size: // one segment was offered
		return r.refuse(virtio.BlkUnsupported)
	}
	var b [size]byte
	got := 0
	for _, p := range r.data {
		got += copy(b[got:], p)
	}
	x := virtio.ReadBlkRange(b[:])
	if x.Flags&^virtio.BlkUnmap != 0 || r.kind == virtio.BlkDiscardRange && x.Flags != 0 {
		return r.refuse(virtio.BlkUnsupported)
	}
	r.unmap = x.Flags&virtio.BlkUnmap != 0
	r.bytes = int64(x.Sectors) * virtio.SectorBytes
	var ok bool
	if r.off, ok = span(x.Sector, r.bytes, s.size.Load()); !ok || x.Sectors > maxRange {
		return r.refuse(virtio.BlkIOError)
	}
	return r.bytes == 0
}

// do does a request that may have to wait. Its error says that the request is not to be
// completed.
func (r *request) do(ctx context.Context, s *scratch) error {
	what, err := "", error(nil)
	switch r.kind {
	case virtio.BlkIn:
		what, err = "read", r.read(ctx, s)
	case virtio.BlkOut:
		what, err = "write", r.commit(ctx)
	case virtio.BlkFlushCache:
		what, err = "flush", r.q.c.s.o.Volume.Flush(ctx)
	case virtio.BlkDiscardRange:
		what, err = "discard", r.zero(ctx, true)
	case virtio.BlkWriteZeroRange:
		what, err = "write zeroes", r.zero(ctx, false)
	}
	switch {
	case err == nil:
	case ctx.Err() != nil:
		return context.Cause(ctx)
	case lost(err):
		return err
	default:
		r.fail(what, err)
	}
	return nil
}

// read reads through private memory: what a device gives is compared with its checksum,
// which the driver must not be able to change meanwhile.
func (r *request) read(ctx context.Context, s *scratch) error {
	b := s.bytes(int(min(r.bytes, pieceBytes)))
	off, end := r.off, r.off+r.bytes
	data := r.data
	for off < end {
		b := b[:min(int64(len(b)), end-off)]
		if err := r.q.c.s.o.Volume.Read(ctx, b, off); err != nil {
			return err
		}
		off += int64(len(b))
		for len(b) > 0 {
			n := copy(data[0], b)
			b = b[n:]
			if data[0] = data[0][n:]; len(data[0]) == 0 {
				data = data[1:]
			}
		}
	}
	return nil
}

// commit does what is left of a write.
func (r *request) commit(ctx context.Context) error {
	v := r.q.c.s.o.Volume
	if !r.flush {
		if err := r.publish(ctx); err != nil {
			return err
		}
	}
	if r.flush || r.q.c.writethrough(r.q.features) {
		return v.Flush(ctx)
	}
	return nil
}

// publish commits a write that is held, or that is not staged.
func (r *request) publish(ctx context.Context) error {
	if r.write == nil {
		w, err := r.stage(ctx)
		if err != nil {
			return err
		}
		defer r.q.c.share.Release(r.bytes)
		r.receive(w)
	} else {
		defer r.q.c.share.Release(r.bytes)
	}
	w := r.write
	r.write = nil
	return w.Commit(ctx)
}

// stage waits for a share of the operation log, which is the caller's then, and for its
// memory.
func (r *request) stage(ctx context.Context) (block.Write, error) {
	c := r.q.c
	defer c.pool.unstaged.Add(-1)
	if err := c.share.Acquire(ctx, r.bytes); err != nil {
		return nil, err
	}
	w, err := c.s.o.Volume.Stage(ctx, r.off, int(r.bytes))
	if err != nil {
		c.share.Release(r.bytes)
	}
	return w, err
}

// zero does a discard or a write of zeroes.
func (r *request) zero(ctx context.Context, discard bool) error {
	v := r.q.c.s.o.Volume
	tag := r.q.c.inflight.tag(r.q.index, r.slot, r.counter)
	var err error
	if discard {
		err = v.Trim(ctx, r.off, r.bytes, tag)
	} else {
		err = v.WriteZeroes(ctx, r.off, r.bytes, r.unmap, tag)
	}
	if err == nil && r.q.c.writethrough(r.q.features) {
		err = v.Flush(ctx)
	}
	return err
}
