package ondisk

import (
	"encoding/binary"
	"fmt"

	"github.com/pollux-storage/pollux/internal/block"
)

// Decoder takes little-endian fields off the front of a buffer. After the
// first field that is not there, all further ones are zero and Err says so:
// a decoding function checks once, at its end.
type Decoder struct {
	b   []byte
	err error
}

// NewDecoder returns a decoder of b, which it does not change.
func NewDecoder(b []byte) *Decoder { return &Decoder{b: b} }

// Err returns an error of kind block.ErrCorrupt if the buffer was too short or
// a count in it impossible.
func (d *Decoder) Err() error { return d.err }

// Fail makes Err return an error of kind block.ErrCorrupt with this reason,
// unless there is one already.
func (d *Decoder) Fail(format string, args ...any) {
	if d.err == nil {
		d.err = fmt.Errorf(format+": %w", append(args, block.ErrCorrupt)...)
	}
	d.b = nil
}

// Bytes returns the next n bytes, which still belong to the buffer, or nil.
func (d *Decoder) Bytes(n int) []byte {
	if n < 0 || n > len(d.b) {
		d.Fail("field of %d bytes with %d left", n, len(d.b))
		return nil
	}
	p := d.b[:n]
	d.b = d.b[n:]
	return p
}

// Len returns how many bytes are left.
func (d *Decoder) Len() int { return len(d.b) }

// U16 returns the next two bytes.
func (d *Decoder) U16() uint16 {
	if p := d.Bytes(2); p != nil {
		return binary.LittleEndian.Uint16(p)
	}
	return 0
}

// U32 returns the next four bytes.
func (d *Decoder) U32() uint32 {
	if p := d.Bytes(4); p != nil {
		return binary.LittleEndian.Uint32(p)
	}
	return 0
}

// U64 returns the next eight bytes.
func (d *Decoder) U64() uint64 {
	if p := d.Bytes(8); p != nil {
		return binary.LittleEndian.Uint64(p)
	}
	return 0
}

// Uvarint returns the next number of as many bytes as it needs, as encoding/binary has it.
func (d *Decoder) Uvarint() uint64 {
	v, n := binary.Uvarint(d.b)
	if n <= 0 {
		d.Fail("number of variable length with %d left", len(d.b))
		return 0
	}
	d.b = d.b[n:]
	return v
}

// Count returns the next four bytes as the number of elements that follow, of
// at least size bytes each: never more than the buffer can hold.
func (d *Decoder) Count(size int) int {
	n := int(d.U32())
	if n*size > len(d.b) {
		d.Fail("%d elements of %d bytes with %d left", n, size, len(d.b))
		return 0
	}
	return n
}

// Pointer returns the next block pointer.
func (d *Decoder) Pointer() block.Pointer {
	if p := d.Bytes(block.PointerSize); p != nil {
		return block.DecodePointer(p)
	}
	return block.Pointer{}
}

// AppendPointer appends an encoded pointer to b.
func AppendPointer(b []byte, p block.Pointer) []byte {
	var enc [block.PointerSize]byte
	p.Encode(enc[:])
	return append(b, enc[:]...)
}

// String returns the next string, a two-byte length and its bytes.
func (d *Decoder) String() string { return string(d.Bytes(int(d.U16()))) }

// AppendString appends a string of at most 65535 bytes to b.
func AppendString(b []byte, s string) []byte {
	b = binary.LittleEndian.AppendUint16(b, uint16(len(s)))
	return append(b, s...)
}
