package cp

import (
	"bytes"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"os"
	"slices"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

// keptRig is a journal that no device has, and the copy of it in memory.
type keptRig struct {
	j   journal
	mem []byte
	raw [][]byte // of the records that were put
}

func newKept(ring, area int, from JournalPos) *keptRig {
	r := &keptRig{mem: make([]byte, keptHead+ring)}
	r.j = journal{pool: testPool, start: 256, size: uint64(area), tail: from.Offset, next: from}
	k := &KeptJournal{keptFrom: keptFrom{pool: testPool, epoch: 7, start: 256, size: uint64(area), from: from.Offset}, mem: r.mem, ring: r.mem[keptHead:], end: from}
	k.save()
	r.j.kept = k
	return r
}

// put puts the next record, one of so many mappings.
func (r *keptRig) put(t testing.TB, mappings int) {
	t.Helper()
	rec := &record{Epoch: 7, Type: typeCommit, Commit: commit{CP: block.CP(r.j.next.Number), Log: 5}}
	for i := range mappings {
		rec.Commit.Runs = append(rec.Commit.Runs, mapRun{Volume: 1, LBA: block.Logical(i), At: block.At(0, uint64(3000+i)), Sums: []uint32{uint32(i)}})
	}
	buf, offset, err := r.j.prepare(rec)
	if err != nil {
		t.Fatal(err)
	}
	f, err := openFrame(buf, testPool)
	if err != nil {
		t.Fatal(err)
	}
	before := r.j.next
	f.sum, f.offset = ondisk.CRC(buf), offset
	r.j.next = f.after()
	r.j.kept.put(before, offset, buf, r.j.next)
	r.raw = append(r.raw, buf)
}

// adopted returns what whoever comes next finds.
func (r *keptRig) adopted(t testing.TB, pos JournalPos) []frame {
	t.Helper()
	k, err := AdoptJournal(r.mem, testPool, 256, r.j.size/block.Size)
	if err != nil {
		t.Fatal(err)
	}
	return k.frames(&r.j, pos)
}

// Records go round in the area and in the memory, each of another length, and what a fold
// has given up makes room. Whoever comes next finds all that fit.
func TestKeptJournalGoesRound(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 1))
	from := JournalPos{Offset: 8 * block.Size, Number: 1}
	r := newKept(14*block.Size, 40*block.Size, from)
	positions := []JournalPos{from}
	wraps, fulls := 0, 0
	for step := range 400 {
		r.put(t, 1+rng.IntN(600))
		positions = append(positions, r.j.next)
		if at := positions[len(positions)-2].Offset % (14 * block.Size); at+uint64(len(r.raw[len(r.raw)-1])) > 14*block.Size {
			wraps++
		}
		if r.j.kept.full {
			fulls++
		}
		got := r.adopted(t, positions[0])
		fit := 0
		for fit < len(r.raw) && positions[fit+1].Offset-positions[0].Offset <= r.j.kept.end.Offset-positions[0].Offset {
			fit++
		}
		if len(got) != fit || !r.j.kept.full && fit != len(r.raw) {
			t.Fatalf("seed %d step %d: %d records of %d, %d of them fit", seed, step, len(got), len(r.raw), fit)
		}
		for i := range got {
			if !bytes.Equal(got[i].raw, r.raw[i]) || got[i].offset+uint64(got[i].n) != positions[i+1].Offset {
				t.Fatalf("seed %d step %d: record %d is another one", seed, step, i)
			}
		}
		// A guest that died between a fold and the state of the memory.
		if skip := rng.IntN(len(positions)); len(got) > skip && len(r.adopted(t, positions[skip])) != len(got)-skip {
			t.Fatalf("seed %d step %d: from record %d on", seed, step, skip)
		}
		if r.j.kept.full || r.j.used() > r.j.size/2 || rng.IntN(6) == 0 {
			n := rng.IntN(len(positions))
			if r.j.kept.full || r.j.used() > r.j.size/2 {
				n = len(positions) - 1
			}
			positions, r.raw = slices.Clone(positions[n:]), slices.Clone(r.raw[n:])
			r.j.tail = positions[0].Offset
			r.j.kept.folded(positions[0])
		}
	}
	if wraps < 10 || fulls < 3 {
		t.Errorf("seed %d: %d records wrapped, %d did not fit", seed, wraps, fulls)
	}
}

// What was left for another pool or journal, by another version, or by nobody, is refused.
func TestKeptJournalRefused(t *testing.T) {
	r := newKept(8*block.Size, 40*block.Size, JournalPos{Number: 1})
	r.put(t, 3)
	if _, err := AdoptJournal(r.mem, block.PoolID{9}, 256, 40); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("another pool: %v", err)
	}
	if _, err := AdoptJournal(r.mem, testPool, 257, 40); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("another place: %v", err)
	}
	if _, err := AdoptJournal(r.mem, testPool, 256, 41); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("another size: %v", err)
	}
	if _, err := AdoptJournal(r.mem[:keptHead+4*block.Size], testPool, 256, 40); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("memory that was cut off: %v", err)
	}
	if _, err := AdoptJournal(make([]byte, 64<<10), testPool, 256, 40); err == nil {
		t.Error("memory that nobody has used was adopted")
	}
	// Either copy of the state does, and the newer one counts.
	for at := range 2 * keptLen {
		mem := bytes.Clone(r.mem)
		mem[at] ^= 1
		k, err := AdoptJournal(mem, testPool, 256, 40)
		if err != nil {
			t.Fatalf("byte %d: %v", at, err)
		}
		if n := len(k.frames(&r.j, JournalPos{Number: 1})); n > 1 {
			t.Errorf("byte %d: %d records", at, n)
		}
	}
}

func TestKeptJournalGolden(t *testing.T) {
	s := keptState{keptFrom: keptFrom{pool: testPool, epoch: 7, generation: 3, start: 256, size: 16 << 20, from: 40 << 12}, end: 60 << 12, ring: 6 << 20}
	var p [keptLen]byte
	s.encode(p[:])
	const path = "testdata/kept.hex"
	got := hex.Dump(p[:])
	if *update {
		if err := os.WriteFile(path, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(path)
	if err != nil || got != string(want) {
		t.Errorf("%v, the state is\n%s", err, got)
	}
	var back keptState
	if err := back.decode(p[:], 6<<20); err != nil || back != s {
		t.Errorf("%+v, %v", back, err)
	}
}

// Whatever the memory holds: what is found is a beginning of what was put.
func FuzzKeptJournal(f *testing.F) {
	f.Add(uint16(0), []byte{1}, uint16(0))
	f.Add(uint16(80), []byte{255, 255, 255, 255, 255, 255, 255, 255}, uint16(128))
	f.Add(uint16(keptHead), []byte("PLXjrnal"), uint16(4096))
	f.Add(uint16(keptHead+12), []byte{0xff, 0xff, 0xff, 0x0f}, uint16(0))
	f.Fuzz(func(t *testing.T, at uint16, bits []byte, also uint16) {
		from := JournalPos{Offset: 20 * block.Size, Number: 5}
		r := newKept(10*block.Size, 32*block.Size, from)
		for _, n := range []int{1, 300, 40, 2, 500} {
			r.put(t, n)
		}
		for _, at := range []uint16{at, also} {
			for i, b := range bits {
				if n := int(at) + i; n < len(r.mem) {
					r.mem[n] ^= b
				}
			}
		}
		look := func(JournalRecord, []byte) error { return nil }
		_, _ = InspectKept(r.mem, look) // must not fail otherwise than by an error
		_, _ = InspectKept(bits, look)
		k, err := AdoptJournal(r.mem, testPool, 256, 32)
		if err != nil {
			return
		}
		for i, f := range k.frames(&r.j, from) {
			if i >= len(r.raw) || !bytes.Equal(f.raw, r.raw[i]) {
				t.Fatalf("record %d is none of those that were put", i)
			}
		}
	})
}
