package guest

import (
	"bufio"
	"encoding/json"
	"fmt"
	"net"
	"sync"
	"time"

	"github.com/pollux-storage/pollux/internal/partner"
)

// The line between agent and guest is a unix stream socket: after the
// descriptors of the listening sockets, which the guest sends first, one
// message of package partner a line, as JSON.

// LineVersion is that of the line, and of the arguments and descriptors that a guest's
// process is started with. It is raised by what the other side would misread.
const LineVersion = 1

const (
	maxLine     = 64 << 10
	maxQueued   = 1024
	lineTimeout = 10 * time.Second // for the other side to take what was sent
)

// Line is one end of the line. Send never blocks: a peer that does not read
// loses the line, not the sender's time.
type Line struct {
	c  *net.UnixConn
	wg sync.WaitGroup

	mu     sync.Mutex // guards what follows
	queue  []partner.Message
	closed bool
	wake   chan struct{} // has room for one
}

// NewLine starts to send on c and owns it.
func NewLine(c *net.UnixConn) *Line {
	l := &Line{c: c, wake: make(chan struct{}, 1)}
	l.wg.Go(l.write)
	return l
}

// Send queues a message; on a line that has broken it is lost.
func (l *Line) Send(m partner.Message) {
	l.mu.Lock()
	if len(l.queue) >= maxQueued {
		l.closed = true
	}
	if !l.closed {
		l.queue = append(l.queue, m)
	}
	l.mu.Unlock()
	select {
	case l.wake <- struct{}{}:
	default:
	}
}

func (l *Line) write() {
	defer l.c.Close() // ends the reader too
	w := bufio.NewWriter(l.c)
	enc := json.NewEncoder(w)
	for range l.wake {
		l.mu.Lock()
		msgs, closed := l.queue, l.closed
		l.queue = nil
		l.mu.Unlock()
		_ = l.c.SetWriteDeadline(time.Now().Add(lineTimeout))
		for _, m := range msgs {
			if enc.Encode(m) != nil {
				closed = true
				break
			}
		}
		if w.Flush() != nil || closed {
			l.mu.Lock()
			l.closed = true
			l.mu.Unlock()
			return
		}
	}
}

// Read calls f for each message until the line ends, and says why it did.
func (l *Line) Read(f func(partner.Message)) error {
	sc := bufio.NewScanner(l.c)
	sc.Buffer(make([]byte, 0, 4096), maxLine)
	for sc.Scan() {
		m, err := parseMessage(sc.Bytes())
		if err != nil {
			return err
		}
		f(m)
	}
	return sc.Err()
}

func parseMessage(p []byte) (partner.Message, error) {
	var m partner.Message
	if err := json.Unmarshal(p, &m); err != nil {
		return m, fmt.Errorf("message on the line: %w", err)
	}
	if m.Kind == "" {
		return m, fmt.Errorf("message on the line has no kind: %.100s", p)
	}
	return m, nil
}

// Close sends what is queued and ends the line.
func (l *Line) Close() {
	l.mu.Lock()
	l.closed = true
	l.mu.Unlock()
	select {
	case l.wake <- struct{}{}:
	default:
	}
	l.wg.Wait()
}
