// Package cache holds clean copies of blocks in memory outside the Go heap,
// bounded and shared by all pools of a guest.
//
// # What is a hit
//
// A frame answers for a [Key], which says more than where a block is: also in
// which consistency point it was written and what its checksum is. A frame is
// a hit only if all of it agrees. So nothing has to be invalidated for the
// sake of correctness: when a physical block is freed and written again, when
// a pool is recovered to an earlier state or when it comes from the partner,
// its map entries carry other keys and old frames simply do not match. There
// is at most one frame for a physical block; the last Put wins. Drop and
// DropPool give memory back early, no more.
//
// A key of a shared block does not know the point that wrote it. For those a frame is
// a hit if place and checksum agree, and Forget keeps away what a block held before it
// was freed. To be taken for another, a frame would have to be put by a reader that
// began before the block was freed and ended after it was written and shared again,
// and have the same checksum.
//
// A hit needs no proof: what Put brings was verified by whoever read it. What
// Offer brings may have been damaged in memory since its checksum was computed.
// The first to ask for it computes it again; a frame that fails is none. Most
// blocks are written again before anybody reads them.
//
// # Replacement
//
// A frame enters a short first-in-first-out list, the cold one. What was
// asked for again by the time it reaches the end moves to the hot list, a
// CLOCK with one second-chance bit; the rest goes. The cold list is held to an
// eighth of the frames once memory is full, so a scan of any length passes
// through that eighth and leaves the hot list alone. Hits that follow an
// insertion closely are not counted: they are one reader that takes a block in
// pieces. A table of short hashes remembers what left the cold list lately;
// what is put again soon enters the hot list at once, so that a working set
// larger than the cold list, but not than the cache, gets in. A plain CLOCK was
// rejected because one scan empties it, exact LRU because each hit would write
// to three frames' links.
//
// # Layout and locking
//
// Memory is divided among shards by a hash of pool and physical block. Each has
// frames, a record for each frame, an open-addressed table and the table of
// hashes; none holds a Go pointer. Invariants, for each shard:
//
//   - a frame is in exactly one of: never used, free list, cold list, hot list;
//   - exactly the frames of the cold and hot lists are in the table, once;
//   - the table is at most half full, and no probe path has a gap.
//
// A shard's mutex guards all that is its own. No two are held at once, and
// nothing blocks under one.
package cache

import (
	"bytes"
	"fmt"
	"sync"
	"unsafe"

	"github.com/pollux-storage/pollux/internal/block"
)

// Key identifies the content of a block.
type Key struct {
	Pool  uint32         // the pool's number within the guest
	Phys  block.Physical // where
	Birth block.CP       // written in this consistency point
	Sum   uint32         // CRC32C of the data
	// Shared says that it is not known which consistency point has written the block,
	// only that it was before the one that refers to it. A frame that is put by such a
	// key answers for others like it alone.
	Shared bool
}

// Stats describes a cache. Counters start at 0 with the cache.
type Stats struct {
	Frames    int // that the memory has room for
	Used      int // that hold a block
	Hits      uint64
	Misses    uint64
	Evictions uint64 // frames given up to make room
}

// Cache is a set of frames. Its methods may be called concurrently.
type Cache struct {
	shards []shard
	bits   uint // log2 of the number of shards
}

// The number of shards grows until none has more than shardFrames, so that
// dropping a pool holds no lock for long.
const (
	minShards   = 16
	maxShards   = 256
	shardFrames = 16384
	tinyShard   = 512 // with fewer frames some shards get too many of a few groups of neighbours
)

// frameCost is what a frame takes of the memory, all tables included.
const frameCost = block.Size + int(unsafe.Sizeof(record{})) + slotsPerFrame*int(unsafe.Sizeof(slot{})) + 4

// New returns a cache whose frames and tables are carved out of mem, which
// must not be used for anything else from then on. With too little memory for
// one frame the cache works and never hits.
func New(mem []byte) *Cache {
	// Frames are aligned as direct I/O wants them.
	if len(mem) > 0 {
		skip := -uintptr(unsafe.Pointer(unsafe.SliceData(mem))) % block.Size
		mem = mem[min(int(skip), len(mem)):]
	}
	c := &Cache{}
	n := len(mem) / frameCost
	shards := minShards
	for shards < maxShards && n/shards > shardFrames {
		shards *= 2
	}
	for shards > 1 && n/shards < tinyShard {
		shards /= 2
	}
	for 1<<c.bits < shards {
		c.bits++
	}
	c.shards = make([]shard, shards)
	each := n / shards
	if shards > 1 {
		each &^= 1 // keeps the tables of the next shard aligned to 8 bytes
	}
	if each == 0 {
		return c
	}
	frames, rest := mem[:n*block.Size], mem[n*block.Size:]
	for i := range c.shards {
		s := &c.shards[i]
		s.frames, frames = frames[:each*block.Size], frames[each*block.Size:]
		s.records, rest = carve[record](rest, each)
		s.table, rest = carve[slot](rest, each*slotsPerFrame)
		s.ghosts, rest = carve[uint32](rest, each)
		s.init()
	}
	return c
}

// carve takes n values of T, which has no pointers, off the front of mem.
func carve[T any](mem []byte, n int) ([]T, []byte) {
	size := n * int(unsafe.Sizeof(*new(T)))
	return unsafe.Slice((*T)(unsafe.Pointer(&mem[:size][0])), n), mem[size:]
}

// Get copies len(dst) bytes from offset off of the block into dst and reports
// whether it is here.
func (c *Cache) Get(key Key, off int, dst []byte) bool {
	s, h := c.at(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	f, ok := s.hit(h, key)
	if ok {
		copy(dst, s.frame(f)[off:off+len(dst)])
	}
	return ok
}

// View calls fn with the frame of the block, if it is here, and reports
// whether it is. fn runs under the shard's lock: it must be short, must not
// keep or change the frame, and must not call the cache.
func (c *Cache) View(key Key, fn func(frame []byte)) bool {
	s, h := c.at(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	f, ok := s.hit(h, key)
	if ok {
		fn(s.frame(f))
	}
	return ok
}

// Same reports whether the block is here, and then whether it holds data, of which the
// key's checksum is true: a frame like it is proved by that.
func (c *Cache) Same(key Key, data []byte) (same, here bool) {
	s, h := c.at(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	if i, ok := s.find(h, key.Pool, key.Phys); ok {
		f := s.table[i].frame - 1
		if r := &s.records[f]; r.unproved && r.holds(key) && bytes.Equal(s.frame(f), data) {
			r.unproved, same = false, true
		}
	}
	f, here := s.hit(h, key)
	return here && (same || bytes.Equal(s.frame(f), data)), here
}

// Has reports whether the block is here. It counts neither as a use nor as a
// hit or miss.
func (c *Cache) Has(key Key) bool {
	s, h := c.at(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	i, ok := s.find(h, key.Pool, key.Phys)
	return ok && s.records[s.table[i].frame-1].holds(key)
}

// Put copies data, one whole block, into a frame for key. It takes the place
// of any frame for the same physical block.
func (c *Cache) Put(key Key, data []byte) {
	if len(data) != block.Size {
		panic(fmt.Sprintf("cache: put %d bytes as block %s", len(data), key.Phys))
	}
	s, h := c.at(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.records) > 0 {
		s.put(h, key, data)
	}
}

// Offer is Put for data whose checksum was not computed lately: it is, when the
// block is asked for first.
func (c *Cache) Offer(key Key, data []byte) {
	if len(data) != block.Size {
		panic(fmt.Sprintf("cache: offer %d bytes as block %s", len(data), key.Phys))
	}
	s, h := c.at(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.records) > 0 {
		s.put(h, key, data).unproved = true
	}
}

// Drop forgets the block if it is here.
func (c *Cache) Drop(key Key) {
	s, h := c.at(key)
	s.mu.Lock()
	defer s.mu.Unlock()
	if i, ok := s.find(h, key.Pool, key.Phys); ok {
		if f := s.table[i].frame - 1; s.records[f].holds(key) {
			s.release(i, f)
		}
	}
}

// Forget drops whatever is held for a physical block: it was freed, so no key
// for it will be asked for again, and its frame is of better use elsewhere.
func (c *Cache) Forget(pool uint32, phys block.Physical) {
	s, h := c.at(Key{Pool: pool, Phys: phys})
	s.mu.Lock()
	defer s.mu.Unlock()
	if i, ok := s.find(h, pool, phys); ok {
		s.release(i, s.table[i].frame-1)
	}
}

// DropPool forgets all blocks of a pool.
func (c *Cache) DropPool(pool uint32) {
	for i := range c.shards {
		c.shards[i].dropPool(pool)
	}
}

// Stats returns the present numbers. Shards are read one after the other.
func (c *Cache) Stats() Stats {
	var st Stats
	for i := range c.shards {
		s := &c.shards[i]
		s.mu.Lock()
		st.Frames += len(s.records)
		st.Used += int(s.lists[cold].n + s.lists[hot].n)
		st.Hits += s.hits
		st.Misses += s.misses
		st.Evictions += s.evictions
		s.mu.Unlock()
	}
	return st
}

// at returns the shard of a key and the key's hash within it.
func (c *Cache) at(key Key) (*shard, uint32) {
	x := uint64(key.Phys>>neighbourBits)*0x9e3779b97f4a7c15 ^ uint64(key.Pool)*0xd6e8feb86659fd93
	x = (x ^ x>>32) * 0xd6e8feb86659fd93
	x = (x ^ x>>32) * 0xd6e8feb86659fd93
	x ^= x >> 32
	const within = 1<<neighbourBits - 1
	return &c.shards[x>>32&(1<<c.bits-1)], uint32(x)&^within | uint32(key.Phys)&within
}

// neighbourBits is log2 of how many blocks that lie side by side on a device have
// one shard, and places side by side in its table: whoever takes them one after
// the other finds lock, slot and record in the processor's cache.
const neighbourBits = 3

// shard is a cache by itself. Everything in it is guarded by mu.
type shard struct {
	mu      sync.Mutex
	frames  []byte
	records []record
	table   []slot
	ghosts  []uint32 // hashes of blocks that left the cold list, at a place by their hash
	lists   [3]list  // by name of list
	fresh   uint32   // frames from here on were never used
	clock   uint32   // insertions, to tell how long ago one was
	coldMax uint32   // what the cold list is held to when memory is full

	hits, misses, evictions uint64

	_ [64]byte // neighbours' locks on other cache lines
}
