package oplog

import (
	"encoding/binary"
	"hash/crc32"
	"sync/atomic"
	"unsafe"

	"github.com/pollux-storage/pollux/internal/block"
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

func crcUpdate(seed uint32, p []byte) uint32 { return crc32.Update(seed, castagnoli, p) }

// sink takes the stores of the log in program order. Everything that changes
// a live section goes through one, so that a test can stop after any store
// and look at what a killed process would leave.
type sink interface {
	// word is a store that may become visible in any order with other words.
	word(off int, v uint64)
	// seal is a store that is made after all stores before it.
	seal(off int, v uint64)
}

// mapped is the section itself. A process that is killed has made all stores
// up to some instruction and none after it, so only the compiler must be kept
// from reordering; an atomic store does that.
type mapped struct{ base unsafe.Pointer }

func (m mapped) word(off int, v uint64) { *(*uint64)(unsafe.Add(m.base, off)) = v }

func (m mapped) seal(off int, v uint64) {
	atomic.StoreUint64((*uint64)(unsafe.Add(m.base, off)), v)
}

// Store is one word that a publication stores, at an offset in the section.
type Store struct {
	Off  int
	Word [8]byte
}

// Stores returns what publishing recs stores, in order, and stores nothing: a
// process may die after any of them. The log must be a copy that is thrown away,
// for it takes recs for published. It returns nil when they do not fit.
func (l *Log) Stores(recs []Record) []Store {
	var r listing
	publish(&r, l, recs)
	return r.stores
}

// listing is a sink that writes down.
type listing struct{ stores []Store }

func (r *listing) word(off int, v uint64) {
	s := Store{Off: off}
	binary.NativeEndian.PutUint64(s.Word[:], v)
	r.stores = append(r.stores, s)
}

func (r *listing) seal(off int, v uint64) { r.word(off, v) }

// fixed returns the word whose bytes in memory are v in little-endian order.
func fixed(v uint64) uint64 {
	var b [8]byte
	binary.LittleEndian.PutUint64(b[:], v)
	return binary.NativeEndian.Uint64(b[:])
}

// storeRecord stores an encoded record at off. The sequence goes last: until
// then the slot carries a sequence that does not belong there (zero, or that
// of a released record one lap ago), so a half-stored record is never taken
// for a whole one, whatever its checksum says by accident.
func storeRecord[S sink](s S, off int, p *[recordSize]byte) {
	for i := 8; i < recordSize; i += 8 {
		s.word(off+i, binary.NativeEndian.Uint64(p[i:]))
	}
	s.seal(off, binary.NativeEndian.Uint64(p[:8]))
}

// storeCell stores a position in both header pages, one after the other: at
// any instant at least one of the two cells is whole.
func storeCell[S sink](s S, g *geometry, at int, v block.Seq, seed uint32) {
	check := fixed(cellCheck(seed, at, v))
	for _, page := range g.header {
		s.seal(page+at, fixed(uint64(v)))
		s.seal(page+at+8, check)
	}
}

// storeHeader stores the header in both pages, one after the other.
func storeHeader[S sink](s S, g *geometry, h *logHeader) {
	var p [logHeaderLen]byte
	h.encode(&p)
	for _, page := range g.header {
		for i := 0; i < logHeaderLen; i += 8 {
			s.seal(page+i, binary.NativeEndian.Uint64(p[i:]))
		}
	}
}
