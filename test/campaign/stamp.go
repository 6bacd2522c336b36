package campaign

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/zeebo/xxh3"

	"github.com/pollux-storage/pollux/internal/block"
)

// stampSize is the head of a unit: magic, volume, place, operation, checksum.
const stampSize = 40

const stampMagic = 0x5054494e55584c50 // "PLXUNITP"

// errTorn says that a unit is neither zero nor whole.
var errTorn = errors.New("a unit is torn, misplaced or not ours")

// alike is how many different contents there are of blocks that units can have in common.
const alike = 6

// fill makes a unit that describes itself. Blocks behind its first are one of few series,
// so that units of several blocks have much in common with others.
func fill(p []byte, volume, unit, op uint64) {
	le := binary.LittleEndian
	le.PutUint64(p, stampMagic)
	le.PutUint64(p[8:], volume)
	le.PutUint64(p[16:], unit)
	le.PutUint64(p[24:], op)
	x := op*0x9e3779b97f4a7c15 ^ unit
	for i := stampSize; i+8 <= len(p); i += 8 {
		if i == block.Size {
			x = op % alike
		}
		x += 0x9e3779b97f4a7c15
		z := (x ^ x>>30) * 0xbf58476d1ce4e5b9
		le.PutUint64(p[i:], z^z>>27)
	}
	le.PutUint64(p[32:], sum(p))
}

func sum(p []byte) uint64 {
	return xxh3.Hash(p[:32]) ^ xxh3.HashSeed(p[stampSize:], 1)
}

// parse returns the operation that wrote a unit, 0 for one of zeroes.
func parse(p []byte, volume, unit uint64) (uint64, error) {
	le := binary.LittleEndian
	if le.Uint64(p) == 0 {
		for i, b := range p {
			if b != 0 {
				return 0, fmt.Errorf("%w: byte %d of a unit that begins with zeroes is %#x", errTorn, i, b)
			}
		}
		return 0, nil
	}
	v, u, op := le.Uint64(p[8:]), le.Uint64(p[16:]), le.Uint64(p[24:])
	switch {
	case le.Uint64(p) != stampMagic:
		return 0, fmt.Errorf("%w: it begins with % x", errTorn, p[:16])
	case le.Uint64(p[32:]) != sum(p):
		return 0, fmt.Errorf("%w: checksum of operation %d does not hold", errTorn, op)
	case v != volume || u != unit:
		return 0, fmt.Errorf("%w: it is unit %d of volume %d, written by operation %d", errTorn, u, v, op)
	}
	return op, nil
}
