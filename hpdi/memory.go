package hpdi

import (
	"cmp"
	"errors"
	"fmt"
	"slices"
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
	// mappings are those that have not been freed. Drivers look them up when they
	// do not know memory yet, or when some was freed, and not for each request.
	mappings struct {
		sync.RWMutex
		sorted []Mapping           // by address; they do not overlap
		ids    map[uint64]struct{} // theirs
		last   uint64              // ID that was given
	}
	freed atomic.Uint64
)

// Alloc returns n bytes of zeroed memory outside the Go heap, aligned to a
// page. It suits direct I/O on every device, those among them that share it
// with another process: it is a mapping of a file in memory. Each piece costs a
// file descriptor and four system calls more than one of AllocPrivate, so a
// program allocates few and large ones. It is asked to be on huge pages, but
// for files in memory the kernel grants them only where
// /sys/kernel/mm/transparent_hugepage/shmem_enabled is "advise" or more; its
// default is "never". Free returns it.
func Alloc(n int) ([]byte, error) {
	mem, fd, err := mapFile(n)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes of memory: %w", n, err)
	}
	advise(mem)
	mappings.Lock()
	defer mappings.Unlock()
	if mappings.ids == nil {
		mappings.ids = map[uint64]struct{}{}
	}
	mappings.last++
	mappings.ids[mappings.last] = struct{}{}
	mappings.sorted = slices.Insert(mappings.sorted, beforeLocked(address(mem)), Mapping{Mem: mem, FD: fd, ID: mappings.last})
	return mem, nil
}

func address(mem []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(mem))) }

// beforeLocked returns how many mappings begin before an address.
func beforeLocked(at uintptr) int {
	i, _ := slices.BinarySearchFunc(mappings.sorted, at, func(m Mapping, at uintptr) int {
		return cmp.Compare(address(m.Mem), at)
	})
	return i
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

// AllocPrivate is Alloc for memory that no other process is to map: tables, and
// buffers for devices whose Info.SharedMemory is false; the others refuse it with
// ErrMemory. It costs no file descriptor and one system call. From 2 MiB on it is on
// huge pages where the kernel has some and
// /sys/kernel/mm/transparent_hugepage/enabled says "madvise" or "always". Pages that
// are given back with MADV_DONTNEED read as zero again.
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
	var m Mapping
	mappings.Lock()
	i := beforeLocked(address(mem))
	whole := i < len(mappings.sorted) && address(mappings.sorted[i].Mem) == address(mem) && len(mappings.sorted[i].Mem) == len(mem)
	if whole {
		m = mappings.sorted[i]
		mappings.sorted = slices.Delete(mappings.sorted, i, i+1)
		delete(mappings.ids, m.ID)
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
	at := address(mem)
	mappings.RLock()
	defer mappings.RUnlock()
	i := beforeLocked(at + 1)
	if i == 0 {
		return Mapping{}, false
	}
	m := mappings.sorted[i-1]
	if at-address(m.Mem)+uintptr(len(mem)) > uintptr(len(m.Mem)) {
		return Mapping{}, false
	}
	return m, true
}

// Mapped reports whether the mapping with that ID has not been freed. It is for drivers.
func Mapped(id uint64) bool {
	mappings.RLock()
	defer mappings.RUnlock()
	_, ok := mappings.ids[id]
	return ok
}

// MappingFile returns a descriptor of the caller's own of the file that the mapping with that
// ID is of. It is for drivers that hand memory over while the application may free it: by the
// number in Mapping.FD another file can be open then. An error wraps ErrMemory if the mapping
// has been freed.
func MappingFile(id uint64) (int, error) {
	mappings.RLock()
	defer mappings.RUnlock()
	for _, m := range mappings.sorted {
		if m.ID == id {
			fd, err := unix.FcntlInt(uintptr(m.FD), unix.F_DUPFD_CLOEXEC, 0)
			if err != nil {
				return -1, fmt.Errorf("descriptor of %d bytes of memory: %w", len(m.Mem), err)
			}
			return fd, nil
		}
	}
	return -1, fmt.Errorf("memory that has been freed: %w", ErrMemory)
}

// Freed returns how often memory from Alloc was freed: a driver that knows mappings by
// their addresses looks whether they are still there when it has changed.
func Freed() uint64 { return freed.Load() }
