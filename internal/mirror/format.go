package mirror

import (
	"encoding/binary"
	"fmt"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/stack"
)

const (
	headerVersion = 1
	mapVersion    = 1

	// MaxCopies is the most that a mirror has.
	MaxCopies = 3

	// reserved is what a copy keeps at its front, in blocks; the mirror's
	// block 0 follows it.
	reserved = block.TrackBlocks

	mapStart = 2  // first block of the map
	mapPages = 16 // blocks of the map at most

	// pageBits is the number of regions in a block of the map.
	pageBits = (block.Size - ondisk.HeaderSize) * 8
)

// headerSlots are the blocks of a copy in which headers of even and of odd
// generation lie.
var headerSlots = [2]uint64{0, 128}

// ID is the random identity of a mirror.
type ID = block.PoolID

// State says how far a copy can be believed.
type State uint8

// The states of a copy; see the package comment.
const (
	Absent State = iota
	InSync
	Resilvering
)

// String returns the word that people read.
func (s State) String() string {
	switch s {
	case Absent:
		return "absent"
	case InSync:
		return "in sync"
	case Resilvering:
		return "resilvering"
	}
	return fmt.Sprintf("state(%d)", uint8(s))
}

// header is what each copy says about the mirror.
type header struct {
	id         ID
	generation uint64
	index      int    // of the copy that carries it
	blocks     uint64 // of the mirror
	shift      uint   // log2 of the blocks of a region
	copies     []member
}

// member is a copy as a header knows it.
type member struct {
	id    block.DeviceID
	state State
	// since is, of an absent copy, the highest generation that its header can
	// have unless it went on by itself.
	since uint64
}

func (h *header) encode() []byte {
	le := binary.LittleEndian
	b := make([]byte, ondisk.HeaderSize, block.Size)
	b = le.AppendUint32(b, uint32(h.index))
	b = le.AppendUint64(b, h.blocks)
	b = le.AppendUint32(b, uint32(h.shift))
	b = le.AppendUint32(b, uint32(len(h.copies)))
	for _, c := range h.copies {
		b = append(b, c.id[:]...)
		b = le.AppendUint32(b, uint32(c.state))
		b = le.AppendUint64(b, c.since)
	}
	n := len(b)
	b = b[:block.Size]
	ondisk.Seal(b, ondisk.Header{Kind: ondisk.KindMirror, Version: headerVersion, Length: n, Pool: h.id, Generation: h.generation})
	return b
}

// memberSize is the size of an encoded member in bytes.
const memberSize = 28

func decodeHeader(b []byte) (header, error) {
	oh, err := ondisk.Open(b, ondisk.KindMirror, headerVersion)
	if err != nil {
		return header{}, err
	}
	d := ondisk.NewDecoder(b[ondisk.HeaderSize:oh.Length])
	h := header{id: oh.Pool, generation: oh.Generation}
	h.index, h.blocks, h.shift = int(d.U32()), d.U64(), uint(d.U32())
	for range d.Count(memberSize) {
		var m member
		copy(m.id[:], d.Bytes(len(m.id)))
		m.state, m.since = State(d.U32()), d.U64()
		h.copies = append(h.copies, m)
	}
	if d.Err() == nil {
		if why := h.wrong(); why != "" {
			d.Fail("%s", why)
		}
	}
	if err := d.Err(); err != nil {
		return header{}, fmt.Errorf("header of a mirror: %w", err)
	}
	return h, nil
}

// wrong says what makes a header impossible. Nothing of it is believed before.
func (h *header) wrong() string {
	inSync := 0
	for _, c := range h.copies {
		if c.state > Resilvering {
			return "copy in " + c.state.String()
		}
		if c.state == InSync {
			inSync++
		}
	}
	switch n := len(h.copies); {
	case n < 2 || n > MaxCopies || h.index >= n:
		return fmt.Sprintf("copy %d of %d", h.index, n)
	case inSync == 0:
		return "no copy is in sync"
	case h.blocks == 0 || h.blocks > block.MaxDeviceBlocks-reserved:
		return fmt.Sprintf("%d blocks", h.blocks)
	case h.shift != shiftFor(h.blocks):
		return fmt.Sprintf("regions of 2^%d blocks", h.shift)
	}
	return ""
}

// minShift makes a region a track.
const minShift = 8

// shiftFor returns the size of the regions of a mirror as log2 of blocks: a
// track, or so much that the map has room for all.
func shiftFor(blocks uint64) uint {
	shift := uint(minShift)
	for (blocks-1)>>shift >= mapPages*pageBits {
		shift++
	}
	return shift
}

// encodeMapPage fills p with page n of the map.
func encodeMapPage(p []byte, id ID, n int, words stack.Bits) {
	le := binary.LittleEndian
	const perPage = pageBits / 64
	for i := range perPage {
		var w uint64
		if j := n*perPage + i; j < len(words) {
			w = words[j].Load()
		}
		le.PutUint64(p[ondisk.HeaderSize+8*i:], w)
	}
	ondisk.Seal(p, ondisk.Header{Kind: ondisk.KindMirrorMap, Version: mapVersion, Length: block.Size, Pool: id, Generation: uint64(n)})
}

// decodeMapPage adds page n of the map to words. A page that is damaged, as by a
// torn write, is an error.
func decodeMapPage(p []byte, id ID, n int, words stack.Bits) error {
	h, err := ondisk.Open(p, ondisk.KindMirrorMap, mapVersion)
	switch {
	case err != nil:
		return err
	case h.Pool != id || h.Generation != uint64(n) || h.Length != block.Size:
		return fmt.Errorf("page %d of the map of mirror %v: %w", h.Generation, h.Pool, block.ErrCorrupt)
	}
	const perPage = pageBits / 64
	for i := range perPage {
		if j := n*perPage + i; j < len(words) {
			words[j].Or(binary.LittleEndian.Uint64(p[ondisk.HeaderSize+8*i:]))
		}
	}
	return nil
}
