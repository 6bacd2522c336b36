package vhost

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// pair returns the two ends of a connection.
func pair(t testing.TB) (*net.UnixConn, *net.UnixConn) {
	t.Helper()
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	var ends [2]*net.UnixConn
	for i, fd := range fds {
		f := os.NewFile(uintptr(fd), "socket")
		c, err := net.FileConn(f)
		if err != nil {
			t.Fatal(err)
		}
		_ = f.Close()
		ends[i] = c.(*net.UnixConn)
		_ = ends[i].SetDeadline(time.Now().Add(10 * time.Second))
		t.Cleanup(func() { _ = c.Close() })
	}
	return ends[0], ends[1]
}

// openFiles counts this process's descriptors.
func openFiles(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}

func eventfds(t testing.TB, n int) []int {
	t.Helper()
	var fds []int
	for range n {
		fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
		if err != nil {
			t.Fatal(err)
		}
		fds = append(fds, fd)
		t.Cleanup(func() { _ = unix.Close(fd) })
	}
	return fds
}

func TestSendReceive(t *testing.T) {
	a, b := pair(t)
	fds := eventfds(t, MaxFiles)
	before := openFiles(t)
	payload := examples[SetMemTable]
	if err := NewConn(a).Send(SetMemTable, FlagNeedReply, payload, fds...); err != nil {
		t.Fatal(err)
	}
	if err := NewConn(a).Send(GetFeatures, 0, nil); err != nil {
		t.Fatal(err)
	}
	var m Message
	c := NewConn(b)
	if err := c.Receive(&m); err != nil {
		t.Fatal(err)
	}
	if m.Request != SetMemTable || !m.NeedReply() || !bytes.Equal(m.Payload, payload) || m.Files() != MaxFiles {
		t.Fatalf("received %v, flags %x, %x with %d descriptors", m.Request, m.Flags, m.Payload, m.Files())
	}
	if _, err := m.TakeFiles(2); !errors.Is(err, ErrProtocol) {
		t.Fatalf("eight descriptors for two: %v", err)
	}
	got, err := m.TakeFiles(MaxFiles)
	if err != nil {
		t.Fatal(err)
	}
	for _, fd := range got {
		if f, err := unix.FcntlInt(uintptr(fd), unix.F_GETFD, 0); err != nil || f&unix.FD_CLOEXEC == 0 {
			t.Errorf("descriptor %d: flags %x, %v", fd, f, err)
		}
		_ = unix.Close(fd)
	}
	if err := c.Receive(&m); err != nil || m.Request != GetFeatures || len(m.Payload) != 0 || m.Files() != 0 {
		t.Fatalf("then %v with %d descriptors, %v", m.Request, m.Files(), err)
	}
	_ = a.Close()
	if err := c.Receive(&m); err != io.EOF {
		t.Fatalf("at the end: %v", err)
	}
	if n := openFiles(t); n != before-1 {
		t.Errorf("%d descriptors are open, %d were", n, before-1)
	}
}

func header(request, flags, size uint32) []byte {
	b := binary.LittleEndian.AppendUint32(nil, request)
	b = binary.LittleEndian.AppendUint32(b, flags)
	return binary.LittleEndian.AppendUint32(b, size)
}

// What breaks the rules is an error, and leaves no descriptor open.
func TestReceiveRefuses(t *testing.T) {
	fds := eventfds(t, MaxFiles+1)
	for name, c := range map[string]struct {
		bytes []byte
		files int
		want  string
	}{
		"a header that ends":        {header(1, 1, 0)[:7], 1, "within its header"},
		"a payload that ends":       {append(header(2, 1, 8), 1, 2, 3), 1, "SET_FEATURES ends within its 8 bytes"},
		"a version of the future":   {header(1, 2, 0), 1, "version 2"},
		"a payload that is too big": {header(5, 1, MaxPayload+1), 2, "SET_MEM_TABLE of 513 bytes"},
		"too many descriptors":      {header(5, 1, 0), MaxFiles + 1, "more than 8 descriptors"},
	} {
		a, b := pair(t)
		before := openFiles(t)
		if _, _, err := a.WriteMsgUnix(c.bytes, unix.UnixRights(fds[:c.files]...), nil); err != nil {
			t.Fatal(err)
		}
		_ = a.CloseWrite()
		var m Message
		err := NewConn(b).Receive(&m)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%s: %v, want %q", name, err, c.want)
		}
		if n := openFiles(t); n != before || m.Files() != 0 {
			t.Errorf("%s: %d descriptors are open, %d were", name, n, before)
		}
	}
}

// Descriptors that come with the rest of a message are closed by the kernel.
func TestFilesWithinMessage(t *testing.T) {
	a, b := pair(t)
	fds := eventfds(t, 1)
	before := openFiles(t)
	if _, err := a.Write(header(2, 1, 8)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := a.WriteMsgUnix(make([]byte, 8), unix.UnixRights(fds...), nil); err != nil {
		t.Fatal(err)
	}
	var m Message
	if err := NewConn(b).Receive(&m); err != nil || m.Files() != 0 {
		t.Fatalf("%d descriptors, %v", m.Files(), err)
	}
	if n := openFiles(t); n != before {
		t.Errorf("%d descriptors are open, %d were", n, before)
	}
}

// FuzzReceive: whatever bytes come, each message is within its bounds, and the receiver
// ends.
func FuzzReceive(f *testing.F) {
	for r, p := range examples {
		f.Add(append(header(uint32(r), 1, uint32(len(p))), p...), uint8(1))
	}
	f.Add(header(5, 1, 1<<31), uint8(9))
	f.Fuzz(func(t *testing.T, b []byte, files uint8) {
		if len(b) == 0 || len(b) > 1<<16 {
			return
		}
		x, y := pair(t)
		defer func() { _, _ = x.Close(), y.Close() }()
		fds := make([]int, files%16)
		for i := range fds {
			fds[i] = 0
		}
		var oob []byte
		if len(fds) > 0 {
			oob = unix.UnixRights(fds...)
		}
		if _, _, err := x.WriteMsgUnix(b, oob, nil); err != nil {
			t.Skip(err)
		}
		_ = x.CloseWrite()
		var m Message
		c := NewConn(y)
		for left := len(b); ; {
			err := c.Receive(&m)
			if err != nil {
				if m.Files() != 0 {
					t.Fatalf("%d descriptors after %v", m.Files(), err)
				}
				return
			}
			if left -= HeaderBytes + len(m.Payload); left < 0 || m.Files() > MaxFiles {
				t.Fatalf("%v of %d bytes with %d descriptors, %d bytes more than were sent", m.Request, len(m.Payload), m.Files(), -left)
			}
			m.CloseFiles()
		}
	})
}
