package hpdi

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"testing"
	"unsafe"

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

// Each byte of many mappings is found in its own, the whole of one as well, and nothing that
// reaches out of it, whichever of them are left.
func TestManyMappings(t *testing.T) {
	seed := rand.Uint64()
	if v := os.Getenv("POLLUX_SEED"); v != "" {
		var err error
		if seed, err = strconv.ParseUint(v, 0, 64); err != nil {
			t.Fatalf("POLLUX_SEED: %v", err)
		}
	}
	rng := rand.New(rand.NewPCG(seed, 0))
	type piece struct {
		mem []byte
		id  uint64
	}
	var there []piece
	gone := map[uint64]bool{}
	check := func() {
		t.Helper()
		for _, p := range there {
			n := len(p.mem)
			for name, part := range map[string][]byte{"all": p.mem, "first": p.mem[:1], "last": p.mem[n-1:], "some": p.mem[rng.IntN(n):]} {
				if m, ok := MappingOf(part); !ok || m.ID != p.id || &m.Mem[0] != &p.mem[0] || len(m.Mem) != n {
					t.Fatalf("seed %d: %s of mapping %d is in mapping %d, %t", seed, name, p.id, m.ID, ok)
				}
			}
			if m, ok := MappingOf(unsafe.Slice(&p.mem[n-1], 2)); ok {
				t.Fatalf("seed %d: what reaches out of mapping %d is in mapping %d", seed, p.id, m.ID)
			}
			if !Mapped(p.id) {
				t.Fatalf("seed %d: mapping %d is said not to be there", seed, p.id)
			}
		}
		for id := range gone {
			if Mapped(id) {
				t.Fatalf("seed %d: mapping %d is said to be there", seed, id)
			}
		}
	}
	for range 200 {
		if len(there) == 0 || rng.IntN(5) > 1 {
			mem, err := Alloc((1 + rng.IntN(4)) * 4096)
			if err != nil {
				t.Fatal(err)
			}
			m, _ := MappingOf(mem)
			there = append(there, piece{mem, m.ID})
		} else {
			i := rng.IntN(len(there))
			if err := Free(there[i].mem); err != nil {
				t.Fatalf("seed %d: %v", seed, err)
			}
			gone[there[i].id] = true
			there = slices.Delete(there, i, i+1)
		}
		check()
	}
	for _, p := range there {
		if err := Free(p.mem); err != nil {
			t.Error(err)
		}
	}
}

// Pages of private memory that are given back are gone, and read as zero.
func TestPrivateGivenBack(t *testing.T) {
	const n = 8 * 4096
	mem, err := AllocPrivate(n)
	if err != nil {
		t.Fatal(err)
	}
	for i := range mem {
		mem[i] = 1
	}
	if err := unix.Madvise(mem[4096:], unix.MADV_DONTNEED); err != nil {
		t.Fatal(err)
	}
	if mem[4095] != 1 || bytes.Count(mem[4096:], []byte{0}) != n-4096 {
		t.Error("something else than what was given back is zero")
	}
	if err := Free(mem); err != nil {
		t.Error(err)
	}
}
