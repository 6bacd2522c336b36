package cache

import (
	"fmt"
	"unsafe"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/planted"
)

// Memory is memory that outlives a guest, and the cache in it with it.
type Memory struct {
	// Bytes begins at a page, and is the cache's alone.
	Bytes []byte
	Pool  block.PoolID
}

// The number of shards grows until none has more than shardFrames, so that
// making one's table anew holds no lock for long.
const (
	minShards   = 16
	maxShards   = 256
	shardFrames = 16384
	tinyShard   = 512 // with fewer frames some shards get too many of a few groups of neighbours
)

// frameCost is what a frame takes of the memory, all tables included.
const frameCost = block.Size + int(unsafe.Sizeof(record{})) + slotsPerFrame*int(unsafe.Sizeof(slot{})) + 4

// layout says how memory is divided.
type layout struct {
	bits uint // log2 of the number of shards
	each int  // frames of a shard
}

// layoutOf returns the layout of so many bytes.
func layoutOf(size int) (l layout) {
	n := size / frameCost
	shards := minShards
	for shards < maxShards && n/shards > shardFrames {
		shards *= 2
	}
	for shards > 1 && n/shards < tinyShard {
		shards /= 2
	}
	for 1<<l.bits < shards {
		l.bits++
	}
	return l.within(size)
}

// within returns the layout of so many bytes with the same shards.
func (l layout) within(size int) layout {
	l.each = size / frameCost >> l.bits
	if l.bits > 0 {
		l.each &^= 1 // keeps the tables of the next shard aligned to 8 bytes
	}
	return l
}

// New returns a cache whose frames and tables are carved out of mem, which
// must not be used for anything else from then on. With too little memory for
// one frame the cache works and never hits.
func New(mem []byte) *Cache { return Start(mem, block.PoolID{}, len(mem)) }

// Start returns a cache that is to have size bytes, and has mem until Keep or Move.
func Start(mem []byte, pool block.PoolID, size int) *Cache {
	l := layoutOf(size)
	c := &Cache{shards: make([]shard, 1<<l.bits), bits: l.bits, seed: seedOf(pool)}
	c.Move(mem)
	return c
}

// seedOf returns what ties hashes to a pool: records of another one's cache are none.
func seedOf(pool block.PoolID) (seed uint64) {
	for _, b := range pool {
		seed = (seed ^ uint64(b)) * 0xd6e8feb86659fd93
	}
	return seed
}

// Move moves the blocks to other memory, which may be smaller or larger than what the
// cache has had until then. Nobody uses that any more when it returns.
func (c *Cache) Move(mem []byte) {
	c.move(mem)
	c.kept.Store(false)
}

func (c *Cache) move(mem []byte) {
	// Frames are aligned as direct I/O wants them.
	if len(mem) > 0 {
		skip := -uintptr(unsafe.Pointer(unsafe.SliceData(mem))) % block.Size
		mem = mem[min(int(skip), len(mem)):]
	}
	l := layout{bits: c.bits}.within(len(mem))
	c.carve(l, mem, func(i int, to *shard) {
		s := &c.shards[i]
		s.mu.Lock()
		defer s.mu.Unlock()
		if s.left != nil {
			c.build(i)
		}
		to.init()
		s.moveTo(to)
	})
}

// Keep is Move to memory that outlives the guest, and is all zero.
func (c *Cache) Keep(m Memory) error {
	l := layout{bits: c.bits}.within(len(m.Bytes) - headBytes)
	if l.each <= 0 {
		return fmt.Errorf("cache of %d shards in %d bytes of memory: %w", len(c.shards), len(m.Bytes), block.ErrInvalid)
	}
	// Each shard is one that can be adopted from the beginning.
	h := header{pool: m.Pool, layout: l}
	h.store(m.Bytes)
	c.move(m.Bytes[headBytes:])
	c.kept.Store(true)
	return nil
}

// Adopt returns the cache that somebody has left in memory, or an error that says why
// that is none of the pool's. It looks at none of the frames: each shard does when it is
// used first, or Build does.
func Adopt(m Memory) (*Cache, error) {
	h, err := headerOf(m.Bytes, len(m.Bytes))
	if err != nil {
		return nil, err
	}
	if h.pool != m.Pool {
		return nil, corrupt("it is of pool %v", h.pool)
	}
	c := &Cache{shards: make([]shard, 1<<h.bits), bits: h.bits, seed: seedOf(m.Pool)}
	c.kept.Store(true)
	c.carve(h.layout, m.Bytes[headBytes:], func(i int, to *shard) {
		s := &c.shards[i]
		s.frames, s.records, s.left, s.ghosts = to.frames, to.records, to.table, to.ghosts
	})
	return c, nil
}

// Kept reports whether the cache outlives the guest.
func (c *Cache) Kept() bool { return c.kept.Load() }

// carve divides memory, and calls use with what each shard has of it.
func (c *Cache) carve(l layout, mem []byte, use func(i int, to *shard)) {
	frames, rest := mem[:l.each<<l.bits*block.Size], mem[l.each<<l.bits*block.Size:]
	for i := range c.shards {
		var to shard
		if l.each > 0 {
			to.frames, frames = frames[:l.each*block.Size], frames[l.each*block.Size:]
			to.records, rest = carve[record](rest, l.each)
			to.table, rest = carve[slot](rest, l.each*slotsPerFrame)
			to.ghosts, rest = carve[uint32](rest, l.each)
		}
		use(i, &to)
	}
}

// carve takes n values of T, which has no pointers, off the front of mem.
func carve[T any](mem []byte, n int) ([]T, []byte) {
	size := n * int(unsafe.Sizeof(*new(T)))
	return unsafe.Slice((*T)(unsafe.Pointer(&mem[:size][0])), n), mem[size:]
}

// moveTo gives a shard the memory of another one, which is empty, and has its blocks go
// there, the oldest first.
func (s *shard) moveTo(to *shard) {
	if len(to.records) > 0 {
		for _, list := range [...]uint8{hot, cold} {
			for f := s.lists[list].tail; f != 0; f = s.records[f-1].prev {
				from := &s.records[f-1]
				r := to.put(from.hash, Key{Phys: block.Physical(from.phys), Birth: block.CP(from.birth), Sum: from.sum, Shared: from.is(shared)}, s.frame(f-1))
				r.flags = from.flags
				if list == hot {
					f := to.lists[cold].head - 1
					to.remove(f)
					to.push(hot, f)
				}
			}
		}
	}
	s.frames, s.records, s.table, s.ghosts = to.frames, to.records, to.table, to.ghosts
	s.lists, s.fresh, s.clock, s.coldMax = to.lists, to.fresh, to.clock, to.coldMax
}

// Close ends the use of the memory, which stays as it is. From then on nothing is here.
func (c *Cache) Close() {
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.Lock()
		s.frames, s.records, s.table, s.ghosts, s.left = nil, nil, nil, nil, nil
		s.lists, s.fresh = [3]list{}, 0
		s.mu.Unlock()
	}
}

// Build looks at the frames of an adopted cache that nobody has looked at yet, a shard
// after the other, until stop says that it is enough.
func (c *Cache) Build(stop func() bool) {
	for i := range c.shards {
		if stop() {
			return
		}
		s := &c.shards[i]
		s.mu.Lock()
		if s.left != nil {
			c.build(i)
		}
		s.mu.Unlock()
	}
}

// build makes table and lists of a shard, which is locked, out of the records that
// somebody has left there.
func (c *Cache) build(shard int) {
	s := &c.shards[shard]
	s.table, s.left = s.left, nil
	s.coldMax = max(1, uint32(len(s.records))/8)
	// Two numbers for each frame have room in the table, which is made last.
	numbers := unsafe.Slice((*uint64)(unsafe.Pointer(unsafe.SliceData(s.table))), len(s.table))
	found, other := numbers[:0:len(s.records)], numbers[len(s.records):]
	s.fresh = 0
	for f := range s.records {
		r := &s.records[f]
		if at, hash := c.at(block.Physical(r.phys)); r.list != cold && r.list != hot || at != shard || hash != r.hash {
			if *r != (record{}) {
				s.fresh = uint32(f) + 1
				*r = record{}
			}
			continue
		}
		s.fresh = uint32(f) + 1
		r.flags &= used | shared | unproved
		if !planted.Has(planted.AdoptedUnproved) {
			r.flags |= unproved
		}
		found = append(found, uint64(r.clock)<<32|uint64(f))
	}
	for _, n := range inOrder(found, other[:len(found)]) {
		f := uint32(n)
		s.push(s.records[f].list, f)
		s.clock = uint32(n>>32) + 1
	}
	clear(s.table)
	for _, list := range [...]uint8{hot, cold} {
		for f := s.lists[list].head; f != 0; {
			at := f - 1
			r := &s.records[at]
			f = r.next
			if _, twice := s.find(r.hash, block.Physical(r.phys)); twice {
				s.remove(at)
				r.list = free
				continue
			}
			s.enlist(at)
		}
	}
	s.adopted = s.lists[hot].n + s.lists[cold].n
	for f := range s.fresh {
		if s.records[f].list == free {
			s.push(free, f)
		}
	}
}

// inOrder sorts numbers by their upper halves, and returns them in one of the two slices
// of the same length.
func inOrder(numbers, other []uint64) []uint64 {
	const digit = 11 // bits; three of them make a half
	for shift := 32; shift < 64; shift += digit {
		var ends [1 << digit]uint32
		for _, n := range numbers {
			ends[n>>shift&(1<<digit-1)]++
		}
		sum := uint32(0)
		for i, n := range ends {
			ends[i] = sum
			sum += n
		}
		for _, n := range numbers {
			at := &ends[n>>shift&(1<<digit-1)]
			other[*at] = n
			*at++
		}
		numbers, other = other, numbers
	}
	return numbers
}
