package ring

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync/atomic"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	core "github.com/pollux-storage/pollux/internal/ring"
)

// Options are of a Server. Volume must be set.
type Options struct {
	Volume   block.Volume  // stays the caller's
	ReadOnly bool          // refuse changes to a volume that could be changed
	Poll     time.Duration // how long a queue looks for requests before it sleeps, at most; 0 is never
	Rings    int           // front-ends at once; 0 is 64
	Workers  int           // of each queue, for requests that may wait for a device; 0 is 16
	Log      *slog.Logger  // nil is nobody
}

// Stats are sums since the server was made, and how it is now.
type Stats struct {
	Rings                   int // front-ends that are connected
	Reads                   uint64
	Writes                  uint64
	Flushes                 uint64
	Discards                uint64
	WriteZeroes             uint64
	Statuses                uint64
	ReadBytes, WrittenBytes uint64
	Errors                  uint64 // requests that have failed
	Again                   uint64 // requests that an earlier back-end has left
	Skipped                 uint64 // of these, those whose change was in the log
	Rerun                   uint64 // of these, those that were run
}

// Server serves one volume to front-ends.
type Server struct {
	o      Options
	core   *core.Server
	ctx    context.Context // of requests; cancelled when they take too long to end
	cancel context.CancelFunc

	reads, writes, flushes, discards, zeroes, statuses, readBytes, writtenBytes, errs, again, skipped, rerun atomic.Uint64
}

// New returns a server that serves once Serve is called.
func New(o Options) (*Server, error) {
	if o.Volume == nil {
		return nil, errors.New("ring: no volume")
	}
	if o.Workers == 0 {
		o.Workers = 16
	}
	if o.Workers < 1 || o.Rings < 0 || o.Poll < 0 {
		return nil, fmt.Errorf("ring: %d workers, %d rings and %v of polling: none may be negative", o.Workers, o.Rings, o.Poll)
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{o: o}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	s.core = core.NewServer(target{s}, core.Options{Poll: o.Poll, Rings: o.Rings, Log: o.Log.With("volume", o.Volume.Info().Name)})
	return s, nil
}

// Serve accepts front-ends until the listener, of the network "unixpacket", is closed, or until
// Shutdown. It leaves the listener open.
func (s *Server) Serve(l *net.UnixListener) error { return s.core.Serve(l) }

// Resized tells all front-ends the size of the volume.
func (s *Server) Resized() { s.core.Changed() }

// Stats returns what was served.
func (s *Server) Stats() Stats {
	return Stats{
		Rings: s.core.Rings(), Reads: s.reads.Load(), Writes: s.writes.Load(), Flushes: s.flushes.Load(),
		Discards: s.discards.Load(), WriteZeroes: s.zeroes.Load(), Statuses: s.statuses.Load(),
		ReadBytes: s.readBytes.Load(), WrittenBytes: s.writtenBytes.Load(), Errors: s.errs.Load(), Again: s.again.Load(), Skipped: s.skipped.Load(), Rerun: s.rerun.Load(),
	}
}

// Shutdown ends all connections once what runs has ended. When ctx ends before, requests
// that wait for devices are called off. What was not begun, or called off, stays in the rings for
// the next back-end.
func (s *Server) Shutdown(ctx context.Context) {
	stop := context.AfterFunc(ctx, s.cancel)
	defer stop()
	s.core.Close()
	s.cancel()
}

// target is the volume as rings see it.
type target struct{ s *Server }

func (t target) Facts() core.Facts {
	i := t.s.o.Volume.Info()
	return core.Facts{
		Size: i.Size, BlockSize: 512, MaxLength: block.MaxIO, ReadOnly: i.ReadOnly || t.s.o.ReadOnly,
		Discard: true, Zeroes: true, Durable: true, Status: true, CancelAll: true,
	}
}

// Attach opens the session of a ring.
func (t target) Attach(shape core.Shape, again int) (core.Runner, error) {
	ctx, cancel := context.WithTimeout(t.s.ctx, 10*time.Second)
	defer cancel()
	session, err := t.s.o.Volume.OpenSession(ctx, block.SessionID(shape.Session), shape.Queues, shape.Entries)
	switch {
	case errors.Is(err, block.ErrUnsupported):
		session = nil
	case err != nil:
		return nil, fmt.Errorf("session of the ring: %w", err)
	}
	if again > 0 && (session == nil || session.Fresh()) {
		t.s.o.Log.Warn("ring: nobody knows which of the requests in flight were done, they are done again", "volume", t.s.o.Volume.Info().Name, "requests", again)
	}
	return &runner{s: t.s, session: session, own: shape.Session}, nil
}

// runner serves one ring.
type runner struct {
	s       *Server
	own     uint64        // the number of the session
	session block.Session // nil: the volume keeps none
}

// Detach closes the session of a front-end that has ended, and leaves it to one that has
// not said so.
func (n *runner) Detach(ended bool) {
	switch {
	case n.session == nil:
	case ended:
		n.session.Close()
	default:
		n.session.Leave()
	}
}
