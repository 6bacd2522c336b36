package cache

import (
	"encoding/binary"
	"fmt"
	"unsafe"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

// KindCache names the header of a cache in memory that outlives its guest.
const KindCache ondisk.Kind = "PLXcache"

const (
	cacheVersion = 1
	headerLen    = 128
	headBytes    = 2 * block.Size // the header, and its second copy in a page of its own
)

// header is what has to be known to find anything in a cache. It never changes.
type header struct {
	pool block.PoolID
	layout
}

// encode fills p, which has headerLen bytes, all zero.
func (h *header) encode(p []byte) {
	le := binary.LittleEndian
	le.PutUint32(p[64:], uint32(h.bits))
	le.PutUint32(p[68:], uint32(h.each))
	le.PutUint32(p[72:], block.Size)
	le.PutUint32(p[76:], uint32(unsafe.Sizeof(record{})))
	ondisk.Seal(p, ondisk.Header{Kind: KindCache, Version: cacheVersion, Length: headerLen, Pool: h.pool})
}

// decode reads one copy, of a cache in size bytes. What it accepts lies within them.
func (h *header) decode(p []byte, size int) error {
	oh, err := ondisk.Open(p, KindCache, cacheVersion)
	if err != nil {
		return err
	}
	if oh.Length != headerLen {
		return corrupt("length %d instead of %d", oh.Length, headerLen)
	}
	le := binary.LittleEndian
	bits, each, frame, rec := le.Uint32(p[64:]), le.Uint32(p[68:]), le.Uint32(p[72:]), le.Uint32(p[76:])
	if frame != block.Size || rec != uint32(unsafe.Sizeof(record{})) {
		return corrupt("frames of %d bytes with records of %d", frame, rec)
	}
	if 1<<min(bits, 31) > maxShards || each == 0 || bits > 0 && each%2 != 0 {
		return corrupt("2 to the power of %d shards of %d frames", bits, each)
	}
	*h = header{pool: oh.Pool, layout: layout{bits: uint(bits), each: int(each)}}
	if most := int64(max(0, size-headBytes)); int64(each)<<bits*int64(frameCost) > most {
		return corrupt("2 to the power of %d shards of %d frames in %d bytes of memory", bits, each, size)
	}
	return nil
}

// headerOf returns the header at the beginning of a cache in so many bytes, of which one
// copy is enough.
func headerOf(head []byte, size int) (h header, err error) {
	if len(head) < headBytes {
		return h, corrupt("only %d bytes of memory", len(head))
	}
	if err = h.decode(head[:block.Size], size); err != nil && h.decode(head[block.Size:headBytes], size) == nil {
		err = nil
	}
	return h, err
}

// store writes both copies.
func (h *header) store(mem []byte) {
	var p [headerLen]byte
	h.encode(p[:])
	for at := 0; at < headBytes; at += block.Size {
		ondisk.StoreWords(mem[at:], p[:])
	}
}

// Facts are what the header of a cache in memory says of it.
type Facts struct {
	Pool   block.PoolID
	Frames int
	Shards int
}

// FactsBytes is how much of the beginning of a cache ReadFacts needs.
const FactsBytes = headBytes

// ReadFacts reads the header from the beginning of a cache in so many bytes of memory, for
// whoever only looks.
func ReadFacts(head []byte, size int64) (Facts, error) {
	h, err := headerOf(head, int(size))
	if err != nil {
		return Facts{}, err
	}
	return Facts{Pool: h.pool, Frames: h.each << h.bits, Shards: 1 << h.bits}, nil
}

func corrupt(why string, args ...any) error {
	return &block.CorruptError{What: "cache", Where: "its header", Why: fmt.Sprintf(why, args...)}
}
