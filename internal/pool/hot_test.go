package pool

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/catalogue"
)

// places returns where a volume has its blocks, holes left out.
func (r *rig) places(name string) map[block.Logical]block.Physical {
	r.t.Helper()
	v, ok := r.catalogue.ByName(name)
	if !ok {
		r.t.Fatalf("no volume %s", name)
	}
	return r.placesFrom(v, 0)
}

// placesFrom is places from the leaf of a block on.
func (r *rig) placesFrom(v catalogue.Volume, from block.Logical) map[block.Logical]block.Physical {
	r.t.Helper()
	at := map[block.Logical]block.Physical{}
	var ptrs [256]block.Pointer
	for lba := from / 256 * 256; lba < block.Logical(v.Size/block.Size); lba += 256 {
		if err := r.bmap.Lookup(v.ID, lba, ptrs[:]); err != nil {
			r.t.Fatal(err)
		}
		for i, p := range ptrs {
			if !p.IsHole() {
				at[lba+block.Logical(i)] = p.Phys
			}
		}
	}
	return at
}

// isCheap reports whether a block lies in a cheap range.
func (r *rig) isCheap(p block.Physical) bool {
	set := r.space.AreCheap([]block.Physical{p})
	return set[0] != 0
}

// moveToFlash makes the ranges of 64 KiB cheap where some blocks of a volume lie, as the
// layer that moves them to flash does.
func (r *rig) moveToFlash(name string, hot func(lba block.Logical) bool) {
	r.t.Helper()
	for lba, p := range r.places(name) {
		if hot(lba) {
			r.space.SetCheap(p.Device(), p.Block()/16*16, 16, true)
		}
	}
}

// What is hot stays in cheap ranges, however often it is written and folded, and nothing
// else goes there before the pool is full; also where blocks are shared.
func TestHotStaysCheap(t *testing.T) {
	for seed := range uint64(few(4)) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			ctx := context.Background()
			rng := rand.New(rand.NewPCG(seed, 11))
			r := newRigWithLog(t, 1+int(seed%2), 64<<20, 8<<20)
			r.mustOpen()
			v := r.volume("v", 256<<20)
			if seed%2 == 1 {
				if err := r.SetSharing(ctx, "v", 4); err != nil {
					t.Fatal(err)
				}
			}
			holds := map[int64]byte{}
			kind := byte(0)
			put := func(b int64) {
				t.Helper()
				kind = kind%250 + 1
				if err := write(v, b*block.Size, unlike(b, kind)); err != nil {
					t.Fatal(err)
				}
				holds[b] = kind
			}
			// Every third of the first blocks will be hot.
			const blocks, every = 600, 3
			for b := range int64(blocks) {
				put(b)
			}
			if err := r.Fold(ctx); err != nil {
				t.Fatal(err)
			}
			hot := func(lba block.Logical) bool { return lba < blocks && lba%every == 0 }
			r.moveToFlash("v", func(lba block.Logical) bool { return lba < blocks/2 })
			for b := range int64(blocks/2 + 16) {
				// What is not hot makes room. So does what may lie in the last range.
				if !hot(block.Logical(b)) || b >= blocks/2 {
					if err := v.Trim(ctx, b*block.Size, block.Size, block.Tag{}); err != nil {
						t.Fatal(err)
					}
					delete(holds, b)
				}
			}
			if err := r.Fold(ctx); err != nil {
				t.Fatal(err)
			}
			cold := int64(1000)
			before := r.machine.Stats().Hot
			written := 0
			for round := range 40 {
				some := map[int64]bool{}
				for range 1 + rng.IntN(60) {
					some[rng.Int64N(blocks/2/every)*every] = true
				}
				for b := range some {
					put(b)
					written++
				}
				for range rng.IntN(40) {
					put(cold)
					cold += 1 + rng.Int64N(2)
				}
				put(blocks/2 + 16 + rng.Int64N(blocks/2-16)) // never was on flash
				var err error
				if rng.IntN(3) == 0 {
					err = r.Fold(ctx)
				} else {
					err = r.Pool.Commit(ctx)
				}
				if err != nil {
					t.Fatal(err)
				}
				for lba, p := range r.places("v") {
					if cheap := r.isCheap(p); cheap != (hot(lba) && lba < blocks/2) {
						t.Fatalf("round %d: block %d lies at %v, in a cheap range: %v", round, lba, p, cheap)
					}
				}
				if err := r.space.CheckFree(); err != nil {
					t.Fatal(err)
				}
			}
			if n := r.machine.Stats().Hot - before; n != uint64(written) {
				t.Errorf("%d of %d blocks found a cheap place", n, written)
			}
			if err := r.Fold(ctx); err != nil {
				t.Fatal(err)
			}
			r.space.SetCheap(0, 40<<20/block.Size, 24<<20/block.Size, true)
			r.fillsCheapLast(v, cold, holds)
			got := make([]byte, block.Size)
			for b, kind := range holds {
				if err := v.Read(ctx, got, b*block.Size); err != nil || string(got) != string(unlike(b, kind)) {
					t.Fatalf("block %d: %v", b, err)
				}
			}
			r.shut()
		})
	}
}

// fillsCheapLast fills a pool by writing to volume "v" from a block on, and takes note of
// that. Cold data take the room of cheap ranges last.
func (r *rig) fillsCheapLast(v block.Volume, cold int64, holds map[int64]byte) {
	r.t.Helper()
	const some = 100
	for full := false; !full; {
		first := cold
		for ; cold < first+some; cold++ {
			err := write(v, cold*block.Size, unlike(cold, 7))
			if full = errors.Is(err, block.ErrNoSpace); full {
				break
			}
			if err != nil {
				r.t.Fatal(err)
			}
			holds[cold] = 7
		}
		others := r.space.Usage().Free - r.space.FreeCheap()
		if err := r.Pool.Commit(context.Background()); err != nil {
			r.t.Fatal(err)
		}
		c, _ := r.catalogue.ByName("v")
		for lba, p := range r.placesFrom(c, block.Logical(first)) {
			if others > 2*some && lba >= block.Logical(first) && r.isCheap(p) {
				r.t.Fatalf("block %d lies at %v, in a cheap range, and %d others were free", lba, p, others)
			}
		}
	}
	if u := r.space.Usage(); r.space.FreeCheap() > u.Slop+some || u.Free-r.space.FreeCheap() > some {
		r.t.Errorf("%+v, and %d cheap blocks are free", u, r.space.FreeCheap())
	}
}

// unlike returns a block that is like no other of another number or kind.
func unlike(b int64, kind byte) []byte {
	p := make([]byte, block.Size)
	binary.LittleEndian.PutUint64(p, uint64(b)<<8|uint64(kind))
	p[8] = 1 // and not like one of zeroes
	return p
}

// What one point writes in a long run of blocks leaves flash, and the rest of the point
// does not.
func TestLongRunsAreNotHot(t *testing.T) {
	ctx := context.Background()
	r := newRigWithLog(t, 1, 128<<20, 16<<20)
	r.mustOpen()
	v := r.volume("v", 256<<20)
	fill := func(from, n int64) {
		t.Helper()
		for b := from; b < from+n; b++ {
			if err := write(v, b*block.Size, unlike(b, 1)); err != nil {
				t.Fatal(err)
			}
		}
	}
	fill(0, 600)
	if err := r.Fold(ctx); err != nil {
		t.Fatal(err)
	}
	r.moveToFlash("v", func(block.Logical) bool { return true })
	r.space.SetCheap(0, 112<<20/block.Size, 16<<20/block.Size, true) // room
	fill(0, 255)
	fill(300, 256)
	fill(598, 1)
	if err := r.Pool.Commit(ctx); err != nil {
		t.Fatal(err)
	}
	places := r.places("v")
	for lba, p := range places {
		if cheap := r.isCheap(p); cheap != (lba < 300 || lba >= 556) {
			t.Fatalf("block %d lies at %v, in a cheap range: %v", lba, p, cheap)
		}
	}
	for lba := block.Logical(1); lba < 255; lba++ {
		if p := places[lba-1] + 1; places[lba] != p && p.Block()%block.TrackBlocks != 0 {
			t.Fatalf("block %d lies at %v, and the one before at %v", lba, places[lba], places[lba-1])
		}
	}
	r.shut()
}

// A point that fails gives cheap blocks back like others, and the next attempt takes them.
func TestHotGivenBack(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, 48<<20)
	faults := r.faulty()
	r.mustOpen()
	v := r.volume("v", 256<<20)
	put := func(kind byte) {
		t.Helper()
		for b := range int64(100) {
			if err := write(v, 2*b*block.Size, unlike(b, kind)); err != nil {
				t.Fatal(err)
			}
		}
	}
	put(1)
	if err := r.Fold(ctx); err != nil {
		t.Fatal(err)
	}
	r.moveToFlash("v", func(block.Logical) bool { return true })
	r.space.SetCheap(0, 40<<20/block.Size, 4<<20/block.Size, true)
	for _, op := range []hpdi.Op{hpdi.OpWrite, hpdi.OpFlush} {
		put(2)
		free, cheap := r.space.Usage().Free, r.space.FreeCheap()
		faults[0].Add(blocktest.Rule{Op: op, Count: 1, Err: errMedium})
		if err := r.Pool.Commit(ctx); !errors.Is(err, errMedium) {
			t.Fatalf("%v: %v", op, err)
		}
		// After a write that has failed cheap ranges are left alone for a while.
		if got, want := r.space.CheapShunned(), op == hpdi.OpWrite; got != want {
			t.Fatalf("%v: cheap ranges are shunned: %v", op, got)
		}
		r.space.ShunCheap(false)
		if now := r.space.Usage().Free; now != free || r.space.FreeCheap() != cheap {
			t.Errorf("%v: %d blocks are free, %d of them cheap, and before %d and %d", op, now, r.space.FreeCheap(), free, cheap)
		}
		if err := r.Pool.Commit(ctx); err != nil {
			t.Fatal(err)
		}
		for lba, p := range r.places("v") {
			if !r.isCheap(p) {
				t.Fatalf("%v: block %d lies at %v", op, lba, p)
			}
		}
	}
	r.shut()
}
