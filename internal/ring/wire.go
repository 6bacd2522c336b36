package ring

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Messages of the socket, one packet each. The front-end asks, the back-end answers
// each message once, in order.
const (
	msgAttach = 1 + iota // number: bytes of the ring; descriptors: the ring, then kick and call of each queue
	msgMemory            // number: of a memory, size: its bytes; descriptor: the memory
	msgForget            // number: of a memory that is in no request
	msgStart             // all is there, serve
	msgBye               // the front-end ends, with nothing in flight
	msgYes               // answer
	msgNo                // answer: text
)

var messageNames = map[uint32]string{
	msgAttach: "attach", msgMemory: "memory", msgForget: "forget", msgStart: "start", msgBye: "bye", msgYes: "yes", msgNo: "no",
}

// message is one of them.
type message struct {
	kind         uint32
	number, size uint64
	text         string
}

const (
	messageHead = 24
	messageText = 512
	messageMax  = messageHead + messageText
	// descriptorsMax is how many come with a message at most: a ring and two bells a queue.
	descriptorsMax = 1 + 2*MaxQueues
)

func (m message) append(p []byte) []byte {
	p = binary.LittleEndian.AppendUint32(p, m.kind)
	p = binary.LittleEndian.AppendUint32(p, formatVersion)
	p = binary.LittleEndian.AppendUint64(p, m.number)
	p = binary.LittleEndian.AppendUint64(p, m.size)
	return append(p, m.text[:min(len(m.text), messageText)]...)
}

func decodeMessage(p []byte) (message, error) {
	le := binary.LittleEndian
	if len(p) < messageHead || len(p) > messageMax {
		return message{}, fmt.Errorf("message of %d bytes: %w", len(p), ErrBroken)
	}
	m := message{kind: le.Uint32(p), number: le.Uint64(p[8:]), size: le.Uint64(p[16:])}
	if v := le.Uint32(p[4:]); v != formatVersion {
		return m, fmt.Errorf("message of version %d instead of %d: %w", v, formatVersion, ErrVersion)
	}
	if messageNames[m.kind] == "" {
		return m, fmt.Errorf("message of kind %d: %w", m.kind, ErrBroken)
	}
	m.text = strings.Map(func(r rune) rune {
		if r < ' ' || r > '~' {
			return '?'
		}
		return r
	}, string(p[messageHead:]))
	return m, nil
}

// send sends a message with descriptors, which stay the caller's.
func send(c *net.UnixConn, m message, fds ...int) error {
	var oob []byte
	if len(fds) > 0 {
		oob = unix.UnixRights(fds...)
	}
	if _, _, err := c.WriteMsgUnix(m.append(nil), oob, nil); err != nil {
		return fmt.Errorf("send %s: %w", messageNames[m.kind], err)
	}
	return nil
}

// receive returns the next message and its descriptors, which are the caller's. The end
// of the connection is ErrGone.
func receive(c *net.UnixConn) (message, []int, error) {
	var buf [messageMax + 1]byte
	oob := make([]byte, unix.CmsgSpace(4*descriptorsMax))
	n, oobn, flags, _, err := c.ReadMsgUnix(buf[:], oob)
	if errors.Is(err, unix.ECONNRESET) {
		// The peer has closed it without having read everything. What it said before is there.
		n, oobn, flags, _, err = c.ReadMsgUnix(buf[:], oob)
	}
	fds, ferr := rights(oob[:oobn])
	if err != nil {
		if errors.Is(err, os.ErrDeadlineExceeded) {
			return message{}, nil, fmt.Errorf("no message in time: %w", err)
		}
		return message{}, nil, fmt.Errorf("%w: %w", ErrGone, err)
	}
	if n == 0 && oobn == 0 {
		return message{}, nil, ErrGone
	}
	m, err := decodeMessage(buf[:n])
	switch {
	case ferr != nil:
		err = ferr
	case err == nil && flags&unix.MSG_CTRUNC != 0:
		err = fmt.Errorf("%s with more descriptors than %d, or than this process may have open: %w", messageNames[m.kind], descriptorsMax, ErrBroken)
	}
	if err != nil {
		closeAll(fds)
		return m, nil, err
	}
	return m, fds, nil
}

// rights returns the descriptors in a control message, with an error those before it.
func rights(oob []byte) (fds []int, err error) {
	msgs, err := syscall.ParseSocketControlMessage(oob)
	if err != nil {
		return nil, fmt.Errorf("control message: %w: %w", err, ErrBroken)
	}
	for i := range msgs {
		got, err := syscall.ParseUnixRights(&msgs[i])
		if err != nil {
			return fds, fmt.Errorf("control message without descriptors: %w: %w", err, ErrBroken)
		}
		fds = append(fds, got...)
	}
	return fds, nil
}

func closeAll(fds []int) {
	for _, fd := range fds {
		unix.Close(fd)
	}
}

// mapSealed maps size bytes of a memory that a peer has handed over. It must be
// sealed against becoming smaller: memory that goes away under who maps it would
// end this process.
func mapSealed(fd int, size uint64) ([]byte, error) {
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	if err != nil {
		return nil, fmt.Errorf("descriptor of memory: it cannot be sealed, hand over a memfd: %w: %w", err, ErrBroken)
	}
	if seals&unix.F_SEAL_SHRINK == 0 {
		return nil, fmt.Errorf("descriptor of memory: it is not sealed against shrinking: %w", ErrBroken)
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return nil, fmt.Errorf("descriptor of memory: %w", err)
	}
	if fs.Type == unix.HUGETLBFS_MAGIC {
		// Pages that are given up may not come again, whatever the size.
		return nil, fmt.Errorf("descriptor of memory: it is of huge pages of their own, which can go away; hand over a plain memfd: %w", ErrBroken)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return nil, fmt.Errorf("descriptor of memory: %w", err)
	}
	if size == 0 || size > MaxRing || int64(size) > st.Size {
		return nil, fmt.Errorf("%d bytes of a memory of %d: %w", size, st.Size, ErrBroken)
	}
	return Map(fd, int64(size))
}
