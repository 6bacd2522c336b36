package pool

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/cache"
	"github.com/pollux-storage/pollux/internal/region"
)

// The cache of clean blocks lies in a section of the pool's region, so that whoever opens
// the pool after this guest, its partner too, has hits at once. It is advisory: what is
// wrong with it costs reads from devices, and where the region has no room for it, it lies
// in memory of this guest.
//
// A region without a cache gets one. The host has to find and clear its memory, for which
// nobody waits: until then the cache has a little memory of this guest, and what is in that
// moves along.

// DefaultCacheBytes is the memory of a cache that nobody has said anything about.
const DefaultCacheBytes = 16 << 20

// readyBytes is how much memory is found at once: a cache that has no more is in its place
// before the pool is open, and others have as much until they are.
const readyBytes = 16 << 20

// keeper is the cache with what its memory needs.
type keeper struct {
	*cache.Cache
	ending atomic.Bool    // nothing more is to be done in the background
	doing  sync.WaitGroup // what is done there

	section region.Section // that it was adopted in, if it was

	mu    sync.Mutex // guards the rest
	bytes int64      // its memory
	own   []byte     // memory that ends with the guest, nil when there is none
	why   string     // why it has that, when that is to stay
}

// CacheMemory returns how much of its region a cache takes at most where limit is
// OpenOptions.CacheBytes.
func CacheMemory(limit int64) int64 { return region.SectionMemory(limit) }

// openCache gives the pool the cache that a guest before has left in a region, which may
// be nil, and otherwise an empty one.
func (op *opener) openCache(r *region.Region) error {
	if r != nil && op.adoptCache(r) {
		return nil
	}
	own, err := hpdi.AllocPrivate(int(min(op.o.CacheBytes, readyBytes)))
	if err != nil {
		return fmt.Errorf("cache of pool %s: %w", op.label.Name, err)
	}
	op.cache.own, op.cache.bytes = own, int64(len(own))
	op.cache.Cache = cache.Start(own, op.label.Pool, int(op.o.CacheBytes))
	return nil
}

// adoptCache makes the cache that a guest before has left in a region that of the pool. It
// reports whether there is one.
func (op *opener) adoptCache(r *region.Region) bool {
	k := &op.cache
	for _, s := range r.Sections(region.SectionCache) {
		if k.Cache == nil && sameSize(s.Length, op.o.CacheBytes) {
			mem, err := r.MapSection(s)
			if err == nil {
				k.Cache, err = cache.Adopt(cache.Memory{Bytes: mem, Pool: op.label.Pool})
			}
			if err != nil {
				op.tell(TellCache, "the cache of pool %s begins empty: %v", op.label.Name, err)
				continue
			}
			k.section, k.bytes = s, s.Length
		}
	}
	return k.Cache != nil
}

// sameSize reports whether a section of a cache serves one that is to have so many bytes.
// What the cache is planned with changes by little when devices or an index do, for which
// nobody gives a warm cache away.
func sameSize(have, want int64) bool {
	slack := max(want/16, region.SectionMemory(1))
	return have >= want-slack && have <= want+slack
}

// leaveRegion takes the cache out of a region that is given up.
func (op *opener) leaveRegion() error {
	if !op.cache.Kept() {
		return nil
	}
	op.cache.Cache.Close()
	err := op.openCache(nil)
	op.reader.Use(op.cache.Cache)
	return err
}

// placeCache finds a place for the cache where it outlives the guest, at once for a small
// one. What was adopted is looked at in the background: who asks for it meanwhile looks at
// a part of it, and waits for that alone.
func (p *Pool) placeCache() {
	k := &p.cache
	if !k.Kept() && p.opts.CacheBytes <= readyBytes {
		p.dropCaches()
		p.keepCache()
	}
	k.doing.Go(func() {
		p.dropCaches()
		if !k.Kept() && k.stats().Why == "" && !k.ending.Load() {
			p.keepCache()
		}
		k.Build(k.ending.Load)
	})
}

// dropCaches gives back the memory of all caches in the region but that of the pool. Where
// that has small pages it takes a second for some GiB.
func (p *Pool) dropCaches() {
	k := &p.cache
	for _, s := range p.region.Sections(region.SectionCache) {
		if s != k.section {
			_ = p.region.RemoveSection(s) // or the next owner does
		}
	}
}

// keepCache moves the cache to the region, or to memory of this guest where that has no
// room for it.
func (p *Pool) keepCache() {
	k := &p.cache
	s, mem, err := p.region.AddSectionUnless(region.SectionCache, p.opts.CacheBytes, p.cacheRest())
	if k.ending.Load() && err != nil {
		return // the next guest will
	}
	if err == nil {
		k.section = s
		if err = k.Keep(cache.Memory{Bytes: mem, Pool: p.label.Pool}); err != nil {
			err = errors.Join(err, p.region.RemoveSection(s))
		}
	}
	bytes, own, why := int64(len(mem)), []byte(nil), ""
	if err != nil {
		bytes, own, why = k.bytes, k.own, err.Error()
		if more, err := hpdi.AllocPrivate(int(p.opts.CacheBytes)); err == nil {
			k.Move(more)
			bytes, own = int64(len(more)), more
		}
		p.tell(TellCache, "the cache of pool %s will not outlive this guest: %v", p.label.Name, err)
	}
	k.mu.Lock()
	before := k.own
	k.bytes, k.own, k.why = bytes, own, why
	k.mu.Unlock()
	if len(before) > 0 && (len(own) == 0 || &before[0] != &own[0]) {
		_ = hpdi.Free(before) // nobody has anything there any more
	}
}

// cacheRest returns what is called between the steps of clearing a cache, and whether it is
// to end. A large one is cleared for seconds, in a part of the time of one processor: clients
// are served beside it.
func (p *Pool) cacheRest() func() bool {
	begun := time.Now()
	return func() bool {
		if p.opts.CacheBytes > readyBytes && !p.cache.ending.Load() {
			time.Sleep(min(time.Since(begun), longestRest))
			begun = time.Now()
		}
		return p.cache.ending.Load()
	}
}

// close ends the use of the cache's memory, which is left to the next guest where it
// outlives this one.
func (k *keeper) close() error {
	if k.Cache == nil {
		return nil
	}
	k.ending.Store(true)
	k.doing.Wait()
	k.Cache.Close()
	k.mu.Lock()
	defer k.mu.Unlock()
	own := k.own
	k.own = nil
	return hpdi.Free(own)
}

// stats describes the cache.
func (k *keeper) stats() CacheStats {
	k.mu.Lock()
	defer k.mu.Unlock()
	return CacheStats{Stats: k.Cache.Stats(), Bytes: k.bytes, Own: int64(len(k.own)), Why: k.why}
}

// CacheStats describes the cache of a pool.
type CacheStats struct {
	cache.Stats
	// Bytes is its memory, and Own what of that ends with the guest.
	Bytes, Own int64
	// Why says why it is to end with the guest. It is empty where it is not, also as
	// long as a new cache has not come to its place.
	Why string
}
