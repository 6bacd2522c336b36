package oplog

import (
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

func benchmarkPublish(b *testing.B, blocks int) {
	const extents = 16384
	l := format(b, section(b, extents), extents, 0)
	ext := make([]Extent, 0, blocks)
	recs := make([]Record, 0, blocks)
	b.ReportAllocs()
	for b.Loop() {
		var ok bool
		if ext, ok = l.Alloc(blocks, ext[:0]); !ok {
			l.Release(l.Head())
			ext, _ = l.Alloc(blocks, ext[:0])
		}
		recs = recs[:0]
		for i := 0; i < blocks; i += MaxRecordBlocks {
			recs = append(recs, Record{
				Volume: 1, LBA: block.Logical(i), Kind: KindWrite,
				Count: uint64(min(MaxRecordBlocks, blocks-i)), First: ext[i],
			})
		}
		if _, ok := l.Publish(recs); !ok {
			b.Fatal("ring full")
		}
	}
}

// BenchmarkPublish1 and 32: allocate and publish so many blocks, without
// filling them or computing their checksums; the release is included.
func BenchmarkPublish1(b *testing.B)  { benchmarkPublish(b, 1) }
func BenchmarkPublish32(b *testing.B) { benchmarkPublish(b, 32) }

// BenchmarkAttach opens the log of a 2 GiB region as it is after a consistency
// point that was under way: a quarter of its extents in records of one block, on
// the second lap of the ring, so that every slot holds some record. Replay is what
// the dirty index reads afterwards.
func BenchmarkAttach(b *testing.B) {
	const extents = 2 << 30 / block.Size
	mem := section(b, extents)
	l := format(b, mem, extents, 0)
	nops := make([]Record, 1024)
	for i := range nops {
		nops[i].Kind = KindNop
	}
	for l.Head() < block.Seq(l.Slots())*3/2 {
		mustPublish(b, l, nops)
		l.Release(l.Head())
	}
	for range extents / 4 {
		ext, _ := l.Alloc(1, nil)
		mustPublish(b, l, []Record{{Volume: 1, Kind: KindWrite, Count: 1, First: ext[0]}})
	}
	b.Run("attach", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if _, err := Attach(mem); err != nil {
				b.Fatal(err)
			}
		}
	})
	l, err := Attach(mem)
	if err != nil {
		b.Fatal(err)
	}
	b.Run("replay", func(b *testing.B) {
		b.ReportAllocs()
		for b.Loop() {
			if err := l.Replay(l.Tail(), l.Head(), func(*Record) error { return nil }); err != nil {
				b.Fatal(err)
			}
		}
	})
}

// BenchmarkAllocHuge takes 32 MiB out of an arena in which only half of each
// run of eight is free.
func BenchmarkAllocHuge(b *testing.B) {
	const extents, n = 65536, 8192
	l := format(b, section(b, extents), extents, 0)
	all, _ := l.Alloc(extents, nil)
	for i := 0; i < extents; i += 8 {
		l.Free(all[i : i+4])
	}
	ext := make([]Extent, 0, n)
	b.ReportAllocs()
	for b.Loop() {
		ext, _ = l.Alloc(n, ext[:0])
		l.Free(ext)
	}
}

// BenchmarkAppend flushes one block after the other to a device in memory.
func BenchmarkAppend(b *testing.B) {
	const extents = 4096
	l := format(b, section(b, extents), extents, 0)
	q := queue(b, blocktest.NewCrash(64<<20, 1))
	d := NewDisk(q, testArea(3*extents))
	defer d.Close()
	d.Reset(1, 1)
	var ext []Extent
	recs := make([]Record, 1)
	b.ReportAllocs()
	for b.Loop() {
		var ok bool
		if ext, ok = l.Alloc(1, ext[:0]); !ok {
			d.Committed(l.Head(), d.Position(l.Head()))
			l.Release(l.Head())
			ext, _ = l.Alloc(1, ext[:0])
		}
		recs[0] = Record{Volume: 1, Kind: KindWrite, Count: 1, First: ext[0]}
		l.Publish(recs)
		if err := d.Append(l, l.Head()-1, l.Head()); err != nil {
			b.Fatal(err)
		}
	}
}
