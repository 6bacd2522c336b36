package pool

import (
	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/devices"
)

// advice is a record that tells the next owner of a pool how far something is that goes on
// in the background. It has two places on the first device, and is written to one and the
// other in turn, by its generation. Nothing depends on it: what is wrong with one, or lost,
// is as if none had been written.
type advice interface {
	number() uint64 // generation, which rises with each that is written
	encode(pool block.PoolID, epoch block.Epoch) []byte
}

// recall returns the newest advice of two places, or false if there is none. frame is
// memory for a block.
func recall[A advice](p *Pool, places [2]uint64, frame []byte, decode func(b []byte, pool block.PoolID) (A, error)) (newest A, found bool) {
	rank := func(b []byte) uint64 {
		a, err := decode(b, p.label.Pool)
		if err != nil {
			return 0
		}
		return a.number()
	}
	for _, b := range places {
		if p.set.ReadBest(block.At(0, b), frame, rank) != nil {
			continue
		}
		if a, err := decode(frame, p.label.Pool); err == nil && (!found || a.number() >= newest.number()) {
			newest, found = a, true
		}
	}
	return newest, found
}

// advise writes advice to the older of its places. It need not be durable: who finds an
// older one does a little twice.
func (p *Pool) advise(places [2]uint64, frame []byte, a advice) {
	copy(frame, a.encode(p.label.Pool, p.epoch))
	_ = p.set.Do([]*devices.IO{{Op: hpdi.OpWrite, At: block.At(0, places[a.number()%2]), Vec: [][]byte{frame}}})
}
