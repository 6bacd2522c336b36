package identity

import (
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func dir(t *testing.T) string {
	t.Helper()
	d, err := os.MkdirTemp("", "plx")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(d) })
	return d
}

// TestHandOver: a client that connects while nobody accepts is served by who
// serves next, and descriptors that went over a socket work like the first.
func TestHandOver(t *testing.T) {
	path := filepath.Join(dir(t), "s")
	s, err := Listen("a", "127.0.0.1:0", path, "guests[0]")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	port, err := s.Port()
	if err != nil || port == 0 {
		t.Fatal(port, err)
	}
	first, err := s.Listeners()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range first {
		_ = l.Close() // the first guest hands over
	}
	passed := pass(t, Files([]*Sockets{s}))
	sets, err := FromFiles([]string{"a"}, passed)
	if err != nil {
		t.Fatal(err)
	}
	for _, addr := range []string{"unix:" + path, "tcp:" + first[0].Addr().String()} {
		network, at, _ := strings.Cut(addr, ":")
		c, err := net.Dial(network, at)
		if err != nil {
			t.Fatalf("%s: a client was refused: %v", addr, err)
		}
		defer c.Close()
	}
	next, err := sets[0].Listeners()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range next {
		c, err := l.Accept()
		if err != nil {
			t.Fatal(err)
		}
		_ = c.Close()
		_ = l.Close()
	}
	cmd := exec.Command("/bin/true")
	cmd.ExtraFiles = append(Files(sets), Files([]*Sockets{s})...)
	if err := cmd.Run(); err != nil {
		t.Fatal(err)
	}
	for _, f := range cmd.ExtraFiles {
		flags, err := unix.FcntlInt(f.Fd(), unix.F_GETFL, 0)
		if err != nil || flags&unix.O_NONBLOCK == 0 {
			t.Fatalf("the socket was made blocking for all: flags %x, %v", flags, err)
		}
	}
	sets[0].Close()
	if _, err := net.Dial("unix", path); err != nil {
		t.Errorf("closing one process's descriptors closed the socket: %v", err)
	}
}

func pass(t *testing.T, files []*os.File) []*os.File {
	t.Helper()
	ln, err := ListenUnix(filepath.Join(dir(t), "l"), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("unix", strings.TrimSuffix(ln.Addr().String(), "~"))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	p, err := ln.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if err := Send(c.(*net.UnixConn), files); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, "after"); err != nil {
		t.Fatal(err)
	}
	got, err := Receive(p)
	if err != nil {
		t.Fatal(err)
	}
	rest := make([]byte, 5)
	if _, err := io.ReadFull(p, rest); err != nil || string(rest) != "after" {
		t.Fatalf("what follows the descriptors was %q, %v", rest, err)
	}
	return got
}

func TestStaleAndTaken(t *testing.T) {
	path := filepath.Join(dir(t), "s")
	ln, err := ListenUnix(path, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o600 {
		t.Fatal(st.Mode(), err)
	}
	if _, err := ListenUnix(path, 0o600); err == nil || !strings.Contains(err.Error(), "listens at "+path) {
		t.Fatalf("a socket in use was taken: %v", err)
	}
	_ = ln.Close()
	ln, err = ListenUnix(path, 0o600)
	if err != nil {
		t.Fatalf("a stale socket was not replaced: %v", err)
	}
	_ = ln.Close()
	file := filepath.Join(dir(t), "f")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ListenUnix(file, 0o600); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Fatalf("a file was replaced: %v", err)
	}
}

func TestAddressErrors(t *testing.T) {
	d := dir(t)
	s, err := Listen("a", "127.0.0.1:0", filepath.Join(d, "a"), "guests[0]")
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	l, err := s.Listeners()
	if err != nil {
		t.Fatal(err)
	}
	at := l[0].Addr().String()
	if _, err := Listen("b", at, filepath.Join(d, "b"), "guests[1]"); err == nil || !strings.Contains(err.Error(), at) || !strings.Contains(err.Error(), "guests[1].port") {
		t.Errorf("%v", err)
	}
	if _, err := Listen("b", "192.0.2.1:1", filepath.Join(d, "b"), "guests[1]"); err == nil || !strings.Contains(err.Error(), "not one of this host") {
		t.Errorf("%v", err)
	}
	for _, l := range l {
		_ = l.Close()
	}
}

func TestReceiveRefuses(t *testing.T) {
	for _, what := range []string{"X", ""} {
		a, b := pair(t)
		_, _ = io.WriteString(a, what)
		_ = a.Close()
		_ = b.SetDeadline(time.Now().Add(5 * time.Second))
		if f, err := Receive(b); err == nil {
			t.Errorf("%q was taken for %v", what, f)
		}
	}
}

func pair(t *testing.T) (*net.UnixConn, *net.UnixConn) {
	t.Helper()
	ln, err := ListenUnix(filepath.Join(dir(t), "p"), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := net.Dial("unix", strings.TrimSuffix(ln.Addr().String(), "~"))
	if err != nil {
		t.Fatal(err)
	}
	p, err := ln.AcceptUnix()
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close(); _ = p.Close() })
	return c.(*net.UnixConn), p
}

func FuzzParseRights(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{16, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 2, 0, 0, 0})
	f.Fuzz(func(t *testing.T, p []byte) {
		// Descriptors in the bytes are not ours: none may be closed here, so
		// only messages too short to hold one are parsed.
		if len(p) < 20 {
			_, _ = parseRights(p)
		}
	})
}

// TestReplace: a socket takes the place of another one, without a moment in which there is
// none, and of nothing else.
func TestReplace(t *testing.T) {
	for network, name := range map[string]string{"unix": "s", "unixpacket": "s.ring"} {
		t.Run(network, func(t *testing.T) { testReplace(t, network, filepath.Join(dir(t), name)) })
	}
}

func testReplace(t *testing.T, network, path string) {
	var before *net.UnixListener
	for range 2 {
		ln, err := ReplaceUnix(network, path, 0o660)
		if err != nil {
			t.Fatal(err)
		}
		defer ln.Close()
		if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o660 {
			t.Fatal(st.Mode(), err)
		}
		c, err := net.Dial(network, path)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		_ = ln.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := ln.Accept(); err != nil {
			t.Errorf("the newest listener does not hear of a connection: %v", err)
		}
		if before != nil {
			_ = before.Close()
			if _, err := os.Stat(path); err != nil {
				t.Errorf("the end of the one before takes the socket away: %v", err)
			}
		}
		before = ln
	}
	if left, _ := os.ReadDir(filepath.Dir(path)); len(left) != 1 {
		t.Errorf("left beside it: %v", left)
	}
	file := filepath.Join(dir(t), "f")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := ReplaceUnix(network, file, 0o600); err == nil || !strings.Contains(err.Error(), "not a socket") {
		t.Errorf("a file was replaced: %v", err)
	}
	if _, err := ReplaceUnix(network, filepath.Join(dir(t), "nowhere", "s"), 0o600); err == nil {
		t.Error("a socket in a directory that is not there")
	}
}
