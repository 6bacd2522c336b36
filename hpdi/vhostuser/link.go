package vhostuser

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/vhost"
	"github.com/pollux-storage/pollux/internal/virtio"
)

// link is one connection to a back-end. One goroutine at a time asks.
type link struct {
	sock    *net.UnixConn
	conn    *vhost.Conn
	timeout time.Duration
	proto   vhost.ProtocolFeatures // as negotiated

	replies chan reply
	gone    chan struct{} // closed when the connection has ended

	mu  sync.Mutex // guards the rest
	why error
}

// reply is an answer of the back-end.
type reply struct {
	request vhost.Request
	payload []byte
	files   []int
}

func (r *reply) close() {
	for _, fd := range r.files {
		_ = unix.Close(fd) // nobody has used it
	}
	r.files = nil
}

// dial makes a connection.
func dial(ctx context.Context, path string, timeout time.Duration) (*link, error) {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	var d net.Dialer
	c, err := d.DialContext(ctx, "unix", path)
	if err != nil {
		return nil, err
	}
	return newLink(c.(*net.UnixConn), timeout), nil
}

func newLink(c *net.UnixConn, timeout time.Duration) *link {
	l := &link{sock: c, conn: vhost.NewConn(c), timeout: timeout, replies: make(chan reply, 1), gone: make(chan struct{})}
	go l.receive()
	return l
}

// receive passes answers on until the connection ends, so that its end is noticed also
// while nobody asks.
func (l *link) receive() {
	defer close(l.gone)
	var m vhost.Message
	defer m.CloseFiles()
	for {
		if err := l.conn.Receive(&m); err != nil {
			l.end(fmt.Errorf("the connection has ended: %w", err))
			return
		}
		r := reply{request: m.Request, payload: append([]byte(nil), m.Payload...)}
		if m.Flags&vhost.FlagReply == 0 {
			l.end(fmt.Errorf("the back-end sent %v where only answers may come: %w", m.Request, vhost.ErrProtocol))
			return
		}
		r.files, _ = m.TakeFiles(m.Files()) // as many as there are
		select {
		case l.replies <- r:
		default:
			r.close()
			l.end(fmt.Errorf("the back-end answered %v, which nobody asked: %w", m.Request, vhost.ErrProtocol))
			return
		}
	}
}

// end closes the connection. The first reason is kept.
func (l *link) end(why error) {
	l.mu.Lock()
	if l.why == nil {
		l.why = fmt.Errorf("%w: %w", hpdi.ErrDisconnected, why)
	}
	l.mu.Unlock()
	_ = l.sock.Close() // receive ends by that
}

// err returns why the connection has ended.
func (l *link) err() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.why
}

// close ends the connection, waits for its goroutine and frees what it has left.
func (l *link) close(why error) {
	l.end(why)
	<-l.gone
	select {
	case r := <-l.replies:
		r.close()
	default:
	}
}

// ask sends a request and returns the back-end's answer. Its descriptors are the caller's.
func (l *link) ask(request vhost.Request, payload []byte, files ...int) (reply, error) {
	return l.exchange(request, 0, payload, files...)
}

func (l *link) exchange(request vhost.Request, flags uint32, payload []byte, files ...int) (reply, error) {
	if err := l.send(request, flags, payload, files...); err != nil {
		return reply{}, err
	}
	timer := time.NewTimer(l.timeout)
	defer timer.Stop()
	select {
	case r := <-l.replies:
		if r.request != request {
			r.close()
			err := fmt.Errorf("the back-end answered %v to %v: %w", r.request, request, vhost.ErrProtocol)
			l.end(err)
			return reply{}, err
		}
		return r, nil
	case <-l.gone:
		return reply{}, l.err()
	case <-timer.C:
		err := fmt.Errorf("the back-end has not answered %v within %v: %w", request, l.timeout, os.ErrDeadlineExceeded)
		l.end(err)
		return reply{}, err
	}
}

func (l *link) send(request vhost.Request, flags uint32, payload []byte, files ...int) error {
	if err := l.sock.SetWriteDeadline(time.Now().Add(l.timeout)); err != nil {
		return errors.Join(l.err(), err)
	}
	if err := l.conn.Send(request, flags, payload, files...); err != nil {
		l.end(err)
		return l.err()
	}
	return nil
}

// number asks for a number.
func (l *link) number(request vhost.Request) (uint64, error) {
	r, err := l.ask(request, nil)
	if err != nil {
		return 0, err
	}
	defer r.close()
	n, err := vhost.ParseU64(r.payload)
	if err != nil {
		err = fmt.Errorf("answer to %v: %w", request, err)
		l.end(err)
	}
	return n, err
}

// tell sends a request that has no answer of its own, and waits for the back-end's word
// that it is done where it gives such.
func (l *link) tell(request vhost.Request, payload []byte, files ...int) error {
	if !l.proto.Has(vhost.PReplyAck) {
		return l.send(request, 0, payload, files...)
	}
	r, err := l.exchange(request, vhost.FlagNeedReply, payload, files...)
	if err != nil {
		return err
	}
	defer r.close()
	n, err := vhost.ParseU64(r.payload)
	if err == nil && n != 0 {
		err = fmt.Errorf("the back-end says %d", n)
	}
	if err != nil {
		return fmt.Errorf("%v: %w", request, err)
	}
	return nil
}

// readConfig reads the configuration space.
func (l *link) readConfig() (virtio.BlkConfig, error) {
	const n = virtio.BlkConfigBytes
	r, err := l.ask(vhost.GetConfig, vhost.Config{Size: n, Data: make([]byte, n)}.Append(nil))
	if err != nil {
		return virtio.BlkConfig{}, err
	}
	defer r.close()
	c, err := vhost.ParseConfig(r.payload)
	var config virtio.BlkConfig
	if err == nil {
		config, err = virtio.ReadBlkConfig(c.Data)
	}
	if err != nil {
		err = fmt.Errorf("answer to %v: %w", vhost.GetConfig, err)
		l.end(err)
	}
	return config, err
}
