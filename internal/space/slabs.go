package space

import (
	"errors"
	"unsafe"

	"github.com/pollux-storage/pollux/hpdi"
)

// chunkWords is the size of the pieces in which slabs take memory.
const chunkWords = 256 << 10 / 8

// slabs are the slabs of one size: a word with the number of the track that it
// belongs to, and that track's planes. They lie without gaps, the last one
// moves into the place of one that is removed, so that memory is what is in use
// and at most two chunks more.
type slabs struct {
	size   int // words of a slab
	n      int // in use
	chunks [][]uint64
}

func (s *slabs) at(i int) []uint64 {
	per := chunkWords / s.size
	return s.chunks[i/per][i%per*s.size:][:s.size:s.size]
}

// add returns the number of a new slab, zeroed.
func (s *slabs) add() (int, error) {
	if s.n == len(s.chunks)*(chunkWords/s.size) {
		mem, err := hpdi.AllocPrivate(chunkWords * 8)
		if err != nil {
			return 0, err
		}
		s.chunks = append(s.chunks, unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(mem))), chunkWords))
	}
	s.n++
	clear(s.at(s.n - 1))
	return s.n - 1, nil
}

// remove gives a slab up. When another one has moved to its number, it returns
// the track that that one belongs to.
func (s *slabs) remove(i int) (moved uint64, ok bool) {
	s.n--
	if i != s.n {
		copy(s.at(i), s.at(s.n))
		moved, ok = s.at(i)[0], true
	}
	if last := len(s.chunks) - 1; s.n < (last-1)*(chunkWords/s.size) {
		// One empty chunk stays, for the next slab.
		_ = freeWords(s.chunks[last]) // only fails for memory that is not ours
		s.chunks = s.chunks[:last]
	}
	return moved, ok
}

func (s *slabs) memory() int64 { return int64(len(s.chunks)) * chunkWords * 8 }

func (s *slabs) close() error {
	var errs []error
	for _, c := range s.chunks {
		errs = append(errs, freeWords(c))
	}
	s.chunks, s.n = nil, 0
	return errors.Join(errs...)
}
