package pool

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/dedup"
	"github.com/pollux-storage/pollux/internal/region"
)

// foreign is a kind of section that this program does not use.
const foreign region.SectionKind = 99

// fillRegion leaves no room for another section in the region.
func (r *rig) fillRegion() {
	r.t.Helper()
	for n := 0; ; n++ {
		if _, _, err := r.Pool.region.AddSection(foreign, 1); err != nil {
			if n == 0 {
				r.t.Fatal(err)
			}
			return
		}
	}
}

// changeRegion changes the region of a guest that is dead.
func (r *rig) changeRegion(change func(q *region.Region)) {
	r.t.Helper()
	q, err := region.Open(r.region, false)
	if err != nil {
		r.t.Fatal(err)
	}
	change(q)
	if err := q.Close(); err != nil {
		r.t.Fatal(err)
	}
}

// dropSections takes all sections of a kind out of a region.
func (r *rig) dropSections(kind region.SectionKind) (n int) {
	r.t.Helper()
	r.changeRegion(func(q *region.Region) {
		for _, s := range q.Sections(kind) {
			n++
			if err := q.RemoveSection(s); err != nil {
				r.t.Fatal(err)
			}
		}
	})
	return n
}

// openBy opens the pool for a guest, with what is loaded later, and returns what it is
// told of the index and how the index is.
func (r *rig) openBy(guest string) (index IndexProgress, told []string) {
	r.t.Helper()
	o := r.options()
	o.Owner = guest
	o.Tell = keep(TellIndex, &told)
	if err := r.openWith(o); err != nil {
		r.t.Fatal(err)
	}
	s, err := r.Sharing(context.Background())
	if err != nil {
		r.t.Fatal(err)
	}
	if s.Index != nil {
		index = *s.Index
	}
	return index, told
}

// expectShared writes what is stored once more, and none of it may be written.
func (r *rig) expectShared(what string, v block.Volume, lba int64, data []byte) {
	r.t.Helper()
	if n := uint64(len(data) / block.Size); n > 0 {
		if written, shared := r.put(v, lba, data); written != 0 || shared != n {
			r.t.Errorf("%s: %d blocks were written and %d shared of %d", what, written, shared, n)
		}
	}
}

// Whoever opens a pool after its guest has died finds at once what is stored, however far
// the index was, and goes on with it where it was.
func TestIndexOutlivesGuest(t *testing.T) {
	for _, how := range []string{"committed", "folded", "in a round", "complete", "released"} {
		t.Run(how, func(t *testing.T) {
			r, v := sharingRig(t, 8)
			data, more := content(1, 600), content(2, 100)
			r.put(v, 0, data)
			if how != "committed" {
				r.fold()
			}
			switch how {
			case "in a round":
				r.indexStep()
				r.indexStep()
			case "complete":
				if err := r.IndexAll(context.Background()); err != nil {
					t.Fatal(err)
				}
			}
			r.put(v, 2000, more) // after the last fold
			var was IndexProgress
			if s, err := r.Sharing(context.Background()); err == nil {
				was = *s.Index
			}
			if how == "released" {
				r.stop()
				if err := r.Release(context.Background()); err != nil {
					t.Fatal(err)
				}
				r.reopen()
			} else {
				r.die()
			}
			now, told := r.openBy("b")
			if len(told) > 0 || !now.Kept || now.IndexStats != was.IndexStats || now.Done != was.Done {
				t.Errorf("%+v became %+v: %q", was, now, told)
			}
			v, _ = r.Volume("v")
			r.expectShared("folded before", v, 4000, data)
			r.expectShared("in the journal", v, 6000, more)
			if err := r.IndexAll(context.Background()); err != nil {
				t.Fatal(err)
			}
			if s, err := r.Sharing(context.Background()); err != nil || s.Index.Entries != 700 || s.Index.Done != s.Index.Pages {
				t.Errorf("%+v, %v", s.Index, err)
			}
			r.die()
			_, told = r.openBy("a")
			v, _ = r.Volume("v")
			r.expectShared("once more", v, 8000, data)
			if n := len(r.Pool.region.Sections(region.SectionIndex)); n != 1 || len(told) > 0 {
				t.Errorf("%d sections, %q", n, told)
			}
			r.shut()
			if _, err := os.Stat(r.region); !errors.Is(err, os.ErrNotExist) {
				t.Errorf("a pool that was closed leaves a region: %v", err)
			}
		})
	}
}

// A region of a guest that kept no index in it is adopted, and gets one. One that was made
// with another secret, or is of no use otherwise, is made anew.
func TestIndexMadeAnew(t *testing.T) {
	for _, what := range []string{"none", "other secret", "damaged", "half made"} {
		r, v := sharingRig(t, 8)
		r.byRecord = false // the test looks at what is in the region
		data := content(1, 300)
		r.put(v, 0, data)
		r.fold()
		r.die()
		switch what {
		case "none":
			if n := r.dropSections(region.SectionIndex); n != 1 {
				t.Fatalf("%d sections", n)
			}
			var st unix.Stat_t
			if err := unix.Stat(r.region, &st); err != nil || st.Blocks*512 > 20<<20 {
				t.Fatalf("%d bytes, %v", st.Blocks*512, err)
			}
		case "other secret":
			r.fingerprint = func(data []byte) dedup.Fingerprint { return dedup.Secret(12).Fingerprint(data) }
		default:
			r.changeRegion(func(q *region.Region) {
				mem, err := q.MapSection(q.Sections(region.SectionIndex)[0])
				if err != nil {
					t.Fatal(err)
				}
				clear(mem[:dedup.FactsBytes])
				if what == "damaged" {
					copy(mem, strings.Repeat("x", dedup.FactsBytes))
				}
			})
		}
		now, told := r.openBy("b")
		if (len(told) == 1) != (what != "none") || !now.Kept || now.Done != 0 {
			t.Errorf("%s: %+v, %q", what, now, told)
		}
		if n := len(r.Pool.region.Sections(region.SectionIndex)); n != 1 {
			t.Errorf("%s: %d sections", what, n)
		}
		if err := r.IndexAll(context.Background()); err != nil {
			t.Fatal(err)
		}
		v, _ = r.Volume("v")
		if what != "other secret" { // those that are stored are of the first
			r.expectShared(what, v, 1000, data)
		}
		r.shut()
	}
}

// Where the region has no room the index lies in the guest's own memory, says so, and
// moves to the region with the next guest that finds room.
func TestIndexWithoutRoomInRegion(t *testing.T) {
	r := newRigWithLog(t, 1, testSize, 16<<20)
	r.byRecord = false // the test looks at what is in the region
	if now, told := r.openBy("a"); now != (IndexProgress{}) || len(told) > 0 {
		t.Errorf("before anything is shared: %+v, %q", now, told)
	}
	r.volume("v", 64<<20)
	r.fillRegion()
	r.die()
	var told []string
	o := r.options()
	o.Tell = keep(TellIndex, &told)
	if err := r.openWith(o); err != nil {
		t.Fatal(err)
	}
	if err := r.SetSharing(context.Background(), "v", 8); err != nil {
		t.Fatal(err)
	}
	v, _ := r.Volume("v")
	data := content(1, 300)
	r.put(v, 0, data)
	r.expectShared("in its own memory", v, 1000, data)
	s, err := r.Sharing(context.Background())
	if err != nil || s.Index.Kept || !strings.Contains(s.Index.Why, "sections in a region") || s.IndexOwn != s.IndexBytes || s.IndexOwn == 0 {
		t.Errorf("%+v, %v", s.Index, err)
	}
	if len(told) != 1 || !strings.Contains(told[0], "will not outlive this guest") {
		t.Errorf("%q", told)
	}
	r.setIndex(128 << 10) // both of them
	if st := r.Stats().Sharing; st.IndexOwn != s.IndexBytes+128<<10 {
		t.Errorf("%+v", st)
	}
	r.die()
	r.dropSections(foreign)
	now, told := r.openBy("a")
	if !now.Kept || now.Why != "" || len(told) > 0 || r.Stats().Sharing.IndexOwn != 0 {
		t.Errorf("%+v, %q", now, told)
	}
	if err := r.IndexAll(context.Background()); err != nil {
		t.Fatal(err)
	}
	v, _ = r.Volume("v")
	r.expectShared("in the region", v, 2000, data)
	r.shut()
}

// A guest may die at any step of a change of the size: the next one finds what is stored
// at once, and ends with an index of the size that is set, and no other.
func TestIndexResizeOutlivesGuest(t *testing.T) {
	for step := 0; ; step++ {
		r, v := sharingRig(t, 8)
		data := content(1, 600)
		r.put(v, 0, data)
		r.fold()
		if err := r.IndexAll(context.Background()); err != nil {
			t.Fatal(err)
		}
		r.setIndex(128 << 10)
		for range step {
			r.indexStep()
		}
		ended := r.machine.Next == nil
		half := step%2 == 1 && r.machine.Next != nil
		if half { // between the last two steps of the change
			next := r.machine.Next
			for next.Begin(); !next.Round.Done; {
				r.machine.IndexFrom(next, 1)
			}
			next.Successor = false
			next.Save()
		}
		r.die()
		now, told := r.openBy("b")
		if len(told) > 0 || now.Done != now.Pages || ((half || ended) != (now.Bytes == 128<<10)) {
			t.Errorf("step %d: %+v, %q", step, now, told)
		}
		v, _ = r.Volume("v")
		r.expectShared(fmt.Sprint("step ", step), v, 1000, data)
		if err := r.IndexAll(context.Background()); err != nil {
			t.Fatal(err)
		}
		if s := r.Pool.region.Sections(region.SectionIndex); len(s) != 1 || r.machine.Index.Stats().Bytes != 128<<10 || s[0].Length != r.machine.Index.Stats().Bytes && s[0].Length != 2<<20 {
			t.Errorf("step %d: %+v", step, s)
		}
		r.expectShared(fmt.Sprint("after step ", step), v, 2000, data)
		r.shut()
		if ended {
			return
		}
	}
}

// scribble writes nonsense over a part of what a region has for indexes: bytes, or entries
// that look good and lead anywhere.
func scribble(rng *rand.Rand, mem []byte) {
	from := 0
	if rng.IntN(4) > 0 {
		from = dedup.FactsBytes // the entries alone, so that they are believed
	}
	from += rng.IntN(len(mem)-from) &^ 7
	n := min(len(mem)-from, 8<<rng.IntN(18))
	part := mem[from:][:n]
	if rng.IntN(3) == 0 {
		part = mem[dedup.FactsBytes:]
	}
	kind := rng.IntN(4)
	for i := 0; i < len(part); i += 8 {
		e := binary.LittleEndian.Uint64(part[i:])
		switch {
		case kind == 0:
			e = rng.Uint64()
		case kind == 1:
			e = 0
		case e == 0:
			continue
		case kind == 2: // anywhere in the pool
			e = e&^(1<<46-1) | uint64(block.At(0, rng.Uint64N(testSize/block.Size+300)))
		default:
			e = e&^(1<<46-1) | rng.Uint64N(1<<46)
		}
		binary.LittleEndian.PutUint64(part[i:], e)
	}
}

// Whatever happens to the memory of an index while no guest lives costs savings alone:
// what is read is what was written, counts are right, and what is written from then on is
// shared.
func TestIndexChaos(t *testing.T) {
	seeds := few(16)
	if soak {
		seeds = 400
	}
	for seed := range uint64(seeds) {
		rng := rand.New(rand.NewPCG(seed, 23))
		r := newRig(t, 1+int(seed%2), testSize)
		r.repeats = true
		r.indexBytes = dedup.MinIndex << (seed % 3)
		if seed%4 == 3 { // nearly everything seems to be stored
			r.fingerprint = func(data []byte) dedup.Fingerprint {
				return dedup.Fingerprint(1 + dedup.Secret(1).Fingerprint(data)%16)
			}
		}
		r.mustOpen()
		v := r.sharingVolume("v", 3<<20, 1+int(seed%3))
		r.sharingVolume("w", 64<<20, 8)
		if seed%3 == 1 {
			r.addMemory(8 << 20)
		}
		m := blocktest.NewModel(seed)
		for round := range 5 {
			if err := exercise(r, v, m, rng, 40); err != nil {
				t.Fatalf("seed %d round %d: %v", seed, round, err)
			}
			if rng.IntN(3) == 0 {
				r.setIndex(dedup.MinIndex << rng.IntN(3))
			}
			for range rng.IntN(5) {
				r.indexStep()
			}
			r.die()
			r.changeRegion(func(q *region.Region) {
				for _, s := range q.Sections(region.SectionIndex) {
					mem, err := q.MapSection(s)
					if err != nil {
						t.Fatal(err)
					}
					for range 1 + rng.IntN(4) {
						scribble(rng, mem)
					}
				}
			})
			v = r.comesBack(m, m.Acked(), fmt.Sprintf("seed %d round %d", seed, round))
			w, _ := r.Volume("w")
			data := content(seed<<8|uint64(round), 64)
			at := int64(round) * 1000
			r.put(w, at, data)
			if _, shared := r.put(w, at+500, data); shared == 0 && seed%4 != 3 {
				t.Errorf("seed %d round %d: nothing is shared any more", seed, round)
			}
			r.expect(w, at, data)
			r.expect(w, at+500, data)
		}
		if r.shut(); t.Failed() {
			t.Fatalf("seed %d", seed)
		}
	}
}
