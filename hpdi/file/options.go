package file

import (
	"fmt"
	"net/url"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
)

// Properties is what URIs of this driver take behind the path. The engine is the scheme's
// to say.
var Properties = []hpdi.Property{
	{Name: "direct", Type: hpdi.TypeEnum, Default: string(DirectAuto), Values: []string{string(DirectAuto), string(DirectOn), string(DirectOff)},
		Meaning: "Whether requests bypass the page cache: where the file system allows it, or not at all otherwise, or never"},
	{Name: "read-only", Type: hpdi.TypeBool, Default: "off", Meaning: "Open for reading only"},
	{Name: "lock", Type: hpdi.TypeBool, Default: "off", Meaning: "Refuse a file that another has opened under a lock, and a block device that is mounted"},
	{Name: "fixed", Type: hpdi.TypeEnum, Default: string(FixedAuto), Values: []string{string(FixedAuto), string(FixedOff)},
		Meaning: "Register memory, and a file without a lock, with io_uring where the kernel can"},
	{Name: "poll", Type: hpdi.TypeDuration, Default: "0s", Max: int64(MaxPoll),
		Meaning: "How long a queue of io_uring looks for results at most before it sleeps"},
	{Name: "block", Type: hpdi.TypeBool, Default: "off",
		Meaning: "Keep the thread while waiting for io_uring: fewer switches, for programs with a processor for each queue"},
	{Name: "thread", Type: hpdi.TypeBool, Default: "off",
		Meaning: "Queues of io_uring belong to the thread that uses them first, and cost less: for programs that lock goroutines to threads"},
}

// ParseOptions makes options of the query of a URI. Its errors wrap hpdi.ErrProperty.
func ParseOptions(values url.Values) (Options, error) {
	s, err := hpdi.ParseSettings(Properties, values)
	if err != nil {
		return Options{}, err
	}
	return Options{
		ReadOnly: s.Bool("read-only"),
		Lock:     s.Bool("lock"),
		Direct:   Direct(s.Text("direct")),
		Fixed:    Fixed(s.Text("fixed")),
		Poll:     s.Duration("poll"),
		Block:    s.Bool("block"),
		Thread:   s.Bool("thread"),
	}, nil
}

// Direct says whether I/O bypasses the page cache.
type Direct string

// The choices for Direct; the empty string is DirectAuto.
const (
	DirectAuto Direct = "auto" // where the file system allows it
	DirectOn   Direct = "on"   // or fail
	DirectOff  Direct = "off"
)

// Engine says how requests reach the kernel.
type Engine string

// The choices for Engine; the empty string is EngineAuto.
const (
	EngineAuto  Engine = "auto"     // io_uring where the kernel allows it
	EngineURing Engine = "io_uring" // or fail
	EngineSync  Engine = "sync"     // preadv and pwritev on goroutines
)

// Fixed says whether memory and file are registered with io_uring.
type Fixed string

// The choices for Fixed; the empty string is FixedAuto.
const (
	// FixedAuto is memory that the application registers, and the file unless it is
	// opened under a lock, as far as the kernel can.
	FixedAuto Fixed = "auto"
	FixedOff  Fixed = "off"
)

// Options says how to open a file. The zero value means: for writing, without
// a lock, by the fastest way there is.
type Options struct {
	ReadOnly bool
	Lock     bool // fail with hpdi.ErrLocked if another description holds the lock
	Direct   Direct
	Engine   Engine
	// Known is what an earlier Open of this file for the same purpose has found, or nil.
	// If the file is still that one, what it can do is not tried out again. It is for
	// whoever opens many devices and has somebody waiting; Direct and Engine must be
	// left to choose.
	Known *Known
	// Fixed says whether memory and the file itself are registered with io_uring, which
	// spares the kernel to look both up for each request.
	Fixed Fixed
	// Poll is the longest time that a queue looks for results before its goroutine
	// sleeps, 0 for none. How long it does look goes by how often that has paid off.
	// Only io_uring polls.
	Poll time.Duration
	// Block makes a goroutine that waits for io_uring wait in the kernel, and keep its
	// thread, instead of in the runtime's poller. That takes fewer switches for each
	// request. But the runtime learns only after 20 µs to 10 ms that the thread's
	// processor is free: it is for programs that have a processor for each queue that
	// waits, or nothing else to do.
	Block bool
	// Thread binds each queue of io_uring to the thread that hands over its first request:
	// the goroutine must be locked to it (runtime.LockOSThread) until the queue is closed.
	// To another thread the queue is an error, ErrThread. In return the kernel never
	// interrupts that thread for a result; it takes them all when it asks. It waits in the
	// kernel, as with Block. Memory that is registered or unregistered once the queue is
	// in use is so for the kernel from the next Submit on, and Info.Note is late likewise.
	// It takes Linux 6.1; Info.Thread says whether queues are bound. The sync engine has
	// no use for it.
	Thread bool
}

// MaxPoll bounds Options.Poll.
const MaxPoll = 10 * time.Millisecond

// Validate says what is wrong with o, if anything is.
func (o Options) Validate() error {
	switch o.Direct {
	case "", DirectAuto, DirectOn, DirectOff:
	default:
		return fmt.Errorf("direct I/O is %q: must be auto, on or off", o.Direct)
	}
	switch o.Engine {
	case "", EngineAuto, EngineURing, EngineSync:
	default:
		return fmt.Errorf("engine is %q: must be auto, io_uring or sync", o.Engine)
	}
	switch o.Fixed {
	case "", FixedAuto, FixedOff:
	default:
		return fmt.Errorf("fixed buffers and files are %q: must be auto or off", o.Fixed)
	}
	if o.Poll < 0 || o.Poll > MaxPoll {
		return fmt.Errorf("poll is %v: must be from 0 to %v", o.Poll, MaxPoll)
	}
	return nil
}
