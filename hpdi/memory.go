package hpdi

import (
	"fmt"

	"golang.org/x/sys/unix"
)

// Alloc returns n bytes of zeroed memory outside the Go heap, aligned to a
// page, on huge pages where the kernel grants them. It suits direct I/O on
// every device. Free returns it.
func Alloc(n int) ([]byte, error) {
	mem, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes of memory: %w", n, err)
	}
	if n >= 2<<20 {
		// Only a hint: without huge pages everything works, a little slower.
		_ = unix.Madvise(mem, unix.MADV_HUGEPAGE)
	}
	return mem, nil
}

// Free returns memory that came from Alloc.
func Free(mem []byte) error {
	if mem == nil {
		return nil
	}
	return unix.Munmap(mem)
}
