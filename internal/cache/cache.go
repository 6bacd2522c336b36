// Package cache holds clean copies of a pool's blocks in memory outside the Go
// heap, bounded, which may outlive the guest.
//
// # What is a hit
//
// A frame answers for a [Key], which says more than where a block is: also in
// which consistency point it was written and what its checksum is. A frame is
// a hit only if all of it agrees. So nothing has to be invalidated for the
// sake of correctness: when a physical block is freed and written again, when
// a pool is recovered to an earlier state or when it comes from the partner,
// its map entries carry other keys and old frames simply do not match. There
// is at most one frame for a physical block; the last Put wins. Drop gives
// memory back early, no more.
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
// # Memory that outlives the guest
//
// A cache that is kept, see [Cache.Keep], lies in a section of the pool's region, and
// who opens the pool next adopts it. Nothing in it is trusted that could hurt. Adopt
// looks at the header alone. Tables and links of a shard are made anew out of the
// frames' records when the shard is used first: a record that cannot be one of its shard
// is a free frame. What it says of the content is proved, like an offer, by the
// first to ask: a guest may have died in the middle of a copy, and memory decays. The
// key of a frame that was adopted says what the map says now, or the frame is no hit;
// so nobody has to know what happened to the pool in between. Order and lists
// follow from the records, too, and what left the cold list lately is whatever the
// table of hashes says, for any hash does no more than let a block enter the hot list
// at once.
//
// Rejected: to keep the tables as they are, with a mark that no change is under way.
// A guest is killed under load, when there always is one, and a table that is almost
// right would have to be searched for loops.
//
// # Layout and locking
//
// Memory is divided among shards by a hash of the physical block. Each has
// frames, a record for each frame, an open-addressed table and the table of
// hashes; none holds a Go pointer. docs/format/cache.md has the picture.
// Invariants, for each shard that was used:
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
	"sync/atomic"

	"github.com/pollux-storage/pollux/internal/block"
)

// Key identifies the content of a block.
type Key struct {
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
	Used      int // that hold a block; of an adopted cache those that were looked at, see Build
	Adopted   int // that somebody before has left, of those that were looked at
	Hits      uint64
	Misses    uint64
	Evictions uint64 // frames given up to make room
	Damaged   uint64 // frames given up because they did not hold what their checksum says
}

// Cache is a set of frames. Its methods may be called concurrently.
type Cache struct {
	shards []shard
	bits   uint   // log2 of the number of shards
	seed   uint64 // of the hash
	kept   atomic.Bool
}

// Get copies len(dst) bytes from offset off of the block into dst and reports
// whether it is here.
func (c *Cache) Get(key Key, off int, dst []byte) bool {
	s, h := c.enter(key.Phys)
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
	s, h := c.enter(key.Phys)
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
	s, h := c.enter(key.Phys)
	defer s.mu.Unlock()
	if i, ok := s.find(h, key.Phys); ok {
		f := s.table[i].frame - 1
		if r := &s.records[f]; r.is(unproved) && r.holds(key) && bytes.Equal(s.frame(f), data) {
			r.flags &^= unproved
			same = true
		}
	}
	f, here := s.hit(h, key)
	return here && (same || bytes.Equal(s.frame(f), data)), here
}

// Has reports whether the block is here. It counts neither as a use nor as a
// hit or miss.
func (c *Cache) Has(key Key) bool {
	s, h := c.enter(key.Phys)
	defer s.mu.Unlock()
	i, ok := s.find(h, key.Phys)
	return ok && s.records[s.table[i].frame-1].holds(key)
}

// Put copies data, one whole block, into a frame for key. It takes the place
// of any frame for the same physical block.
func (c *Cache) Put(key Key, data []byte) {
	if len(data) != block.Size {
		panic(fmt.Sprintf("cache: put %d bytes as block %s", len(data), key.Phys))
	}
	s, h := c.enter(key.Phys)
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
	s, h := c.enter(key.Phys)
	defer s.mu.Unlock()
	if len(s.records) > 0 {
		s.put(h, key, data).flags |= unproved
	}
}

// Drop forgets the block if it is here.
func (c *Cache) Drop(key Key) {
	s, h := c.enter(key.Phys)
	defer s.mu.Unlock()
	if i, ok := s.find(h, key.Phys); ok {
		if f := s.table[i].frame - 1; s.records[f].holds(key) {
			s.release(i, f)
		}
	}
}

// Forget drops whatever is held for a physical block: it was freed, so no key
// for it will be asked for again, and its frame is of better use elsewhere.
func (c *Cache) Forget(phys block.Physical) {
	s, h := c.enter(phys)
	defer s.mu.Unlock()
	if i, ok := s.find(h, phys); ok {
		s.release(i, s.table[i].frame-1)
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
		st.Adopted += int(s.adopted)
		st.Hits += s.hits
		st.Misses += s.misses
		st.Evictions += s.evictions
		st.Damaged += s.damaged
		s.mu.Unlock()
	}
	return st
}

// enter locks the shard of a block, and returns it with the block's hash within it.
func (c *Cache) enter(phys block.Physical) (*shard, uint32) {
	i, h := c.at(phys)
	s := &c.shards[i]
	s.mu.Lock()
	if s.left != nil {
		c.build(i)
	}
	return s, h
}

// at returns the number of a block's shard, and its hash within it.
func (c *Cache) at(phys block.Physical) (int, uint32) {
	x := uint64(phys>>neighbourBits)*0x9e3779b97f4a7c15 ^ c.seed
	x = (x ^ x>>32) * 0xd6e8feb86659fd93
	x = (x ^ x>>32) * 0xd6e8feb86659fd93
	x ^= x >> 32
	const within = 1<<neighbourBits - 1
	return int(x >> 32 & (1<<c.bits - 1)), uint32(x)&^within | uint32(phys)&within
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
	left    []slot   // of a table that is to be made out of what somebody has left
	lists   [3]list  // by name of list
	fresh   uint32   // frames from here on were never used
	clock   uint32   // insertions, to tell how long ago one was
	coldMax uint32   // what the cold list is held to when memory is full

	adopted uint32 // frames that somebody before has left

	hits, misses, evictions, damaged uint64

	_ [64]byte // neighbours' locks on other cache lines
}
