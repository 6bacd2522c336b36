package identity

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A socket path that cannot be had takes the TCP address back, and says which
// setting is meant.
func TestListenRefusals(t *testing.T) {
	d := dir(t)
	file := filepath.Join(d, "f")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	probe, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	at := probe.Addr().String()
	if err := probe.Close(); err != nil {
		t.Fatal(err)
	}
	for name, test := range map[string]struct {
		endpoint, path string
		words          []string
	}{
		"no folder":         {at, filepath.Join(d, "no", "s"), []string{"guests[0].socket", filepath.Join(d, "no", "s")}},
		"below a file":      {at, filepath.Join(file, "s"), []string{"guests[0].socket"}},
		"a file":            {at, file, []string{"guests[0].socket", "not a socket"}},
		"too long a path":   {at, filepath.Join(d, strings.Repeat("x", 120)), []string{"guests[0].socket"}},
		"a folder":          {at, d, []string{"not a socket"}},
		"no endpoint":       {"nowhere", filepath.Join(d, "s"), []string{"listen at nowhere for a"}},
		"endpoint too high": {"127.0.0.1:99999", filepath.Join(d, "s"), []string{"127.0.0.1:99999"}},
	} {
		s, err := Listen("a", test.endpoint, test.path, "guests[0]")
		if err == nil {
			s.Close()
			t.Errorf("%s: no error", name)
			continue
		}
		for _, w := range test.words {
			if !strings.Contains(err.Error(), w) {
				t.Errorf("%s: %v does not say %q", name, err, w)
			}
		}
	}
	left, err := os.ReadDir(d)
	if err != nil || len(left) != 1 {
		t.Errorf("left over: %v %v", left, err)
	}
	// Nothing holds the address.
	s, err := Listen("a", at, filepath.Join(d, "s"), "guests[0]")
	if err != nil {
		t.Fatal(err)
	}
	s.Close()
}

// Descriptors that are not sockets, or not open any more.
func TestNoSockets(t *testing.T) {
	s, err := Listen("a", "127.0.0.1:0", filepath.Join(dir(t), "s"), "guests[0]")
	if err != nil {
		t.Fatal(err)
	}
	if p, err := s.Port(); err != nil || p == 0 {
		t.Errorf("port %d: %v", p, err)
	}
	file, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	mixed := &Sockets{Name: "mixed", TCP: s.TCP, Unix: file}
	if l, err := mixed.Listeners(); err == nil || !strings.Contains(err.Error(), "socket of mixed") {
		t.Errorf("%v %v", l, err)
	}
	mixed.TCP = file
	if p, err := mixed.Port(); err == nil || !strings.Contains(err.Error(), "socket of mixed") {
		t.Errorf("%d %v", p, err)
	}
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}
	s.Close()
	s.Close()
	if _, err := s.Port(); err == nil {
		t.Error("the port of a closed socket")
	}
	if _, err := s.Listeners(); err == nil {
		t.Error("listeners of closed sockets")
	}
	(&Sockets{}).Close()

	ln, err := ListenUnix(filepath.Join(dir(t), "s"), 0o600)
	if err != nil {
		t.Fatal(err)
	}
	_ = ln.Close()
	if f, err := File(ln); err == nil {
		t.Errorf("a descriptor of a closed listener: %v", f)
	}
}

func TestFromFilesRefuses(t *testing.T) {
	for _, n := range []int{0, 1, 3, 5} {
		if s, err := FromFiles([]string{"a", "b"}, make([]*os.File, n)); err == nil {
			t.Errorf("%d descriptors were taken for %v", n, s)
		}
	}
	if s, err := FromFiles(nil, nil); err != nil || len(s) != 0 {
		t.Errorf("%v %v", s, err)
	}
}

func TestSendRefuses(t *testing.T) {
	a, b := pair(t)
	if err := Send(a, make([]*os.File, maxFiles+1)); err == nil {
		t.Error("more descriptors than a message may carry")
	}
	_ = a.Close()
	if err := Send(a, nil); !errors.Is(err, net.ErrClosed) {
		t.Errorf("%v", err)
	}
	_ = b.SetDeadline(time.Now().Add(5 * time.Second))
	if f, err := Receive(b); err == nil {
		t.Errorf("%v", f)
	}
	_ = b.Close()
	if _, err := Receive(b); !errors.Is(err, net.ErrClosed) {
		t.Errorf("%v", err)
	}
}

// Descriptors that come with something that is no such message are closed.
func TestReceiveClosesStrangers(t *testing.T) {
	a, b := pair(t)
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if _, _, err := a.WriteMsgUnix([]byte{'X'}, unix.UnixRights(int(w.Fd())), nil); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	_ = b.SetDeadline(time.Now().Add(5 * time.Second))
	if f, err := Receive(b); err == nil {
		t.Errorf("%v", f)
	}
	// With all writers gone the pipe ends.
	_ = r.SetDeadline(time.Now().Add(5 * time.Second))
	if n, err := r.Read(make([]byte, 1)); n != 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the descriptor is still open: %v", err)
	}
}

// What cannot be asked is not taken for stale.
func TestSocketNobodyMayAsk(t *testing.T) {
	path := filepath.Join(dir(t), "s")
	// A datagram socket refuses streams otherwise than a dead one.
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: path, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if ln, err := ListenUnix(path, 0o600); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("%v %v", ln, err)
	}
	if _, err := os.Stat(path); errors.Is(err, fs.ErrNotExist) {
		t.Error("it was removed")
	}
}

// A control message that is cut short passes nothing.
func TestCutRights(t *testing.T) {
	whole := unix.UnixRights(0)
	for n := unix.SizeofCmsghdr; n < unix.CmsgLen(4); n++ {
		if files, err := parseRights(whole[:n]); err == nil || len(files) != 0 || !strings.Contains(err.Error(), "receive sockets") {
			t.Errorf("%d bytes: %v, %v", n, files, err)
		}
	}
}
