package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/sync/semaphore"
	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/vhost"
	"github.com/pollux-storage/pollux/internal/virtio"
)

// errRule is what a front-end is disconnected for.
var errRule = errors.New("the front-end broke a rule")

// client is a connection. Its fields are of the goroutine that answers messages, except
// where another owner is named.
type client struct {
	s    *Server
	conn *net.UnixConn
	vc   *vhost.Conn
	log  *slog.Logger

	ctx    context.Context
	cancel context.CancelCauseFunc // cuts the connection: nothing is completed any more
	// leaving is why the connection ends in good order, nil while it does not.
	leaving atomic.Pointer[error]

	features virtio.Features
	protocol vhost.ProtocolFeatures
	status   uint64
	regions  []*region
	memory   *virtio.Memory
	shared   int64 // bytes of the server's sum that are this connection's
	queues   []*queue
	inflight tracking

	writeback atomic.Bool
	dirty     atomic.Pointer[dirtyLog]
	pool      pool
	share     *semaphore.Weighted // of the operation log, for writes that wait

	// helpers are what the server has begun beside serve, which waits for them. Whoever
	// begins one has the server's mu and finds the connection in its list.
	helpers sync.WaitGroup

	mu   sync.Mutex // guards back and sending on it
	back *net.UnixConn
}

func newClient(s *Server, conn *net.UnixConn, id uint64) *client {
	c := &client{
		s: s, conn: conn, vc: vhost.NewConn(conn),
		log: s.o.Log.With("volume", s.o.Volume.Info().Name, "connection", id),
	}
	c.ctx, c.cancel = context.WithCancelCause(context.Background())
	c.writeback.Store(true)
	c.share = semaphore.NewWeighted(maxStaged)
	c.pool.init(c, s.o.Workers)
	c.queues = make([]*queue, s.o.Queues)
	for i := range c.queues {
		c.queues[i] = newQueue(c, i)
	}
	return c
}

// serve answers messages until the connection ends, and ends everything that belongs to it.
func (c *client) serve(ctx context.Context) error {
	defer c.helpers.Wait() // of which gone lets no more begin
	defer c.s.gone(c)
	stop := context.AfterFunc(ctx, func() { c.cut(context.Cause(ctx)) })
	loud := c.s.loud()
	if loud {
		c.log.Info("vhost-user: connected")
	}
	err := c.messages()
	_ = stop()
	if why := c.leaving.Load(); why != nil {
		err = *why
	}
	if cause := context.Cause(c.ctx); cause != nil {
		err = cause
	}
	c.end()
	switch {
	case err == nil, errors.Is(err, ErrServerClosed), lost(err), errors.Is(err, context.Canceled), errors.Is(err, errReplaced):
		if loud {
			c.log.Info("vhost-user: disconnected", "why", why(err))
		}
	default:
		c.s.count.disconnects.Add(1)
		if loud {
			c.log.Warn("vhost-user: connection cut", "error", err)
		}
	}
	return err
}

func why(err error) string {
	if err == nil {
		return "the front-end has closed the connection"
	}
	return err.Error()
}

// messages answers messages until there are no more.
func (c *client) messages() error {
	var m vhost.Message
	defer m.CloseFiles()
	for {
		if err := c.vc.Receive(&m); err != nil {
			if errors.Is(err, io.EOF) {
				return nil
			}
			if errors.Is(err, unix.ECONNRESET) || errors.Is(err, net.ErrClosed) || errors.Is(err, os.ErrDeadlineExceeded) {
				return nil // or as cut and leave have said
			}
			return err
		}
		if err := c.answer(&m); err != nil {
			return err
		}
		m.CloseFiles() // what was not expected
	}
}

// answer handles a message and sends what the front-end waits for.
func (c *client) answer(m *vhost.Message) error {
	r := reply{}
	var err error
	if h, ok := handlers[m.Request]; ok {
		err = h(c, m, &r)
	} else {
		err = fmt.Errorf("%w: a message for no feature that was offered", errRule)
	}
	if err != nil {
		err = fmt.Errorf("%v: %w", m.Request, err)
	}
	switch {
	case r.payload != nil && err == nil:
		if e := c.send(m.Request, r.payload, r.files...); e != nil {
			err = e
		}
	case m.NeedReply() && c.protocol.Has(vhost.PReplyAck):
		var code uint64
		if err != nil {
			code = 1
		}
		if e := c.send(m.Request, vhost.AppendU64(nil, code)); e != nil && err == nil {
			err = e
		}
	}
	for _, fd := range r.files {
		_ = unix.Close(fd)
	}
	return err
}

func (c *client) send(r vhost.Request, payload []byte, files ...int) error {
	if err := c.conn.SetWriteDeadline(time.Now().Add(sendTime)); err != nil {
		return err
	}
	if c.ctx.Err() != nil { // whose deadline that might have replaced
		return context.Cause(c.ctx)
	}
	return c.vc.Send(r, vhost.FlagReply, payload, files...)
}

// sendTime is how long a front-end may take to take a message.
const sendTime = 10 * time.Second

// cut ends the connection now: requests under way are called off, and not completed.
func (c *client) cut(why error) {
	c.cancel(why)
	_ = c.conn.SetDeadline(time.Unix(1, 0))
}

// leave lets what the queues have taken end, and then ends the connection.
func (c *client) leave(why error) {
	if !c.leaving.CompareAndSwap(nil, &why) {
		return
	}
	for _, q := range c.queues {
		q.hush()
	}
	for _, q := range c.queues {
		q.settle()
	}
	_ = c.conn.SetDeadline(time.Unix(1, 0))
}

// end frees what the connection has. Nobody else uses it any more.
func (c *client) end() {
	idle := true
	for _, q := range c.queues {
		q.hush()
	}
	if c.leaving.Load() == nil {
		c.cancel(errGone)
	}
	for _, q := range c.queues {
		q.pause()
		idle = idle && q.retired()
		q.close()
	}
	c.cancel(errGone)
	c.pool.close()
	c.inflight.close(idle)
	c.dropMemory()
	if d := c.dirty.Swap(nil); d != nil {
		d.close()
	}
	c.mu.Lock()
	if c.back != nil {
		_ = c.back.Close()
		c.back = nil
	}
	c.mu.Unlock()
	_ = c.conn.Close()
}

var errGone = errors.New("the front-end is gone")

// configChanged tells the driver that the configuration space is another one.
func (c *client) configChanged() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.back == nil {
		return
	}
	_ = c.back.SetWriteDeadline(time.Now().Add(time.Second))
	if err := vhost.NewConn(c.back).Send(vhost.Request(vhost.BackendConfigChange), 0, nil); err != nil {
		c.log.Warn("vhost-user: the front-end does not take the notice of a new size", "error", err)
	}
}

// fault says what the recovered value of a panic means: memory that the front-end has taken
// away, or a mistake of ours, which goes on.
func fault(v any) error {
	if v == nil {
		return nil
	}
	if e, ok := v.(interface {
		error
		Addr() uintptr
	}); ok {
		return fmt.Errorf("%w: memory that it shares cannot be reached any more, its file was truncated or the machine has no pages for it (%w)", errRule, e)
	}
	panic(v)
}

// writethrough reports whether each write is to be flushed: drivers that cannot flush
// expect that, and others may ask for it.
func (c *client) writethrough(f virtio.Features) bool {
	return !f.Has(virtio.BlkFlush) || f.Has(virtio.BlkConfigWCE) && !c.writeback.Load()
}

// tag returns the tag of a submission, none without a session.
func (t *tracking) tag(queue int, slot uint16, counter uint64) block.Tag {
	if t.session == nil {
		return block.Tag{}
	}
	return block.Tag{Session: t.id, Queue: uint16(queue), Slot: slot, Counter: counter}
}
