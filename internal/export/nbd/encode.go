package nbd

import (
	"bytes"
	"encoding/binary"
	"errors"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/nbdproto"
)

// maxMessage is how much of an error's text a client gets.
const (
	maxMessage      = 256
	errorReplyBytes = nbdproto.ChunkSize + 6 + maxMessage
)

// errNoExtents is a volume that breaks its contract.
var errNoExtents = errors.New("volume returned no block status")

func putSimple(b []byte, cookie uint64, e nbdproto.Errno) int {
	_ = b[nbdproto.SimpleSize-1]
	binary.BigEndian.PutUint32(b, nbdproto.MagicSimple)
	binary.BigEndian.PutUint32(b[4:], uint32(e))
	binary.BigEndian.PutUint64(b[8:], cookie)
	return nbdproto.SimpleSize
}

func putChunk(b []byte, flags, kind uint16, cookie uint64, length int) {
	_ = b[nbdproto.ChunkSize-1]
	binary.BigEndian.PutUint32(b, nbdproto.MagicStructured)
	binary.BigEndian.PutUint16(b[4:], flags)
	binary.BigEndian.PutUint16(b[6:], kind)
	binary.BigEndian.PutUint64(b[8:], cookie)
	binary.BigEndian.PutUint32(b[16:], uint32(length))
}

func putData(b []byte, flags uint16, cookie, off uint64, n int) int {
	putChunk(b, flags, nbdproto.ChunkOffsetData, cookie, 8+n)
	binary.BigEndian.PutUint64(b[nbdproto.ChunkSize:], off)
	return nbdproto.DataChunkSize
}

func putHole(b []byte, flags uint16, cookie, off uint64, n int) int {
	putChunk(b, flags, nbdproto.ChunkOffsetHole, cookie, 12)
	binary.BigEndian.PutUint64(b[nbdproto.ChunkSize:], off)
	binary.BigEndian.PutUint32(b[nbdproto.ChunkSize+8:], uint32(n))
	return nbdproto.HoleChunkSize
}

// encodeDone writes the reply of a request that succeeded and returns no data.
// Under structured replies the simple form is allowed for all commands but
// READ, and shorter.
func (s *session) encodeDone(b []byte, h *header) int {
	if h.cmd == nbdproto.CmdRead && s.structured {
		putChunk(b, nbdproto.ChunkDone, nbdproto.ChunkNone, h.cookie, 0)
		return nbdproto.ChunkSize
	}
	return putSimple(b, h.cookie, nbdproto.EOK)
}

// encodeError writes a reply that says e and, where the protocol has room for
// it, why.
func (s *session) encodeError(b []byte, h *header, e nbdproto.Errno, why string) int {
	if !s.structured {
		return putSimple(b, h.cookie, e)
	}
	why = why[:min(len(why), maxMessage)]
	putChunk(b, nbdproto.ChunkDone, nbdproto.ChunkError, h.cookie, 6+len(why))
	binary.BigEndian.PutUint32(b[nbdproto.ChunkSize:], uint32(e))
	binary.BigEndian.PutUint16(b[nbdproto.ChunkSize+4:], uint16(len(why)))
	return nbdproto.ChunkSize + 6 + copy(b[nbdproto.ChunkSize+6:], why)
}

// readHead is how many bytes come before the data in the reply to a read.
func (s *session) readHead() int {
	if s.structured {
		return nbdproto.DataChunkSize
	}
	return nbdproto.SimpleSize
}

// Holes in replies: zeroes that fill the request become one hole chunk, and so
// do runs of zero blocks from holeRun bytes on. Shorter ones are not worth a
// chunk of their own to the client.
const (
	holeRun  = 16 << 10
	minHole  = 512 // a shorter read is always data, which also leaves room for the chunk
	maxHoles = 16  // in one reply; what follows goes as data
)

var zeroBlock [block.Size]byte

// isZero reports whether b, at most a block, is all zero.
func isZero(b []byte) bool {
	return len(b) == 0 || b[0] == 0 && bytes.Equal(b, zeroBlock[:len(b)])
}

// run is a stretch of data or zeroes within a read.
type run struct {
	off, n int
	hole   bool
}

// findRuns cuts the data of a read at off into runs, at block boundaries of the
// volume. At most maxHoles are holes.
func findRuns(runs []run, data []byte, off uint64) []run {
	holes := 0
	for i := 0; i < len(data); {
		n := min(block.Size-int((off+uint64(i))%block.Size), len(data)-i)
		zero := holes < maxHoles && isZero(data[i:i+n])
		if k := len(runs); k > 0 && runs[k-1].hole == zero {
			runs[k-1].n += n
		} else {
			runs = append(runs, run{i, n, zero})
		}
		i += n
		if k := len(runs); zero || k < 2 || !runs[k-2].hole {
			continue
		}
		// A run of zeroes has just ended. A short one joins its neighbours.
		k := len(runs)
		if runs[k-2].n >= holeRun {
			if runs[k-1].n == n {
				holes++
			}
			continue
		}
		runs[k-2].n += runs[k-1].n
		runs[k-2].hole = false
		runs = runs[:k-1]
		if k >= 3 {
			runs[k-3].n += runs[k-2].n
			runs = runs[:k-2]
		}
	}
	if k := len(runs); k > 1 && runs[k-1].hole && runs[k-1].n < holeRun {
		runs[k-2].n += runs[k-1].n
		runs = runs[:k-1]
	}
	return runs
}

// encodeRead makes the reply to a read in place: the data is in b from
// s.readHead() on. It returns the length of the reply.
func (s *session) encodeRead(b []byte, n int, h *header) int {
	if !s.structured {
		return putSimple(b, h.cookie, nbdproto.EOK) + n
	}
	data := b[nbdproto.DataChunkSize : nbdproto.DataChunkSize+n]
	if h.flags&nbdproto.CmdFlagDF == 0 {
		if n < 2*holeRun { // no room for data and a run that counts
			if n < minHole || !isZeroRange(data) {
				return putData(b, nbdproto.ChunkDone, h.cookie, h.off, n) + n
			}
			return putHole(b, nbdproto.ChunkDone, h.cookie, h.off, n)
		}
		var space [2*maxHoles + 2]run
		if runs := findRuns(space[:0], data, h.off); len(runs) > 1 || runs[0].hole {
			return encodeRuns(b, runs, h)
		}
	}
	return putData(b, nbdproto.ChunkDone, h.cookie, h.off, n) + n
}

// isZeroRange reports whether b is all zero.
func isZeroRange(b []byte) bool {
	for len(b) > block.Size {
		if !isZero(b[:block.Size]) {
			return false
		}
		b = b[block.Size:]
	}
	return isZero(b)
}

// encodeRuns writes one chunk for each run. It works in place from the front:
// a hole shrinks to its chunk, which also makes room for the header of the data
// behind it, so that data only ever moves down.
func encodeRuns(b []byte, runs []run, h *header) int {
	out := 0
	for i, r := range runs {
		var flags uint16
		if i == len(runs)-1 {
			flags = nbdproto.ChunkDone
		}
		off := h.off + uint64(r.off)
		if r.hole {
			out += putHole(b[out:], flags, h.cookie, off, r.n)
			continue
		}
		copy(b[out+nbdproto.DataChunkSize:], b[nbdproto.DataChunkSize+r.off:nbdproto.DataChunkSize+r.off+r.n])
		out += putData(b[out:], flags, h.cookie, off, r.n) + r.n
	}
	return out
}

// statusBytes is how long a block status reply with n extents is.
func statusBytes(n int) int { return nbdproto.ChunkSize + 4 + 8*n }

// encodeStatus writes a block status reply. Neighbours that are alike become
// one extent.
func (s *session) encodeStatus(b []byte, h *header, ext []block.Extent) int {
	const longest = 1<<32 - block.Size // a whole number of blocks
	at, end := nbdproto.ChunkSize+4, h.off+uint64(h.n)
	var lastFlags uint32
	next := h.off
	for _, e := range ext {
		stop := min(uint64(e.Offset)+uint64(e.Length), end)
		if stop <= next {
			continue
		}
		var flags uint32
		if e.Hole {
			flags = nbdproto.StateHole | nbdproto.StateZero
		}
		n := min(stop-next, longest)
		if at > nbdproto.ChunkSize+4 && flags == lastFlags {
			if sum := uint64(binary.BigEndian.Uint32(b[at-8:])) + n; sum <= longest {
				binary.BigEndian.PutUint32(b[at-8:], uint32(sum))
				next += n
				continue
			}
		}
		binary.BigEndian.PutUint32(b[at:], uint32(n))
		binary.BigEndian.PutUint32(b[at+4:], flags)
		at, lastFlags = at+8, flags
		if next += n; next < stop {
			break
		}
	}
	putChunk(b, nbdproto.ChunkDone, nbdproto.ChunkBlockStatus, h.cookie, at-nbdproto.ChunkSize)
	binary.BigEndian.PutUint32(b[nbdproto.ChunkSize:], contextAllocationID)
	return at
}
