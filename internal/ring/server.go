package ring

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"
)

// Target is what a back-end serves. Its methods may be called concurrently.
type Target interface {
	// Facts tells of the device.
	Facts() Facts
	// Attach returns who runs the requests of a ring of this shape. again says how many
	// requests an earlier back-end may have run, and has not completed.
	Attach(s Shape, again int) (Runner, error)
}

// Runner runs the requests of one ring.
type Runner interface {
	// Run serves a queue on a goroutine of its own: it takes requests by Next, completes
	// each by Done or Later, and waits by Idle. It returns when the queue is to stop
	// and all its requests are done, or with an error that ends the connection, with all
	// requests done as well: nobody may touch their memory afterwards.
	Run(*Queue) error
	// Detach is called when all queues have ended. ended says that the front-end has said
	// that nothing of it is in flight and that it will not come back.
	Detach(ended bool)
}

// Options are of a Server. The zero value is complete.
type Options struct {
	// Poll is how long a queue looks for requests before it sleeps, at most.
	Poll time.Duration
	// Rings is how many front-ends there may be at once; 0 is 64.
	Rings int
	// Memory is how much a front-end may hand over in bytes; 0 is 16 GiB.
	Memory int64
	// Together is how much all of them may; 0 is four times Memory.
	Together int64
	// Log is told of front-ends that come, go and break the rules; nil is nobody.
	Log *slog.Logger
}

// patience is how long a front-end may take from connecting to start.
const patience = 10 * time.Second

// memories is how many memories a front-end may hand over.
const memories = 1 << 10

// Server serves front-ends that come to a socket.
type Server struct {
	target Target
	o      Options
	ctx    context.Context
	cancel context.CancelFunc
	conns  sync.WaitGroup

	mu     sync.Mutex // guards the following
	open   map[*conn]bool
	mapped int64 // bytes that all front-ends have handed over
}

// NewServer returns a server of target.
func NewServer(target Target, o Options) *Server {
	if o.Rings == 0 {
		o.Rings = 64
	}
	if o.Memory == 0 {
		o.Memory = 16 << 30
	}
	if o.Together == 0 {
		o.Together = 4 * o.Memory
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	s := &Server{target: target, o: o, open: map[*conn]bool{}}
	s.ctx, s.cancel = context.WithCancel(context.Background())
	return s
}

// Serve accepts front-ends until the listener is closed or Close is called. The listener
// is of the network "unixpacket".
func (s *Server) Serve(l *net.UnixListener) error {
	if err := l.SetDeadline(time.Time{}); err != nil && !errors.Is(err, net.ErrClosed) { // of an earlier server
		return fmt.Errorf("rings at %s: %w", l.Addr(), err)
	}
	stop := context.AfterFunc(s.ctx, func() { _ = l.SetDeadline(time.Unix(1, 0)) })
	defer stop()
	const firstPause, longestPause = 5 * time.Millisecond, time.Second
	for pause := firstPause; ; {
		c, err := l.AcceptUnix()
		switch {
		case err == nil:
			pause = firstPause
			s.admit(c)
			continue
		case s.ctx.Err() != nil, errors.Is(err, net.ErrClosed):
			return nil
		}
		// Most likely out of descriptors: it helps to wait.
		s.o.Log.Warn("ring: cannot accept a front-end, trying again", "address", l.Addr().String(), "error", err, "pause", pause)
		select {
		case <-s.ctx.Done():
			return nil
		case <-time.After(pause):
		}
		pause = min(2*pause, longestPause)
	}
}

// admit serves a front-end that has come to a socket, or tells it that there are too many.
func (s *Server) admit(c *net.UnixConn) {
	k := &conn{s: s, c: c}
	s.mu.Lock()
	closed, full := s.ctx.Err() != nil, len(s.open) >= s.o.Rings
	if !closed && !full {
		s.open[k] = true
		s.conns.Add(1)
	}
	s.mu.Unlock()
	if closed || full {
		if full {
			// The first message has room, so that this does not wait.
			_ = send(c, message{kind: msgNo, text: fmt.Sprintf("there are %d front-ends already, as many as are allowed", s.o.Rings)})
		}
		c.Close()
		return
	}
	go func() {
		defer s.conns.Done()
		k.run()
		s.mu.Lock()
		delete(s.open, k)
		s.mu.Unlock()
	}()
}

// Changed tells all front-ends the facts of the device anew.
func (s *Server) Changed() {
	s.mu.Lock()
	defer s.mu.Unlock()
	for k := range s.open {
		k.setFacts(s.target.Facts())
	}
}

// Rings returns how many front-ends are connected.
func (s *Server) Rings() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return len(s.open)
}

// Close ends all connections, once the requests that run have ended, and returns when
// that is so. What was submitted and not begun is left in the rings, for the next
// back-end.
func (s *Server) Close() {
	s.mu.Lock()
	s.cancel()
	for k := range s.open {
		k.hangUp()
	}
	s.mu.Unlock()
	s.conns.Wait()
}

// conn is one front-end.
type conn struct {
	s    *Server
	c    *net.UnixConn // nil: there is no socket
	hung chan struct{} // closed by hangUp then
	over sync.Once

	number uint64     // of this back-end of the ring
	facts  sync.Mutex // guards m against its end, and SetFacts
	m      *Memory
	known  atomic.Pointer[Facts]
	// mapped is what is mapped, by number; 0 is the data area. The goroutine of the
	// connection replaces it as a whole.
	mapped atomic.Pointer[[][]byte]

	ring    []byte
	bytes   int64 // reserved to be mapped, the ring included
	bells   []*Bell
	queues  []*Queue
	runner  Runner
	running sync.WaitGroup
	failed  chan error // of a queue
	bye     bool
}

// hangUp makes a connection end as if the front-end had closed it.
func (k *conn) hangUp() {
	if k.c == nil {
		k.over.Do(func() { close(k.hung) })
		return
	}
	_ = k.c.CloseRead()
}

// run serves a front-end that has come to the socket.
func (k *conn) run() {
	err := k.end(faults(k.serve))
	if err != nil && !errors.Is(err, ErrGone) {
		_ = k.c.SetWriteDeadline(time.Now().Add(time.Second))
		_ = send(k.c, message{kind: msgNo, text: err.Error()})
	}
	k.free()
	// Only now may the front-end look for another back-end: nothing of this one runs.
	k.c.Close()
}

// end ends the queues of a connection that has ended for this reason, and returns the
// true one.
func (k *conn) end(err error) error {
	stop := unstick(k.bells)
	for _, q := range k.queues {
		q.halt()
	}
	k.running.Wait()
	stop()
	if k.m != nil {
		// Of memory that is gone the front-end learns as well.
		_ = faults(func() error {
			if k.m.Attached() == k.number {
				k.m.SetBack(false)
			}
			return nil
		})
	}
	if k.runner != nil {
		k.runner.Detach(k.bye)
	}
	select {
	case e := <-k.failed:
		err = e
	default:
	}
	if err == nil || errors.Is(err, ErrGone) {
		k.s.o.Log.Info("ring: front-end has gone", "said so", k.bye)
	} else {
		k.s.o.Log.Warn("ring: front-end is disconnected", "error", err)
	}
	return err
}

// free unmaps everything.
func (k *conn) free() {
	k.facts.Lock()
	k.m = nil
	k.facts.Unlock()
	for _, b := range k.bells {
		b.Close()
	}
	if all := k.mapped.Load(); all != nil {
		for _, mem := range (*all)[1:] {
			if mem != nil {
				_ = unix.Munmap(mem)
			}
		}
	}
	if k.ring != nil {
		_ = unix.Munmap(k.ring)
	}
	k.giveBack(k.bytes)
}

// serve answers messages until the connection ends.
func (k *conn) serve() error {
	_ = k.c.SetReadDeadline(time.Now().Add(patience))
	started := false
	for {
		m, fds, err := receive(k.c)
		if err != nil {
			return err
		}
		if k.s.ctx.Err() != nil {
			closeAll(fds)
			return nil
		}
		switch {
		case m.kind == msgAttach && k.ring == nil:
			err = k.attach(m, fds)
		case m.kind == msgMemory && k.ring != nil:
			err = k.add(m, fds)
		case m.kind == msgForget && k.ring != nil && len(fds) == 0:
			err = k.forget(m)
		case m.kind == msgStart && k.ring != nil && !started && len(fds) == 0:
			started = true
			_ = k.c.SetReadDeadline(time.Time{})
			err = k.start()
		case m.kind == msgBye && started && len(fds) == 0:
			k.bye = true
			return nil
		default:
			closeAll(fds)
			err = fmt.Errorf("%s with %d descriptors at the wrong time: %w", messageNames[m.kind], len(fds), ErrBroken)
		}
		if err != nil {
			return err
		}
		if err := send(k.c, message{kind: msgYes, number: uint64(m.kind)}); err != nil {
			return fmt.Errorf("%w: %w", ErrGone, err)
		}
	}
}

// attach maps the ring. It keeps or closes the descriptors.
func (k *conn) attach(m message, fds []int) error {
	if len(fds) < 3 || len(fds)%2 != 1 {
		closeAll(fds)
		return fmt.Errorf("attach with %d descriptors: one of the ring and two for each queue are needed: %w", len(fds), ErrBroken)
	}
	err := k.reserve(m.number)
	var mem []byte
	if err == nil {
		mem, err = mapSealed(fds[0], m.number)
	}
	unix.Close(fds[0])
	if err != nil {
		closeAll(fds[1:])
		return fmt.Errorf("ring: %w", err)
	}
	k.ring = mem
	for i, fd := range fds[1:] {
		b, err := bellOf(fd)
		if err != nil {
			closeAll(fds[1+i:])
			return err
		}
		k.bells = append(k.bells, b)
	}
	ring, err := Open(mem)
	if err != nil {
		return fmt.Errorf("ring: %w", err)
	}
	if shape := ring.Shape(); !shape.Bells || shape.Queues != len(k.bells)/2 {
		return fmt.Errorf("ring with %d queues, and %d bells: %w", shape.Queues, len(k.bells), ErrBroken)
	}
	k.mapped.Store(&[][]byte{ring.Data()})
	k.facts.Lock()
	k.m = ring
	k.facts.Unlock()
	return nil
}

// add maps a memory.
func (k *conn) add(m message, fds []int) error {
	if len(fds) != 1 {
		closeAll(fds)
		return fmt.Errorf("memory with %d descriptors instead of 1: %w", len(fds), ErrBroken)
	}
	defer unix.Close(fds[0])
	if m.number == 0 || m.number >= memories {
		return fmt.Errorf("memory %d: numbers from 1 to %d are possible: %w", m.number, memories-1, ErrBroken)
	}
	if k.mapping(uint16(m.number)) != nil {
		return fmt.Errorf("memory %d is there already: %w", m.number, ErrBroken)
	}
	if err := k.reserve(m.size); err != nil {
		return fmt.Errorf("memory %d: %w", m.number, err)
	}
	mem, err := mapSealed(fds[0], m.size)
	if err != nil {
		return fmt.Errorf("memory %d: %w", m.number, err)
	}
	k.setMapping(uint16(m.number), mem)
	return nil
}

// reserve counts n bytes that are to be mapped. They are given back by forget, or when the
// connection has ended.
func (k *conn) reserve(n uint64) error {
	s := k.s
	if n > uint64(s.o.Memory) || k.bytes > s.o.Memory-int64(n) {
		return fmt.Errorf("%d bytes beside %d: a front-end may hand over %d: %w", n, k.bytes, s.o.Memory, ErrBroken)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.mapped > s.o.Together-int64(n) {
		return fmt.Errorf("%d bytes: all front-ends have handed over %d already, and may %d", n, s.mapped, s.o.Together)
	}
	s.mapped += int64(n)
	k.bytes += int64(n)
	return nil
}

// giveBack takes back what was reserved.
func (k *conn) giveBack(n int64) {
	k.bytes -= n
	k.s.mu.Lock()
	k.s.mapped -= n
	k.s.mu.Unlock()
}

func (k *conn) mapping(number uint16) []byte {
	all := *k.mapped.Load()
	if int(number) >= len(all) {
		return nil
	}
	return all[number]
}

func (k *conn) setMapping(number uint16, mem []byte) {
	all := *k.mapped.Load()
	all = append(make([][]byte, 0, max(len(all), int(number)+1)), all...)
	all = all[:cap(all)]
	all[number] = mem
	k.mapped.Store(&all)
}

// forget unmaps a memory once no queue uses it.
func (k *conn) forget(m message) error {
	if m.number == 0 || m.number >= memories {
		return fmt.Errorf("memory %d is to be forgotten: %w", m.number, ErrBroken)
	}
	mem := k.mapping(uint16(m.number))
	if mem == nil {
		return fmt.Errorf("memory %d is to be forgotten and was never there: %w", m.number, ErrBroken)
	}
	k.setMapping(uint16(m.number), nil)
	defer unstick(k.bells)()
	for _, q := range k.queues {
		q.drop.Store(int64(m.number) + 1)
		q.kick.Ring()
		if err := <-q.dropped; err != nil {
			k.setMapping(uint16(m.number), mem) // it is unmapped when the queues have ended
			return err
		}
	}
	k.giveBack(int64(len(mem)))
	return unix.Munmap(mem)
}

// setFacts tells the front-end of the device.
func (k *conn) setFacts(f Facts) {
	k.facts.Lock()
	defer k.facts.Unlock()
	k.known.Store(&f)
	if k.m != nil {
		// Who serves the connection finds as well that the memory is gone.
		_ = faults(func() error { k.m.SetFacts(f); return nil })
	}
}

// start makes the queues and lets them run.
func (k *conn) start() error {
	f := k.s.target.Facts()
	if err := f.Check(); err != nil {
		return fmt.Errorf("the device cannot be served: %w", err)
	}
	k.setFacts(f)
	shape := k.m.Shape()
	// What was submitted before the first back-end came has been run by nobody.
	k.number = k.m.Attach()
	first := k.number == 1
	again := 0
	for i := range shape.Queues {
		b, err := NewBack(k.m, i)
		if err != nil {
			return err
		}
		q := newQueue(i, b, k.bells[2*i], k.bells[2*i+1], k.s.o.Poll)
		if q.first = first; !first {
			again += b.Recovered()
		}
		q.facts, q.memory = k.known.Load, k.mapping
		k.queues = append(k.queues, q)
	}
	r, err := k.s.target.Attach(shape, again)
	if err != nil {
		k.queues = nil
		return err
	}
	k.runner = r
	k.failed = make(chan error, len(k.queues))
	k.m.SetBack(true)
	k.s.o.Log.Info("ring: front-end is there", "queues", shape.Queues, "entries", shape.Entries, "to be done again", again)
	for _, q := range k.queues {
		k.running.Go(func() {
			if err := runQueue(r, q); err != nil {
				k.failed <- err
				k.hangUp()
			}
			q.end()
		})
	}
	return nil
}

// runQueue runs a queue.
func runQueue(r Runner, q *Queue) error {
	if err := faults(func() error { return r.Run(q) }); err != nil {
		return fmt.Errorf("queue %d: %w", q.Number, err)
	}
	return nil
}

// faults calls do, and makes an error of memory that cannot be reached.
func faults(do func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		p := recover()
		if fault, ok := p.(interface{ Addr() uintptr }); ok {
			err = fmt.Errorf("memory that is shared with the front-end, at %#x, cannot be reached: %w", fault.Addr(), ErrBroken)
		} else if p != nil {
			panic(p)
		}
	}()
	return do()
}
