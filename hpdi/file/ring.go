package file

import (
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"syscall"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/spin"
)

// The part of the kernel's interface (linux/io_uring.h) that is used here.
const (
	ringOpReadv       = 1
	ringOpWritev      = 2
	ringOpFsync       = 3
	ringOpReadFixed   = 4
	ringOpCancel      = 14
	ringOpLinkTimeout = 15
	ringOpFallocate   = 17
	ringOpRead        = 22
	ringOpWrite       = 23
	ringOpCommand     = 46 // IORING_OP_URING_CMD
	ringOpReadvFixed  = 60

	ringFixedFile = 1 << 0 // flags of an entry
	ringLink      = 1 << 2

	ringFsyncDatasync   = 1 << 0
	ringEnterGetEvents  = 1 << 0
	ringFeatSingleMmap  = 1 << 0
	ringFeatNoDrop      = 1 << 1
	ringFeatStable      = 1 << 2
	ringOffRings        = 0
	ringOffSQEs         = 0x10000000
	ringOpSupported     = 1 << 0
	blockCommandDiscard = 0x12 << 8 // BLOCK_URING_CMD_DISCARD
)

// sqe is struct io_uring_sqe: one operation for the kernel.
type sqe struct {
	opcode   uint8
	flags    uint8
	ioprio   uint16
	fd       int32
	off      uint64 // of a command: its number
	addr     uint64
	len      uint32
	opFlags  uint32
	userData uint64
	bufIndex uint16
	persona  uint16
	fileIdx  int32
	addr3    uint64
	_        uint64
}

// cqe is struct io_uring_cqe: the result of one operation.
type cqe struct {
	userData uint64
	res      int32
	flags    uint32
}

// ringParams is struct io_uring_params.
type ringParams struct {
	sqEntries, cqEntries, flags, sqThreadCPU, sqThreadIdle, features, wqFd uint32
	_                                                                      [3]uint32
	sq                                                                     struct {
		head, tail, mask, entries, flags, dropped, array, _ uint32
		user                                                uint64
	}
	cq struct {
		head, tail, mask, entries, overflow, cqes, flags, _ uint32
		user                                                uint64
	}
}

// Sizes that the kernel fixed for ever.
var (
	_ [64]byte  = [unsafe.Sizeof(sqe{})]byte{}
	_ [16]byte  = [unsafe.Sizeof(cqe{})]byte{}
	_ [120]byte = [unsafe.Sizeof(ringParams{})]byte{}
)

// ring is a pair of queues in memory shared with the kernel. One goroutine at
// a time uses it, which may move between threads unless the ring is bound to one.
//
// Of each pair of positions one is ours and one the kernel's. Ours are kept
// here too, and only stored, with release order, after the entries that they
// publish; the kernel's are loaded with acquire order.
//
//	*sqHead <= sqTail <= *sqHead + len(sqes)
//	cqHead <= *cqTail
type ring struct {
	fd             int
	rings, entries []byte // the mappings

	sqes             []sqe
	sqHead, sqTailAt *uint32
	sqFlags          *uint32
	sqTail           uint32 // first free entry

	cqes             []cqe
	cqHeadAt, cqTail *uint32
	cqHead           uint32 // next result to take

	// The descriptor is readable while there are results, so that the
	// runtime's poller can wait for them.
	file  *os.File // owns fd
	conn  syscall.RawConn
	least uint32             // results that ready asks for
	ready func(uintptr) bool // whether they are there; made once
	look  func() bool        // the same
	poll  spin.Poller
	block bool // wait in the kernel
	bound binding
	kept  int // the eventfd that tells of results of a ring that is bound, 0: nobody asked

	knows     *ringKnowledge
	fixedFile bool // file 0 is the device's
	table     bool // there is a table of registered buffers
}

// ringKnowledge is what not all kernels can that serve here.
type ringKnowledge struct {
	vectorsFixed bool // several vectors in one registered buffer (Linux 6.15)
}

// ringKnows is what the kernel can, once this process has seen it take a ring that has all
// that is needed. Who opens many files that are known does not make one for each: that
// costs as much as all else that opening it takes.
var ringKnows atomic.Pointer[ringKnowledge]

// newRing makes a ring for n operations at once, that is bound to a thread if that is
// wanted and the kernel can.
func newRing(n int, thread, block bool) (*ring, error) {
	var p ringParams
	fd, errno := setUpRing(n, thread, &p)
	if errno != 0 {
		return nil, refusal(errno)
	}
	r := &ring{fd: fd, knows: ringKnows.Load(), block: block} // the kernel sets close-on-exec
	if p.flags&ringDeferTaskrun != 0 {
		r.bound, r.block = ringUnbound, true
	}
	if err := errors.Join(r.watch(), r.attach(&p)); err != nil {
		return nil, errors.Join(err, r.close())
	}
	return r, nil
}

// refusal says what to do about an error of io_uring_setup.
func refusal(errno unix.Errno) error {
	switch errno {
	case unix.ENOSYS:
		return fmt.Errorf("the kernel has none: %w", errno)
	case unix.EPERM, unix.EACCES:
		return fmt.Errorf("not permitted (see sysctl kernel.io_uring_disabled and the container's seccomp profile): %w", errno)
	case unix.ENOMEM:
		return fmt.Errorf("not enough memory may be locked (see ulimit -l): %w", errno)
	}
	return fmt.Errorf("set up: %w", errno)
}

// watch makes the runtime's poller watch the descriptor, which r.file owns from
// here on. Of a ring that is waited for in the kernel it must not: its thread would be
// woken for each result.
func (r *ring) watch() (err error) {
	var nonblock error
	if !r.block {
		nonblock = unix.SetNonblock(r.fd, true) // or os would not have it polled
	}
	r.file = os.NewFile(uintptr(r.fd), "io_uring")
	r.ready = func(uintptr) bool { return r.results() >= r.least }
	r.look = func() bool { return r.results() >= r.least || r.deferred() }
	r.conn, err = r.file.SyscallConn()
	return errors.Join(nonblock, err)
}

// attach maps the memory of the ring.
func (r *ring) attach(p *ringParams) (err error) {
	const need = ringFeatSingleMmap | ringFeatNoDrop | ringFeatStable
	if p.features&need != need {
		return fmt.Errorf("the kernel's is too old: features %#x, needed %#x", p.features, need)
	}
	size := max(p.sq.array+p.sqEntries*4, p.cq.cqes+p.cqEntries*uint32(unsafe.Sizeof(cqe{})))
	if r.rings, err = r.mmap(ringOffRings, int(size)); err != nil {
		return err
	}
	if r.entries, err = r.mmap(ringOffSQEs, int(p.sqEntries)*int(unsafe.Sizeof(sqe{}))); err != nil {
		return err
	}
	word := func(at uint32) *uint32 { return (*uint32)(unsafe.Pointer(&r.rings[at])) }
	r.sqHead, r.sqTailAt, r.sqFlags = word(p.sq.head), word(p.sq.tail), word(p.sq.flags)
	r.cqHeadAt, r.cqTail = word(p.cq.head), word(p.cq.tail)
	r.sqTail, r.cqHead = atomic.LoadUint32(r.sqTailAt), atomic.LoadUint32(r.cqHeadAt)
	r.sqes = unsafe.Slice((*sqe)(unsafe.Pointer(&r.entries[0])), p.sqEntries)
	r.cqes = unsafe.Slice((*cqe)(unsafe.Pointer(&r.rings[p.cq.cqes])), p.cqEntries)
	// Entries are used in order, so the array of indices never changes.
	array := unsafe.Slice(word(p.sq.array), p.sqEntries)
	for i := range array {
		array[i] = uint32(i)
	}
	return nil
}

func (r *ring) mmap(off int64, n int) ([]byte, error) {
	mem, err := unix.Mmap(r.fd, off, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_POPULATE)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes of the ring: %w", n, err)
	}
	return mem, nil
}

// close frees the ring. Nothing may be in flight.
func (r *ring) close() error {
	r.unregister()
	if r.kept != 0 {
		_ = unix.Close(r.kept) // nothing is lost with it
	}
	return errors.Join(hpdi.Free(r.rings), hpdi.Free(r.entries), r.file.Close())
}

// next returns the entry for one more operation, zeroed. The caller has made
// sure that no more operations are in flight than the ring was made for.
func (r *ring) next() *sqe {
	if r.unsubmitted() == len(r.sqes) {
		panic("file: io_uring submission queue overflows")
	}
	e := &r.sqes[r.sqTail&uint32(len(r.sqes)-1)]
	*e = sqe{}
	r.sqTail++
	return e
}

// unsubmitted returns the number of entries that the kernel has not taken.
func (r *ring) unsubmitted() int { return int(r.sqTail - atomic.LoadUint32(r.sqHead)) }

// takeBack withdraws the entries that the kernel has not taken and calls f
// with each one's user data.
func (r *ring) takeBack(f func(userData uint64)) {
	head := atomic.LoadUint32(r.sqHead)
	for at := head; at != r.sqTail; at++ {
		f(r.sqes[at&uint32(len(r.sqes)-1)].userData)
	}
	r.sqTail = head
	atomic.StoreUint32(r.sqTailAt, head)
}

// submit hands new entries to the kernel, with one call. The kernel may leave
// some, which the next call hands over.
func (r *ring) submit() unix.Errno {
	atomic.StoreUint32(r.sqTailAt, r.sqTail)
	if r.bound != ringFree {
		return r.enter(r.unsubmitted(), 0, ringEnterGetEvents) // results that are due come by the same call
	}
	return r.enter(r.unsubmitted(), 0, 0)
}

func (r *ring) enter(submit, least int, flags uintptr) unix.Errno {
	_, _, errno := unix.Syscall6(unix.SYS_IO_URING_ENTER, uintptr(r.fd), uintptr(submit), uintptr(least), flags, 0, 0)
	return errno
}

// wait waits for least results. A signal may end it early.
//
// It parks the goroutine in the runtime's poller instead of blocking a thread
// in io_uring_enter. A blocked thread keeps its processor until the runtime's
// monitor takes it away, which takes from 20 µs to 10 ms: on two processors,
// two such queues held up unrelated goroutines for 20 ms at p99.9, and reached
// half the requests per second. With one queue and nothing else to do a blocked
// thread takes fewer switches, so that a program may choose it (Options.Block).
func (r *ring) wait(least int) unix.Errno {
	r.least = uint32(least)
	if r.poll.Poll(r.look) {
		return r.collect()
	}
	defer r.poll.Woke()
	if !r.block && r.conn.Read(r.ready) == nil {
		return 0
	}
	return r.enter(0, least, ringEnterGetEvents) // the poller does not take the descriptor
}

// results returns the number of results to take.
func (r *ring) results() uint32 { return atomic.LoadUint32(r.cqTail) - r.cqHead }

// take returns the next result, if there is one.
func (r *ring) take() (cqe, bool) {
	if r.results() == 0 {
		return cqe{}, false
	}
	c := r.cqes[r.cqHead&uint32(len(r.cqes)-1)]
	r.cqHead++
	atomic.StoreUint32(r.cqHeadAt, r.cqHead)
	return c, true
}

// probeURing says why queues cannot use io_uring here, or nil, and whether they are bound
// to threads if that is wanted.
func probeURing(thread bool) (bound bool, err error) {
	r, err := newRing(1, thread, true)
	if err != nil {
		return false, err
	}
	bound = r.bound != ringFree
	return bound, errors.Join(r.probe(), r.close())
}

// probe asks the kernel for the operations that it must know.
func (r *ring) probe() error {
	var p struct { // struct io_uring_probe
		last, n uint8
		_       uint16
		_       [3]uint32
		ops     [256]struct {
			op, _ uint8
			flags uint16
			_     uint32
		}
	}
	if errno := r.register(ringRegisterProbe, unsafe.Pointer(&p), uintptr(len(p.ops))); errno != 0 {
		return fmt.Errorf("the kernel's is too old: it cannot list its operations: %w", errno)
	}
	has := func(op int) bool { return p.ops[op].flags&ringOpSupported != 0 }
	for _, op := range []int{ringOpReadv, ringOpWritev, ringOpFsync, ringOpReadFixed, ringOpCancel, ringOpLinkTimeout,
		ringOpFallocate, ringOpRead, ringOpWrite} {
		if !has(op) {
			return fmt.Errorf("the kernel's is too old: it lacks operation %d", op)
		}
	}
	ringKnows.Store(&ringKnowledge{vectorsFixed: has(ringOpReadvFixed)})
	return nil
}
