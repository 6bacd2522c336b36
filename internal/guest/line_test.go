package guest

import (
	"net"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/partner"
)

// connected returns the two ends of a unix stream.
func connected(t *testing.T) (*net.UnixConn, *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var out [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "line")
		c, err := net.FileConn(f)
		_ = f.Close()
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = c.Close() })
		out[i] = c.(*net.UnixConn)
	}
	return out[0], out[1]
}

// TestReadRefuses: what is no message ends the line, with the reason.
func TestReadRefuses(t *testing.T) {
	for what, want := range map[string]string{
		"{\"kind\":\"ping\"}\nnonsense\n":                        "message on the line: ",
		"{\"kind\":\"ping\"}\n{\"inc\":1}\n":                     "no kind",
		"{\"kind\":\"ping\"}\n" + strings.Repeat("x", maxLine+1): "too long",
	} {
		near, far := connected(t)
		go func() {
			_, _ = far.Write([]byte(what))
			_ = far.Close()
		}()
		l := NewLine(near)
		n := 0
		err := l.Read(func(partner.Message) { n++ })
		l.Close()
		if n != 1 || err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%.40q: %d messages, %v", what, n, err)
		}
	}
}

// TestDeafPeer: a peer that does not read loses the line, not the sender's
// time.
func TestDeafPeer(t *testing.T) {
	near, far := connected(t)
	l := NewLine(near)
	reason := strings.Repeat("x", 1<<12) // 1024 of them are more than the socket holds
	isClosed := func() bool {
		l.mu.Lock()
		defer l.mu.Unlock()
		return l.closed
	}
	for n := 0; !isClosed(); n++ {
		if n > 10*maxQueued {
			t.Fatal("the queue grows without end")
		}
		l.Send(partner.Message{Kind: partner.KindPing, Reason: reason})
	}
	_ = far.Close() // what the writer is stuck with fails
	l.Close()
	if _, err := near.Write([]byte("x")); err == nil {
		t.Error("the line is still open")
	}
}
