package collect

import (
	"sync/atomic"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
)

// ringSize is how many accesses a recorder holds until the next tick: 96 KiB of memory.
const ringSize = 4096

// crowded is how many accesses one stands for where a ring is more than half full.
const crowded = 8

// event is an access.
type event struct {
	offset int64
	at     int64  // nanoseconds since 1970
	size   uint32 // bytes
	weight uint16 // how many accesses it stands for
	write  bool
}

// maxEvent is the largest size of an event; what is larger counts as that.
const maxEvent = 1 << 30

// taking is what recorders must know of the parameters. It is never changed, only replaced.
type taking struct {
	operations uint32
	every      int64
}

// Recorder takes the accesses of one queue. Its owner alone calls Record.
type Recorder struct {
	c *Collector

	// Of the owner.
	skip int64 // accesses until one is taken, where not all are
	draw uint64
	head atomic.Uint64 // events ever put into the ring
	lost atomic.Uint64

	_    [64]byte // the tail is written by another processor
	tail atomic.Uint64
	_    [64]byte

	ring [ringSize]event
}

// Record notes an access of bytes at offset. It allocates nothing and waits for nobody.
// Flushes, discards and what lies outside of the device are not noted.
func (r *Recorder) Record(op hpdi.Op, offset, bytes int64, now time.Time) {
	if every := r.takes(op, offset, bytes); every > 0 {
		r.put(op, offset, bytes, now, every)
	}
}

// RecordBy is Record with the time that a clock tells, which is asked only for an access that
// is taken: where there are many, asking takes longer than all the rest.
func (r *Recorder) RecordBy(op hpdi.Op, offset, bytes int64, clock func() time.Time) {
	if every := r.takes(op, offset, bytes); every > 0 {
		r.put(op, offset, bytes, clock(), every)
	}
}

// takes returns for how many accesses one counts, 0 when it is not taken.
func (r *Recorder) takes(op hpdi.Op, offset, bytes int64) (every int64) {
	t := r.c.taking.Load()
	if t.operations>>op&1 == 0 || bytes <= 0 || offset < 0 || offset > r.c.geometry.Size-bytes {
		return 0
	}
	used := r.head.Load() - r.tail.Load()
	every = t.every
	if used >= ringSize/2 {
		every *= crowded
	}
	if every > 1 {
		if r.skip--; r.skip > 0 {
			return 0
		}
		r.skip = r.next(every)
	}
	if used == ringSize {
		r.lost.Add(uint64(every))
		return 0
	}
	return every
}

// put puts an access into the ring, which has room.
func (r *Recorder) put(op hpdi.Op, offset, bytes int64, now time.Time, every int64) {
	head := r.head.Load()
	r.ring[head%ringSize] = event{offset, now.UnixNano(), uint32(min(bytes, maxEvent)), uint16(every), op == hpdi.OpWrite}
	r.head.Store(head + 1)
}

// next draws how many accesses further the next one is taken: 1 to 2·every-1, every in the
// mean, so that no rhythm of the accesses meets one of the sampling.
func (r *Recorder) next(every int64) int64 {
	r.draw ^= r.draw << 13
	r.draw ^= r.draw >> 7
	r.draw ^= r.draw << 17
	return 1 + int64(r.draw%uint64(2*every-1))
}

// Close ends the recorder; what it has noted is counted by the next tick. Record must not be
// called any more.
func (r *Recorder) Close() {
	r.c.mu.Lock()
	defer r.c.mu.Unlock()
	r.c.closing = append(r.c.closing, r)
}

// cursor is how far a tick is in a recorder's ring.
type cursor struct {
	r         *Recorder
	next, end uint64
}

// drain gives all events that were recorded before to take, in the order of their times.
func drain(cursors []cursor, take func(*event)) {
	for len(cursors) > 0 {
		first := -1
		for i := 0; i < len(cursors); {
			k := &cursors[i]
			if k.next == k.end {
				k.r.tail.Store(k.end)
				cursors[i] = cursors[len(cursors)-1]
				cursors = cursors[:len(cursors)-1]
				continue
			}
			if first < 0 || k.at() < cursors[first].at() {
				first = i
			}
			i++
		}
		if first < 0 {
			return
		}
		k := &cursors[first]
		take(&k.r.ring[k.next%ringSize])
		k.next++
	}
}

func (k *cursor) at() int64 { return k.r.ring[k.next%ringSize].at }
