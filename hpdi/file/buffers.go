package file

import (
	"errors"
	"fmt"
	"runtime"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
)

// Of registered memory the kernel takes at most maxPiece bytes as one buffer. A ring
// has a table with place for maxPieces of them, 1 TiB, which it gets with the first.
const (
	maxPiece  = 1 << 30
	maxPieces = 1 << 10
)

// piece is registered memory under one number.
type piece struct {
	base  uintptr
	bytes uintptr
	index uint16 // in the tables of all rings
}

// pieces are what one ring has registered, in the order of their addresses. A value
// that others may see never changes.
type pieces []piece

// find returns the number of the piece that n bytes from base on lie in.
func (t pieces) find(base, n uintptr) (index uint16, ok bool) {
	low, high := 0, len(t) // t[low-1].base <= base < t[high].base
	for low < high {
		if mid := int(uint(low+high) / 2); t[mid].base <= base {
			low = mid + 1
		} else {
			high = mid
		}
	}
	if low == 0 {
		return 0, false
	}
	p := &t[low-1]
	return p.index, base-p.base <= p.bytes && n <= p.bytes-(base-p.base)
}

// findAll is find for several vectors, of which the kernel takes those in one piece alone.
func (t pieces) findAll(iov []iovec) (index uint16, ok bool) {
	for i, v := range iov {
		at, in := t.find(v.base, uintptr(v.len))
		if !in || i > 0 && at != index {
			return 0, false
		}
		index = at
	}
	return index, len(iov) > 0
}

// registration is memory that the application has made known.
type registration struct {
	mem     []byte // referred to: it stays where it is, also if it lies in the Go heap
	times   int    // how often, without an Unregister
	pieces  pieces
	refused error // why a ring does without
}

func (r *registration) base() uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(r.mem))) }

// Register makes memory known to the rings of the device, those to come among them, so
// that requests on it spare the kernel to look up and pin pages. It is pinned once for
// each queue, and counts each time against what the user may lock; where the kernel
// does not take it, it is used as other memory and Info.Note says why. With the sync
// engine, and with Options.Fixed off, it changes nothing.
//
// Pinned pages are what requests go to until Unregister, whatever else is mapped at
// their addresses meanwhile.
func (d *device) Register(mem []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed {
		return d.fail(hpdi.ErrClosed)
	}
	if len(mem) == 0 {
		return nil
	}
	reg := &registration{mem: mem, times: 1}
	var taken [maxPieces]bool
	for _, other := range d.memory {
		if other.base() == reg.base() && len(other.mem) == len(mem) {
			other.times++
			return nil
		}
		if other.base() < reg.base()+uintptr(len(mem)) && reg.base() < other.base()+uintptr(len(other.mem)) {
			return fmt.Errorf("%s: register %d bytes of memory: they overlap %d that are registered; unregister those first", d.info.Name, len(mem), len(other.mem))
		}
		for _, p := range other.pieces {
			taken[p.index] = true
		}
	}
	at := reg.base()
	end := at + uintptr(len(mem))
	for i := 0; i < maxPieces && at < end; i++ {
		if !taken[i] {
			reg.pieces = append(reg.pieces, piece{at, min(maxPiece, end-at), uint16(i)})
			at += maxPiece
		}
	}
	if at < end {
		reg.pieces, reg.refused = nil, fmt.Errorf("more than %d pieces", maxPieces)
	}
	d.memory = append(d.memory, reg)
	for q := range d.rings {
		q.attach(reg)
	}
	d.tellRefused()
	return nil
}

// Unregister takes one Register of the same memory back.
func (d *device) Unregister(mem []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	for i, reg := range d.memory {
		if reg.base() != uintptr(unsafe.Pointer(unsafe.SliceData(mem))) || len(reg.mem) != len(mem) {
			continue
		}
		if reg.times--; reg.times > 0 {
			return nil
		}
		d.memory = slices.Delete(d.memory, i, i+1)
		var err error
		for q := range d.rings {
			err = errors.Join(err, q.detach(reg))
		}
		d.tellRefused()
		if err != nil {
			return fmt.Errorf("%s: unregister %d bytes of memory: %w", d.info.Name, len(mem), err)
		}
		return nil
	}
	return nil
}

// tellRefused brings the note of Info up to date. The caller holds d.mu.
func (d *device) tellRefused() {
	var bytes int
	var why error
	for _, reg := range d.memory {
		if reg.refused != nil {
			bytes += len(reg.mem)
			why = reg.refused
		}
	}
	if why == nil {
		d.refused.Store(nil)
		return
	}
	note := fmt.Sprintf("%d bytes of memory are not registered with io_uring: %v", bytes, why)
	d.refused.Store(&note)
}

// attach registers memory with the queue's ring. The caller holds the device's mu; the
// queue may be in use: it sees the pieces once the kernel has them all.
func (q *uringQueue) attach(reg *registration) {
	if q.dev.opts.Fixed == FixedOff || len(reg.pieces) == 0 || q.later(change{in: reg}) {
		return
	}
	q.attachNow(reg)
}

// attachNow is attach by a thread that the ring obeys.
func (q *uringQueue) attachNow(reg *registration) {
	err := q.ring.makeTable()
	done := 0
	for ; err == nil && done < len(reg.pieces); done++ {
		p := reg.pieces[done]
		err = q.ring.setBuffer(p.index, iovec{p.base, uint64(p.bytes)})
	}
	if err != nil {
		for _, p := range reg.pieces[:done] {
			_ = q.ring.setBuffer(p.index, iovec{}) // the error before is the one to tell
		}
		reg.refused = err
		return
	}
	next := slices.Concat(q.pieces(), reg.pieces)
	slices.SortFunc(next, func(a, b piece) int {
		if a.base < b.base {
			return -1
		}
		return 1
	})
	q.fixed.Store(&next)
}

// detach is the reverse of attach. Nobody has a request on these pieces.
func (q *uringQueue) detach(reg *registration) error {
	if q.never(reg) {
		return nil
	}
	gone, had := reg.pieces, q.pieces()
	next := slices.DeleteFunc(slices.Clone(had), func(p piece) bool { return slices.Contains(gone, p) })
	if len(next) == len(had) { // the ring does without them
		return nil
	}
	q.fixed.Store(&next)
	if q.later(change{out: gone}) {
		return nil
	}
	return q.detachNow(gone)
}

// detachNow takes pieces from the ring, by a thread that it obeys.
func (q *uringQueue) detachNow(gone pieces) error {
	var err error
	for _, p := range gone {
		err = errors.Join(err, q.ring.setBuffer(p.index, iovec{}))
	}
	return err
}

// pieces returns what the ring has registered.
func (q *uringQueue) pieces() pieces {
	if t := q.fixed.Load(); t != nil {
		return *t
	}
	return nil
}

// The part of the kernel's interface that registers buffers and files.
const (
	ringUnregisterBuffers = 1
	ringRegisterFiles     = 2
	ringUnregisterFiles   = 3
	ringRegisterProbe     = 8
	ringRegisterBuffers2  = 15
	ringUpdateBuffers     = 16
)

// makeTable gives the ring its table of buffers, an empty one, if it has none.
func (r *ring) makeTable() error {
	if r.table {
		return nil
	}
	type resources struct { // struct io_uring_rsrc_register
		n, flags   uint32
		_          uint64
		data, tags uint64
	}
	empty := make([]iovec, maxPieces)
	var pin runtime.Pinner // its address is in a number
	pin.Pin(&empty[0])
	defer pin.Unpin()
	arg := resources{n: maxPieces, data: uint64(uintptr(unsafe.Pointer(&empty[0])))}
	switch errno := r.register(ringRegisterBuffers2, unsafe.Pointer(&arg), unsafe.Sizeof(arg)); errno {
	case 0:
		r.table = true
		return nil
	case unix.EINVAL:
		return fmt.Errorf("it takes Linux 5.13: %w", errno)
	default:
		return refusal(errno)
	}
}

// setBuffer puts memory into the table, or nothing.
func (r *ring) setBuffer(index uint16, v iovec) error {
	type update struct { // struct io_uring_rsrc_update2
		offset, _  uint32
		data, tags uint64
		n, _       uint32
	}
	var pin runtime.Pinner
	pin.Pin(&v)
	defer pin.Unpin()
	arg := update{offset: uint32(index), data: uint64(uintptr(unsafe.Pointer(&v))), n: 1}
	switch errno := r.register(ringUpdateBuffers, unsafe.Pointer(&arg), unsafe.Sizeof(arg)); errno {
	case 0:
		return nil
	case unix.EFAULT:
		return fmt.Errorf("it must be mapped, for writing too: %w", errno)
	case unix.EOPNOTSUPP:
		return fmt.Errorf("memory of this kind cannot stay pinned: %w", errno)
	default:
		return refusal(errno)
	}
}

// register calls io_uring_register.
func (r *ring) register(op uintptr, arg unsafe.Pointer, n uintptr) unix.Errno {
	for {
		_, _, errno := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(r.fd), op, uintptr(arg), n, 0, 0)
		if errno != unix.EINTR {
			return errno
		}
	}
}

// registerFile makes fd the ring's file number 0, and reports whether the kernel has
// taken it.
func (r *ring) registerFile(fd int) {
	n := int32(fd)
	r.fixedFile = r.register(ringRegisterFiles, unsafe.Pointer(&n), 1) == 0
}

// unregister gives files and buffers back at once. With the ring alone they would go
// some time after its descriptor, and what is locked would count until then.
func (r *ring) unregister() {
	if r.fixedFile {
		_ = r.register(ringUnregisterFiles, nil, 0) // the ring goes next, and all with it
	}
	if r.table {
		_ = r.register(ringUnregisterBuffers, nil, 0)
	}
}
