package dirty

import (
	"math/rand/v2"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/oplog"
)

// BenchmarkPublish measures what publishing one random block costs, its part of
// dropping the generation included: an operation is one block.
func BenchmarkPublish(b *testing.B) {
	const extents = 64 << 10
	r := newRig(b, extents)
	rng := rand.New(rand.NewPCG(1, 1))
	recs := make([]oplog.Record, 1)
	var ext []oplog.Extent
	b.ReportAllocs()
	for i := 0; b.Loop(); i++ {
		if i%(extents/generations) == 0 {
			r.drain()
		}
		var ok bool
		var err error
		if ext, ok, err = r.TryAcquire(1, ext[:0]); !ok || err != nil {
			b.Fatal(ok, err)
		}
		recs[0] = oplog.Record{Kind: oplog.KindWrite, Volume: 1, LBA: block.Logical(rng.Uint64N(1 << 15)), Count: 1, First: ext[0]}
		if err := r.Publish(recs, nil); err != nil {
			b.Fatal(err)
		}
	}
}

// BenchmarkRead looks one block up, half of which are dirty, in as many
// generations as there can be.
func BenchmarkRead(b *testing.B) {
	const extents = 32 << 10
	r := newRig(b, extents)
	r.Freeze()
	rng := rand.New(rand.NewPCG(1, 1))
	r.write(1, 0, 1, 1)
	for i := range extents - extents/generations {
		r.write(1, block.Logical(rng.Uint64N(1<<15)), 1, uint64(i))
		if len(r.frozen) == 0 {
			r.Freeze()
		}
	}
	b.Logf("%d generations", len(r.frozen)+1)
	found := func(int, []byte, uint32) {}
	b.ReportAllocs()
	for b.Loop() {
		r.Read(1, block.Logical(rng.Uint64N(1<<16)), 1, found)
	}
}

// BenchmarkRestore rebuilds the index of a 2 GiB log with a quarter of it in
// records of single random blocks, as a takeover does.
func BenchmarkRestore(b *testing.B) {
	const extents = 512 << 10
	r := newRig(b, extents)
	rng := rand.New(rand.NewPCG(1, 1))
	for range extents / 4 {
		ext, _ := r.log.Alloc(1, nil)
		rec := oplog.Record{Kind: oplog.KindWrite, Volume: 1, LBA: block.Logical(rng.Uint64N(1 << 20)), Count: 1, First: ext[0]}
		if _, ok := r.log.Publish([]oplog.Record{rec}); !ok {
			b.Fatal("ring full")
		}
	}
	log, _ := r.attach()
	b.ReportAllocs()
	for b.Loop() {
		s := r.over(log)
		if err := s.Restore(log.Tail()); err != nil {
			b.Fatal(err)
		}
		r.space.Unreserve(s.active.reserved)
		s.active.free()
	}
}
