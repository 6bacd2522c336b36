package file

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
)

// Create makes a sparse file of size bytes at path, readable and writable by
// its owner alone, and makes it durable. It fails if path exists.
func Create(path string, size int64) (err error) {
	if size < BlockSize || size%BlockSize != 0 {
		return fmt.Errorf("create %s: size %d is not a positive multiple of %d bytes", path, size, BlockSize)
	}
	f, err := os.OpenFile(path, os.O_CREATE|os.O_EXCL|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("create backing file: %w", err)
	}
	defer func() {
		if cerr := f.Close(); err == nil {
			err = cerr
		}
		if err != nil {
			err = fmt.Errorf("create %s: %w", path, errors.Join(err, os.Remove(path)))
		}
	}()
	if err := f.Truncate(size); err != nil {
		return err
	}
	if err := f.Sync(); err != nil {
		return err
	}
	dir, err := os.Open(filepath.Dir(path))
	if err != nil {
		return err
	}
	return errors.Join(dir.Sync(), dir.Close())
}

// openFile opens path and takes the lock if opts ask for it.
func openFile(path string, opts Options) (fd int, err error) {
	// Looked at before it is opened, because opening a pipe would block and
	// opening some devices does things.
	var st unix.Stat_t
	if err := ignoringEINTR(func() error { return unix.Stat(path, &st) }); err != nil {
		return -1, err
	}
	if kind := st.Mode & unix.S_IFMT; kind != unix.S_IFREG && kind != unix.S_IFBLK {
		return -1, errors.New("neither a regular file nor a block device")
	}
	flags := unix.O_RDWR | unix.O_CLOEXEC
	if opts.ReadOnly {
		flags = unix.O_RDONLY | unix.O_CLOEXEC
	}
	if err := ignoringEINTR(func() (err error) { fd, err = unix.Open(path, flags, 0); return err }); err != nil {
		return -1, err
	}
	if opts.Lock {
		if err := flock(fd, unix.LOCK_EX|unix.LOCK_NB); err != nil {
			_ = unix.Close(fd) // the error before is the one to tell
			if errors.Is(err, unix.EWOULDBLOCK) {
				return -1, hpdi.ErrLocked
			}
			return -1, fmt.Errorf("lock: %w", err)
		}
	}
	return fd, nil
}

// ErrTooSmall is what Open ends with where there is less than a block: a file that is empty,
// or a block device that has nothing behind it, as a loop device without a file.
var ErrTooSmall = errors.New("smaller than a block")

// measure finds out whether d is a block device, and its size.
func (d *device) measure() error {
	var st unix.Stat_t
	if err := unix.Fstat(d.fd, &st); err != nil {
		return fmt.Errorf("stat: %w", err)
	}
	size := st.Size
	switch st.Mode & unix.S_IFMT {
	case unix.S_IFREG:
	case unix.S_IFBLK:
		d.block = true
		var bytes uint64
		if err := ioctl(d.fd, unix.BLKGETSIZE64, unsafe.Pointer(&bytes)); err != nil {
			return fmt.Errorf("ask for the size: %w", err)
		}
		size = int64(bytes)
		var sector int32
		if err := ioctl(d.fd, unix.BLKSSZGET, unsafe.Pointer(&sector)); err != nil {
			return fmt.Errorf("ask for the sector size: %w", err)
		}
		if sector > BlockSize {
			return fmt.Errorf("sectors of %d bytes, at most %d can be used", sector, BlockSize)
		}
	default:
		return errors.New("neither a regular file nor a block device")
	}
	d.identify(size)
	d.info.Size = size &^ (BlockSize - 1)
	if d.info.Size == 0 {
		return fmt.Errorf("%w: it has %d bytes, at least %d are needed", ErrTooSmall, size, BlockSize)
	}
	return nil
}

// refuseBusy refuses a block device that the system uses: one that is mounted,
// or part of a RAID or volume group. Only the holder of the lock asks, so two
// who open at once do not mistake each other for the system.
func refuseBusy(fd int) error {
	probe, err := unix.Open("/proc/self/fd/"+strconv.Itoa(fd), unix.O_RDONLY|unix.O_EXCL|unix.O_CLOEXEC, 0)
	if errors.Is(err, unix.EBUSY) {
		return fmt.Errorf("the device is mounted or part of another one; unmount or remove it there first: %w", err)
	}
	if err != nil {
		return nil // without /proc nobody can tell
	}
	return unix.Close(probe)
}

// chooseDirect switches direct I/O on where it is wanted and works.
func (d *device) chooseDirect(want Direct) (note string, err error) {
	if want == DirectOff {
		return "", nil
	}
	err = d.tryDirect()
	switch {
	case err == nil:
		d.info.Direct = true
		return "", nil
	case want == DirectOn:
		return "", fmt.Errorf("direct I/O: %w", err)
	}
	if err := d.setDirect(false); err != nil {
		return "", fmt.Errorf("return to the page cache: %w", err)
	}
	return fmt.Sprintf("no direct I/O: %v", err), nil
}

// tryDirect switches direct I/O on and reads a block to see it work: some file
// systems take the flag and refuse the read.
func (d *device) tryDirect() error {
	if inMemory, err := d.inMemory(); err != nil {
		return err
	} else if inMemory {
		return errors.New("the file lives in memory")
	}
	var stx unix.Statx_t
	err := unix.Statx(d.fd, "", unix.AT_EMPTY_PATH, unix.STATX_DIOALIGN, &stx)
	if err == nil && stx.Mask&unix.STATX_DIOALIGN != 0 {
		if stx.Dio_offset_align == 0 {
			return errors.New("the file system does not offer it for this file")
		}
		if max(stx.Dio_offset_align, stx.Dio_mem_align) > BlockSize {
			return fmt.Errorf("it needs an alignment of %d bytes", max(stx.Dio_offset_align, stx.Dio_mem_align))
		}
	}
	if err := d.setDirect(true); err != nil {
		return fmt.Errorf("the file system does not take it: %w", err)
	}
	page, err := hpdi.AllocPrivate(BlockSize)
	if err != nil {
		return err
	}
	err = ignoringEINTR(func() error { _, err := unix.Pread(d.fd, page, 0); return err })
	return errors.Join(err, hpdi.Free(page))
}

// setDirect switches direct I/O on the description, which keeps its lock.
func (d *device) setDirect(on bool) error {
	flags, err := unix.FcntlInt(uintptr(d.fd), unix.F_GETFL, 0)
	if err != nil {
		return err
	}
	flags &^= unix.O_DIRECT
	if on {
		flags |= unix.O_DIRECT
	}
	_, err = unix.FcntlInt(uintptr(d.fd), unix.F_SETFL, flags)
	return err
}

// probeDeallocate finds out whether the device discards and writes zeroes
// without data.
func (d *device) probeDeallocate() {
	if d.info.ReadOnly {
		return
	}
	if d.block {
		d.info.Discard = d.queueLimit("discard_max_bytes") > 0
		d.info.Zeroes = d.queueLimit("write_zeroes_max_bytes") > 0
		return
	}
	// A hole beyond the end of the file changes nothing.
	var st unix.Stat_t
	if unix.Fstat(d.fd, &st) != nil {
		return
	}
	end := (st.Size + BlockSize - 1) &^ (BlockSize - 1)
	err := ignoringEINTR(func() error { return unix.Fallocate(d.fd, punchMode, end, BlockSize) })
	d.info.Discard, d.info.Zeroes = err == nil, err == nil
}

// queueLimit reads a limit of the block device's request queue, 0 if there is none.
func (d *device) queueLimit(name string) int64 {
	var st unix.Stat_t
	if unix.Fstat(d.fd, &st) != nil {
		return 0
	}
	n, _ := queueAttribute(sysfs, st.Rdev, name)
	return n
}

// ignoringEINTR calls f again while a signal interrupts it.
func ignoringEINTR(f func() error) error {
	for {
		if err := f(); !errors.Is(err, unix.EINTR) {
			return err
		}
	}
}

func flock(fd, how int) error {
	return ignoringEINTR(func() error { return unix.Flock(fd, how) })
}

func ioctl(fd int, req uint, arg unsafe.Pointer) error {
	return ignoringEINTR(func() error {
		if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), uintptr(req), uintptr(arg)); errno != 0 {
			return errno
		}
		return nil
	})
}
