package restart

import (
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

// Slots is memory that outlives a guest, with room for two records:
//
//	0          half            length
//	+----------+---------------+
//	| record A | record B      |
//	+----------+---------------+
//
// The older one is replaced, so that who is killed meanwhile leaves the other. No order of
// the stores matters: a record counts only if its checksum does.
type Slots struct {
	mem  []byte
	next int // the one to be written
}

// SlotsFor returns how many bytes of memory a record needs, with room to grow.
func SlotsFor(record int) int64 { return 4 * int64(record) }

// OpenSlots takes memory that has records, or nothing.
func OpenSlots(mem []byte) *Slots {
	s := &Slots{mem: mem}
	newest := uint64(0)
	for i := range 2 {
		if h, err := ondisk.Open(s.slot(i), ondisk.KindRestart, recordVersion); err == nil && h.Generation >= newest {
			newest, s.next = h.Generation, 1-i
		}
	}
	return s
}

func (s *Slots) slot(i int) []byte {
	half := len(s.mem) / 2
	return s.mem[i*half : (i+1)*half]
}

// Put stores a record in the place of the older one. One that is too long is
// block.ErrNoSpace, and changes nothing.
func (s *Slots) Put(enc []byte) error {
	slot := s.slot(s.next)
	if len(enc) > len(slot) {
		return fmt.Errorf("restart record of %d bytes in %d: %w", len(enc), len(slot), block.ErrNoSpace)
	}
	copy(slot, enc)
	s.next = 1 - s.next
	return nil
}

// Newest returns the newest record in memory like that of Slots, of so many bytes, whatever is
// in it, or why there is none. read reads what is at an offset of it, and returns how many
// bytes it could read.
func Newest(length int64, read func(p []byte, off int64) int) (*Record, error) {
	half := length / 2
	var records [2]*Record
	var errs [2]error
	for i := range int64(2) {
		records[i], errs[i] = readSlot(half, func(p []byte) int { return read(p, i*half) })
	}
	return Newer(records[0], errs[0], records[1], errs[1])
}

// readSlot reads the record at the beginning of a slot: of the slot no more than it says it has.
func readSlot(length int64, read func(p []byte) int) (*Record, error) {
	head := make([]byte, ondisk.HeaderSize)
	if read(head) < len(head) {
		return nil, ErrNone
	}
	n := int64(ondisk.Length(head))
	if string(head[:len(ondisk.KindRestart)]) != string(ondisk.KindRestart) || n < ondisk.HeaderSize {
		return nil, ErrNone
	}
	if n > min(length, MaxBytes) {
		return nil, fmt.Errorf("restart record of %d bytes: %w", n, ondisk.ErrChecksum)
	}
	b := make([]byte, n)
	return Decode(b[:read(b)])
}

// ErrNone says that there is no record.
var ErrNone = fmt.Errorf("there is no restart record: %w", ondisk.ErrMagic)

// Newer returns the newer of two records, and an error if there is neither: the more telling
// one.
func Newer(a *Record, errA error, b *Record, errB error) (*Record, error) {
	switch {
	case errA == nil && (errB != nil || a.Number >= b.Number):
		return a, nil
	case errB == nil:
		return b, nil
	case errors.Is(errA, ondisk.ErrMagic):
		return nil, errB
	}
	return nil, errA
}
