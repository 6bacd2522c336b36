package host

import (
	"errors"
	"net"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The spares of an agent that was killed have its sockets until they end: the next agent
// waits for that, and for nobody else.
func TestListenAfterSpares(t *testing.T) {
	a := keeper(t, nil)
	ln, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	g := a.cfg.Guests[0]
	port := ln.Addr().(*net.TCPAddr).Port
	g.Port = &port
	if err := os.MkdirAll(a.cfg.RunDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	if _, err := a.listen(&g, "guests[0]"); !errors.Is(err, unix.EADDRINUSE) {
		t.Errorf("an address that somebody else has: %v", err)
	}
	if err := os.WriteFile(sparePath(a.cfg, "b"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	ended := time.AfterFunc(50*time.Millisecond, func() { _ = ln.Close() })
	defer ended.Stop()
	s, err := a.listen(&g, "guests[0]")
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
}
