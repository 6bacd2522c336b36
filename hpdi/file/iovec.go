package file

import (
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
)

// maxIovecs is how many vectors one call to the kernel carries: as many as a
// track has blocks. A request with more goes in pieces.
const maxIovecs = 256

// maxTransfer bounds one call to the kernel in bytes, below what the kernel
// itself cuts a call to, and at a whole block.
const maxTransfer = 1 << 30

// Modes of fallocate. None may change the size of the file.
const (
	punchMode = unix.FALLOC_FL_PUNCH_HOLE | unix.FALLOC_FL_KEEP_SIZE
	zeroMode  = unix.FALLOC_FL_ZERO_RANGE | unix.FALLOC_FL_KEEP_SIZE
)

// iovec is the kernel's struct iovec. Its base is a number, because the array
// lies outside the Go heap, where the collector would not see a pointer.
type iovec struct {
	base uintptr
	len  uint64
}

// allocIovecs returns n iovecs outside the Go heap and the memory to free.
func allocIovecs(n int) ([]iovec, []byte, error) {
	mem, err := hpdi.AllocPrivate(n * int(unsafe.Sizeof(iovec{})))
	if err != nil {
		return nil, nil, err
	}
	return unsafe.Slice((*iovec)(unsafe.Pointer(&mem[0])), n), mem, nil
}

// fillIovecs describes in iov what is left of vec after its first skip bytes,
// as far as it fits, and returns the number of iovecs used. Vectors that are
// neighbours in memory become one.
func fillIovecs(iov []iovec, vec [][]byte, skip int64) int {
	n := 0
	room := uint64(maxTransfer)
	for _, v := range vec {
		if skip >= int64(len(v)) {
			skip -= int64(len(v))
			continue
		}
		v = v[skip:]
		skip = 0
		base, length := uintptr(unsafe.Pointer(unsafe.SliceData(v))), min(uint64(len(v)), room)
		switch {
		case n > 0 && iov[n-1].base+uintptr(iov[n-1].len) == base:
			iov[n-1].len += length
		case n < len(iov):
			iov[n] = iovec{base, length}
			n++
		default:
			return n
		}
		if room -= length; room == 0 {
			return n
		}
	}
	return n
}

// discardNow discards a range of a block device and waits for the device.
func (d *device) discardNow(off, length int64) error {
	r := [2]uint64{uint64(off), uint64(length)}
	return ioctl(d.fd, unix.BLKDISCARD, unsafe.Pointer(&r))
}

// zeroRangeMode returns how zeroes are written to d at present.
func (d *device) zeroRangeMode() uint32 {
	if d.noZeroRange.Load() {
		return punchMode
	}
	return zeroMode
}

// endOfFile is the error of a call that moved nothing: the file has shrunk
// since it was opened.
func endOfFile(r *hpdi.Request, pos int64) error {
	return fmt.Errorf("nothing was transferred at %d, has the file been shortened? %w", r.Offset+pos, hpdi.Errno(unix.EIO))
}
