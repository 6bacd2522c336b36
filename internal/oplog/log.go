package oplog

import (
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"sync/atomic"
	"unsafe"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/planted"
)

// Config describes a new log.
type Config struct {
	PayloadBytes int64 // size of the arena, rounded down to whole blocks
	Pool         block.PoolID
	Epoch        block.Epoch
	Start        block.Seq // last sequence that is committed already
}

// Log is an operation log in memory. Its methods may be called concurrently,
// except that the caller lets at most one Publish, one Release and one
// SetEpoch run at a time. Publish does not disturb Release and need not wait
// for it: they store to different places.
//
//	start <= tail <= head <= tail + slots
type Log struct {
	memory
	out mapped

	head  atomic.Uint64 // last published
	tail  atomic.Uint64 // last released
	arena arena

	scratch [recordSize]byte // of Publish

	attached block.Seq // what Attach has verified and, in ring A, restored
	tags     int       // KindTag records that Attach found
	repaired int       // copies that Attach restored from the other one
}

// DamageError says from which position on a log in memory can not be
// trusted. It is a block.ErrCorrupt.
type DamageError struct {
	First block.Seq // first lost position; everything before it is whole
	Last  block.Seq // last position known to have been published
	Why   string
}

// Error names the positions, the reason and the way on.
func (e *DamageError) Error() string {
	return fmt.Sprintf("operation log is damaged from position %d on (published up to %d): %s; "+
		"only what was flushed to the devices can be recovered from there on", e.First, e.Last, e.Why)
}

// Is makes errors.Is(err, block.ErrCorrupt) true.
func (e *DamageError) Is(target error) bool { return target == block.ErrCorrupt }

// checkMemory refuses memory in which a log cannot live.
func checkMemory(mem []byte) error {
	if len(mem) < int(SectionSize(0)) || len(mem)%pageSize != 0 {
		return fmt.Errorf("operation log in %d bytes, which is no section size: %w", len(mem), block.ErrInvalid)
	}
	if uintptr(unsafe.Pointer(unsafe.SliceData(mem)))%pageSize != 0 {
		return fmt.Errorf("operation log in memory that is not aligned to %d bytes: %w", pageSize, block.ErrInvalid)
	}
	return nil
}

// Format makes an empty log in mem, which is aligned to 4 KiB and has at
// least SectionSize(c.PayloadBytes) bytes, a multiple of 4 KiB. Until it
// returns, mem holds no log at all.
func Format(mem []byte, c Config) (*Log, error) {
	if err := checkMemory(mem); err != nil {
		return nil, err
	}
	if c.PayloadBytes < block.Size || SectionSize(c.PayloadBytes) > int64(len(mem)) {
		return nil, fmt.Errorf("operation log of %d bytes payload in %d bytes: %w", c.PayloadBytes, len(mem), block.ErrInvalid)
	}
	l := &Log{
		memory: memory{mem: mem, geo: geometryFor(extentsIn(c.PayloadBytes), len(mem))},
		out:    mapped{unsafe.Pointer(unsafe.SliceData(mem))},
	}
	l.hdr = logHeader{
		pool: c.Pool, epoch: c.Epoch, birth: c.Epoch, generation: 1, version: 1,
		extents: l.geo.extents, slots: l.geo.slots, size: uint64(l.geo.size), start: c.Start,
	}
	_, _ = rand.Read(l.hdr.identity[:]) // documented never to fail
	l.seed = l.hdr.seed()
	for _, p := range l.geo.header {
		clear(mem[p : p+pageSize])
	}
	for _, r := range l.geo.ring {
		clear(mem[r : r+int(l.geo.slots)*recordSize])
	}
	storeCell(l.out, &l.geo, tailCellAt, c.Start, l.seed)
	storeCell(l.out, &l.geo, headCellAt, c.Start, l.seed)
	storeHeader(l.out, &l.geo, &l.hdr)
	l.head.Store(uint64(c.Start))
	l.tail.Store(uint64(c.Start))
	l.arena.init(l.geo.extents)
	return l, nil
}

// Pool returns the pool that the log belongs to.
func (l *Log) Pool() block.PoolID { return l.hdr.pool }

// Epoch returns the epoch that SetEpoch or Format stored.
func (l *Log) Epoch() block.Epoch { return l.hdr.epoch }

// Repaired returns how many copies of records, positions and headers Attach
// found bad or half stored and restored from the other copy.
func (l *Log) Repaired() int { return l.repaired }

// Head returns the position of the last published record.
func (l *Log) Head() block.Seq { return block.Seq(l.head.Load()) }

// Tail returns the position up to which records were released.
func (l *Log) Tail() block.Seq { return block.Seq(l.tail.Load()) }

// Capacity returns the number of extents.
func (l *Log) Capacity() int { return int(l.geo.extents) }

// ExtentsFree returns the number of free extents.
func (l *Log) ExtentsFree() int { return l.arena.count() }

// Slots returns the number of records that the ring holds.
func (l *Log) Slots() int { return int(l.geo.slots) }

// SlotsFree returns the number of records that fit before a Release.
func (l *Log) SlotsFree() int {
	// Tail first: it only rises, so the difference is never too large.
	tail := l.tail.Load()
	return int(l.geo.slots - (l.head.Load() - tail))
}

// Alloc appends n free extents to dst and returns true, or takes none and
// returns false. It prefers runs of MaxRecordBlocks consecutive ones. The
// extents belong to the caller until they are published or freed.
func (l *Log) Alloc(n int, dst []Extent) ([]Extent, bool) { return l.arena.alloc(n, dst) }

// Free gives back extents that were allocated and not published.
func (l *Log) Free(ext []Extent) { l.arena.put(ext) }

// Payload returns the memory of n consecutive extents. It is aligned to 4 KiB.
func (l *Log) Payload(first Extent, n int) []byte {
	p := l.payload(first, n)
	if p == nil {
		panic(fmt.Sprintf("oplog: extents %d+%d of %d", first, n, l.geo.extents))
	}
	return p
}

// Sum fills in the checksums of a write's payload.
func (l *Log) Sum(rec *Record) {
	for i := range rec.Count {
		rec.CRC[i] = ondisk.CRC(l.Payload(rec.First+Extent(i), 1))
	}
}

// Publish appends records, gives them consecutive positions from first on and
// fills those in. Payloads and checksums must be in place; they never change
// afterwards. It returns false and does nothing when the ring lacks room.
// Once it has returned true the records survive the death of the process.
func (l *Log) Publish(recs []Record) (first block.Seq, ok bool) {
	return publish(l.out, l, recs)
}

func publish[S sink](s S, l *Log, recs []Record) (first block.Seq, ok bool) {
	head := l.head.Load()
	if len(recs) == 0 || uint64(len(recs)) > l.geo.slots-(head-l.tail.Load()) {
		return 0, false
	}
	if planted.Has(planted.PublishBeforeRecord) {
		storeCell(s, &l.geo, headCellAt, block.Seq(head)+block.Seq(len(recs)), l.seed)
	}
	p := &l.scratch
	for i := range recs {
		r := &recs[i]
		if err := r.check(l.geo.extents); err != nil {
			panic("oplog: published " + err.Error())
		}
		r.Seq = block.Seq(head) + 1 + block.Seq(i)
		r.encode(p, l.seed)
		// Both copies before the next record: a valid record after an
		// invalid one is always damage, never the mark of a crash.
		slot := l.slot(r.Seq)
		storeRecord(s, l.geo.ring[0]+slot, p)
		storeRecord(s, l.geo.ring[1]+slot, p)
	}
	// The stored head lags behind the records and is not what makes them
	// valid. It tells a lost end of the log from one that never was.
	last := block.Seq(head) + block.Seq(len(recs))
	storeCell(s, &l.geo, headCellAt, last, l.seed)
	l.head.Store(uint64(last))
	return block.Seq(head) + 1, true
}

// Release forgets all records up to and including upTo, which must be
// committed, and frees their extents and slots.
func (l *Log) Release(upTo block.Seq) { release(l.out, l, upTo) }

func release[S sink](s S, l *Log, upTo block.Seq) {
	tail, head := l.Tail(), l.Head()
	if upTo <= tail {
		return
	}
	if upTo > head {
		panic(fmt.Sprintf("oplog: release of %d beyond the head %d", upTo, head))
	}
	// The tail first. The other way round, an extent could be filled anew
	// while a record that recovery would replay still names it.
	if !planted.Has(planted.ReleaseNotRecorded) {
		storeCell(s, &l.geo, tailCellAt, upTo, l.seed)
	}
	// Records are read before their slots are given away by l.tail.
	const chunk = 256
	var batch [chunk]struct {
		first Extent
		n     uint8
	}
	for tail < upTo { // in small pieces: Alloc waits for none of them long
		n := 0
		for ; n < chunk && tail < upTo; n++ {
			tail++
			rec, err := l.Get(tail)
			batch[n].n = 0
			// The extents of a record that was damaged since it was
			// published stay lost until the next Attach.
			if err == nil && rec.Kind == KindWrite {
				batch[n].first, batch[n].n = rec.First, uint8(rec.Count)
			}
		}
		l.arena.mu.Lock()
		for _, b := range batch[:n] {
			for i := range Extent(b.n) {
				l.arena.putLocked(b.first + i)
			}
		}
		l.arena.mu.Unlock()
		l.tail.Store(uint64(tail))
	}
}

// Get returns a record that is published and not released.
func (l *Log) Get(seq block.Seq) (Record, error) {
	var rec Record
	head := l.Head()
	if tail := l.Tail(); seq <= tail || seq > head {
		return rec, fmt.Errorf("log record %d, of %d to %d: %w", seq, tail+1, head, block.ErrNotFound)
	}
	for c := range l.geo.ring {
		if l.read(c, seq, &rec) {
			if err := rec.check(l.geo.extents); err == nil {
				return rec, nil
			}
		}
	}
	return Record{}, &DamageError{First: seq, Last: head, Why: "both copies of the record are bad"}
}

// Replay calls fn with the records after from, up to and including to, in
// order, until one returns an error. fn must not keep the record. Nothing may be
// released meanwhile. Replay is what follows Attach: it does not verify again what
// Attach has verified.
func (l *Log) Replay(from, to block.Seq, fn func(*Record) error) error {
	var rec Record // one for all
	for seq := from + 1; seq <= to; seq++ {
		p := (*[recordSize]byte)(l.mem[l.geo.ring[0]+l.slot(seq):])
		if seq <= l.attached && seq > l.Tail() && binary.LittleEndian.Uint64(p[:]) == uint64(seq) {
			rec.fields(p)
		} else {
			var err error
			if rec, err = l.Get(seq); err != nil {
				return err
			}
		}
		if err := fn(&rec); err != nil {
			return err
		}
	}
	return nil
}

// SetEpoch records that a guest with a new epoch goes on in this log, before
// it begins to: Epoch may not be called meanwhile. A log that has no tags any more can be
// read by programs that do not know them, until AllowTags.
func (l *Log) SetEpoch(e block.Epoch) {
	if l.tags == 0 {
		l.hdr.version = 1
	}
	l.hdr.epoch = e
	l.hdr.generation++
	storeHeader(l.out, &l.geo, &l.hdr)
}

// AllowTags must be called before KindTag records are published, not beside SetEpoch and
// itself: programs that do not know them will refuse the log.
func (l *Log) AllowTags() {
	if l.hdr.version == logVersion {
		return
	}
	l.hdr.version = logVersion
	l.hdr.generation++
	storeHeader(l.out, &l.geo, &l.hdr)
}
