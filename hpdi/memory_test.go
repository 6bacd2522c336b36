package hpdi

import (
	"errors"
	"testing"

	"golang.org/x/sys/unix"
)

// Memory from Alloc can be mapped by somebody else, who then sees the same bytes and
// cannot cut it off; other memory is not taken for such.
func TestMappings(t *testing.T) {
	const n = 3 * 4096
	mem, err := Alloc(n)
	if err != nil {
		t.Fatal(err)
	}
	other, err := Alloc(n)
	if err != nil {
		t.Fatal(err)
	}
	m, ok := MappingOf(mem[5000:6000])
	if !ok || &m.Mem[0] != &mem[0] || len(m.Mem) != n {
		t.Fatalf("it is in a mapping of %d bytes, %v", len(m.Mem), ok)
	}
	if o, ok := MappingOf(other); !ok || o.ID == m.ID || o.FD == m.FD {
		t.Errorf("two mappings are %+v and %+v", m.ID, o.ID)
	}
	peer, err := unix.Mmap(m.FD, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		t.Fatal(err)
	}
	mem[n-1], peer[1] = 7, 8
	if peer[n-1] != 7 || mem[1] != 8 {
		t.Error("the peer's mapping is other memory")
	}
	if err := unix.Ftruncate(m.FD, 0); !errors.Is(err, unix.EPERM) {
		t.Errorf("whoever shares it can cut it off: %v", err)
	}
	private, err := AllocPrivate(n)
	if err != nil {
		t.Fatal(err)
	}
	for name, p := range map[string][]byte{"heap": make([]byte, n), "private": private} {
		if _, ok := MappingOf(p); ok {
			t.Errorf("%s memory is in a mapping", name)
		}
	}
	before := Freed()
	if err := Free(mem[:n/2]); err == nil {
		t.Error("half of it was freed")
	}
	if _, ok := MappingOf(mem); !ok {
		t.Error("what could not be freed is forgotten")
	}
	if err := errors.Join(Free(mem), Free(private), Free(nil)); err != nil {
		t.Error(err)
	}
	if o, _ := MappingOf(other); Mapped(m.ID) || !Mapped(o.ID) {
		t.Error("what was freed is mapped, or what was not is not")
	}
	if got := Freed() - before; got != 1 {
		t.Errorf("%d were freed", got)
	}
	if _, err := unix.FcntlInt(uintptr(m.FD), unix.F_GETFD, 0); !errors.Is(err, unix.EBADF) {
		t.Errorf("its file is still open: %v", err)
	}
	if err := errors.Join(Free(other), unix.Munmap(peer)); err != nil {
		t.Error(err)
	}
}
