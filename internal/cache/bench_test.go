package cache

import (
	"math/rand/v2"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

// fullCache returns a cache of 1 GiB that holds as many blocks as it has room
// for, put in the order of the device, as consistency points do.
func fullCache(b *testing.B) (c *Cache, n int) {
	mem, err := hpdi.AllocPrivate(1 << 30)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = hpdi.Free(mem) })
	c = New(mem)
	n = c.Stats().Frames * 9 / 10
	page := make([]byte, block.Size)
	for i := range n {
		c.Put(key(i), page)
	}
	b.ReportAllocs()
	b.ResetTimer()
	return c, n
}

// A request of 128 KiB that the cache answers: its blocks lie side by side on the
// device.
func BenchmarkGetRun(b *testing.B) {
	c, n := fullCache(b)
	buf, rng := make([]byte, block.Size), rand.New(rand.NewPCG(1, 1))
	for i := 0; b.Loop(); i++ {
		at := rng.IntN(n - 32)
		for j := range 32 {
			c.Get(key(at+j), 0, buf[:8])
		}
	}
}

// A block of a random write in a consistency point: a version anywhere is
// forgotten, and the new one put beside the one before it.
func BenchmarkReplace(b *testing.B) {
	c, n := fullCache(b)
	page, rng := make([]byte, block.Size), rand.New(rand.NewPCG(1, 1))
	for i := 0; b.Loop(); i++ {
		c.Forget(key(rng.IntN(n)).Phys)
		c.Put(key(n+i), page)
	}
}
