package vhostuser

import (
	"fmt"
	"math"
	"sync/atomic"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/vhost"
	"github.com/pollux-storage/pollux/internal/virtio"
)

// processMemory is how many bytes all connections of a process may map together: the
// process needs addresses for itself.
const processMemory = 64 << 40

var mapped atomic.Int64

// region is a piece of the front-end's memory.
type region struct {
	vhost.Region
	mapping []byte // the whole mapping, which begins at a page
	mem     []byte
	sealed  bool // it cannot become shorter
}

// shared describes a file that a front-end shares.
type shared struct {
	size   int64
	page   int64 // of its mappings
	sealed bool
}

// inspect says what a descriptor is, or that it is nothing that may be mapped: a page of
// a file that somebody serves may never come.
func inspect(fd int) (shared, error) {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(fd, &fs); err != nil {
		return shared{}, fmt.Errorf("%w: a descriptor that is no file: %w", errRule, err)
	}
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return shared{}, fmt.Errorf("%w: a descriptor that is no file: %w", errRule, err)
	}
	huge := fs.Type == unix.HUGETLBFS_MAGIC
	if st.Mode&unix.S_IFMT != unix.S_IFREG || fs.Type != unix.TMPFS_MAGIC && !huge {
		return shared{}, fmt.Errorf("%w: memory must be a memfd or a file of tmpfs or hugetlbfs (QEMU: -object memory-backend-memfd,share=on)", errRule)
	}
	i := shared{size: st.Size, page: int64(unix.Getpagesize())}
	if huge {
		i.page = fs.Bsize
		return i, nil // pages that are given up may not come again, whatever the size
	}
	seals, err := unix.FcntlInt(uintptr(fd), unix.F_GET_SEALS, 0)
	i.sealed = err == nil && seals&unix.F_SEAL_SHRINK != 0
	return i, nil
}

// mapFile maps n bytes at off of a file. It returns the mapping and the part of it that was
// asked for.
func mapFile(fd int, i shared, off, n uint64) (mapping, mem []byte, err error) {
	if n == 0 || n > math.MaxInt64 || off > math.MaxInt64-n || int64(off+n) > i.size {
		return nil, nil, fmt.Errorf("%w: %d bytes at %d of a file of %d", errRule, n, off, i.size)
	}
	begin := int64(off) / i.page * i.page
	length := (int64(off+n) - begin + i.page - 1) / i.page * i.page
	if mapped.Add(length) > processMemory {
		mapped.Add(-length)
		return nil, nil, fmt.Errorf("%d bytes of memory: all connections have mapped %d bytes, at most %d are possible", n, mapped.Load(), int64(processMemory))
	}
	mapping, err = unix.Mmap(fd, begin, int(length), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_NORESERVE)
	if err != nil {
		mapped.Add(-length)
		return nil, nil, fmt.Errorf("map %d bytes at %d of the front-end's memory: %w", n, off, err)
	}
	_ = unix.Madvise(mapping, unix.MADV_DONTDUMP)
	at := off - uint64(begin)
	return mapping, mapping[at : at+n : at+n], nil
}

func unmap(mapping []byte) {
	if mapping != nil {
		mapped.Add(-int64(len(mapping)))
		_ = unix.Munmap(mapping)
	}
}

// mapRegion maps a region of the front-end. The descriptor stays the caller's.
func mapRegion(r vhost.Region, fd int) (*region, error) {
	i, err := inspect(fd)
	if err != nil {
		return nil, err
	}
	m := &region{Region: r, sealed: i.sealed}
	if m.mapping, m.mem, err = mapFile(fd, i, r.Offset, r.Size); err != nil {
		return nil, fmt.Errorf("memory at guest address %#x: %w", r.Guest, err)
	}
	return m, nil
}

// useMemory makes regions the connection's memory, those that are there already and new
// ones. While queues run there are only new ones, of which setMemory tells.
func (c *client) useMemory(regions []*region) error {
	slots := make([]virtio.Slot, 0, len(regions))
	for _, r := range regions {
		slots = append(slots, virtio.Slot{Guest: r.Guest, User: r.User, Mem: r.mem})
	}
	m, err := virtio.NewMemory(slots)
	if err != nil {
		return fmt.Errorf("%w: %w", errRule, err)
	}
	c.regions, c.memory = regions, m
	return nil
}

// reserve makes the connection's part of the memory that all connections of the server may
// share so many bytes, before they are mapped. An error ends the connection, which gives
// its part back by dropMemory.
func (c *client) reserve(sizes ...uint64) error {
	most := c.s.o.Memory
	n := int64(0)
	for _, size := range sizes {
		if size > uint64(most) || n > most-int64(size) {
			return fmt.Errorf("%w: %d bytes of memory beside %d, all connections of a disk may share %d", errRule, size, n, most)
		}
		n += int64(size)
	}
	if sum := c.s.shared.Add(n - c.shared); sum > most {
		c.s.shared.Add(c.shared - n)
		return fmt.Errorf("%d bytes of memory, all connections of the disk would share %d, at most %d are possible", n, sum, most)
	}
	c.shared = n
	return nil
}

func (c *client) dropMemory() {
	for _, r := range c.regions {
		unmap(r.mapping)
	}
	c.regions, c.memory = nil, nil
	c.s.shared.Add(-c.shared)
	c.shared = 0
}

// sealed reports whether none of the connection's memory can become shorter: then the
// volume may touch it under its locks.
func (c *client) sealed() bool {
	for _, r := range c.regions {
		if !r.sealed {
			return false
		}
	}
	return true
}
