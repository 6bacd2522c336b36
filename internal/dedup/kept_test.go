package dedup

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

// keptMemory returns memory for an index of so many bytes.
func keptMemory(t testing.TB, n int) Memory {
	t.Helper()
	mem, err := hpdi.AllocPrivate(n)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = hpdi.Free(mem) })
	return Memory{Bytes: mem, Pool: block.PoolID{1}, Check: 7, Free: func() error { return nil }}
}

func newKept(t testing.TB, m Memory, bytes int64) *Index {
	t.Helper()
	x, err := NewIndexIn(m, bytes)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

func adopt(t testing.TB, m Memory) *Index {
	t.Helper()
	x, err := AdoptIndex(m)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// counted counts the entries of an index, and proves what it says of itself.
func counted(t testing.TB, x *Index) {
	t.Helper()
	x.Count(len(x.buckets))
	if x.Counting() {
		t.Fatal("it is still to be counted")
	}
	if err := x.check(); err != nil {
		t.Fatal(err)
	}
}

// An index that is adopted finds what the one before did at once, and knows how many
// entries it has when they were counted.
func TestAdoptIndex(t *testing.T) {
	m := keptMemory(t, 1<<20)
	x := newKept(t, m, 1<<20)
	r := rand.New(rand.NewPCG(1, 2))
	prints := make([]Fingerprint, 100_000)
	put := func(x *Index, from, to int) {
		for i := from; i < to; i++ {
			prints[i] = Fingerprint(r.Uint64())
			x.Put(prints[i], block.At(1, uint64(i)))
		}
	}
	missing := func(x *Index, n int) (missing int) {
		for i, f := range prints[:n] {
			if !x.has(f, block.At(1, uint64(i))) {
				missing++
			}
		}
		return missing
	}
	put(x, 0, 60_000)
	x.Whole, x.Order, x.Round = 6, 3, Round{Begun: true, Done: true, Place: Place{2, 1 << 30}}
	x.Save()
	put(x, 60_000, 60_100) // which nobody has saved
	if x.Kept() != 1<<20 || x.Counting() {
		t.Error("it is not kept, or would have to be counted")
	}
	if err := x.check(); err != nil {
		t.Fatal(err)
	}
	if err := x.Close(); err != nil {
		t.Fatal(err)
	}

	y := adopt(t, m)
	if n := missing(y, 60_100); n > 0 {
		t.Errorf("%d are missing", n)
	}
	if y.Whole != 6 || y.Order != 3 || y.Round != x.Round || y.Successor || !y.Counting() || y.Stats().Entries != 60_000 || y.Full() {
		t.Errorf("%+v", y.Stats())
	}
	// What happens before all are counted is counted, too.
	put(y, 60_100, 60_500)
	for i := range 50 {
		y.Delete(prints[i], block.At(1, uint64(i)))
	}
	if y.Count(1000); !y.Counting() {
		t.Error("it is counted already")
	}
	put(y, 60_500, 61_000)
	counted(t, y)
	if n := y.Stats().Entries; n != 61_000-50 || missing(y, 61_000) != 50 {
		t.Errorf("%d entries, %d are missing", n, missing(y, 61_000))
	}
	if y.Renew(); y.Round != (Round{}) || y.Full() {
		t.Errorf("renewed: %+v", y.Round)
	}
	y.Begin()
	if y.Renew(); !y.Round.Begun || y.Full() {
		t.Errorf("renewed within a round: %+v", y.Round)
	}
	if y.End(); !y.Full() {
		t.Error("a round within which it was renewed was enough")
	}
	facts, err := ReadFacts(m.Bytes[:FactsBytes])
	if err != nil || facts.Entries != 60_000 || facts.Slots != 131_072 || facts.Bytes != 1<<20 || facts.Pool != m.Pool || !facts.Round.Done {
		t.Errorf("%+v, %v", facts, err)
	}
}

// A guest may die whatever it is doing with an index. Who adopts it finds what it would
// have found, goes on with the round, and knows all about it when it was counted.
func TestAdoptIndexAnywhere(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 3))
	m := keptMemory(t, 2*MinIndex) // the rest is never touched
	x := newKept(t, m, MinIndex)
	stored := map[block.Physical]Fingerprint{}
	var left []block.Physical // to be put in this round
	die := func() {
		copyOf := keptMemory(t, len(m.Bytes))
		copy(copyOf.Bytes, m.Bytes)
		was := x.Stats()
		x = adopt(t, copyOf)
		m = copyOf
		if now := x.Stats(); now.Every != was.Every || now.Bytes != was.Bytes {
			t.Fatalf("seed %d: %+v became %+v", seed, was, now)
		}
		if rng.IntN(2) == 0 {
			counted(t, x)
		}
	}
	for step := range 20_000 {
		switch n := rng.IntN(100); {
		case n < 70 || len(stored) < 100:
			p, f := block.At(0, rng.Uint64N(12_000)), Fingerprint(rng.Uint64()|1)
			stored[p] = f
			x.Put(f, p)
		case n < 80:
			for p, f := range stored {
				x.Delete(f, p)
				delete(stored, p)
				break
			}
		case x.Round.Begun && !x.Round.Done && n < 98:
			for i := range left[:min(100, len(left))] {
				if f, ok := stored[left[i]]; ok {
					x.Put(f, left[i])
				}
			}
			if left = left[min(100, len(left)):]; len(left) == 0 {
				x.End()
			}
		case n == 98 && (!x.Round.Begun || x.Round.Done):
			x.Begin()
			left = left[:0]
			for p := range stored {
				left = append(left, p)
			}
		case step%50 == 0:
			x.Save()
			die()
			continue
		default:
			continue
		}
		x.Save()
		if !x.Counting() && step%500 == 0 {
			if err := x.check(); err != nil {
				t.Fatalf("seed %d step %d: %v", seed, step, err)
			}
		}
	}
	counted(t, x)
	missing, wanted := 0, 0
	for p, f := range stored {
		if uint64(p)%uint64(x.Stats().Every) == 0 {
			if wanted++; !x.has(f, p) {
				missing++
			}
		}
	}
	if wanted == 0 || missing*50 > wanted {
		t.Errorf("seed %d: %d of %d are missing: %+v", seed, missing, wanted, x.Stats())
	}
	if len(bytes.Trim(m.Bytes[MinIndex:], "\x00")) > 0 {
		t.Error("memory behind the index was written to")
	}
}

// Whatever lies in the memory is no index, or one that is right again after two rounds.
func TestAdoptGarbage(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 5))
	m := keptMemory(t, MinIndex)
	x := newKept(t, m, MinIndex)
	for round := range 25 {
		if rng.IntN(2) == 0 {
			x.Begin()
		}
		x.Save()
		// Of what holds the state two copies are left, one, or none.
		from, n := rng.IntN(len(m.Bytes)), 1+rng.IntN(1<<(1+rng.IntN(17)))
		for i := from; i < min(len(m.Bytes), from+n); i++ {
			m.Bytes[i] = byte(rng.Uint32())
		}
		var err error
		if x, err = AdoptIndex(m); err != nil {
			if from > 2*stateLen {
				t.Fatalf("seed %d round %d: %v", seed, round, err)
			}
			clear(m.Bytes)
			x = newKept(t, m, MinIndex)
		}
		for range 2000 {
			f, p := Fingerprint(rng.Uint64()|1), block.Physical(rng.Uint64N(1<<addressBits))
			switch rng.IntN(3) {
			case 0:
				x.Put(f, p)
			case 1:
				x.Delete(f, p)
			default:
				x.Touch([]Fingerprint{f})
				for _, c := range x.Candidates(f, nil) {
					if c >= 1<<addressBits {
						t.Fatalf("seed %d round %d: address %x", seed, round, uint64(c))
					}
				}
			}
		}
		if s := x.Stats(); s.Entries < 0 || s.Entries > s.Slots {
			t.Fatalf("seed %d round %d: %+v", seed, round, s)
		}
		prints := make([]Fingerprint, 1000)
		for range 2 {
			x.Begin()
			for i := range prints {
				// Both buckets of some, one in 100,000, are taken by the state.
				for a, b := uint64(0), uint64(0); max(a, b) < uint64(x.first); a, b = x.two(prints[i]) {
					prints[i] = Fingerprint(rng.Uint64() | 1)
				}
				x.Put(prints[i], block.At(0, uint64(i*block.TrackBlocks)))
			}
			x.End()
		}
		x.Count(len(x.buckets))
		for x.swept < len(x.buckets) {
			x.sweep()
		}
		if err := x.check(); err != nil {
			t.Fatalf("seed %d round %d: %v", seed, round, err)
		}
		for i, f := range prints {
			if !x.has(f, block.At(0, uint64(i*block.TrackBlocks))) {
				t.Fatalf("seed %d round %d: block %d is missing", seed, round, i)
			}
		}
		if n := x.Stats().Entries; n != len(prints) {
			t.Fatalf("seed %d round %d: %d entries instead of %d", seed, round, n, len(prints))
		}
	}
}

// A guest that dies while it saves leaves the state before or the new one.
func TestSaveTorn(t *testing.T) {
	m := keptMemory(t, MinIndex)
	x := newKept(t, m, MinIndex)
	for i := range 3 { // in either place
		x.Order = uint32(i)
		before := bytes.Clone(m.Bytes[:2*stateLen])
		x.Save()
		for n := range stateLen/8 + 1 {
			torn := keptMemory(t, MinIndex)
			copy(torn.Bytes, before)
			at := int(x.generation % 2 * stateLen)
			copy(torn.Bytes[at:], m.Bytes[at:at+8*n])
			if y := adopt(t, torn); y.Order != x.Order && y.Order != max(x.Order, 1)-1 {
				t.Errorf("after %d words it is number %d of %d", n, y.Order, x.Order)
			}
		}
	}
}

func TestAdoptIndexRefuses(t *testing.T) {
	m := keptMemory(t, 2*MinIndex)
	for what, err := range map[string]error{
		"nothing": func() error { _, err := AdoptIndex(m); return err }(),
		"little":  func() error { _, err := AdoptIndex(Memory{Bytes: m.Bytes[:100]}); return err }(),
	} {
		if err == nil {
			t.Errorf("%s was adopted", what)
		}
	}
	if _, err := NewIndexIn(Memory{Bytes: m.Bytes[:MinIndex]}, 2*MinIndex); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("an index larger than its memory: %v", err)
	}
	newKept(t, m, 2*MinIndex)
	for what, edit := range map[string]func(m *Memory){
		"pool":   func(m *Memory) { m.Pool = block.PoolID{2} },
		"secret": func(m *Memory) { m.Check++ },
		"size":   func(m *Memory) { m.Bytes = m.Bytes[:MinIndex] },
	} {
		other := m
		edit(&other)
		if _, err := AdoptIndex(other); !errors.Is(err, block.ErrCorrupt) {
			t.Errorf("another %s: %v", what, err)
		}
	}
	if _, err := ReadFacts(m.Bytes[:FactsBytes-1]); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("facts of too few bytes: %v", err)
	}
	freed := false
	m.Free = func() error { freed = true; return nil }
	if err := adopt(t, m).Drop(); err != nil || !freed {
		t.Errorf("%v, its memory was given back: %v", err, freed)
	}
	if err := newIndexToDrop(t).Drop(); err != nil {
		t.Error(err)
	}
}

func newIndexToDrop(t *testing.T) *Index {
	x, err := NewIndex(MinIndex)
	if err != nil {
		t.Fatal(err)
	}
	return x
}

func goldenState() state {
	return state{
		pool: block.PoolID{0xaa, 0xbb}, check: 0x1122334455667788, size: 32 << 20, generation: 9, order: 5,
		flags: flagRound | flagGoing | flagBegun, every: 4, whole: 2, added: 1000, entries: 2000,
		round: Round{Begun: true, Place: Place{1, 0x123456}},
	}
}

// The stored bytes of version 1.
func TestGoldenState(t *testing.T) {
	s := goldenState()
	var p [stateLen]byte
	s.encode(p[:])
	text, err := os.ReadFile("testdata/state.hex")
	if err != nil {
		t.Fatalf("%v; the bytes are\n%x", err, p)
	}
	want, err := hex.DecodeString(strings.Join(strings.Fields(string(text)), ""))
	if err != nil || !bytes.Equal(want, p[:]) {
		t.Errorf("%v\n got %x\nwant %x", err, p, want)
	}
	var back state
	if err := back.decode(p[:]); err != nil || back != s {
		t.Errorf("%v, %+v", err, back)
	}
}

// FuzzState decodes states whose checksum is right.
func FuzzState(f *testing.F) {
	s := goldenState()
	var p [stateLen]byte
	s.encode(p[:])
	f.Add(p[64:])
	f.Fuzz(func(t *testing.T, body []byte) {
		var p [stateLen]byte
		copy(p[64:], body)
		ondisk.Seal(p[:], ondisk.Header{Kind: KindIndex, Version: stateVersion, Length: stateLen})
		var s state
		if s.decode(p[:]) != nil {
			return
		}
		if s.size < MinIndex || s.size&(s.size-1) != 0 || !slices.Contains([]uint16{1, 2, 4, 8, 16, 32, 64, 128, 256}, s.every) {
			t.Fatalf("%+v", s)
		}
		if s.size > MinIndex {
			return
		}
		mem := make([]byte, MinIndex)
		copy(mem, p[:])
		copy(mem[2*stateLen:], bytes.Repeat(body, MinIndex/(len(body)+1)))
		x, err := AdoptIndex(Memory{Bytes: mem, Check: Fingerprint(s.check)})
		if err != nil {
			t.Fatal(err)
		}
		if n := x.Stats(); n.Entries < 0 || n.Entries > n.Slots {
			t.Fatalf("%+v", n)
		}
		for i := range uint64(100) {
			x.Put(Fingerprint(i<<57|i), block.At(0, i))
		}
		x.Begin()
		x.End()
		x.Save()
		if y, err := AdoptIndex(*x.kept); err != nil || y.Whole != s.whole || !y.Round.Done {
			t.Fatalf("%v, %+v", err, y)
		}
		if binary.LittleEndian.Uint64(mem[64:]) != s.check && binary.LittleEndian.Uint64(mem[stateLen+64:]) != s.check {
			t.Fatal("it is of another secret")
		}
	})
}
