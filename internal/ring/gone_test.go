package ring

import (
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// Memory that is taken away under a connection does not end the process that tells the facts.
func TestFactsOfMemoryThatIsGone(t *testing.T) {
	s := shape(1, 4)
	fd := unsealed(t)
	if err := unix.Ftruncate(fd, s.Size()); err != nil {
		t.Fatal(err)
	}
	mem, err := Map(fd, s.Size())
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Munmap(mem)
	m, err := Format(mem, s)
	if err != nil {
		t.Fatal(err)
	}
	d := newDisk()
	srv := NewServer(d, Options{})
	k := &conn{s: srv, m: m}
	srv.open[k] = true
	if err := unix.Ftruncate(fd, 0); err != nil {
		t.Fatal(err)
	}
	srv.Changed()
	if f := k.known.Load(); f == nil || *f != d.Facts() {
		t.Errorf("the connection knows %+v", f)
	}
	if err := faults(k.start); !errors.Is(err, ErrBroken) {
		t.Errorf("started: %v", err)
	}
}

// Pages of hugetlbfs go away without the file becoming smaller.
func TestHugePagesAreRefused(t *testing.T) {
	fd, err := unix.MemfdCreate("test", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING|unix.MFD_HUGETLB)
	if err != nil {
		t.Skipf("no huge pages here: %v", err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, 1<<30); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK); err != nil {
		t.Fatal(err)
	}
	if _, err := mapSealed(fd, 1<<30); !errors.Is(err, ErrBroken) || !strings.Contains(err.Error(), "huge pages") {
		t.Errorf("mapped: %v", err)
	}
}
