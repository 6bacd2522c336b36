package hpditest

import (
	"math/rand/v2"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
)

// Bench measures reads or writes of size bytes at random multiples of size
// with depth of them in flight. An iteration is one request. It reports
// allocations, of which there should be none.
func Bench(b *testing.B, d hpdi.Device, op hpdi.Op, size, depth int) {
	b.Helper()
	q := newQueue(b, d, depth)
	defer closeQueue(b, q)
	mem := alloc(b, depth*size)
	for i := range mem {
		mem[i] = byte(i * 7)
	}
	slots := d.Info().Size / int64(size)
	rng := rand.New(rand.NewPCG(1, 2))
	ready := make([]*hpdi.Request, depth)
	for i := range ready {
		ready[i] = &hpdi.Request{Op: op, Vec: [][]byte{mem[i*size : (i+1)*size]}}
	}
	done := make([]*hpdi.Request, 0, depth)
	b.SetBytes(int64(size))
	b.ReportAllocs()
	b.ResetTimer()
	for left, flying := b.N, 0; left > 0 || flying > 0; {
		n := min(left, len(ready))
		next := ready[len(ready)-n:]
		for _, r := range next {
			r.Offset = rng.Int64N(slots) * int64(size)
		}
		if err := q.Submit(next...); err != nil {
			b.Fatal(err)
		}
		ready = ready[:len(ready)-n]
		left -= n
		flying += n
		var err error
		if done, err = q.Wait(min(1, flying), done[:0]); err != nil {
			b.Fatal(err)
		}
		for _, r := range done {
			if r.Err != nil {
				b.Fatal(r.Err)
			}
		}
		flying -= len(done)
		ready = append(ready, done...)
	}
}
