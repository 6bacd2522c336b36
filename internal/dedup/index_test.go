package dedup

import (
	"fmt"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
)

func newIndex(t testing.TB, bytes int64) *Index {
	x, err := NewIndex(bytes)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := x.Close(); err != nil {
			t.Error(err)
		}
	})
	return x
}

func (x *Index) has(f Fingerprint, p block.Physical) bool {
	return slices.Contains(x.Candidates(f, nil), p)
}

// check proves the invariants that Index states.
func (x *Index) check() error {
	n, fresh := 0, 0
	for i := x.first; i < len(x.buckets); i++ {
		for j, e := range x.buckets[i] {
			if e == 0 {
				continue
			}
			if n++; e&roundBit == x.round {
				fresh++
			}
			if i < x.swept && !x.stays(e) {
				return fmt.Errorf("bucket %d has an entry for %v, of which one in %d is kept", i, addressOf(e), x.every)
			}
			other := x.other(uint64(i), e>>tagShift)
			if back := x.other(other, e>>tagShift); back != uint64(i) || other == back {
				return fmt.Errorf("bucket %d leads to %d, which leads to %d", i, other, back)
			}
			if x.find(other, e) != nil || x.find(uint64(i), e) != &x.buckets[i][j] {
				return fmt.Errorf("entry %x is there twice", e)
			}
		}
	}
	if n != x.n || fresh != x.fresh {
		return fmt.Errorf("%d entries and not %d, %d of the present round and not %d", n, x.n, fresh, x.fresh)
	}
	return nil
}

// Whatever is put is found as long as there is room, and nothing else nearly ever.
func TestIndexFinds(t *testing.T) {
	x := newIndex(t, 1<<20) // 131,072 slots
	const n = 100_000
	r := rand.New(rand.NewPCG(1, 2))
	prints := make([]Fingerprint, n)
	for i := range prints {
		prints[i] = Fingerprint(r.Uint64())
		x.Put(prints[i], block.At(i%3, uint64(1000+i)))
		x.Put(prints[i], block.At(i%3, uint64(1000+i)))
	}
	missing, wrong := 0, 0
	for i, f := range prints {
		if !x.has(f, block.At(i%3, uint64(1000+i))) {
			missing++
		}
		wrong += len(x.Candidates(Fingerprint(r.Uint64()), nil))
	}
	if s := x.Stats(); missing > 0 || s.Entries != n || s.Every != 1 || wrong > n/1000 {
		t.Errorf("%d of %d are missing, %d were found that are not there: %+v", missing, n, wrong, s)
	}
	if err := x.check(); err != nil {
		t.Error(err)
	}
	for i, f := range prints {
		x.Delete(f, block.At(i%3, uint64(1000+i)))
		x.Delete(f, block.At(i%3, uint64(1000+i)))
	}
	if x.Stats().Entries != 0 {
		t.Errorf("%d entries are left", x.Stats().Entries)
	}
}

// An index that has no room for all blocks keeps those at even places of their
// tracks, all of them.
func TestIndexThins(t *testing.T) {
	x := newIndex(t, MinIndex) // 8192 slots
	r := rand.New(rand.NewPCG(3, 4))
	prints := make([]Fingerprint, 50_000)
	for i := range prints {
		prints[i] = Fingerprint(r.Uint64())
		x.Put(prints[i], block.At(1, uint64(i)))
		if i%1000 == 0 {
			if err := x.check(); err != nil {
				t.Fatal(err)
			}
		}
	}
	s := x.Stats()
	if s.Every != 8 || s.Entries > s.Slots {
		t.Fatalf("%+v", s)
	}
	// What was put before one in eight was kept is there as well.
	missing, wanted := 0, 0
	for i := 0; i < len(prints); i += s.Every {
		if wanted++; !x.has(prints[i], block.At(1, uint64(i))) {
			missing++
		}
	}
	if missing*200 > wanted {
		t.Errorf("%d of %d are missing", missing, wanted)
	}
}

// The block with which an index gets full is not kept if it is none of those that are.
func TestIndexThinsWithABlockThatGoes(t *testing.T) {
	x := newIndex(t, MinIndex)
	r := rand.New(rand.NewPCG(5, 6))
	n := uint64(0)
	for ; x.Stats().Entries < x.Stats().Slots*thin/16; n += 2 {
		x.Put(Fingerprint(r.Uint64()), block.At(1, n))
	}
	if s := x.Stats(); s.Every != 1 {
		t.Fatalf("%+v", s)
	}
	f := Fingerprint(r.Uint64())
	x.Put(f, block.At(1, n+1))
	if s := x.Stats(); s.Every != 2 || x.has(f, block.At(1, n+1)) {
		t.Errorf("%+v", s)
	}
	if x.Put(f, block.At(1, n+2)); !x.has(f, block.At(1, n+2)) {
		t.Error("one that stays is missing")
	}
}

// Blocks that are written over and over fill an index with what is not true any more.
// Rounds take that out, and the index goes on keeping all blocks that there are.
func TestIndexRounds(t *testing.T) {
	x := newIndex(t, MinIndex) // 8192 slots
	r := rand.New(rand.NewPCG(7, 8))
	now := make([]Fingerprint, 3000)
	rounds := 0
	for i := range 60_000 {
		p := r.IntN(len(now))
		now[p] = Fingerprint(r.Uint64())
		x.Put(now[p], block.At(1, uint64(p)))
		if !x.Full() {
			continue
		}
		rounds++
		x.Begin()
		for p, f := range now {
			if f != None {
				if x.Put(f, block.At(1, uint64(p))); p%100 == 0 { // others go on meanwhile
					now[p] = Fingerprint(r.Uint64())
					x.Put(now[p], block.At(1, uint64(p)))
				}
			}
		}
		if err := x.check(); err != nil {
			t.Fatalf("%d: in a round: %v", i, err)
		}
		x.End()
		if err := x.check(); err != nil {
			t.Fatalf("%d: %v", i, err)
		}
		for p, f := range now {
			if f != None && !x.has(f, block.At(1, uint64(p))) {
				t.Fatalf("%d: block %d is missing after a round", i, p)
			}
		}
	}
	if s := x.Stats(); rounds < 5 || s.Every != 1 {
		t.Errorf("%d rounds, %+v", rounds, s)
	}
}

// An index that had to keep fewer blocks keeps more when there are fewer.
func TestIndexKeepsMoreAgain(t *testing.T) {
	x := newIndex(t, MinIndex)
	r := rand.New(rand.NewPCG(9, 10))
	prints := make([]Fingerprint, 30_000)
	for i := range prints {
		prints[i] = Fingerprint(r.Uint64())
		x.Put(prints[i], block.At(1, uint64(i)))
	}
	if x.Stats().Every < 4 {
		t.Fatalf("%+v", x.Stats())
	}
	for n := 0; n == 0 || x.Full(); n++ {
		if n > 10 {
			t.Fatalf("it is never content: %+v", x.Stats())
		}
		x.Begin()
		for i := range 3000 {
			x.Put(prints[i], block.At(1, uint64(i)))
		}
		x.End()
	}
	missing := 0
	for i := range 3000 {
		if !x.has(prints[i], block.At(1, uint64(i))) {
			missing++
		}
	}
	if s := x.Stats(); s.Every != 1 || missing > 0 {
		t.Errorf("%d are missing: %+v", missing, s)
	}
	if err := x.check(); err != nil {
		t.Error(err)
	}
}

// An index that is full of what is true is not told the same over and over: only when
// something was put that is new.
func TestFullIndexRests(t *testing.T) {
	x := newIndex(t, MinIndex)
	r := rand.New(rand.NewPCG(11, 12))
	prints := make([]Fingerprint, 8000) // one of each track
	for i := range prints {
		prints[i] = Fingerprint(r.Uint64())
	}
	put := func(n int) {
		for i := range prints[:n] {
			x.Put(prints[i], block.At(1, uint64(i)*block.TrackBlocks))
		}
	}
	put(len(prints))
	for rounds := 0; x.Full(); rounds++ {
		if rounds > 2 {
			t.Fatalf("it is never content: %+v", x.Stats())
		}
		x.Begin()
		put(len(prints))
		x.End()
	}
	if s := x.Stats(); s.Every == block.TrackBlocks || s.Entries < s.Slots*14/16 {
		t.Fatalf("it is not full: %+v", s)
	}
	put(len(prints)) // they are there already
	if x.Full() {
		t.Error("it is full again after nothing new")
	}
	for i := range 1000 {
		x.Put(Fingerprint(r.Uint64()), block.At(2, uint64(i)*block.TrackBlocks))
	}
	if !x.Full() {
		t.Errorf("it is not full with 1000 blocks more: %+v", x.Stats())
	}
	if err := x.check(); err != nil {
		t.Error(err)
	}
}

// Blocks that are alike everywhere do not push others out of more than their own
// two buckets, and an index that a client fills with them stays one.
func TestIndexOfEqualBlocks(t *testing.T) {
	x := newIndex(t, MinIndex)
	for i := range 10_000 {
		x.Put(77, block.At(0, uint64(i)))
	}
	if n := len(x.Candidates(77, nil)); n != 2*bucketSlots || x.Stats().Entries != n {
		t.Errorf("%d candidates, %+v", n, x.Stats())
	}
	if err := x.check(); err != nil {
		t.Error(err)
	}
}

func BenchmarkIndex(b *testing.B) {
	x := newIndex(b, 256<<20)
	r := rand.New(rand.NewPCG(5, 6))
	for i := range x.Stats().Slots * 3 / 4 {
		x.Put(Fingerprint(r.Uint64()), block.Physical(i))
	}
	var to []block.Physical
	b.Run("absent", func(b *testing.B) {
		b.ReportAllocs()
		for range b.N {
			to = x.Candidates(Fingerprint(r.Uint64()), to[:0])
		}
	})
	b.Run("put", func(b *testing.B) {
		b.ReportAllocs()
		for i := range b.N {
			x.Put(Fingerprint(r.Uint64()), block.Physical(i))
		}
	})
}

func BenchmarkFingerprint(b *testing.B) {
	data := make([]byte, block.Size)
	b.SetBytes(block.Size)
	for range b.N {
		Secret(7).Fingerprint(data)
	}
}
