// Package hpdi is the high-performance device interface: the one way in which
// Pollux, and any application beside it, reaches storage devices.
//
// A program opens a [Device] through a driver (hpdi/file for files and block
// devices, hpdi/mem for memory), takes one [Queue] for each goroutine that
// does I/O, fills in [Request] values and submits them. The program does not
// know which driver serves it: what a device can do is data, in [Info].
//
// # Memory
//
// A request carries its data as vectors into memory that belongs to the
// application. Drivers never copy payload: what the application passes is what
// the kernel, the ring or the peer sees. Devices that do direct I/O demand
// vectors that are aligned to Info.BlockSize; [Alloc] returns such memory, and
// Register makes a piece of memory known to a device ahead of time so that a
// driver can pin it once instead of at each request.
//
// # Durability
//
// A completed write is durable only after a later completed OpFlush on any
// queue of the same device, unless its request was Durable: then it is when it
// completes, in one round trip instead of two, and says nothing about other
// writes. Requests that are in flight together complete in any order.
package hpdi

import (
	"errors"
	"fmt"
	"unsafe"
)

// Op says what a request does.
type Op uint8

// The operations a request may carry.
const (
	// OpRead fills Vec from the device.
	OpRead Op = iota + 1
	// OpWrite sends Vec to the device.
	OpWrite
	// OpFlush makes all writes that completed before it was submitted durable.
	OpFlush
	// OpDiscard tells the device that Length bytes at Offset are not needed;
	// what they read as afterwards is undefined.
	OpDiscard
	// OpWriteZeroes makes Length bytes at Offset read as zero.
	OpWriteZeroes
)

// String returns the lower-case name of the operation.
func (o Op) String() string {
	switch o {
	case OpRead:
		return "read"
	case OpWrite:
		return "write"
	case OpFlush:
		return "flush"
	case OpDiscard:
		return "discard"
	case OpWriteZeroes:
		return "write-zeroes"
	}
	return fmt.Sprintf("op(%d)", uint8(o))
}

// Request is one operation. The application owns it and its memory again once
// a queue has returned it as completed.
type Request struct {
	Op     Op
	Offset int64 // bytes from the start of the device, a multiple of BlockSize
	// Vec is the data of a read or write, in order. Each vector's length is a
	// multiple of BlockSize.
	Vec [][]byte
	// Length is the number of bytes of a discard or write-zeroes. Reads and
	// writes take it from Vec.
	Length int64
	// Durable makes a write complete only when it survives a power cut. It is
	// for devices with Info.Durable.
	Durable bool
	// User is for the application; drivers do not touch it.
	User any

	// Err is the result, valid once the request has completed.
	Err error
}

// Bytes returns the number of bytes that the request covers.
func (r *Request) Bytes() int64 {
	if r.Op == OpRead || r.Op == OpWrite {
		var n int64
		for _, v := range r.Vec {
			n += int64(len(v))
		}
		return n
	}
	return r.Length
}

// Info describes an open device.
type Info struct {
	Name      string // how the user named it, for messages
	Driver    string // "io_uring", "sync", "mem"
	Size      int64  // bytes, a multiple of BlockSize
	BlockSize int    // bytes: alignment and granularity of every request
	Direct    bool   // I/O bypasses the page cache
	Discard   bool   // OpDiscard is supported
	Zeroes    bool   // OpWriteZeroes is supported without writing data
	Durable   bool   // writes may be Durable
	ReadOnly  bool   // only OpRead and OpFlush are served
	Rotates   bool   // going from one place to another costs a seek, or nobody knows that it does not
	Note      string // why a faster way was not taken, empty when none was missed
}

// Queue is a path to a device for one goroutine at a time.
type Queue interface {
	// Submit hands requests to the device. It may block while the queue is
	// full. Requests that are malformed complete with an error like others;
	// the returned error says that the queue itself no longer works.
	Submit(reqs ...*Request) error
	// Wait blocks until at least min submitted requests have completed and
	// appends all completed ones to done. It never waits for more than are in
	// flight, so with none it returns at once.
	Wait(min int, done []*Request) ([]*Request, error)
	// Close waits for requests in flight and frees the queue. Requests that
	// Wait has not returned by then are the application's again, with Err set.
	Close() error
}

// Device is an open device. Its methods may be called concurrently.
type Device interface {
	Info() Info
	// NewQueue returns a queue that takes up to depth requests at once.
	NewQueue(depth int) (Queue, error)
	// Register makes memory known ahead of its use. It is an optimisation;
	// drivers that have no use for it return nil.
	Register(mem []byte) error
	// Close frees the device, and its lock when it was opened under one. All
	// its queues must have been closed.
	Close() error
}

// Copies is a Device that keeps several copies of each block and cannot tell by
// itself which of them is good.
type Copies interface {
	Device
	// ReadGood reads len(buf) bytes at off from the first copy for which good
	// returns true, and makes those before it like it. It returns how many it
	// has repaired. The range must not cross a multiple of 1 MiB.
	ReadGood(off int64, buf []byte, good func([]byte) bool) (repaired int, err error)
	// NumCopies returns how many copies there are, those that are away included.
	NumCopies() int
	// ReadCopy reads at off from copy i, from 0, alone and repairs nothing. It
	// returns ErrNoCopy when that copy is away, or need not have what was written
	// to the range. What is being written meanwhile may be read in part.
	ReadCopy(i int, off int64, vec ...[]byte) error
	// Settle writes p, which was read from one of the copies at off, to those
	// that hold something else, and makes it durable. It is for what a crash
	// may have left on some copies only, once somebody has gone by it. It
	// returns how many copies it has written.
	Settle(off int64, p []byte) (written int, err error)
	// ProveOwn reads what the device keeps for itself on its copies, writes anew what
	// is not as it should be, and returns how many blocks were not.
	ProveOwn() (mended int, err error)
	// Verified says that whoever reads bytes from off on checks them, and uses
	// ReadGood or Settle, so that the device need not decide which copy to
	// believe.
	Verified(off int64)
	// Unused gives the device a function that says of a range, from the offset
	// that Verified was given on, that nobody reads it before it is written
	// again: then it need not be the same on all copies. It is called with
	// nothing being written to the range, until the device is closed.
	Unused(unused func(off, n int64) bool)
}

// Errors of requests and devices. Drivers wrap them with what was being done.
var (
	// ErrRange: the request reaches past the device.
	ErrRange = errors.New("beyond the end of the device")
	// ErrAlign: offset or vectors are not multiples of the block size.
	ErrAlign = errors.New("not aligned to the device's block size")
	// ErrUnsupported: the device cannot do this operation.
	ErrUnsupported = errors.New("operation not supported by the device")
	// ErrReadOnly: the device was opened for reading only.
	ErrReadOnly = errors.New("device is open for reading only")
	// ErrClosed: the queue or device was closed.
	ErrClosed = errors.New("device is closed")
	// ErrNoCopy: the copy that was asked for is away or not filled yet.
	ErrNoCopy = errors.New("this copy is away or not filled yet")
	// ErrLocked: somebody else has the device open.
	ErrLocked = errors.New("device is locked by another process")
)

// Check returns the error that a driver must complete r with before doing
// anything, or nil when r is well formed for a device described by info.
func (r *Request) Check(info Info) error {
	if info.ReadOnly && (r.Op == OpWrite || r.Op == OpDiscard || r.Op == OpWriteZeroes) {
		return ErrReadOnly
	}
	if r.Durable && (r.Op != OpWrite || !info.Durable) {
		return ErrUnsupported
	}
	switch r.Op {
	case OpFlush:
		return nil
	case OpDiscard:
		if !info.Discard {
			return ErrUnsupported
		}
	case OpWriteZeroes:
		if !info.Zeroes {
			return ErrUnsupported
		}
	case OpRead, OpWrite:
	default:
		return ErrUnsupported
	}
	bs := int64(info.BlockSize)
	n := r.Bytes()
	if r.Offset%bs != 0 || n%bs != 0 {
		return ErrAlign
	}
	if r.Op == OpRead || r.Op == OpWrite {
		for _, v := range r.Vec {
			if int64(len(v))%bs != 0 {
				return ErrAlign
			}
			// What a disk demands of addresses differs (4 to 4096 bytes). One
			// rule for all shows a mistake on the first disk, not on the last.
			if info.Direct && uintptr(unsafe.Pointer(unsafe.SliceData(v)))%uintptr(bs) != 0 && len(v) > 0 {
				return ErrAlign
			}
		}
	}
	if r.Offset < 0 || n < 0 || r.Offset > info.Size-n {
		return ErrRange
	}
	return nil
}

// Do submits reqs, which must be the only ones in flight on q, waits for all
// of them and returns the first error in their order.
func Do(q Queue, reqs ...*Request) error {
	if err := q.Submit(reqs...); err != nil {
		return err
	}
	done, err := q.Wait(len(reqs), make([]*Request, 0, len(reqs)))
	if err != nil {
		return err
	}
	if len(done) != len(reqs) {
		return fmt.Errorf("hpdi: %d of %d requests completed", len(done), len(reqs))
	}
	for _, r := range reqs {
		if r.Err != nil {
			return fmt.Errorf("%s of %d bytes at %d: %w", r.Op, r.Bytes(), r.Offset, r.Err)
		}
	}
	return nil
}
