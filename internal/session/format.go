package session

import (
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"unsafe"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

// KindTable names the header of a table of sessions.
const KindTable ondisk.Kind = "PLXsessn"

const (
	tableVersion = 1
	headerLen    = 128
	headerTwin   = 2048 // where the second copy is
	entriesAt    = block.Size
	entryLen     = 64
	cellLen      = 16
	cellsAt      = entriesAt + MaxSessions*entryLen
	leftAt       = 32 // in an entry; what lies before it has a checksum
)

const (
	// Size is how many bytes of the region a table takes.
	Size = 8 << 20
	// MaxSessions is the number of sessions that a table has room for.
	MaxSessions = 1024
	// MaxQueues is the largest number of queues of a session.
	MaxQueues = 1024
	// MaxSlots is the largest number of slots of a queue, the largest size of a virtqueue.
	MaxSlots = 1 << 15
)

// header is what a table's header says. It never changes.
type header struct {
	pool     block.PoolID
	epoch    block.Epoch // of the guest that made the table
	identity [16]byte    // random, of this table
	cells    uint64      // how many there are
}

func (h *header) encode(p []byte) {
	copy(p[64:], h.identity[:])
	le := binary.LittleEndian
	le.PutUint64(p[80:], MaxSessions)
	le.PutUint64(p[88:], h.cells)
	ondisk.Seal(p, ondisk.Header{Kind: KindTable, Version: tableVersion, Length: headerLen, Pool: h.pool, Epoch: h.epoch})
}

// decode reads one copy, of a table in memory of so many bytes.
func (h *header) decode(p []byte, size int) error {
	oh, err := ondisk.Open(p, KindTable, tableVersion)
	if err != nil {
		return err
	}
	le := binary.LittleEndian
	*h = header{pool: oh.Pool, epoch: oh.Epoch, identity: [16]byte(p[64:80]), cells: le.Uint64(p[88:])}
	if n := le.Uint64(p[80:]); oh.Length != headerLen || n != MaxSessions || h.cells > uint64(size-cellsAt)/cellLen {
		return corrupt("header", "%d bytes, %d entries and %d cells in memory of %d bytes", oh.Length, n, h.cells, size)
	}
	return nil
}

// seed starts the checksums of this table, so that what another one has left in the same
// memory is not taken for its own.
func (h *header) seed() uint32 { return ondisk.CRC(h.identity[:]) }

// entry is a session as the table has it.
type entry struct {
	id            block.SessionID
	volume        block.VolumeID
	queues, slots uint16
	first         uint32    // cell of slot 0 of queue 0; those of a queue follow each other
	since         block.Seq // its tags come after this position of the log
	left          uint64    // rises from one that was left to the next; 0 of one that was not
}

// cells returns how many cells the session has.
func (e *entry) cells() uint64 { return uint64(e.queues) * uint64(e.slots) }

// encode fills p without left.
func (e *entry) encode(p *[leftAt]byte, seed uint32) {
	le := binary.LittleEndian
	le.PutUint64(p[0:], uint64(e.id))
	le.PutUint32(p[8:], uint32(e.volume))
	le.PutUint16(p[12:], e.queues)
	le.PutUint16(p[14:], e.slots)
	le.PutUint32(p[16:], e.first)
	le.PutUint64(p[24:], uint64(e.since))
	le.PutUint32(p[20:], entrySum(p, seed))
}

func entrySum(p *[leftAt]byte, seed uint32) uint32 {
	var b [leftAt]byte
	copy(b[4:], p[:20])
	copy(b[24:], p[24:])
	binary.LittleEndian.PutUint32(b[:], seed)
	return ondisk.CRC(b[:])
}

// decode reads an entry that has an id and says why it cannot be one.
func (e *entry) decode(p *[leftAt]byte, seed uint32, cells uint64) error {
	le := binary.LittleEndian
	*e = entry{
		id: block.SessionID(le.Uint64(p[0:])), volume: block.VolumeID(le.Uint32(p[8:])),
		queues: le.Uint16(p[12:]), slots: le.Uint16(p[14:]), first: le.Uint32(p[16:]), since: block.Seq(le.Uint64(p[24:])),
	}
	switch {
	case entrySum(p, seed) != le.Uint32(p[20:]):
		return fmt.Errorf("session %016x: its checksum does not hold", uint64(e.id))
	case e.queues < 1 || e.queues > MaxQueues || e.slots < 1 || e.slots > MaxSlots || uint64(e.first)+e.cells() > cells:
		return fmt.Errorf("session %016x: %d queues of %d slots from cell %d on, of %d", uint64(e.id), e.queues, e.slots, e.first, cells)
	}
	return nil
}

// cellCheck returns the second word of a cell. A cell of zeroes is one of no submission.
func cellCheck(seed uint32, n uint64, counter uint64) uint64 {
	if counter == 0 {
		return 0
	}
	return ondisk.CellCheck(seed, n, counter)
}

// memory is a section that holds a table. Another process may look at it while its owner
// stores: everything is moved by whole words.
type memory struct {
	mem  []byte
	hdr  header
	seed uint32 // of the header
}

func (m *memory) at(at int) *uint64 {
	return (*uint64)(unsafe.Pointer(unsafe.SliceData(m.mem[at : at+8])))
}

func (m *memory) load(at int) uint64     { return atomic.LoadUint64(m.at(at)) }
func (m *memory) store(at int, v uint64) { atomic.StoreUint64(m.at(at), v) }

// open settles on a whole copy of the header.
func (m *memory) open(mem []byte) error {
	if len(mem) < cellsAt+cellLen || len(mem)%block.Size != 0 {
		return corrupt("header", "only %d bytes of memory", len(mem))
	}
	err := m.hdr.decode(mem[:headerLen], len(mem))
	if err != nil && m.hdr.decode(mem[headerTwin:headerTwin+headerLen], len(mem)) != nil {
		return err
	}
	m.mem, m.seed = mem, m.hdr.seed()
	return nil
}

// entryAt reads the entry of a place; id is 0 where there is none.
func (m *memory) entryAt(place int) (e entry, err error) {
	var p [leftAt]byte
	at := entriesAt + place*entryLen
	for i := 0; i < leftAt; i += 8 {
		binary.NativeEndian.PutUint64(p[i:], m.load(at+i))
	}
	if binary.LittleEndian.Uint64(p[:]) == 0 {
		return entry{}, nil
	}
	err = e.decode(&p, m.seed, m.hdr.cells)
	e.left = m.load(at + leftAt)
	return e, err
}

// word is one that is stored: a process may die after any of them.
type word struct {
	at int
	v  uint64
}

func (m *memory) apply(words []word) {
	for _, w := range words {
		m.store(w.at, w.v)
	}
}

// entryWords are the stores of an entry in a place that has none. Until its id is there, it
// is not.
func (m *memory) entryWords(place int, e *entry) (words [leftAt/8 + 1]word) {
	var p [leftAt]byte
	e.encode(&p, m.seed)
	at := entriesAt + place*entryLen
	words[0] = word{at + leftAt, e.left}
	for i := range leftAt / 8 {
		words[leftAt/8-i] = word{at + 8*i, binary.NativeEndian.Uint64(p[8*i:])}
	}
	return words
}

// dropEntry makes a place free.
func (m *memory) dropEntry(place int) { m.store(entriesAt+place*entryLen, 0) }

// cell reads a cell; ok is false if it is damaged.
func (m *memory) cell(n uint64) (counter uint64, ok bool) {
	at := cellsAt + int(n)*cellLen
	counter = m.load(at)
	return counter, m.load(at+8) == cellCheck(m.seed, n, counter)
}

// cellWords are the stores of a cell.
func (m *memory) cellWords(n uint64, counter uint64) [2]word {
	at := cellsAt + int(n)*cellLen
	return [2]word{{at, counter}, {at + 8, cellCheck(m.seed, n, counter)}}
}

// putCell stores a cell.
func (m *memory) putCell(n uint64, counter uint64) {
	words := m.cellWords(n, counter)
	m.apply(words[:])
}

func corrupt(where, why string, args ...any) error {
	return &block.CorruptError{What: "table of sessions", Where: where, Why: fmt.Sprintf(why, args...)}
}
