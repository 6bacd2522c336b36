package session

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

var pool = block.PoolID{7}

// rig is a table in memory of a test.
type rig struct {
	*Table
	t   testing.TB
	mem []byte
	seq block.Seq // head of the log
}

func section(t testing.TB, size int) []byte {
	t.Helper()
	mem, err := hpdi.AllocPrivate(size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = hpdi.Free(mem) })
	return mem
}

func newRig(t testing.TB, size int) *rig {
	r := &rig{t: t, mem: section(t, size)}
	r.Table = New(func() ([]byte, block.PoolID, block.Epoch, error) { return r.mem, pool, 3, nil })
	return r
}

func anyVolume(block.VolumeID) bool { return true }

// next lets the guest die: another one adopts the memory.
func (r *rig) next() {
	r.t.Helper()
	r.Table = New(nil)
	if err := r.Adopt(r.mem, pool, anyVolume); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) open(vol block.VolumeID, id block.SessionID, queues, slots int) (*Session, error) {
	return r.Open(r.t.Context(), block.VolumeInfo{ID: vol, Name: "v"}, id, queues, slots, func() block.Seq { return r.seq })
}

func (r *rig) mustOpen(vol block.VolumeID, id block.SessionID, queues, slots int) *Session {
	r.t.Helper()
	s, err := r.open(vol, id, queues, slots)
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}

// publish makes a change with a tag.
func (r *rig) publish(vol block.VolumeID, tag block.Tag) {
	r.t.Helper()
	if err := r.Begin(vol, tag); err != nil {
		r.t.Fatal(err)
	}
	r.seq += 2
	r.End(tag, true)
}

// is demands an answer.
func (r *rig) is(s *Session, queue, slot int, counter uint64, want bool) {
	r.t.Helper()
	if done, err := s.Done(queue, slot, counter); done != want || err != nil {
		r.t.Errorf("queue %d, slot %d, submission %d: done is %t, %v", queue, slot, counter, done, err)
	}
}

func (r *rig) want(err, kind error, texts ...string) {
	r.t.Helper()
	if !errors.Is(err, kind) {
		r.t.Errorf("%v: want %v", err, kind)
		return
	}
	for _, s := range texts {
		if !strings.Contains(err.Error(), s) {
			r.t.Errorf("%v: does not say %q", err, s)
		}
	}
}

func TestSession(t *testing.T) {
	r := newRig(t, Size)
	if st := r.Stats(); st != (Stats{}) {
		t.Errorf("a table without sessions: %+v", st)
	}
	s := r.mustOpen(1, 11, 2, 4)
	if !s.Fresh() {
		t.Error("a new session is not fresh")
	}
	r.is(s, 0, 0, 1, false)
	r.is(s, 0, 0, 0, false)
	r.publish(1, block.Tag{Session: 11, Queue: 1, Slot: 3, Counter: 5})
	for q := range 2 {
		for slot := range 4 {
			r.is(s, q, slot, 5, q == 1 && slot == 3)
		}
	}
	r.publish(1, block.Tag{Session: 11, Queue: 1, Slot: 3, Counter: 9})
	r.is(s, 1, 3, 5, false) // completed long ago; its slot was used again
	r.is(s, 1, 3, 9, true)
	tag := block.Tag{Session: 11, Counter: 10}
	if err := r.Begin(1, tag); err != nil {
		t.Fatal(err)
	}
	r.End(tag, false)
	r.is(s, 0, 0, 10, false)
	for name, c := range map[string]struct {
		vol  block.VolumeID
		tag  block.Tag
		kind error
	}{
		"no such session": {1, block.Tag{Session: 12, Counter: 1}, block.ErrClosed},
		"another volume":  {2, block.Tag{Session: 11, Counter: 1}, block.ErrInvalid},
		"queue":           {1, block.Tag{Session: 11, Queue: 2, Counter: 1}, block.ErrInvalid},
		"slot":            {1, block.Tag{Session: 11, Slot: 4, Counter: 1}, block.ErrInvalid},
		"no counter":      {1, block.Tag{Session: 11}, block.ErrInvalid},
	} {
		if err := r.Begin(c.vol, c.tag); !errors.Is(err, c.kind) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, at := range [][2]int{{-1, 0}, {2, 0}, {0, -1}, {0, 4}} {
		_, err := s.Done(at[0], at[1], 1)
		r.want(err, block.ErrInvalid, "000000000000000b")
	}
	if st := r.Stats(); st != (Stats{Sessions: 1, Open: 1, Bytes: Size}) {
		t.Errorf("%+v", st)
	}
}

func TestOpenRefuses(t *testing.T) {
	r := newRig(t, Size)
	r.mustOpen(1, 11, 2, 4)
	for name, c := range map[string]struct {
		vol           block.VolumeID
		id            block.SessionID
		queues, slots int
	}{
		"no id": {1, 0, 1, 1}, "no queue": {1, 1, 0, 1}, "queues": {1, 1, MaxQueues + 1, 1}, "no slot": {1, 1, 1, 0},
		"slots": {1, 1, 1, MaxSlots + 1}, "both": {1, 1, MaxQueues, MaxSlots},
		"another volume": {2, 11, 2, 4}, "another shape": {1, 11, 4, 2},
	} {
		_, err := r.open(c.vol, c.id, c.queues, c.slots)
		if !errors.Is(err, block.ErrInvalid) || !strings.Contains(err.Error(), "volume v") {
			t.Errorf("%s: %v", name, err)
		}
	}
	none := errors.New("no room")
	r.Table = New(func() ([]byte, block.PoolID, block.Epoch, error) { return nil, pool, 1, none })
	_, err := r.open(1, 1, 1, 1)
	r.want(err, none, "volume v")
	r.Shut()
	_, err = r.open(1, 1, 1, 1)
	r.want(err, block.ErrClosed)
	r.want(r.Begin(1, block.Tag{Session: 1, Counter: 1}), block.ErrClosed)
}

// What one guest noted the next one knows, whoever has left or closed what.
func TestNextGuest(t *testing.T) {
	r := newRig(t, Size)
	r.mustOpen(1, 11, 2, 4)
	b := r.mustOpen(2, 12, 1, 8)
	again := r.mustOpen(2, 12, 1, 8)
	if again.Fresh() {
		t.Error("a session that is open is fresh")
	}
	r.publish(1, block.Tag{Session: 11, Queue: 1, Slot: 1, Counter: 3})
	r.publish(2, block.Tag{Session: 12, Slot: 7, Counter: 4})
	b.Leave()
	b.Leave()
	if st := r.Stats(); st.Open != 2 {
		t.Errorf("one of two has left: %+v", st)
	}
	again.Leave()
	if st := r.Stats(); st.Open != 1 || st.Sessions != 2 {
		t.Errorf("both have left: %+v", st)
	}
	r.next()
	if st := r.Stats(); st != (Stats{Sessions: 2, Bytes: Size}) {
		t.Errorf("after a death: %+v", st)
	}
	a := r.mustOpen(1, 11, 2, 4)
	b = r.mustOpen(2, 12, 1, 8)
	if a.Fresh() || b.Fresh() {
		t.Error("a session that was found is fresh")
	}
	r.is(a, 1, 1, 3, true)
	r.is(b, 0, 7, 4, true)
	a.Close()
	a.Close()
	_, err := a.Done(1, 1, 3)
	r.want(err, block.ErrClosed, "000000000000000b")
	r.next()
	a = r.mustOpen(1, 11, 2, 4)
	if !a.Fresh() {
		t.Error("a closed session was found")
	}
	r.is(a, 1, 1, 3, false)
	r.Shut()
	a.Close()
	b.Leave()
	_, err = a.Done(0, 0, 1)
	r.want(err, block.ErrClosed)
}

// The volumes of sessions may be gone: deleted by this guest, or by one that died over it.
func TestForget(t *testing.T) {
	r := newRig(t, Size)
	a, b := r.mustOpen(1, 11, 1, 4), r.mustOpen(2, 12, 1, 4)
	r.Forget(1)
	_, err := a.Done(0, 0, 1)
	r.want(err, block.ErrClosed)
	r.is(b, 0, 0, 1, false)
	r.Table = New(nil)
	if err := r.Adopt(r.mem, pool, func(id block.VolumeID) bool { return id != 2 }); err != nil {
		t.Fatal(err)
	}
	if st := r.Stats(); st.Sessions != 0 || st.Damaged != 0 {
		t.Errorf("%+v", st)
	}
}

// The log tells what a guest that died had no time to note, and nothing of a session that
// had the same number before.
func TestRestore(t *testing.T) {
	r := newRig(t, Size)
	r.seq = 100
	r.mustOpen(1, 11, 1, 4)
	r.next()
	r.Restore(block.Tag{Session: 11, Slot: 1, Counter: 7}, 100) // of before
	r.Restore(block.Tag{Session: 11, Slot: 2, Counter: 8}, 101)
	r.Restore(block.Tag{Session: 11, Slot: 2, Counter: 9}, 103)
	r.Restore(block.Tag{Session: 12, Slot: 2, Counter: 9}, 104)
	r.Restore(block.Tag{Session: 11, Slot: 4, Counter: 9}, 105)
	r.Restore(block.Tag{Session: 11, Queue: 1, Counter: 9}, 106)
	s := r.mustOpen(1, 11, 1, 4)
	for slot, counter := range []uint64{0, 0, 9, 0} {
		r.is(s, 0, slot, 7, false)
		r.is(s, 0, slot, 9, counter == 9)
	}
}

// When memory is short those go that were left first, and none that is open.
func TestEviction(t *testing.T) {
	r := newRig(t, cellsAt+block.Size) // 256 slots
	var s []*Session
	for i := range 4 {
		s = append(s, r.mustOpen(1, block.SessionID(i+1), 1, 64))
	}
	_, err := r.open(1, 9, 1, 64)
	r.want(err, block.ErrNoSpace, "4 sessions are open")
	s[2].Leave()
	s[0].Leave()
	r.mustOpen(1, 9, 1, 64).Leave()
	if st := r.Stats(); st.Sessions != 4 || st.Evicted != 1 || st.Open != 2 {
		t.Errorf("%+v", st)
	}
	if _, err := s[2].Done(0, 0, 1); !errors.Is(err, block.ErrClosed) {
		t.Errorf("the one that was left first: %v", err)
	}
	if r.mustOpen(1, 1, 1, 64).Fresh() {
		t.Error("the one that was left second is gone")
	}
	// After a death: 1 was open, as were 2 and 4; 9 was left.
	r.next()
	r.mustOpen(1, 10, 1, 64)
	for id, fresh := range map[block.SessionID]bool{1: false, 2: false, 4: false, 10: false} {
		if r.mustOpen(1, id, 1, 64).Fresh() != fresh {
			t.Errorf("session %d: fresh is %t", id, !fresh)
		}
	}
	// Not all of it at once, and more than there is.
	r = newRig(t, cellsAt+block.Size)
	for i := range 4 {
		r.mustOpen(1, block.SessionID(i+1), 1, 64).Leave()
	}
	r.mustOpen(1, 9, 2, 100)
	if st := r.Stats(); st.Sessions != 1 || st.Evicted != 4 {
		t.Errorf("a large session: %+v", st)
	}
	_, err = r.open(1, 8, 3, 100)
	r.want(err, block.ErrInvalid, "at most 256 slots")
}

// All places may be taken before all slots are.
func TestManySessions(t *testing.T) {
	r := newRig(t, Size)
	var first *Session
	for i := range MaxSessions {
		s := r.mustOpen(1, block.SessionID(i+1), 4, 126)
		if first == nil {
			first = s
		}
	}
	if st := r.Stats(); st.Open != MaxSessions {
		t.Fatalf("%+v", st)
	}
	_, err := r.open(1, 5000, 1, 1)
	r.want(err, block.ErrNoSpace)
	first.Leave()
	r.mustOpen(1, 5000, 1, 1)
	v, bad, err := Look(r.mem)
	if err != nil || bad != nil || len(v.Sessions) != MaxSessions {
		t.Errorf("%d sessions, %v, %v", len(v.Sessions), bad, err)
	}
}

// A guest may die after each store of a new session and of a tag.
func TestEveryStore(t *testing.T) {
	r := newRig(t, cellsAt+2*block.Size)
	a := r.mustOpen(1, 11, 1, 8)
	r.publish(1, block.Tag{Session: 11, Slot: 3, Counter: 1})
	image := bytes.Clone(r.mem)
	e := entry{id: 12, volume: 1, queues: 1, slots: 8, first: 8, since: 5}
	words := r.entryWords(1, &e)
	for n := range len(words) + 1 {
		copy(r.mem, image)
		r.apply(words[:n])
		r.next()
		want := 1
		if n == len(words) {
			want = 2
		}
		if st := r.Stats(); st.Sessions != want || st.Damaged != 0 {
			t.Errorf("%d stores of a new session: %+v", n, st)
		}
	}
	copy(r.mem, image)
	cell := r.cellWords(a.s.cellOf(0, 3), 2)
	for n := range len(cell) + 1 {
		copy(r.mem, image)
		r.apply(cell[:n])
		r.next()
		r.Restore(block.Tag{Session: 11, Slot: 3, Counter: 2}, 9) // it is in the log, or was not published
		r.is(r.mustOpen(1, 11, 1, 8), 0, 3, 2, true)
	}
}

// Whatever is damaged is not taken for an answer.
func TestDamage(t *testing.T) {
	r := newRig(t, cellsAt+2*block.Size)
	r.mustOpen(1, 11, 1, 8)
	r.mustOpen(2, 12, 1, 8)
	r.publish(1, block.Tag{Session: 11, Slot: 3, Counter: 1})
	r.publish(2, block.Tag{Session: 12, Slot: 3, Counter: 1})
	image := bytes.Clone(r.mem)
	flip := func(at, bit int) {
		copy(r.mem, image)
		r.mem[at] ^= 1 << bit
		r.next()
	}
	at := cellsAt + 3*cellLen
	for i := range cellLen * 8 {
		flip(at+i/8, i%8)
		s := r.mustOpen(1, 11, 1, 8)
		_, err := s.Done(0, 3, 1)
		r.want(err, block.ErrCorrupt, "session 000000000000000b, queue 0, slot 3", "nobody can tell")
		r.is(r.mustOpen(2, 12, 1, 8), 0, 3, 1, true)
		_, bad, err := Look(r.mem)
		if err != nil || len(bad) != 1 || !strings.Contains(bad[0].Error(), "1 of 8 slots") {
			t.Fatalf("%v, %v", bad, err)
		}
		r.publish(1, block.Tag{Session: 11, Slot: 3, Counter: 2})
		r.is(s, 0, 3, 2, true)
	}
	for i := range leftAt * 8 {
		flip(entriesAt+i/8, i%8)
		if st := r.Stats(); st.Sessions != 1 || st.Damaged != 1 {
			t.Fatalf("bit %d of an entry: %+v", i, st)
		}
		if !r.mustOpen(1, 11, 1, 8).Fresh() {
			t.Fatalf("bit %d of an entry: the session was found", i)
		}
		r.is(r.mustOpen(2, 12, 1, 8), 0, 3, 1, true)
	}
	// One copy of the header is enough.
	for i := range headerLen * 8 {
		flip(i/8, i%8)
		r.is(r.mustOpen(1, 11, 1, 8), 0, 3, 1, true)
		flip(headerTwin+i/8, i%8)
		r.is(r.mustOpen(1, 11, 1, 8), 0, 3, 1, true)
		if _, bad, err := Look(r.mem); err != nil || len(bad) != 1 {
			t.Fatalf("bit %d of a header: %v, %v", i, bad, err)
		}
	}
	copy(r.mem, image)
	r.mem[64]++
	r.mem[headerTwin+64]++
	err := New(nil).Adopt(r.mem, pool, anyVolume)
	if err == nil {
		t.Error("both headers are damaged")
	}
	if _, _, err := Look(r.mem); err == nil {
		t.Error("both headers are damaged")
	}
	copy(r.mem, image)
	r.want(New(nil).Adopt(r.mem, block.PoolID{8}, anyVolume), block.ErrCorrupt, "of pool")
	r.want(New(nil).Adopt(r.mem[:block.Size], pool, anyVolume), block.ErrCorrupt, "4096 bytes")
	// Two entries for the same cells, or of the same number.
	for _, e := range []entry{{id: 13, volume: 1, queues: 1, slots: 2, first: 4}, {id: 12, volume: 1, queues: 1, slots: 1, first: 100}} {
		copy(r.mem, image)
		words := r.entryWords(5, &e)
		r.apply(words[:])
		if _, bad, err := Look(r.mem); err != nil || len(bad) != 1 || !strings.Contains(bad[0].Error(), "there twice") {
			t.Errorf("%v, %v", bad, err)
		}
		r.next()
		if st := r.Stats(); st.Damaged != 1 || st.Sessions != 2 {
			t.Errorf("%+v", st)
		}
	}
}

func TestGolden(t *testing.T) {
	h := header{pool: block.PoolID{0xaa}, epoch: 5, identity: [16]byte{1, 2, 3}, cells: 519936}
	var hdr [headerLen]byte
	h.encode(hdr[:])
	e := entry{id: 0x0102030405060708, volume: 0x11121314, queues: 0x21, slots: 0x3132, first: 0x414, since: 0x5152535455565758}
	var ent [leftAt]byte
	e.encode(&ent, h.seed())
	m := memory{mem: make([]byte, cellsAt+block.Size), hdr: h, seed: h.seed()}
	m.putCell(3, 0x6162636465666768)
	for file, got := range map[string][]byte{"header.hex": hdr[:], "entry.hex": ent[:], "cell.hex": m.mem[cellsAt+3*cellLen:][:cellLen]} {
		text, err := os.ReadFile("testdata/" + file)
		want, _ := hex.DecodeString(strings.Join(strings.Fields(string(text)), ""))
		if err != nil || !bytes.Equal(want, got) {
			t.Errorf("%s: %v\n got %x\nwant %x", file, err, got, want)
		}
	}
	var hb header
	if err := hb.decode(hdr[:], Size); err != nil || hb != h {
		t.Errorf("header comes back as %+v: %v", hb, err)
	}
	var eb entry
	if err := eb.decode(&ent, h.seed(), h.cells); err != nil || eb != e {
		t.Errorf("entry comes back as %+v: %v", eb, err)
	}
	if c, ok := m.cell(3); !ok || c != 0x6162636465666768 {
		t.Errorf("cell comes back as %x, %t", c, ok)
	}
}

// A tag costs no allocation.
func TestNoAllocation(t *testing.T) {
	r := newRig(t, Size)
	s := r.mustOpen(1, 11, 4, 128)
	n := uint64(0)
	if a := testing.AllocsPerRun(500, func() {
		n++
		tag := block.Tag{Session: 11, Queue: uint16(n % 4), Slot: uint16(n % 128), Counter: n}
		if r.Begin(1, tag) != nil {
			t.Fatal("refused")
		}
		r.End(tag, true)
		if done, err := s.Done(int(n%4), int(n%128), n); !done || err != nil {
			t.Fatal(done, err)
		}
	}); a > 0 {
		t.Errorf("%.1f allocations", a)
	}
}

// FuzzAdopt shows a table in which anything may stand, also what would be right.
func FuzzAdopt(f *testing.F) {
	r := newRig(f, cellsAt+2*block.Size)
	r.mustOpen(1, 11, 1, 8)
	r.mustOpen(2, 12, 2, 16).Leave()
	r.publish(1, block.Tag{Session: 11, Slot: 3, Counter: 1})
	image := bytes.Clone(r.mem)
	f.Add(uint32(0), image[:headerLen], true)
	f.Add(uint32(entriesAt), image[entriesAt:][:entryLen], true)
	f.Add(uint32(entriesAt+5*entryLen), image[entriesAt:][:entryLen], true)
	f.Add(uint32(entriesAt+12), []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff}, true)
	f.Add(uint32(cellsAt+3*cellLen), image[cellsAt+3*cellLen:][:cellLen], false)
	mem := section(f, len(image))
	f.Fuzz(func(t *testing.T, at uint32, p []byte, sealed bool) {
		copy(mem, image)
		copy(mem[int(at)%len(mem):], p)
		if sealed {
			reseal(mem, r.hdr)
		}
		v, bad, lookErr := Look(mem)
		tab := New(nil)
		if err := tab.Adopt(mem, pool, anyVolume); err != nil {
			return
		}
		if lookErr != nil {
			t.Fatalf("it was adopted, and a look says %v", lookErr)
		}
		st := tab.Stats()
		if bad == nil && st.Sessions != len(v.Sessions) || st.Sessions > len(v.Sessions) {
			t.Fatalf("%d sessions were adopted, a look shows %d, %v", st.Sessions, len(v.Sessions), bad)
		}
		x := rig{Table: tab, t: t, mem: mem}
		for _, info := range v.Sessions {
			s, err := x.open(info.Volume, info.ID, info.Queues, info.Slots)
			if err != nil || s.Fresh() {
				continue
			}
			tag := block.Tag{Session: info.ID, Queue: uint16(info.Queues - 1), Slot: uint16(info.Slots - 1), Counter: 1 << 40}
			x.publish(info.Volume, tag)
			x.is(s, int(tag.Queue), int(tag.Slot), tag.Counter, true)
			_, _ = s.Done(0, 0, 1)
		}
		if _, err := x.open(9, 999, 1, 100); err != nil && !errors.Is(err, block.ErrNoSpace) && !errors.Is(err, block.ErrInvalid) {
			t.Fatal(err)
		}
	})
}

// reseal makes the checksums of header and entries right.
func reseal(mem []byte, was header) {
	for _, at := range []int{0, headerTwin} {
		h := was
		h.cells = uint64(mem[at+88]) | uint64(mem[at+89])<<8
		h.encode(mem[at : at+headerLen])
	}
	m := memory{mem: mem, hdr: was, seed: was.seed()}
	for place := range MaxSessions {
		p := (*[leftAt]byte)(mem[entriesAt+place*entryLen:])
		sum := entrySum(p, m.seed)
		copy(p[20:], []byte{byte(sum), byte(sum >> 8), byte(sum >> 16), byte(sum >> 24)})
	}
}

// Sessions come and go at random, against a plain model.
func TestAgainstModel(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	r := newRig(t, cellsAt+4*block.Size) // 1024 slots
	type client struct {
		s    *Session
		vol  block.VolumeID
		q, n int
		last map[[2]int]uint64
	}
	model := map[block.SessionID]*client{}
	counter := uint64(0)
	for step := range 3000 {
		id := block.SessionID(1 + rng.IntN(12))
		c := model[id]
		what := fmt.Sprintf("seed %d, step %d, session %d", seed, step, id)
		switch k := rng.IntN(20); {
		case k == 0:
			r.next()
			for id, c := range model {
				c.s = r.mustOpen(c.vol, id, c.q, c.n)
				if c.s.Fresh() {
					t.Fatalf("%s: %d is lost", what, id)
				}
			}
		case c == nil:
			c = &client{vol: block.VolumeID(1 + rng.IntN(3)), q: 1 + rng.IntN(2), n: 1 + rng.IntN(30), last: map[[2]int]uint64{}}
			c.s = r.mustOpen(c.vol, id, c.q, c.n)
			if !c.s.Fresh() {
				t.Fatalf("%s: found", what)
			}
			model[id] = c
		case k == 1:
			c.s.Close()
			delete(model, id)
		case k == 2:
			c.s.Leave()
			c.s = r.mustOpen(c.vol, id, c.q, c.n)
		case k == 3:
			r.Forget(c.vol)
			for id, o := range model {
				if o.vol == c.vol {
					delete(model, id)
				}
			}
		default:
			counter++
			at := [2]int{rng.IntN(c.q), rng.IntN(c.n)}
			r.publish(c.vol, block.Tag{Session: id, Queue: uint16(at[0]), Slot: uint16(at[1]), Counter: counter})
			c.last[at] = counter
		}
		for id, c := range model {
			q, n := rng.IntN(c.q), rng.IntN(c.n)
			last := c.last[[2]int{q, n}]
			if done, err := c.s.Done(q, n, max(last, 1)); err != nil || done != (last > 0) {
				t.Fatalf("%s: slot %d of queue %d of %d, last %d: %t, %v", what, n, q, id, last, done, err)
			}
		}
	}
	v, bad, err := Look(r.mem)
	if err != nil || bad != nil || len(v.Sessions) != len(model) {
		t.Errorf("seed %d: a look shows %d of %d sessions, %v, %v", seed, len(v.Sessions), len(model), bad, err)
	}
}

// Headers that are whole and cannot be, and what a check says of a table in use.
func TestOddTables(t *testing.T) {
	r := newRig(t, cellsAt+block.Size)
	if bad := r.Check(); bad != nil {
		t.Errorf("a table without memory: %v", bad)
	}
	gone, cancel := context.WithCancel(t.Context())
	cancel()
	_, err := r.Open(gone, block.VolumeInfo{ID: 1, Name: "v"}, 11, 1, 8, func() block.Seq { return 0 })
	r.want(err, context.Canceled, "volume v")
	r.mustOpen(1, 11, 1, 8)
	if bad := r.Check(); bad != nil {
		t.Errorf("a table of which nothing is wrong: %v", bad)
	}
	says := func(bad []error, want string) {
		t.Helper()
		if len(bad) != 1 || !strings.Contains(bad[0].Error(), want) {
			t.Errorf("%v, want one with %q", bad, want)
		}
	}
	image := bytes.Clone(r.mem)
	h := r.hdr
	h.identity[0]++
	h.encode(r.mem[headerTwin : headerTwin+headerLen])
	_, bad, err := Look(r.mem)
	if err != nil {
		t.Fatal(err)
	}
	says(bad, "its two copies differ")
	h = r.hdr
	h.cells = 1 << 20
	h.encode(r.mem[:headerLen])
	h.encode(r.mem[headerTwin : headerTwin+headerLen])
	r.want(New(nil).Adopt(r.mem, pool, anyVolume), block.ErrCorrupt, "1048576 cells in memory")
	says(r.Check(), "1048576 cells in memory")
	copy(r.mem, image)
	r.dropEntry(0)
	says(r.Check(), "it has 0 sessions, in use are 1")
}
