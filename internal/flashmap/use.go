package flashmap

import (
	"math/bits"
	"sync/atomic"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
)

// OpUse says how requests of a kind have used a device.
type OpUse struct {
	Requests uint64 // as the device got them
	Bytes    uint64
	// Latency is the mean time from submission to the end, of Samples of them.
	Latency time.Duration
	Samples uint64
}

// TierUse is what requests have made of one of the two devices.
type TierUse struct {
	Reads  OpUse
	Writes OpUse // also of zeroes
}

// PrimaryUse is how a primary device was used since the flash device was opened. A
// request that has to do with both devices counts at both. A queue adds what it has
// counted when it waits for a device, every 64 requests of a kind, and when it is closed.
type PrimaryUse struct {
	Number  int
	Name    string // of the device that is open, empty without one
	Primary TierUse
	Flash   TierUse
	// Moved are bytes that moves have written to flash: beside Flash.Writes.Bytes all
	// that is written there but for the table.
	Moved uint64
}

// Use returns how each primary that is known was used.
func (f *Flash) Use() (all []PrimaryUse) {
	f.stripes[0].mu.Lock()
	primaries := f.primaries // who changes them has all stripes
	f.stripes[0].mu.Unlock()
	for _, p := range primaries {
		if p == nil {
			continue
		}
		u := PrimaryUse{Number: p.number, Moved: p.use.moved.Load(),
			Primary: p.use.ops[onPrimary].tier(), Flash: p.use.ops[onFlash].tier()}
		if d := p.dev.Load(); d != nil {
			u.Name = d.info.Name
		}
		all = append(all, u)
	}
	return all
}

// sampleEvery is how many requests of a kind there are in a queue to one whose time is
// taken: to ask for the time costs a third of what a request costs here.
const sampleEvery = 64

// The kinds of request that are counted.
const (
	reads = iota
	writes
	kinds
)

// use counts what a primary and its queues do.
type use struct {
	ops   [2]tier // by side
	moved atomic.Uint64
}

// tier counts by kind.
type tier [kinds]struct{ requests, bytes, samples, nanos atomic.Uint64 }

func (t *tier) tier() TierUse {
	get := func(kind int) OpUse {
		c := &t[kind]
		o := OpUse{Requests: c.requests.Load(), Bytes: c.bytes.Load(), Samples: c.samples.Load()}
		if o.Samples > 0 {
			o.Latency = time.Duration(c.nanos.Load() / o.Samples)
		}
		return o
	}
	return TierUse{Reads: get(reads), Writes: get(writes)}
}

// tally is what a queue counts by itself, so that requests share no memory that others
// write.
type tally struct {
	ops [2][8]count // by side and hpdi.Op
	// fresh are the counts with something that is not added, one bit for each.
	fresh uint16
	// sampled is the request to a device whose time is taken, which began at begun; nil for
	// none.
	sampled *hpdi.Request
	begun   time.Duration
}

// count is how much a queue has counted, and how much of it is added to what is known of
// the primary.
type count struct{ requests, bytes, addedRequests, addedBytes uint64 }

// count counts a request for n bytes to a side, and tells whether its time is to be taken.
func (t *tally) count(side int, op hpdi.Op, n int64) bool {
	c := &t.ops[side&1][op&7]
	t.fresh |= 1 << (side&1<<3 | int(op&7))
	c.bytes += uint64(n)
	c.requests++
	return c.requests%sampleEvery == 1
}

// settle adds what the queue has counted to what is known of the primary.
func (q *queue) settle() {
	for ; q.tally.fresh != 0; q.tally.fresh &= q.tally.fresh - 1 {
		i := bits.TrailingZeros16(q.tally.fresh)
		side, op := i>>3, hpdi.Op(i&7)
		if op == hpdi.OpFlush || op == hpdi.OpDiscard {
			continue
		}
		c, sum := &q.tally.ops[side][op], &q.d.p.use.ops[side][kindOf(op)]
		sum.requests.Add(c.requests - c.addedRequests)
		sum.bytes.Add(c.bytes - c.addedBytes)
		c.addedRequests, c.addedBytes = c.requests, c.bytes
	}
}

func kindOf(op hpdi.Op) int {
	if op == hpdi.OpRead {
		return reads
	}
	return writes
}

// sample begins to take the time of a request to a device, unless that of another one is
// being taken.
func (q *queue) sample(r *hpdi.Request) {
	q.settle()
	if q.tally.sampled == nil && r.Op != hpdi.OpDiscard {
		q.tally.sampled, q.tally.begun = r, q.d.clock()
	}
}

// sampled notes how long the request took, if it is the one whose time is taken.
func (q *queue) sampled(r *hpdi.Request, side int) {
	if r != q.tally.sampled {
		return
	}
	sum := &q.d.p.use.ops[side][kindOf(r.Op)]
	sum.samples.Add(1)
	sum.nanos.Add(uint64(max(0, q.d.clock()-q.tally.begun)))
	q.tally.sampled = nil
}
