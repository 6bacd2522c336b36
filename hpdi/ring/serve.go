package ring

import (
	"fmt"
	"log/slog"
	"net"
	"os"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	core "github.com/pollux-storage/pollux/internal/ring"
)

// ServeOptions are of a back-end. The zero value never polls, and serves 64 front-ends at
// once.
type ServeOptions struct {
	Poll  time.Duration // how long a queue looks for requests before it sleeps, at most
	Rings int           // front-ends at once; 0 is 64
	Log   *slog.Logger  // is told of front-ends that come, go and break the rules; nil is nobody
}

// Server is a back-end: it serves a device to front-ends. Each queue of a ring becomes a
// queue of the device.
type Server struct {
	dev  hpdi.Device
	core *core.Server
}

// NewServer returns a back-end for a device, which stays the caller's and must be one that
// takes memory from anywhere: payload is handed to it where it lies, in memory that
// belongs to the front-end.
func NewServer(dev hpdi.Device, o ServeOptions) (*Server, error) {
	info := dev.Info()
	if info.SharedMemory {
		return nil, fmt.Errorf("ring: %s (%s) cannot be served: %w", info.Name, info.Driver, hpdi.ErrMemory)
	}
	if err := factsOf(info).Check(); err != nil {
		return nil, fmt.Errorf("ring: %s (%s) cannot be served: %w", info.Name, info.Driver, err)
	}
	s := &Server{dev: dev}
	s.core = core.NewServer(target{dev}, core.Options{Poll: o.Poll, Rings: o.Rings, Log: o.Log})
	return s, nil
}

// Listen returns a socket at path for Serve. What a server that has died left there is
// replaced.
func Listen(path string) (*net.UnixListener, error) {
	if st, err := os.Lstat(path); err == nil && st.Mode()&os.ModeSocket != 0 {
		if c, err := net.Dial("unixpacket", path); err == nil {
			c.Close()
			return nil, fmt.Errorf("ring: somebody serves at %s already", path)
		}
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("ring: %w", err)
		}
	}
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: path, Net: "unixpacket"})
	if err != nil {
		return nil, fmt.Errorf("ring: %w", err)
	}
	return l, nil
}

// Serve accepts front-ends until the listener is closed or Close is called.
func (s *Server) Serve(l *net.UnixListener) error { return s.core.Serve(l) }

// Changed tells all front-ends that what Info of the device says has changed.
func (s *Server) Changed() { s.core.Changed() }

// Close ends all connections when what runs has ended. What was not begun stays in the
// rings, for the back-end that comes next.
func (s *Server) Close() { s.core.Close() }

// target serves a device.
type target struct{ dev hpdi.Device }

func factsOf(i hpdi.Info) core.Facts {
	return core.Facts{
		Size: i.Size, BlockSize: i.BlockSize, MaxLength: core.MaxLength, Discard: i.Discard, Zeroes: i.Zeroes, Durable: i.Durable,
		Status: i.Status, ReadOnly: i.ReadOnly, Direct: i.Direct, Rotates: i.Rotates, CancelAll: i.Cancel == hpdi.CancelAll,
	}
}

func (t target) Facts() core.Facts { return factsOf(t.dev.Info()) }

func (t target) Attach(core.Shape, int) (core.Runner, error) { return runner(t), nil }

// runner runs requests by queues of the device. It keeps no tags: what an earlier
// back-end may have run is run again, which changes nothing as long as the front-end
// has waited for the requests that it depends on.
type runner struct{ dev hpdi.Device }

func (runner) Detach(bool) {}

// Run serves a queue.
func (n runner) Run(q *core.Queue) (err error) {
	dq, err := n.dev.NewQueue(q.Depth())
	if err != nil {
		return err
	}
	// Closing waits for what is in flight.
	defer func() {
		if e := dq.Close(); err == nil && e != nil {
			err = e
		}
	}()
	w := &worker{q: q, dq: dq, reqs: make([]hpdi.Request, q.Depth()), events: n.dev.Info().Event}
	w.more = w.look
	w.cancel = func(r *core.Request) { dq.Cancel(&w.reqs[r.Slot]) }
	return w.run()
}

// worker is the goroutine of a queue.
type worker struct {
	q      *core.Queue
	dq     hpdi.Queue
	reqs   []hpdi.Request // of each slot
	batch  []*hpdi.Request
	done   []*hpdi.Request
	events bool // the device has a descriptor; it is asked for when the worker has to sleep
	more   func() bool
	cancel func(*core.Request)
	err    error // of the device's queue
}

func (w *worker) run() error {
	for {
		began, err := w.begin()
		if err != nil {
			return err
		}
		ended := w.end(0)
		w.q.Cancels(w.cancel)
		if w.err != nil {
			return w.err
		}
		w.q.Flush()
		if w.q.Stopping() && w.q.Running() == 0 {
			return nil
		}
		if began || ended {
			continue
		}
		event := -1
		if w.q.Running() > 0 && w.events {
			event = w.dq.Event()
		}
		if w.q.Running() > 0 && event < 0 || w.q.Stopping() {
			// A device without a descriptor: nothing else is begun until something of it ends.
			w.end(1)
		} else if err := w.q.Idle(event, -1, w.more); err != nil {
			return err
		}
	}
}

// look says whether requests have ended at the device.
func (w *worker) look() bool { return w.q.Running() > 0 && w.end(0) || w.err != nil }

// begin gives all new requests to the device.
func (w *worker) begin() (bool, error) {
	w.batch = w.batch[:0]
	for {
		r, err := w.q.Next()
		if err != nil {
			return false, err
		}
		if r == nil {
			break
		}
		w.batch = append(w.batch, w.translate(r))
	}
	if len(w.batch) == 0 {
		return false, nil
	}
	return true, w.dq.Submit(w.batch...)
}

// translate makes a request of the device from one of the ring.
func (w *worker) translate(r *core.Request) *hpdi.Request {
	h := &w.reqs[r.Slot]
	extents := h.Extents[:0]
	*h = hpdi.Request{Offset: r.Offset, User: r, Extents: extents}
	switch r.Op {
	case core.OpRead:
		h.Op, h.Vec = hpdi.OpRead, r.Vec
	case core.OpWrite:
		h.Op, h.Vec, h.Durable = hpdi.OpWrite, r.Vec, r.Flags&core.FlagDurable != 0
	case core.OpFlush:
		h.Op, h.Offset = hpdi.OpFlush, 0
	case core.OpDiscard:
		h.Op, h.Length = hpdi.OpDiscard, r.Length
	case core.OpWriteZeroes:
		h.Op, h.Length = hpdi.OpWriteZeroes, r.Length
	case core.OpStatus:
		h.Op, h.Length = hpdi.OpStatus, r.Length
		if cap(h.Extents) == 0 {
			h.Extents = make([]hpdi.Extent, 0, core.Segments)
		}
	}
	return h
}

// end completes what has ended at the device, and says whether anything has.
func (w *worker) end(least int) bool {
	if w.q.Running() == 0 {
		return false
	}
	var err error
	if w.done, err = w.dq.Wait(least, w.done[:0]); err != nil {
		w.err = err
		return true
	}
	for _, h := range w.done {
		r := h.User.(*core.Request)
		h.Vec = nil
		if h.Err != nil {
			w.q.Done(r, statusOf(h.Err), h.Err.Error())
			continue
		}
		for _, x := range h.Extents {
			if !w.q.AddExtent(r, core.Extent{Length: uint64(x.Length), State: uint64(x.State)}) {
				break
			}
		}
		w.q.Done(r, core.StatusOK, "")
	}
	return len(w.done) > 0
}
