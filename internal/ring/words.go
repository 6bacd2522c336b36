package ring

import (
	"fmt"
	"sync/atomic"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/fenced"
)

// word returns the eight bytes at off of p as a word that another process may
// change. The bytes must be there and aligned.
func word(p []byte, off int) *atomic.Uint64 {
	return (*atomic.Uint64)(unsafe.Pointer(&p[off : off+8 : off+8][0]))
}

// store is for words that the other side looks at before it sleeps.
func store(w *atomic.Uint64, v uint64) { fenced.Store64(w, v) }

// put stores a word that nobody reads before a later store says that it is there.
func put(p []byte, off int, v uint64) {
	*(*uint64)(unsafe.Pointer(&p[off : off+8 : off+8][0])) = v
}

// Memory is the mapped file of a ring.
type Memory struct {
	shape Shape
	mem   []byte
}

// Format makes a ring of this shape in mem, which is zero and of the right size.
func Format(mem []byte, s Shape) (*Memory, error) {
	if err := s.Check(); err != nil {
		return nil, err
	}
	if int64(len(mem)) < s.Size() {
		return nil, fmt.Errorf("ring of %d bytes in %d bytes of memory", s.Size(), len(mem))
	}
	s.encode(mem[:page])
	return &Memory{shape: s, mem: mem}, nil
}

// Open finds the ring that is in mem, which another process may change.
func Open(mem []byte) (*Memory, error) {
	if len(mem) < queuesAt {
		return nil, fmt.Errorf("%d bytes of memory: %w", len(mem), ErrNoRing)
	}
	var own [headerLen]byte
	for i := 0; i < headerLen; i += 8 {
		put(own[:], i, word(mem, i).Load())
	}
	s, err := decode(own[:], int64(len(mem)))
	if err != nil {
		return nil, err
	}
	return &Memory{shape: s, mem: mem}, nil
}

// Shape returns what the header said when it was checked.
func (m *Memory) Shape() Shape { return m.shape }

// Data returns the data area.
func (m *Memory) Data() []byte {
	at := m.shape.dataAt()
	return m.mem[at : at+m.shape.Data : at+m.shape.Data]
}

// Map maps size bytes of a file for both sides to write.
func Map(fd int, size int64) ([]byte, error) {
	mem, err := unix.Mmap(fd, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes: %w", size, err)
	}
	return mem, nil
}

// The states of a side.
const (
	stateNone    = 0
	stateServing = 1
	stateGone    = 2
)

// SetFront says whether the front-end is there.
func (m *Memory) SetFront(here bool) { store(word(m.mem, frontPage+frontState), state(here)) }

// FrontGone says whether the front-end has said that it has ended.
func (m *Memory) FrontGone() bool { return word(m.mem, frontPage+frontState).Load() == stateGone }

// SetBack says whether a back-end is there.
func (m *Memory) SetBack(here bool) { store(word(m.mem, backPage+backState), state(here)) }

// BackServes says whether a back-end has said that it serves.
func (m *Memory) BackServes() bool { return word(m.mem, backPage+backState).Load() == stateServing }

func state(here bool) uint64 {
	if here {
		return stateServing
	}
	return stateGone
}

// Attach counts the back-ends of this ring. It returns the number of this one.
func (m *Memory) Attach() uint64 { return word(m.mem, backPage+backAttach).Add(1) }

// Attached returns the number of the newest back-end.
func (m *Memory) Attached() uint64 { return word(m.mem, backPage+backAttach).Load() }

// BeatFront shows the back-end that the front-end lives.
func (m *Memory) BeatFront() { word(m.mem, frontPage+frontBeat).Add(1) }

// BeatBack shows the front-end that the back-end lives.
func (m *Memory) BeatBack() { word(m.mem, backPage+backBeat).Add(1) }

// Beats returns the heartbeats of both sides. They mean nothing but that they change.
func (m *Memory) Beats() (front, back uint64) {
	return word(m.mem, frontPage+frontBeat).Load(), word(m.mem, backPage+backBeat).Load()
}
