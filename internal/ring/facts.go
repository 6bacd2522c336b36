package ring

import (
	"fmt"
	"math/bits"
)

// Facts is what a back-end tells of its device.
type Facts struct {
	Size      int64 // bytes, a multiple of BlockSize
	BlockSize int   // bytes: a power of two from 512 to 64 KiB
	MaxLength int64 // of a read or write in bytes, a multiple of BlockSize, up to MaxLength
	Discard   bool
	Zeroes    bool
	Durable   bool // writes may be FlagDurable
	Status    bool
	ReadOnly  bool
	Direct    bool // memory must be aligned to BlockSize
	Rotates   bool
	CancelAll bool // requests that have begun can be cancelled too
}

const factWords = 4

// restTries is how often Facts looks for a moment at which they do not change. To write them
// takes a fraction of that, and a back-end that has died over it never ends.
const restTries = 500

func (f Facts) flags() uint64 {
	var v uint64
	for i, b := range []bool{f.Discard, f.Zeroes, f.Durable, f.Status, f.ReadOnly, f.Direct, f.Rotates, f.CancelAll} {
		if b {
			v |= 1 << i
		}
	}
	return v
}

// Check returns an error that names what no device has.
func (f Facts) Check() error {
	if f.BlockSize < 512 || f.BlockSize > 64<<10 || bits.OnesCount(uint(f.BlockSize)) != 1 {
		return fmt.Errorf("block size of %d bytes: a power of two from 512 to 65536 is needed", f.BlockSize)
	}
	bs := int64(f.BlockSize)
	if f.Size < 0 || f.Size%bs != 0 {
		return fmt.Errorf("size of %d bytes: whole blocks of %d bytes are needed", f.Size, bs)
	}
	if f.MaxLength < bs || f.MaxLength%bs != 0 || f.MaxLength > MaxLength {
		return fmt.Errorf("largest request of %d bytes: whole blocks of %d bytes, up to %d, are needed", f.MaxLength, bs, MaxLength)
	}
	return nil
}

// SetFacts tells the front-end. The sequence is odd while they change.
func (m *Memory) SetFacts(f Facts) {
	seq := word(m.mem, backPage+factsSeq)
	n := seq.Load() &^ 1
	store(seq, n+1)
	for i, v := range [factWords]uint64{uint64(f.Size), uint64(f.BlockSize), uint64(f.MaxLength), f.flags()} {
		store(word(m.mem, backPage+factsAt+8*i), v)
	}
	store(seq, n+2)
}

// Facts returns what the back-end tells, and the sequence of it, by which a change
// is seen. It does not wait for a back-end that is about to tell something else
// for longer than that takes.
func (m *Memory) Facts() (Facts, uint64, error) {
	seq := word(m.mem, backPage+factsSeq)
	for range restTries {
		n := seq.Load()
		if n%2 == 1 {
			continue
		}
		var v [factWords]uint64
		for i := range v {
			v[i] = word(m.mem, backPage+factsAt+8*i).Load()
		}
		if seq.Load() != n {
			continue
		}
		if n == 0 {
			return Facts{}, 0, fmt.Errorf("the back-end has not said what its device is: %w", ErrBroken)
		}
		return factsOf(v, n)
	}
	return Facts{}, 0, fmt.Errorf("what the back-end says of its device does not come to rest: %w", ErrBroken)
}

func factsOf(v [factWords]uint64, seq uint64) (Facts, uint64, error) {
	if v[0] > 1<<62 || v[1] > 1<<20 || v[2] > 1<<40 {
		return Facts{}, 0, fmt.Errorf("the back-end tells of a device of %d bytes in blocks of %d: %w", v[0], v[1], ErrBroken)
	}
	has := func(i int) bool { return v[3]>>i&1 == 1 }
	f := Facts{
		Size: int64(v[0]), BlockSize: int(v[1]), MaxLength: int64(v[2]),
		Discard: has(0), Zeroes: has(1), Durable: has(2), Status: has(3), ReadOnly: has(4), Direct: has(5), Rotates: has(6), CancelAll: has(7),
	}
	if err := f.Check(); err != nil {
		return Facts{}, 0, fmt.Errorf("what the back-end tells of its device: %w: %w", err, ErrBroken)
	}
	return f, seq, nil
}

// FactsSeq returns the sequence of the facts.
func (m *Memory) FactsSeq() uint64 { return word(m.mem, backPage+factsSeq).Load() }
