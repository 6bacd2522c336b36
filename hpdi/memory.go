package hpdi

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Mapping is memory from Alloc, and how another process may map the same.
type Mapping struct {
	Mem []byte // all of it
	FD  int    // of the file that it is a mapping of, from its beginning; closed by Free
	ID  uint64 // no other mapping of this process has or had it
}

// huge is the size from which on memory is asked to be on huge pages.
const huge = 2 << 20

var (
	mappings struct {
		sync.RWMutex
		at map[*byte]Mapping
		id uint64
	}
	freed atomic.Uint64
)

// Alloc returns n bytes of zeroed memory outside the Go heap, aligned to a
// page, on huge pages where the kernel grants them. It suits direct I/O on
// every device, those among them that share it with another process. Each
// piece costs a file descriptor, so a program allocates few and large ones.
// Free returns it.
func Alloc(n int) ([]byte, error) {
	mem, fd, err := mapFile(n)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes of memory: %w", n, err)
	}
	advise(mem)
	mappings.Lock()
	defer mappings.Unlock()
	if mappings.at == nil {
		mappings.at = map[*byte]Mapping{}
	}
	mappings.id++
	mappings.at[&mem[0]] = Mapping{Mem: mem, FD: fd, ID: mappings.id}
	return mem, nil
}

// mapFile maps a file without a name that nobody can make shorter: whoever shares it
// could end this process by that.
func mapFile(n int) ([]byte, int, error) {
	fd, err := unix.MemfdCreate("hpdi", unix.MFD_CLOEXEC|unix.MFD_ALLOW_SEALING)
	if err != nil {
		return nil, -1, err
	}
	var mem []byte
	if err = unix.Ftruncate(fd, int64(n)); err == nil {
		if _, err = unix.FcntlInt(uintptr(fd), unix.F_ADD_SEALS, unix.F_SEAL_SHRINK|unix.F_SEAL_GROW|unix.F_SEAL_SEAL); err == nil {
			mem, err = unix.Mmap(fd, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
		}
	}
	if err != nil {
		_ = unix.Close(fd) // nobody has seen it
		return nil, -1, err
	}
	return mem, fd, nil
}

// advise asks for huge pages. It is only a hint: without them everything works, a
// little slower.
func advise(mem []byte) {
	if len(mem) >= huge {
		_ = unix.Madvise(mem, unix.MADV_HUGEPAGE)
	}
}

// AllocPrivate is Alloc for memory that no device is to see, such as tables. It costs
// no file descriptor, and devices that share memory refuse it with ErrMemory.
func AllocPrivate(n int) ([]byte, error) {
	mem, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes of memory: %w", n, err)
	}
	advise(mem)
	return mem, nil
}

// Free returns memory that came from Alloc or AllocPrivate: all of it, and with no
// request on it in flight.
func Free(mem []byte) error {
	if mem == nil {
		return nil
	}
	mappings.Lock()
	m, shared := mappings.at[unsafe.SliceData(mem)]
	whole := shared && len(m.Mem) == len(mem)
	if whole {
		delete(mappings.at, &m.Mem[0])
	}
	mappings.Unlock()
	if !whole {
		return unix.Munmap(mem) // which refuses what is not a whole mapping
	}
	// Who shares it is to notice before the address can be another mapping's.
	freed.Add(1)
	return errors.Join(unix.Munmap(mem), unix.Close(m.FD))
}

// MappingOf returns the mapping that all of mem lies in. It is for drivers, and reports
// false for memory that is not from Alloc.
func MappingOf(mem []byte) (Mapping, bool) {
	at := uintptr(unsafe.Pointer(unsafe.SliceData(mem)))
	mappings.RLock()
	defer mappings.RUnlock()
	for p, m := range mappings.at {
		if begin := uintptr(unsafe.Pointer(p)); at >= begin && at-begin+uintptr(len(mem)) <= uintptr(len(m.Mem)) {
			return m, true
		}
	}
	return Mapping{}, false
}

// Mapped reports whether the mapping with that ID has not been freed. It is for drivers.
func Mapped(id uint64) bool {
	mappings.RLock()
	defer mappings.RUnlock()
	for _, m := range mappings.at {
		if m.ID == id {
			return true
		}
	}
	return false
}

// Freed returns how often memory from Alloc was freed: a driver that knows mappings by
// their addresses looks whether they are still there when it has changed.
func Freed() uint64 { return freed.Load() }
