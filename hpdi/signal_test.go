package hpdi

import (
	"testing"

	"golang.org/x/sys/unix"
)

// A signal is readable while it is set, whenever its descriptor was asked for, and costs
// no allocation.
func TestSignal(t *testing.T) {
	readable := func(fd int) bool {
		p := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
		n, err := unix.Poll(p, 0)
		if err != nil {
			t.Fatal(err)
		}
		return n > 0
	}
	var before, after Signal
	before.Set(true) // nobody has asked
	fd := before.Event()
	if fd < 0 || !readable(fd) || before.Event() != fd {
		t.Errorf("descriptor %d of what was set before", fd)
	}
	if fd = after.Event(); fd < 0 || readable(fd) {
		t.Errorf("descriptor %d of what was never set", fd)
	}
	for range 3 {
		if after.Set(true); !readable(fd) {
			t.Error("set, and not readable")
		}
		after.Set(true)
		if after.Set(false); readable(fd) {
			t.Error("not set, and readable")
		}
	}
	if n := testing.AllocsPerRun(100, func() { after.Set(true); after.Set(false) }); n != 0 {
		t.Errorf("%v allocations", n)
	}
	before.Close()
	after.Close()
	after.Set(true)
	after.Close()
	if after.Event() != -1 {
		t.Error("a closed one has a descriptor")
	}
}
