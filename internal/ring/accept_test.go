package ring

import (
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// Front-ends that are too many are told so at once, and take no place.
func TestRefusedAtOnce(t *testing.T) {
	path, s := served(t, newDisk(), Options{Rings: 1})
	a := newClient(t, path, shape(1, 4))
	if err := a.attach(); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		c, err := net.Dial("unixpacket", path)
		if err != nil {
			t.Fatal(err)
		}
		if err := c.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
		m, _, err := receive(c.(*net.UnixConn))
		if err != nil || m.kind != msgNo || !strings.Contains(m.text, "as many as are allowed") {
			t.Fatalf("received %+v, %v", m, err)
		}
		if n := s.Rings(); n != 1 {
			t.Fatalf("%d front-ends are connected", n)
		}
		c.Close()
	}
	for range 100 { // what it asks may come before or after the refusal
		link, err := Dial(t.Context(), path)
		if err != nil {
			t.Fatal(err)
		}
		if err := link.Start(); err == nil || !strings.Contains(err.Error(), "as many as are allowed") {
			t.Fatalf("one too many: %v", err)
		}
	}
}

// lines is a log.
type lines chan string

func (l lines) Write(p []byte) (int, error) {
	l <- string(p)
	return len(p), nil
}

// A server takes a listener whose deadline has passed with an earlier server, and goes on when
// a connection cannot be accepted.
func TestAcceptGoesOn(t *testing.T) {
	l, err := net.ListenUnix("unixpacket", &net.UnixAddr{Name: filepath.Join(t.TempDir(), "s"), Net: "unixpacket"})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	if err := l.SetDeadline(time.Unix(1, 0)); err != nil {
		t.Fatal(err)
	}
	log := make(lines, 1000)
	s := NewServer(newDisk(), Options{Log: slog.New(slog.NewTextHandler(log, nil))})
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	attached := func() {
		t.Helper()
		c := newClient(t, l.Addr().String(), shape(1, 4))
		if err := c.attach(); err != nil {
			t.Fatal(err)
		}
		c.link.Bye()
	}
	attached()
	if err := l.SetDeadline(time.Unix(1, 0)); err != nil { // now it fails
		t.Fatal(err)
	}
	for again := false; !again; {
		select {
		case err := <-done:
			t.Fatalf("the server has ended: %v", err)
		case line := <-log:
			again = strings.Contains(line, "trying again")
		}
	}
	if err := l.SetDeadline(time.Time{}); err != nil {
		t.Fatal(err)
	}
	attached()
	s.Close()
	if err := <-done; err != nil {
		t.Error(err)
	}
}
