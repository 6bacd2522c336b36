package flashmap

import (
	"bytes"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

func exampleLabel() label {
	l := label{id: ID{1, 2, 3}, generation: 7, shift: 16, notes: 300}
	first := fit(l.front(), 1<<18, 12, l.shift)
	l.segments = []segment{first, fit(first.end(l.shift)+5, 1<<19, 3, l.shift)}
	l.primaries = []member{{0, block.DeviceID{4}, 3 * pageSets}, {9, block.DeviceID{5}, 70}}
	l.runs = []run{{0, 0, 0, 2}, {9, 0, 2, 1}, {0, 2, 5, 1}}
	return l
}

func examplePage(kind ondisk.Kind) []byte {
	p := make([]byte, block.Size)
	putWord(p, 0, uint64(keyOf(9, 69)))
	putWord(p, pageWords-1, uint64(keyOf(0, 1)))
	encodePage(p, kind, ID{1, 2, 3}, 5, 11)
	return p
}

func exampleNote() []byte {
	p := make([]byte, block.Size)
	noteHead{kind: NoteAccess, generation: 6, length: 300*block.Size - 7, sum: 0x12345678}.encode(p, ID{1, 2, 3})
	return p
}

// The bytes of a label, of pages and of the header of a note do not change.
func TestGolden(t *testing.T) {
	l := exampleLabel()
	for name, got := range map[string][]byte{"label": l.encode(), "table": examplePage(ondisk.KindFlashTable), "map": examplePage(ondisk.KindFlashMap), "note": exampleNote()} {
		path := filepath.Join("testdata", name+".hex")
		text := hex.Dump(bytes.TrimRight(got, "\x00"))
		if os.Getenv("POLLUX_UPDATE_GOLDEN") != "" {
			if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if strings.TrimSpace(string(want)) != strings.TrimSpace(text) {
			t.Errorf("%s has changed:\n%s", name, text)
		}
	}
}

func TestLabelRoundTrip(t *testing.T) {
	l := exampleLabel()
	got, err := decodeLabel(l.encode())
	if err != nil || !reflect.DeepEqual(got, l) {
		t.Errorf("got %+v, %v", got, err)
	}
}

// The largest label that can be fits into its block.
func TestLabelFits(t *testing.T) {
	if n := ondisk.HeaderSize + 5*4 + maxSegments*segmentSize + MaxPrimaries*memberSize + maxRuns*runSize; n > block.Size {
		t.Errorf("a label may have %d bytes", n)
	}
}

func TestLabelRefused(t *testing.T) {
	for name, change := range map[string]func(*label){
		"no generation":      func(l *label) { l.generation = 0 },
		"small data sets":    func(l *label) { l.shift = 15 },
		"large data sets":    func(l *label) { l.shift = 21 },
		"huge data sets":     func(l *label) { l.shift = 255 },
		"no segment":         func(l *label) { l.segments = nil },
		"segment in front":   func(l *label) { l.segments[0].start = l.front() - 1 },
		"segment in notes":   func(l *label) { l.notes++ },
		"large notes":        func(l *label) { l.notes = maxNotes/block.Size + 1 },
		"segments overlap":   func(l *label) { l.segments[1].start--; l.segments[1].start -= 5 },
		"segment far away":   func(l *label) { l.segments[1].start = 1 << 63 },
		"too many slots":     func(l *label) { l.segments[1].slots = l.segments[1].tablePages*pageWords + 1 },
		"too many pages":     func(l *label) { l.segments[1].tablePages = 1 << 31 },
		"device twice":       func(l *label) { l.primaries[1].number = 0 },
		"another device":     func(l *label) { l.primaries[1].number = MaxPrimaries },
		"too large a device": func(l *label) { l.primaries[1].sets = maxSets + 1 },
		"more data sets":     func(l *label) { l.primaries[1].sets = pageSets + 1 },
		"run of nobody":      func(l *label) { l.runs[1].primary = 8 },
		"runs overlap":       func(l *label) { l.runs[1].page = 1 },
		"run beyond":         func(l *label) { l.runs[2].page = 15 },
		"run of nothing":     func(l *label) { l.runs[1].count = 0 },
		"run out of order":   func(l *label) { l.runs[2].first = 3 },
		"a run is missing":   func(l *label) { l.runs = l.runs[:2] },
		"endless run":        func(l *label) { l.runs[2].count = 1 << 31 },
	} {
		l := exampleLabel()
		change(&l)
		if _, err := decodeLabel(l.encode()); !errors.Is(err, block.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

func TestPageRefused(t *testing.T) {
	p := examplePage(ondisk.KindFlashTable)
	if g, err := decodePage(p, ondisk.KindFlashTable, ID{1, 2, 3}, 5); g != 11 || err != nil {
		t.Fatalf("generation %d, %v", g, err)
	}
	if k := key(word(p, 0)); k.primary() != 9 || k.set() != 69 {
		t.Errorf("word 0 is %v", k)
	}
	for name, decode := range map[string]func() (uint64, error){
		"kind":   func() (uint64, error) { return decodePage(p, ondisk.KindFlashMap, ID{1, 2, 3}, 5) },
		"id":     func() (uint64, error) { return decodePage(p, ondisk.KindFlashTable, ID{1, 2}, 5) },
		"number": func() (uint64, error) { return decodePage(p, ondisk.KindFlashTable, ID{1, 2, 3}, 6) },
		"bits": func() (uint64, error) {
			q := bytes.Clone(p)
			q[1000] ^= 1
			return decodePage(q, ondisk.KindFlashTable, ID{1, 2, 3}, 5)
		},
	} {
		if _, err := decode(); err == nil {
			t.Errorf("another %s was taken", name)
		}
	}
}

func TestNoteRefused(t *testing.T) {
	const limit = 300 * block.Size
	p := exampleNote()
	if h, err := decodeNote(p, ID{1, 2, 3}, NoteAccess, limit); h.generation != 6 || h.length != limit-7 || h.sum != 0x12345678 || err != nil {
		t.Fatalf("header %+v, %v", h, err)
	}
	for name, tt := range map[string]struct {
		id    ID
		kind  Note
		limit int
		want  error
	}{
		"another device": {ID{1}, NoteAccess, limit, ondisk.ErrMagic},
		"another note":   {ID{1, 2, 3}, NotePolicy, limit, block.ErrCorrupt},
		"no room":        {ID{1, 2, 3}, NoteAccess, limit - 8, block.ErrCorrupt},
	} {
		if _, err := decodeNote(p, tt.id, tt.kind, tt.limit); !errors.Is(err, tt.want) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Segments are as large as there is room for, and not larger.
func TestFit(t *testing.T) {
	for _, shift := range []uint{16, 18, 20} {
		per := uint64(1) << (shift - block.Shift)
		for _, end := range []uint64{0, 255, 256, 300, 600, 1000, 5000, 1 << 20, 1<<20 + 7, 1 << 26} {
			s := fit(reserved, end, 3, shift)
			if s.slots == 0 {
				if end > reserved+20+2*per {
					t.Errorf("no slot in %d blocks", end)
				}
				continue
			}
			if s.end(shift) > end || s.slots > s.tablePages*pageWords || s.data(shift)%per != 0 {
				t.Errorf("%+v in %d blocks ends at %d", s, end, s.end(shift))
			}
			more := s
			more.slots++
			more.tablePages = (more.slots + pageWords - 1) / pageWords
			if more.end(shift) <= end {
				t.Errorf("%+v in %d blocks has room for more", s, end)
			}
		}
	}
}

func FuzzLabel(f *testing.F) {
	f.Fuzz(func(t *testing.T, p []byte) {
		// Most inputs would fail at the checksum.
		if len(p) >= ondisk.HeaderSize {
			p = bytes.Clone(p)
			ondisk.Seal(p, ondisk.Header{Kind: ondisk.KindFlash, Version: labelVersion, Length: len(p), Pool: ID{1}, Generation: 3})
		}
		l, err := decodeLabel(p)
		if err != nil {
			return
		}
		again, err := decodeLabel(l.encode())
		if err != nil || !reflect.DeepEqual(again, l) {
			t.Errorf("%+v became %+v, %v", l, again, err)
		}
		if n := l.slots(); n > l.tablePages()*pageWords {
			t.Errorf("%d slots in %d pages", n, l.tablePages())
		}
	})
}

// A flash device whose pages hold anything is opened without a panic, and never says
// of one slot, or of one data set, two things.
func FuzzPages(f *testing.F) {
	f.Fuzz(func(t *testing.T, table, marks []byte) {
		primary, flash := disks(t)
		fl, _ := attach(t, primary, flash)
		must(t, fl.Close())
		flash = flash.Reopen()
		put := func(kind ondisk.Kind, words []byte, places [2]uint64) {
			p := make([]byte, block.Size)
			copy(p[ondisk.HeaderSize+pageHead:], words)
			encodePage(p, kind, fl.ID(), 0, 9)
			for _, at := range places {
				must(t, writeAt(t, flash, at, p))
			}
		}
		put(ondisk.KindFlashTable, table, fl.tableAt(0))
		put(ondisk.KindFlashMap, marks, fl.mapAt(0))
		fl, err := Open(flash)
		if err != nil {
			if !errors.Is(err, block.ErrCorrupt) {
				t.Errorf("refused: %v", err)
			}
			return
		}
		for _, problem := range fl.Check() {
			// Two slots for one data set are what nobody can mend.
			if !strings.Contains(problem, "is in slots") && !strings.Contains(problem, "is looked for in") && !strings.Contains(problem, "the index has") {
				t.Error(problem)
			}
		}
	})
}

func FuzzNote(f *testing.F) {
	f.Add(exampleNote(), 300*block.Size)
	f.Add(exampleNote()[:ondisk.HeaderSize+3], 300*block.Size)
	f.Fuzz(func(t *testing.T, p []byte, limit int) {
		// Most inputs would fail at the checksum.
		if len(p) >= ondisk.HeaderSize {
			p = bytes.Clone(p)
			ondisk.Seal(p, ondisk.Header{Kind: ondisk.KindFlashNote, Version: noteVersion, Length: len(p), Pool: ID{1}, Generation: 3})
		}
		limit = max(0, limit)
		h, err := decodeNote(p, ID{1}, NoteAccess, limit)
		if err != nil {
			return
		}
		if h.length < 0 || h.length > limit {
			t.Errorf("%d bytes where %d have room", h.length, limit)
		}
		again := make([]byte, block.Size)
		h.encode(again, ID{1})
		if other, err := decodeNote(again, ID{1}, NoteAccess, limit); err != nil || other != h {
			t.Errorf("%+v became %+v, %v", h, other, err)
		}
	})
}
