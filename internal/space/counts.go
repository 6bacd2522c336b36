package space

import (
	"encoding/binary"
	"errors"
	"fmt"
	"math/bits"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

// MaxCount is the most references that a block can have: a count tree stores a byte.
const MaxCount = 255

const (
	trackWords = block.TrackBlocks / 64 // of a set of a track's blocks
	maxPlanes  = 8                      // enough for MaxCount-1
)

// errLimit says that a block has MaxCount references.
var errLimit = fmt.Errorf("a count is at its limit of %d: %w", MaxCount, block.ErrUnsupported)

// blocks is a set of the blocks of one track.
type blocks [trackWords]uint64

// span returns the blocks lo to hi-1.
func span(lo, hi int) (m blocks) {
	for w := range m {
		from, to := max(lo-64*w, 0), min(hi-64*w, 64)
		if from < to {
			m[w] = (^uint64(0) >> (64 - (to - from))) << from
		}
	}
	return m
}

// counts are the reference counts of one device, exact up to MaxCount. A bit
// tells whether a block is in use; what a count is above 1 lies, in binary, in
// the planes of its track: a set of the blocks whose bit is 1 for each bit of
// the largest number. Tracks where nothing is shared have no planes.
//
// All of it is memory of the kernel without pointers, addressed by the number
// of the track. Pages that were never touched, or given back, read as zero.
type counts struct {
	used []uint64 // trackWords a track
	refs []uint32 // where a track's planes are: number of its slab << refShift | how many
	// slabs by the number of their planes; slabs[0] is not used.
	slabs [maxPlanes + 1]slabs
}

const refShift = 4

func newCounts(tracks int) (c counts, err error) {
	if c.used, err = allocWords[uint64](tracks * trackWords); err != nil {
		return c, err
	}
	if c.refs, err = allocWords[uint32](tracks); err != nil {
		return c, errors.Join(err, c.close())
	}
	for k := range c.slabs {
		c.slabs[k].size = 1 + k*trackWords
	}
	return c, nil
}

func (c *counts) close() error {
	errs := []error{freeWords(c.used), freeWords(c.refs)}
	for k := range c.slabs {
		errs = append(errs, c.slabs[k].close())
	}
	return errors.Join(errs...)
}

func (c *counts) track(t int) *blocks { return (*blocks)(c.used[t*trackWords:]) }

// planes returns the planes of a track, the lowest first.
func (c *counts) planes(t int) []uint64 {
	r := c.refs[t]
	if r == 0 {
		return nil
	}
	return c.slabs[r&(1<<refShift-1)].at(int(r >> refShift))[1:]
}

func (c *counts) get(b uint64) int {
	t, w, i := int(b/block.TrackBlocks), b%block.TrackBlocks/64, b%64
	n := int(c.track(t)[w] >> i & 1)
	for j, plane := 0, c.planes(t); len(plane) > 0; j, plane = j+1, plane[trackWords:] {
		n += int(plane[w]>>i&1) << j
	}
	return n
}

// inc adds a reference to each block of m and returns how many were free. It
// changes nothing when it fails.
func (c *counts) inc(t int, m *blocks) (fresh int, err error) {
	used, planes := c.track(t), c.planes(t)
	var full uint64 // blocks whose next count needs one plane more
	for w := range m {
		carry := m[w] & used[w]
		if len(planes) == maxPlanes*trackWords {
			for p := w + trackWords; p < len(planes); p += trackWords {
				carry &= planes[p]
			}
			if carry&^planes[w] != 0 {
				return 0, errLimit
			}
			continue
		}
		for p := w; p < len(planes); p += trackWords {
			carry &= planes[p]
		}
		full |= carry
	}
	if full != 0 {
		if planes, err = c.resize(t, len(planes)/trackWords+1); err != nil {
			return 0, err
		}
	}
	for w := range m {
		fresh += bits.OnesCount64(m[w] &^ used[w])
		carry := m[w] & used[w]
		used[w] |= m[w]
		for p := w; carry != 0; p += trackWords {
			planes[p], carry = planes[p]^carry, planes[p]&carry
		}
	}
	return fresh, nil
}

// dec drops a reference of each block of m, all of which have one, and returns
// how many are free now.
func (c *counts) dec(t int, m *blocks) (freed int) {
	used, planes := c.track(t), c.planes(t)
	for w := range m {
		var shared uint64
		for p := w; p < len(planes); p += trackWords {
			shared |= planes[p]
		}
		last, borrow := m[w]&^shared, m[w]&shared
		freed += bits.OnesCount64(last)
		used[w] &^= last
		for p := w; borrow != 0; p += trackWords {
			planes[p], borrow = planes[p]^borrow, borrow&^planes[p]
		}
	}
	c.narrow(t, planes)
	return freed
}

// narrow gives planes back that hold nothing any more.
func (c *counts) narrow(t int, planes []uint64) {
	have := len(planes) / trackWords
	need := have
	for need > 0 && *(*blocks)(planes[(need-1)*trackWords:]) == (blocks{}) {
		need--
	}
	if need == have {
		return
	}
	// Without memory for a smaller slab the larger one is as good.
	_, _ = c.resize(t, need)
}

// resize gives a track a slab of another number of planes, or none, with what
// its planes hold, and returns the planes.
func (c *counts) resize(t, need int) ([]uint64, error) {
	old := c.planes(t)
	var slab []uint64
	var ref uint32
	if need > 0 {
		i, err := c.slabs[need].add()
		if err != nil {
			return nil, err
		}
		slab = c.slabs[need].at(i)
		slab[0] = uint64(t)
		copy(slab[1:], old)
		ref = uint32(i)<<refShift | uint32(need)
	}
	if r := c.refs[t]; r != 0 {
		i, k := int(r>>refShift), r&(1<<refShift-1)
		if moved, ok := c.slabs[k].remove(i); ok {
			c.refs[moved] = r
		}
	}
	c.refs[t] = ref
	if need == 0 {
		return nil, nil
	}
	return slab[1:], nil
}

// The bytes of a word, and the bits of a byte.
const (
	everyByte = 0x0101010101010101
	lowBits   = 0x7f * everyByte
	oneEach   = 0x8040201008040201 // bit i of byte i
	gather    = 0x0102040810204080 // brings the lowest bit of each byte together in the highest byte
)

// load sets the counts of the blocks of a track from bytes. All of them are 0
// before.
func (c *counts) load(t int, from *[block.TrackBlocks]byte) error {
	var used blocks
	var more uint64 // bits of what counts are above 1
	for i := 0; i < len(from); i += 8 {
		x := binary.LittleEndian.Uint64(from[i:])
		if x == 0 {
			continue
		}
		one := (((x & lowBits) + lowBits) | x) >> 7 & everyByte // 1 for each byte that is not 0
		used[i/64] |= one * gather >> 56 << (i % 64)
		more |= x - one
	}
	if more == 0 {
		*c.track(t) = used
		return nil
	}
	more |= more >> 32
	more |= more >> 16
	planes, err := c.resize(t, bits.Len8(byte(more|more>>8)))
	if err != nil {
		return err
	}
	*c.track(t) = used
	for i := 0; i < len(from); i += 8 {
		x := binary.LittleEndian.Uint64(from[i:])
		x -= (((x & lowBits) + lowBits) | x) >> 7 & everyByte
		for p := i / 64; x != 0; p += trackWords {
			planes[p] |= x & everyByte * gather >> 56 << (i % 64)
			x = x >> 1 & lowBits
		}
	}
	return nil
}

// store writes the counts of a track as bytes.
func (c *counts) store(t int, to *[block.TrackBlocks]byte) {
	used, planes := c.track(t), c.planes(t)
	for i := 0; i < len(to); i += 8 {
		x := spread(used[i/64] >> (i % 64))
		for j, p := 0, i/64; p < len(planes); j, p = j+1, p+trackWords {
			x += spread(planes[p]>>(i%64)) << j
		}
		binary.LittleEndian.PutUint64(to[i:], x)
	}
}

// spread makes a byte of each of the lowest eight bits.
func spread(x uint64) uint64 {
	return ((x&0xff*everyByte)&oneEach + lowBits) >> 7 & everyByte
}

// discard gives the memory of unused entries back, which only private memory
// allows. It is a hint: what lies on larger pages than the kernel's smallest stays.
func discard[T uint32 | uint64](words []T) {
	_ = unix.Madvise(bytesOf(words), unix.MADV_DONTNEED)
}

// allocWords returns n zeroes outside the Go heap. Memory comes page by page:
// huge ones would make a sparse pool pay for what it does not use.
func allocWords[T uint32 | uint64](n int) ([]T, error) {
	mem, err := hpdi.AllocPrivate(n * int(unsafe.Sizeof(T(0))))
	if err != nil {
		return nil, fmt.Errorf("memory of %d tracks: %w", n, err)
	}
	_ = unix.Madvise(mem, unix.MADV_NOHUGEPAGE)
	return unsafe.Slice((*T)(unsafe.Pointer(unsafe.SliceData(mem))), n), nil
}

func bytesOf[T uint16 | uint32 | uint64](words []T) []byte {
	return unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(words))), len(words)*int(unsafe.Sizeof(T(0))))
}

func freeWords[T uint16 | uint32 | uint64](words []T) error {
	if words == nil {
		return nil
	}
	return hpdi.Free(bytesOf(words))
}
