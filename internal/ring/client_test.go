package ring

import (
	"errors"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// answering is a back-end that answers as a test tells it.
func answering(t *testing.T) (*Link, *net.UnixConn) {
	t.Helper()
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	link, err := Dial(t.Context(), l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	c, err := l.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Close()
		link.Drop()
	})
	return link, c
}

// heard receives a question.
func heard(t *testing.T, c *net.UnixConn, kind uint32) {
	t.Helper()
	m, fds, err := receive(c)
	closeAll(fds)
	if err != nil || m.kind != kind {
		t.Fatalf("received %+v, %v", m, err)
	}
}

// An answer that is late is not taken for that to the next question: memory that the back-end
// has under a number would be taken for another one.
func TestLateAnswer(t *testing.T) {
	link, c := answering(t)
	link.wait = 20 * time.Millisecond
	if err := link.Memory(5, sealedFile(t, 4096), 4096); !errors.Is(err, ErrGone) {
		t.Fatalf("a question without an answer: %v", err)
	}
	heard(t, c, msgMemory)
	if err := send(c, message{kind: msgYes, number: msgMemory}); err != nil {
		t.Fatal(err)
	}
	if err := link.Memory(5, sealedFile(t, 4096), 4096); !errors.Is(err, ErrGone) {
		t.Fatalf("the next question: %v", err)
	}
	select {
	case <-link.Gone():
		t.Fatal("the connection is forgotten before the back-end has closed it")
	default:
	}
	if _, _, err := receive(c); !errors.Is(err, ErrGone) {
		t.Fatalf("the back-end is told of the next question, %v", err)
	}
	c.Close()
	if err := link.Err(); !errors.Is(err, ErrGone) || !strings.Contains(err.Error(), "does not answer") {
		t.Errorf("it ended with %v", err)
	}
}

// An answer to something else ends the connection.
func TestAnswerToAnotherQuestion(t *testing.T) {
	link, c := answering(t)
	asked := make(chan error, 1)
	go func() { asked <- link.Forget(5) }()
	heard(t, c, msgForget)
	if err := send(c, message{kind: msgYes, number: msgMemory}); err != nil {
		t.Fatal(err)
	}
	if err := <-asked; !errors.Is(err, ErrBroken) {
		t.Fatal(err)
	}
	c.Close()
	if err := link.Err(); !errors.Is(err, ErrBroken) || errors.Is(err, ErrGone) {
		t.Errorf("it ended with %v", err)
	}
}

// A back-end that hangs is left behind after a while.
func TestDropOfOneThatHangs(t *testing.T) {
	link, c := answering(t)
	link.wait = 20 * time.Millisecond
	link.Drop()
	if err := link.Err(); !errors.Is(err, ErrGone) {
		t.Error(err)
	}
	if err := send(c, message{kind: msgYes}); !errors.Is(err, unix.EPIPE) {
		t.Errorf("the connection is still there: %v", err)
	}
}
