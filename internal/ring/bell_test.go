package ring

import (
	"encoding/binary"
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// A front-end that fills the counters of its bells, and lets who writes to them wait, holds
// up neither what it asks for nor the end of the server.
func TestHostileBells(t *testing.T) {
	d := newDisk()
	path, s := served(t, d, Options{})
	c := newClient(t, path, shape(1, 4))
	if err := c.attach(); err != nil {
		t.Fatal(err)
	}
	if err := c.link.Memory(3, sealedFile(t, 4096), 4096); err != nil {
		t.Fatal(err)
	}
	c.f.Arm()
	full := binary.LittleEndian.AppendUint64(nil, 1<<64-2)
	stick := func() {
		t.Helper()
		if err := unix.SetNonblock(c.bells[1].fd, true); err != nil {
			t.Fatal(err)
		}
		for {
			// The back-end may be ringing yet for what was answered already.
			c.bells[1].Quiet()
			_, err := unix.Write(c.bells[1].fd, full)
			if err == nil {
				break
			}
			if !errors.Is(err, unix.EAGAIN) {
				t.Fatal(err)
			}
		}
		if err := unix.SetNonblock(c.bells[1].fd, false); err != nil {
			t.Fatal(err)
		}
		c.submit(Entry{Op: OpWrite, Length: 4096, Segs: []Segment{{0, 4096}}})
	}
	stick()
	within(t, "forget", func() {
		if err := c.link.Forget(3); err != nil {
			t.Error(err)
		}
	})
	if a, err := c.answer(); err != nil || a.Status != StatusOK {
		t.Fatalf("%+v, %v", a, err)
	}
	c.f.Arm()
	stick()
	within(t, "close", s.Close)
}

// Nobody waits in the kernel for a bell that has not rung, whatever the peer does to it.
func TestQuietBell(t *testing.T) {
	b, err := NewBell()
	if err != nil {
		t.Fatal(err)
	}
	defer b.Close()
	if err := unix.SetNonblock(b.fd, false); err != nil {
		t.Fatal(err)
	}
	within(t, "quiet", b.Quiet)
}

func within(t *testing.T, what string, do func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done)
		do()
	}()
	select {
	case <-done:
	case <-time.After(10 * time.Second):
		t.Fatalf("%s does not end", what)
	}
}
