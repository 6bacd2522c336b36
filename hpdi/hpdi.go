// Package hpdi is the high-performance device interface: the one way in which
// Pollux, and any application beside it, reaches storage devices.
//
// A program opens a [Device] by its URI (hpdi/open, which lists all drivers) or
// through a driver's own package, takes one [Queue] for each goroutine that does
// I/O, fills in [Request] values and submits them. The program does not know
// which driver serves it: what a device can do is data, in [Info].
//
// # Memory
//
// A request carries its data as vectors into memory that belongs to the
// application. Drivers do not copy payload: what the application passes is what
// the kernel, the ring or the peer sees. Only where the device is memory itself
// (hpdi/mem) is the copy the transfer. Devices that do direct I/O demand
// vectors that are aligned to Info.BlockSize; [Alloc] returns such memory, and
// Register makes a piece of memory known to a device ahead of time so that a
// driver can pin it once instead of at each request.
//
// From Submit until Wait returns the request, its memory is the driver's. That
// holds for requests that were cancelled or whose deadline has passed too: they
// come back when nobody can touch their memory any more, and not before.
//
// # Durability
//
// A completed write is durable only after a later completed OpFlush on any
// queue of the same device, unless its request was Durable: then it is when it
// completes, in one round trip instead of two, and says nothing about other
// writes. Requests that are in flight together complete in any order.
//
// # Waiting
//
// Completions are polled (Wait for none), waited for (Wait for some) or waited
// for together with other things: [Queue.Event] is a file descriptor for poll
// and epoll. All three mix freely on one queue.
//
// # Errors
//
// What has gone wrong with a request is told by errors.Is and the errors of this
// package; the text of an error names the device and what to do.
package hpdi

// Info describes an open device.
type Info struct {
	Name      string // how the user named it, for messages
	Driver    string // what serves it: a driver of hpdi/open, or its engine, as "io_uring"
	Size      int64  // bytes, a multiple of BlockSize
	BlockSize int    // bytes: alignment and granularity of every request
	Direct    bool   // I/O bypasses the page cache
	// SharedMemory says that vectors must lie in memory of [Alloc], which a peer can
	// map; a request with other memory ends with ErrMemory.
	SharedMemory bool
	Discard      bool   // OpDiscard is supported
	Zeroes       bool   // OpWriteZeroes is supported without writing data
	Durable      bool   // writes may be Durable
	ReadOnly     bool   // only OpRead, OpFlush and OpStatus are served
	Rotates      bool   // going from one place to another costs a seek, or nobody knows that it does not
	Status       bool   // OpStatus is supported
	Event        bool   // queues have a descriptor for poll and epoll
	Thread       bool   // a queue belongs to the thread that uses it first; see runtime.LockOSThread
	Cancel       Cancel // which requests Queue.Cancel and Request.Deadline reach
	Note         string // why a faster way was not taken, empty when none was missed
}

// Plain returns the information without what queues that embed [Plain] do not
// have. It is for devices that wrap others.
func (i Info) Plain() Info {
	i.Status, i.Event, i.Cancel = false, false, CancelNone
	return i
}

// Cancel says which requests a driver can end before they are done.
type Cancel uint8

const (
	// CancelNone: requests take as long as they take, whatever their deadlines.
	CancelNone Cancel = iota
	// CancelQueued: those that the driver has not handed over yet.
	CancelQueued
	// CancelAll: those that are under way at the device too.
	CancelAll
)

// String returns "none", "queued" or "all".
func (c Cancel) String() string {
	switch c {
	case CancelQueued:
		return "queued"
	case CancelAll:
		return "all"
	}
	return "none"
}

// Device is an open device. Its methods may be called concurrently.
type Device interface {
	Info() Info
	// NewQueue returns a queue that takes up to depth requests at once.
	NewQueue(depth int) (Queue, error)
	// Register makes memory known ahead of its use, so that a driver can pin or
	// map it once. It is an optimisation: memory that is not registered is served
	// too, drivers that have no use for it return nil, and where the kernel or a
	// peer will not have it Info.Note says so. The same memory may be registered
	// several times; pieces that overlap without being the same are an error.
	Register(mem []byte) error
	// Unregister takes one Register of the same memory back. It must come before
	// the memory is unmapped or punched out, with no request on it in flight: a
	// driver may hold on to the pages that lay there. What is not registered is
	// left alone. Close forgets all.
	Unregister(mem []byte) error
	// Close frees the device, and its lock when it was opened under one. All
	// its queues must have been closed.
	Close() error
}
