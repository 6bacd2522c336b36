package file

import (
	"errors"
	"fmt"
	"slices"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// ErrThread is the error of a queue that is bound to a thread (Options.Thread) and is used
// by another one. The queue works on, for its own thread.
var ErrThread = errors.New("the queue belongs to the thread that used it first: lock its goroutine to one (runtime.LockOSThread), or open the file without thread")

// The part of the kernel's interface that says when results are taken in.
const (
	ringSubmitAll    = 1 << 7 // Linux 5.18
	ringTaskrunFlag  = 1 << 9 // 5.19
	ringSingleIssuer = 1 << 12
	ringDeferTaskrun = 1 << 13 // 6.1
	ringDisabled     = 1 << 6

	ringSQTaskrun   = 1 << 2 // flag of the submission queue: results are due
	ringEnableRings = 12

	ringRegisterEventfd = 4
)

// binding says whether a ring belongs to a thread.
//
// What completes a request in the kernel leaves work for the thread that has submitted it.
// For a ring that is free that thread is interrupted or woken at once, result by result,
// because nobody knows which thread will ask. The thread of a bound ring is left alone
// until it asks, and then does all that is there.
type binding int8

const (
	ringFree    binding = iota // any thread uses it
	ringUnbound                // to be bound to the thread that uses it first
	ringBound
)

// setUpRing calls io_uring_setup with the best flags that the kernel knows. A ring that is
// to be bound begins disabled: the thread that enables it has it, and until then any may
// register with it.
//
// IORING_SETUP_COOP_TASKRUN is not among them. It spares a free ring the interruptions as
// well, but a result is then delayed until the thread that has submitted its request
// happens to enter the kernel, and threads run other goroutines meanwhile.
func setUpRing(n int, thread bool, p *ringParams) (fd int, errno unix.Errno) {
	tries := []uint32{ringSubmitAll | ringTaskrunFlag | ringSingleIssuer | ringDeferTaskrun | ringDisabled, ringSubmitAll, 0}
	if !thread {
		tries = tries[1:]
	}
	for _, flags := range tries {
		*p = ringParams{flags: flags}
		at, _, e := unix.Syscall(unix.SYS_IO_URING_SETUP, uintptr(n), uintptr(unsafe.Pointer(p)), 0)
		if fd, errno = int(at), e; errno != unix.EINVAL {
			break
		}
	}
	return fd, errno
}

// deferred says that the kernel keeps results until they are asked for.
func (r *ring) deferred() bool { return atomic.LoadUint32(r.sqFlags)&ringSQTaskrun != 0 }

// collect asks the kernel for results that it keeps. It does not wait.
func (r *ring) collect() unix.Errno {
	if !r.deferred() || r.results() > 0 {
		return 0
	}
	return r.enter(0, 0, ringEnterGetEvents)
}

// source returns a descriptor that is readable while there are results: the ring itself.
// But of one that is bound the kernel does not wake who polls it for what it keeps; that
// has an eventfd, which stays readable until quiet.
func (r *ring) source() (int, error) {
	if r.bound == ringFree {
		return r.fd, nil
	}
	if r.kept != 0 {
		return r.kept, nil
	}
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC|unix.EFD_NONBLOCK)
	if err != nil {
		return -1, err
	}
	n := int32(fd)
	if errno := r.register(ringRegisterEventfd, unsafe.Pointer(&n), 1); errno != 0 {
		_ = unix.Close(fd) // the error before is the one to tell
		return -1, errno
	}
	r.kept = fd
	return fd, nil
}

// quiet makes the source unreadable. What came before shows in the ring, and what comes
// later makes it readable again.
func (r *ring) quiet() {
	if r.kept != 0 {
		var count [8]byte
		_, _ = unix.Read(r.kept, count[:]) // there may be nothing
	}
}

// change is memory that came or went, for a ring that takes it from its thread alone.
type change struct {
	in  *registration
	out pieces
}

// lateChanges are changes in the order in which they are to be made.
type lateChanges struct {
	any  atomic.Bool // whether the list is not empty
	list []change    // guarded by the device's mu
}

// later puts a change off to the next Submit, and says whether it had to. The caller holds
// the device's mu.
func (q *uringQueue) later(c change) bool {
	if q.ring.bound != ringBound {
		return false
	}
	q.late.list = append(q.late.list, c)
	q.late.any.Store(true)
	return true
}

// never takes memory off the list that was to be registered and has gone before that, and
// says whether there was such. The caller holds the device's mu.
func (q *uringQueue) never(reg *registration) bool {
	i := slices.IndexFunc(q.late.list, func(c change) bool { return c.in == reg })
	if i < 0 {
		return false
	}
	q.late.list = slices.Delete(q.late.list, i, i+1)
	return true
}

// enterThread binds the ring to the calling thread if it is the first, and registers what
// has been put off.
func (q *uringQueue) enterThread() error {
	if q.ring.bound == ringUnbound {
		return q.bind()
	}
	if q.late.any.Load() {
		return q.catchUp()
	}
	return nil
}

func (q *uringQueue) bind() error {
	d := q.dev
	d.mu.Lock()
	defer d.mu.Unlock()
	if errno := q.ring.register(ringEnableRings, nil, 0); errno != 0 {
		return d.fail(fmt.Errorf("bind queue to the thread: %w", errno))
	}
	q.ring.bound = ringBound
	return nil
}

// catchUp makes the changes that were put off.
func (q *uringQueue) catchUp() error {
	d := q.dev
	d.mu.Lock()
	defer d.mu.Unlock()
	// A probe for no operations changes nothing, but the kernel refuses it to a wrong thread.
	if errno := q.ring.register(ringRegisterProbe, unsafe.Pointer(new([16]byte)), 0); errno == unix.EEXIST {
		return d.fail(ErrThread)
	}
	var err error
	for _, c := range q.late.list {
		if c.in != nil {
			q.attachNow(c.in)
		} else {
			err = errors.Join(err, q.detachNow(c.out))
		}
	}
	q.late.list = nil
	q.late.any.Store(false)
	d.tellRefused()
	if err != nil {
		return fmt.Errorf("%s: unregister memory: %w", d.info.Name, err)
	}
	return nil
}
