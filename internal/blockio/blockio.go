// Package blockio reads stored blocks and proves them: from the cache when it
// holds the very version that a pointer names, else from the devices, where
// neighbouring blocks become one request. Bytes whose checksum is not the
// pointer's are never handed on.
//
// A page that cannot be read, or whose bytes are wrong, is read from its twin, and
// written again where it lay. Only who keeps pages from being freed and used again
// meanwhile may do the latter: the pool's one goroutine. Others leave a note, which
// Forget takes away when the page is freed, and Mend looks at.
package blockio

import (
	"errors"
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/cache"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/planted"
)

// bounceBlocks is the size of one device request at most, and bounces how many
// bounce buffers all readers of a pool share.
const (
	bounceBlocks = 64
	bounces      = 64
)

// Reader reads the blocks of one pool. Its methods may be called concurrently.
type Reader struct {
	set   *devices.Set
	cache *cache.Cache
	bufs  chan *bounce
	mem   []byte // of all bounce buffers
	bad   suspects
}

// bounce is a buffer that device requests read into, with those requests.
type bounce struct {
	mem []byte
	ios [bounceBlocks]devices.IO
	use []*devices.IO           // those of ios that are in use
	vec [bounceBlocks][1][]byte // their vectors
}

// add makes a request that reads into frame i of the buffer.
func (b *bounce) add(i int, at block.Physical) {
	n := len(b.use)
	b.vec[n][0] = b.frame(i)
	b.ios[n] = devices.IO{Op: hpdi.OpRead, At: at, Vec: b.vec[n][:]}
	b.use = append(b.use, &b.ios[n])
}

// extend makes the last request read one more block.
func (b *bounce) extend() {
	vec := &b.vec[len(b.use)-1][0]
	*vec = (*vec)[:len(*vec)+block.Size]
}

func (b *bounce) frame(i int) []byte { return b.mem[i*block.Size:][:block.Size] }

// New returns a reader of set's blocks that keeps clean frames in c.
func New(set *devices.Set, c *cache.Cache) (*Reader, error) {
	mem, err := hpdi.AllocPrivate(bounces * bounceBlocks * block.Size)
	if err != nil {
		return nil, err
	}
	r := &Reader{set: set, cache: c, mem: mem, bufs: make(chan *bounce, bounces)}
	for buf := range slices.Chunk(mem, bounceBlocks*block.Size) {
		r.bufs <- &bounce{mem: buf}
	}
	return r, nil
}

// Close frees the reader's memory; no call may be under way.
func (r *Reader) Close() error { return hpdi.Free(r.mem) }

// Use makes c the cache; no call may be under way.
func (r *Reader) Use(c *cache.Cache) { r.cache = c }

func (r *Reader) key(p block.Pointer) cache.Key {
	return cache.Key{Phys: p.Phys, Birth: p.Birth, Sum: p.Sum, Shared: p.Shared}
}

// Cached copies len(dst) bytes from offset off of the block into dst, if the
// cache holds it.
func (r *Reader) Cached(p block.Pointer, off int, dst []byte) bool {
	return r.cache.Get(r.key(p), off, dst)
}

// ViewCached calls fn with the block, which it must not keep, if the cache
// holds it.
func (r *Reader) ViewCached(p block.Pointer, fn func(frame []byte)) bool {
	return r.cache.View(r.key(p), fn)
}

// SameCached reports whether the cache holds a block, and then whether that is data, of
// which the pointer's checksum is true.
func (r *Reader) SameCached(p block.Pointer, data []byte) (same, here bool) {
	return r.cache.Same(r.key(p), data)
}

// Put gives a block whose checksum was just computed to the cache.
func (r *Reader) Put(p block.Pointer, frame []byte) { r.cache.Put(r.key(p), frame) }

// Offer gives a block that was written to the cache, which proves it when it is
// asked for.
func (r *Reader) Offer(p block.Pointer, frame []byte) { r.cache.Offer(r.key(p), frame) }

// Forget tells the cache that n blocks from p on were freed.
func (r *Reader) Forget(p block.Physical, n int) {
	r.bad.forget(p, n)
	for i := range n {
		r.cache.Forget(p + block.Physical(i))
	}
}

// View calls fn with the block, reading it from its device when it must. Whoever asks
// for a page that has a twin keeps it from being freed meanwhile.
func (r *Reader) View(p block.Pointer, fn func(frame []byte)) error {
	return r.view(p, fn, func(frame []byte) bool {
		_, err := r.set.FromTwin(p.Phys, p.Second().Phys, frame, proves(p))
		return err == nil
	})
}

// ViewBeside is View of a page that may be freed meanwhile, unless current returns
// true afterwards.
func (r *Reader) ViewBeside(p block.Pointer, fn func(frame []byte), current func() bool) error {
	return r.view(p, fn, func(frame []byte) bool {
		if r.set.Read(p.Second().Phys, frame) != nil || verify(p, frame) != nil {
			return false
		}
		r.bad.add(p, current)
		return true
	})
}

// view reads a block, from its twin by rescue if it must and there is one.
func (r *Reader) view(p block.Pointer, fn func(frame []byte), rescue func(frame []byte) bool) error {
	if r.ViewCached(p, fn) {
		return nil
	}
	b := r.take()
	defer r.give(b)
	b.add(0, p.Phys)
	frame := b.frame(0)
	err := r.set.Do(b.use)
	if err == nil {
		err = r.prove(p, frame)
	}
	if err != nil && p.Twin != 0 {
		if rescue(frame) {
			err = nil
		} else if errors.Is(err, block.ErrCorrupt) {
			r.set.NoteCorrupt(p.Phys)
		}
	}
	if err != nil {
		return err
	}
	r.Put(p, frame)
	fn(frame)
	return nil
}

// Prefetch brings blocks into the cache, many at a time. It is only a hint:
// what cannot be read will be noticed by whoever wants it.
func (r *Reader) Prefetch(ps []block.Pointer) {
	fetches := make([]Fetch, 0, len(ps))
	for _, p := range ps {
		if !p.IsHole() && !r.cache.Has(r.key(p)) {
			fetches = append(fetches, Fetch{Ptr: p})
		}
	}
	for chunk := range slices.Chunk(fetches, bounceBlocks) {
		_ = r.readChunk(chunk)
	}
}

// Fetch is one block wanted: Dst receives its bytes from Off on.
type Fetch struct {
	Ptr block.Pointer
	Off int
	Dst []byte
	Err error // result
}

// ReadAll carries out all fetches from the devices, neighbours in one request
// and the rest at once. Each has its own result; the error returned is the
// first of them.
func (r *Reader) ReadAll(fetches []Fetch) error {
	var first error
	for chunk := range slices.Chunk(fetches, bounceBlocks) {
		// A reader holds one buffer at a time, so that readers cannot wait for
		// each other in a circle. An error ends nothing: a fetch that was not
		// tried would look like one that succeeded.
		if err := r.readChunk(chunk); err != nil && first == nil {
			first = err
		}
	}
	return first
}

func (r *Reader) readChunk(fetches []Fetch) error {
	b := r.take()
	defer r.give(b)
	for i := range fetches {
		if i > 0 && fetches[i].Ptr.Phys == fetches[i-1].Ptr.Phys+1 {
			b.extend()
		} else {
			b.add(i, fetches[i].Ptr.Phys)
		}
	}
	_ = r.set.Do(b.use) // each IO carries its own error
	var first error
	for i, io := 0, 0; i < len(fetches); i++ {
		f := &fetches[i]
		if i > 0 && f.Ptr.Phys != fetches[i-1].Ptr.Phys+1 {
			io++
		}
		frame := b.frame(i)
		if planted.Has(planted.ReadErrorAsZeroes) && b.use[io].Err != nil {
			f.Err = nil
			clear(f.Dst)
			continue
		}
		if f.Err = b.use[io].Err; f.Err == nil {
			f.Err = r.prove(f.Ptr, frame)
		}
		if f.Err == nil {
			r.Put(f.Ptr, frame)
			copy(f.Dst, frame[f.Off:])
		} else if first == nil {
			first = f.Err
		}
	}
	return first
}

func (r *Reader) take() *bounce { return <-r.bufs }

func (r *Reader) give(b *bounce) {
	b.use = b.use[:0]
	r.bufs <- b
}

// prove verifies what was read for a pointer, and looks for another copy when it
// is wrong.
func (r *Reader) prove(p block.Pointer, frame []byte) error {
	err := verify(p, frame)
	if err != nil && r.set.ReadGood(p.Phys, frame, proves(p)) {
		return nil
	}
	if err != nil && p.Twin == 0 {
		r.set.NoteCorrupt(p.Phys)
	}
	return err
}

// proves returns what tells the bytes of a block from others.
func proves(p block.Pointer) func(frame []byte) bool {
	return func(frame []byte) bool { return ondisk.CRC(frame) == p.Sum }
}

func verify(p block.Pointer, frame []byte) error {
	if sum := ondisk.CRC(frame); sum != p.Sum && !planted.Has(planted.ChecksumUnverified) {
		return &block.CorruptError{What: "block", Where: p.String(), Why: fmt.Sprintf("checksum %08x instead of %08x", sum, p.Sum)}
	}
	return nil
}
