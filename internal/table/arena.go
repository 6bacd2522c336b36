package table

import (
	"runtime"
	"unsafe"

	"github.com/pollux-storage/pollux/hpdi"
)

// chunkBytes is how much memory an arena takes at a time. It is touched, and so
// costs anything, only where it is used.
const chunkBytes = 1 << 20

// arena hands out zeroed memory outside the Go heap. All of it is given back at
// once.
type arena struct {
	chunks []*chunk
	rest   []byte // of the last one
}

type chunk struct {
	mem     []byte
	cleanup runtime.Cleanup
}

// round rounds a size up to whole lines of the processor's cache.
func round(size uintptr) uintptr { return (size + 63) &^ 63 }

// take returns size bytes, aligned to a line of the processor's cache. That
// the host has no memory left ends the program, as it does for memory of the
// heap.
func (a *arena) take(size uintptr) unsafe.Pointer {
	size = round(size)
	a.reserve(size)
	p := unsafe.Pointer(unsafe.SliceData(a.rest))
	a.rest = a.rest[size:]
	return p
}

// reserve makes the next size bytes come from one chunk. One of 2 MiB and more is on
// huge pages where the host grants them, which are touched much faster.
func (a *arena) reserve(size uintptr) {
	if uintptr(len(a.rest)) < size {
		a.rest = a.more(int(size))
	}
}

func (a *arena) more(size int) []byte {
	mem, err := hpdi.AllocPrivate(max(chunkBytes, size))
	if err != nil {
		panic("table: " + err.Error())
	}
	c := &chunk{mem: mem}
	c.cleanup = runtime.AddCleanup(c, release, mem)
	a.chunks = append(a.chunks, c)
	return mem
}

func release(mem []byte) { _ = hpdi.Free(mem) } // only fails for memory that is not ours

func (a *arena) bytes() (n int64) {
	for _, c := range a.chunks {
		n += int64(len(c.mem))
	}
	return n
}

func (a *arena) free() {
	for _, c := range a.chunks {
		c.cleanup.Stop()
		release(c.mem)
	}
	*a = arena{}
}
