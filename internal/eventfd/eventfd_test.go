package eventfd

import (
	"encoding/binary"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

func made(t *testing.T) int {
	t.Helper()
	fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Close(fd) })
	return fd
}

func TestCheck(t *testing.T) {
	fd := made(t)
	if err := Check(fd); err != nil {
		t.Fatal(err)
	}
	if flags, err := unix.FcntlInt(uintptr(fd), unix.F_GETFL, 0); err != nil || flags&unix.O_NONBLOCK == 0 {
		t.Errorf("flags %#x, %v", flags, err)
	}
	f, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := Check(int(f.Fd())); err == nil || !strings.Contains(err.Error(), "is /dev/null, an eventfd is needed") {
		t.Errorf("a file: %v", err)
	}
	if err := Check(-1); err == nil {
		t.Error("no descriptor is an eventfd")
	}
}

// Nobody waits in Read, whatever the flags, and what was counted is gone after it.
func TestRead(t *testing.T) {
	fd := made(t) // which blocks
	var r Reader
	if counted, wait := r.Read(fd); counted || !wait {
		t.Errorf("nothing was counted: %v, %v", counted, wait)
	}
	Count(fd)
	Count(fd)
	if counted, wait := r.Read(fd); !counted || wait {
		t.Errorf("counted twice: %v, %v", counted, wait)
	}
	if counted, wait := r.Read(fd); counted || !wait {
		t.Errorf("read twice: %v, %v", counted, wait)
	}
	if counted, wait := r.Read(-1); counted || wait {
		t.Errorf("no descriptor: %v, %v", counted, wait)
	}
	if n := testing.AllocsPerRun(100, func() { Count(fd); r.Read(fd) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
}

// Whoever waits because the peer has filled the counter goes on, and a counter that the peer
// has not seen stays.
func TestUnstick(t *testing.T) {
	fd := made(t)
	var r Reader
	Count(fd)
	r.Unstick(fd)
	if counted, _ := r.Read(fd); !counted {
		t.Error("what was counted is gone")
	}
	if _, err := unix.Write(fd, binary.LittleEndian.AppendUint64(nil, 1<<64-2)); err != nil {
		t.Fatal(err)
	}
	done := make(chan bool)
	go func() {
		Count(fd)
		close(done)
	}()
	r.Unstick(fd)
	<-done
	if counted, _ := r.Read(fd); !counted {
		t.Error("what was counted behind a full counter is gone")
	}
}
