package session

import (
	"bytes"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
)

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
	clear(r.mem[:block.Size]) // but there are entries
	if err := New(nil).Adopt(r.mem, pool, anyVolume); err == nil || errors.Is(err, ErrNone) {
		t.Errorf("no header: %v", err)
	}
	r.want(New(nil).Adopt(section(t, Size), pool, anyVolume), ErrNone)
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

// A check reads many slots in several pieces.
func TestCheckOfManySlots(t *testing.T) {
	r := newRig(t, Size)
	const slots = 2*checkedAtOnce + 5
	s := r.mustOpen(1, 11, 1, slots)
	for _, slot := range []int{0, checkedAtOnce - 1, checkedAtOnce, slots - 1} {
		r.mem[cellsAt+int(s.s.cellOf(0, slot))*cellLen]++
	}
	want := fmt.Sprintf("session 000000000000000b: 4 of %d slots are damaged", slots)
	if bad := r.Check(); len(bad) != 1 || bad[0].Error() != want {
		t.Errorf("%v", bad)
	}
	if _, bad, err := Look(r.mem); err != nil || len(bad) != 1 || bad[0].Error() != want {
		t.Errorf("%v, %v", bad, err)
	}
	m, entries, _ := r.outline()
	s.Close() // while it is checked
	info := infoOf(&entries[0].entry)
	if r.survey(&m, &entries[0].entry, &info, 0) || info.Damaged > 0 {
		t.Errorf("slots of a session that has ended were counted: %+v", info)
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
