package hpdi

import (
	"fmt"
	"time"
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
	// OpStatus asks what Length bytes at Offset are made of, for Extents. It
	// moves no data.
	OpStatus
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
	case OpStatus:
		return "block-status"
	}
	return fmt.Sprintf("op(%d)", uint8(o))
}

// ExtentState is what a part of a device is made of.
type ExtentState uint8

const (
	// Data is allocated, and reads as anything.
	Data ExtentState = iota
	// Hole is not allocated and reads as zero.
	Hole
	// Zero is allocated and reads as zero.
	Zero
)

// String returns "data", "hole" or "zero".
func (s ExtentState) String() string {
	switch s {
	case Data:
		return "data"
	case Hole:
		return "hole"
	case Zero:
		return "zero"
	}
	return fmt.Sprintf("state(%d)", uint8(s))
}

// Extent is a part of a device that is alike throughout.
type Extent struct {
	Length int64 // bytes, a multiple of the block size, more than 0
	State  ExtentState
}

// Request is one operation. The application owns it and its memory again once
// a queue has returned it as completed.
type Request struct {
	Op     Op
	Offset int64 // bytes from the start of the device, a multiple of BlockSize
	// Vec is the data of a read or write, in order. Each vector's length is a
	// multiple of BlockSize.
	Vec [][]byte
	// Length is the number of bytes of a discard, write-zeroes or block status.
	// Reads and writes take it from Vec.
	Length int64
	// Extents is the answer to a block status: what lies from Offset on, in order
	// and without gaps. The application passes it empty, with a capacity for as many
	// as it wants and at least one. The answer covers at least a block of a range
	// that is not empty and never goes beyond its end; it may end before that, and
	// the application asks again from there on.
	Extents []Extent
	// Durable makes a write complete only when it survives a power cut. It is
	// for devices with Info.Durable.
	Durable bool
	// Deadline is when the request ends with ErrDeadline if it has not completed,
	// as far as Info.Cancel goes; the zero time is never. Queues look at deadlines
	// in Submit, and in Wait and while it blocks: whoever waits for Queue.Event
	// calls Wait when the next deadline has passed.
	Deadline time.Time
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

// AddExtent is for drivers: it adds n bytes to the answer of a block status, to
// the last extent if that is of the same state, and cuts what lies beyond the
// range that was asked for. It reports whether the driver is to go on: whether
// there is more to tell, and place for it.
func (r *Request) AddExtent(n int64, state ExtentState) bool {
	var have int64
	for _, e := range r.Extents {
		have += e.Length
	}
	if n = min(n, r.Length-have); n <= 0 {
		return have < r.Length
	}
	if last := len(r.Extents) - 1; last >= 0 && r.Extents[last].State == state {
		r.Extents[last].Length += n
	} else if len(r.Extents) == cap(r.Extents) {
		return false
	} else {
		r.Extents = append(r.Extents, Extent{Length: n, State: state})
	}
	return have+n < r.Length
}

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
	case OpStatus:
		if !info.Status {
			return ErrUnsupported
		}
		if len(r.Extents) > 0 || cap(r.Extents) == 0 {
			return ErrExtents
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

// Late returns ErrDeadline if the request has a deadline and now is not before it.
// It is for drivers.
func (r *Request) Late(now time.Time) error {
	if !r.Deadline.IsZero() && !now.Before(r.Deadline) {
		return ErrDeadline
	}
	return nil
}
