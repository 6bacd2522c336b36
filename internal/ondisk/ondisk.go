// Package ondisk defines the header that every persistent structure of Pollux
// starts with, on devices and in regions: what it is, its format version, how
// long it is, whose it is, which of two copies is newer, and a checksum over
// all of it. docs/format/header.md has the picture.
package ondisk

import (
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"

	"github.com/pollux-storage/pollux/internal/block"
)

// HeaderSize is the size of a Header in bytes.
const HeaderSize = 64

// Kind names a structure: eight printable bytes that a hex dump shows.
type Kind string

// The kinds of structure.
const (
	KindLabel      Kind = "PLXlabel" // device label
	KindSuperblock Kind = "PLXsuper" // superblock of a pool
	KindJournal    Kind = "PLXjrnal" // record of the metadata journal
	KindFlushLog   Kind = "PLXflush" // batch of the flush log
	KindRegion     Kind = "PLXregio" // header page of a region
	KindNode       Kind = "PLXnode." // page of a metadata tree
	KindCatalogue  Kind = "PLXcatal" // catalogue page
	KindMirror     Kind = "PLXmirro" // header of a copy of a mirror
	KindMirrorMap  Kind = "PLXmrmap" // page of the map of regions of a mirror
	KindScrub      Kind = "PLXscrub" // how far the scrub of a pool is
	KindScan       Kind = "PLXscan." // how far the scan of a volume is
	KindFlash      Kind = "PLXremap" // label of a flash device
	KindFlashTable Kind = "PLXrmtab" // page of its table: what is in which slot
	KindFlashMap   Kind = "PLXrmmap" // page of its map: which data sets are on it
	KindFlashNote  Kind = "PLXrmnot" // note that is kept on it
	KindAccess     Kind = "PLXacces" // how the data sets of a device are used
	KindRestart    Kind = "PLXrestr" // restart record
)

// Header is the decoded header.
type Header struct {
	Kind       Kind
	Version    uint16
	Length     int // bytes that the checksum covers, header included
	Pool       block.PoolID
	Epoch      block.Epoch
	Generation uint64
}

// The reasons for which a structure is refused. ErrMagic commonly means that
// nothing was ever written there; the others wrap block.ErrCorrupt or
// block.ErrUnsupported.
var (
	ErrMagic    = errors.New("no such structure here")
	ErrVersion  = fmt.Errorf("format version is newer than this program: %w", block.ErrUnsupported)
	ErrChecksum = fmt.Errorf("checksum mismatch: %w", block.ErrCorrupt)
)

var castagnoli = crc32.MakeTable(crc32.Castagnoli)

// CRC returns the CRC32C of p, the checksum of all formats here.
func CRC(p []byte) uint32 { return crc32.Checksum(p, castagnoli) }

// CellCheck returns the second word of a cell of two: a bijective mix of the first with its
// place and the seed of what it lies in (splitmix64's finaliser), so that every flipped bit
// shows.
func CellCheck(seed uint32, place, v uint64) uint64 {
	x := v ^ uint64(seed)<<32 ^ place
	x = (x ^ x>>30) * 0xbf58476d1ce4e5b9
	x = (x ^ x>>27) * 0x94d049bb133111eb
	return x ^ x>>31
}

// ZeroSum is the checksum of a block of zeroes.
var ZeroSum = CRC(make([]byte, block.Size))

const checksumAt = 56

// Seal writes the header into the first HeaderSize bytes of p and checksums
// the first h.Length bytes, which must be filled in by then.
func Seal(p []byte, h Header) {
	if len(h.Kind) != 8 || h.Length < HeaderSize || h.Length > len(p) {
		panic(fmt.Sprintf("ondisk: seal %q with length %d in %d bytes", h.Kind, h.Length, len(p)))
	}
	copy(p, h.Kind)
	le := binary.LittleEndian
	le.PutUint16(p[8:], h.Version)
	le.PutUint16(p[10:], 0)
	le.PutUint32(p[12:], uint32(h.Length))
	copy(p[16:32], h.Pool[:])
	le.PutUint64(p[32:], uint64(h.Epoch))
	le.PutUint64(p[40:], h.Generation)
	le.PutUint64(p[48:], 0)
	le.PutUint64(p[checksumAt:], 0)
	le.PutUint32(p[checksumAt:], CRC(p[:h.Length]))
}

// Length returns how many bytes a structure has that Seal has sealed.
func Length(p []byte) int { return int(binary.LittleEndian.Uint32(p[12:])) }

// Open checks that p starts with a whole structure of the given kind, of a
// version up to maxVersion, and returns its header. The checksum is computed
// without changing p.
func Open(p []byte, kind Kind, maxVersion uint16) (Header, error) {
	if len(p) < HeaderSize || string(p[:8]) != string(kind) {
		return Header{}, ErrMagic
	}
	le := binary.LittleEndian
	h := Header{
		Kind:       kind,
		Version:    le.Uint16(p[8:]),
		Length:     int(le.Uint32(p[12:])),
		Pool:       block.PoolID(p[16:32]),
		Epoch:      block.Epoch(le.Uint64(p[32:])),
		Generation: le.Uint64(p[40:]),
	}
	if h.Length < HeaderSize || h.Length > len(p) {
		return Header{}, fmt.Errorf("length %d of at most %d: %w", h.Length, len(p), ErrChecksum)
	}
	// The checksum is taken with its own eight bytes as zero.
	var zero [8]byte
	sum := crc32.Update(0, castagnoli, p[:checksumAt])
	sum = crc32.Update(sum, castagnoli, zero[:])
	sum = crc32.Update(sum, castagnoli, p[checksumAt+8:h.Length])
	if stored := le.Uint64(p[checksumAt:]); stored != uint64(sum) {
		return Header{}, fmt.Errorf("stored %08x, computed %08x: %w", stored, sum, ErrChecksum)
	}
	// Only a sound header can be believed about its version.
	if h.Version == 0 || h.Version > maxVersion {
		return Header{}, fmt.Errorf("version %d, known up to %d: %w", h.Version, maxVersion, ErrVersion)
	}
	return h, nil
}
