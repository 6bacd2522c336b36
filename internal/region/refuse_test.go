package region

import (
	"encoding/binary"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

// Headers with a good checksum that describe no possible region.
func TestImpossibleHeaders(t *testing.T) {
	path := filepath.Join(t.TempDir(), "r")
	good := create1(t, path).Header()
	le := binary.LittleEndian
	section := func(i int, off, n uint64) func(p []byte) {
		return func(p []byte) {
			le.PutUint32(p[168:], uint32(i+1))
			le.PutUint64(p[tableAt+i*entryLen:], off)
			le.PutUint64(p[tableAt+i*entryLen+8:], n)
		}
	}
	size := uint64(good.Size)
	first := uint64(good.Sections[0].Offset + good.Sections[0].Length)
	for _, test := range []struct {
		name   string
		edit   func(p []byte)
		length int
		word   string
	}{
		{"too short", func([]byte) {}, headerLen - 8, "length 504 instead of 512"},
		{"no size", func(p []byte) { le.PutUint64(p[64:], 0) }, headerLen, "size 0"},
		{"no room for sections", func(p []byte) { le.PutUint64(p[64:], firstAt-pageSize) }, headerLen, "size 12288"},
		{"half a page", func(p []byte) { le.PutUint64(p[64:], size+8) }, headerLen, "size"},
		{"too large", func(p []byte) { le.PutUint64(p[64:], maxSize+pageSize) }, headerLen, "size"},
		{"smaller than its section", func(p []byte) { le.PutUint64(p[64:], first-pageSize) }, headerLen, "section 0"},
		{"too many sections", func(p []byte) { le.PutUint32(p[168:], maxSections+1) }, headerLen, "9 sections"},
		{"section in the header", section(0, firstAt-pageSize, pageSize), headerLen, "section 0"},
		{"empty section", section(0, firstAt, 0), headerLen, "section 0"},
		{"section off a page", section(0, firstAt+8, pageSize), headerLen, "section 0"},
		{"section of half a page", section(0, firstAt, pageSize+8), headerLen, "section 0"},
		{"section beyond the end", section(0, size+pageSize, pageSize), headerLen, "section 0"},
		{"section past the end", section(0, firstAt, size), headerLen, "section 0"},
		{"section that overflows", section(0, firstAt, ^uint64(pageSize-1)), headerLen, "section 0"},
		{"overlapping sections", section(1, first-pageSize, pageSize), headerLen, "section 1"},
	} {
		p := make([]byte, pageSize)
		if err := good.encode(p); err != nil {
			t.Fatal(err)
		}
		test.edit(p)
		ondisk.Seal(p, ondisk.Header{Kind: ondisk.KindRegion, Version: version, Length: test.length, Pool: good.Pool, Generation: 1})
		var h Header
		if err := h.decode(p); !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), test.word) {
			t.Errorf("%s: %v", test.name, err)
		}
		// In a file both copies say so.
		whole, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		copy(whole, p)
		copy(whole[pageSize:], p)
		bad := path + "x"
		if err := os.WriteFile(bad, whole, 0o600); err != nil {
			t.Fatal(err)
		}
		if r, err := Open(bad, true); !errors.Is(err, block.ErrCorrupt) {
			t.Errorf("%s: %v %v", test.name, r, err)
		}
	}
}

func TestEncodeRefusals(t *testing.T) {
	good := create1(t, filepath.Join(t.TempDir(), "r")).Header()
	for name, edit := range map[string]func(*Header){
		"region id":      func(h *Header) { h.ID = "x" },
		"boot id":        func(h *Header) { h.BootID = "" },
		"sections in a":  func(h *Header) { h.Sections = make([]Section, maxSections+1) },
		"owner \"a\\x00": func(h *Header) { h.Owner = "a\x00b" },
	} {
		h := good
		edit(&h)
		if err := h.encode(make([]byte, pageSize)); !errors.Is(err, block.ErrInvalid) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// The copies of two regions in one file are of neither.
func TestCopiesOfTwoRegions(t *testing.T) {
	dir := t.TempDir()
	a, b := create1(t, filepath.Join(dir, "a")), create1(t, filepath.Join(dir, "b"))
	copy(a.mem[pageSize:2*pageSize], b.mem[:pageSize])
	if _, err := Open(a.Path(), true); !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), "two copies") {
		t.Errorf("%v", err)
	}
	before := a.Header()
	if before.ID == b.Header().ID {
		t.Error("it became the other region")
	}
}

// A region whose log is not its first section, or that has none.
func TestNoLogSection(t *testing.T) {
	for name, edit := range map[string]func(*Header){
		"none":      func(h *Header) { h.Sections = nil },
		"something": func(h *Header) { h.Sections[0].Kind = 99 },
	} {
		r := create1(t, filepath.Join(t.TempDir(), "r"))
		h := r.Header()
		edit(&h)
		for at := 0; at < wordsAt; at += pageSize {
			if err := h.encode(r.mem[at : at+pageSize]); err != nil {
				t.Fatal(err)
			}
		}
		if _, err := Open(r.Path(), false); !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), "first section") {
			t.Errorf("%s: %v", name, err)
		}
		in, err := Inspect(r.Path())
		if err != nil {
			t.Fatal(err)
		}
		if !in.Valid() || in.Log() != nil || len(in.Odd) != 1 || !strings.Contains(in.Odd[0], "first section") {
			t.Errorf("%s: %+v", name, in)
		}
		if err := in.Close(); err != nil {
			t.Error(err)
		}
	}
}

// Whoever only looks sees damage instead of an error.
func TestInspect(t *testing.T) {
	path := filepath.Join(t.TempDir(), "r")
	r := create1(t, path)
	if err := r.SetOwner("b", 5); err != nil {
		t.Fatal(err)
	}
	look := func() *Inspection {
		t.Helper()
		in, err := Inspect(path)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = in.Close() })
		return in
	}
	in := look()
	if !in.Valid() || !in.Copies[0].Wins || !in.Copies[1].Wins || len(in.Odd) != 0 || len(in.Log()) != logBytes ||
		in.Header().Owner != "b" || in.Bytes != r.Header().Size || in.Copies[1].At != pageSize || in.Copies[0].Generation != 2 {
		t.Errorf("%+v", in)
	}
	r.mem[100] ^= 1
	in = look()
	if !in.Valid() || in.Copies[0].Wins || !errors.Is(in.Copies[0].Err, ondisk.ErrChecksum) || !in.Copies[1].Wins || in.Header().Owner != "b" {
		t.Errorf("one copy damaged: %+v", in.Copies)
	}
	r.mem[pageSize] ^= 1
	in = look()
	if in.Valid() || !errors.Is(in.Copies[1].Err, ondisk.ErrMagic) || in.Log() != nil {
		t.Errorf("both copies damaged: %+v", in.Copies)
	}
	r.mem[pageSize] ^= 1
	if err := os.Truncate(path, firstAt+pageSize); err != nil {
		t.Fatal(err)
	}
	in = look()
	if !in.Valid() || in.Log() != nil || len(in.Odd) != 1 || !strings.Contains(in.Odd[0], "20480 bytes") {
		t.Errorf("cut off: %+v", in)
	}
	if err := os.Truncate(path, firstAt-1); err != nil {
		t.Fatal(err)
	}
	if _, err := Inspect(path); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("%v", err)
	}
	if err := errors.Join(os.Remove(path), unix.Mkfifo(path, 0o600)); err != nil {
		t.Fatal(err)
	}
	if _, err := Inspect(path); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("a pipe: %v", err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if _, err := Inspect(path); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v", err)
	}
}

func TestCreateFails(t *testing.T) {
	dir := t.TempDir()
	if _, err := Create(filepath.Join(dir, "no", "r"), Options{LogBytes: 4096}); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("without a folder: %v", err)
	}
	create1(t, filepath.Join(dir, "r"))
	if _, err := Create(filepath.Join(dir, "r"), Options{LogBytes: 4096}); !errors.Is(err, block.ErrExists) {
		t.Errorf("%v", err)
	}
	if left, _ := os.ReadDir(dir); len(left) != 1 {
		t.Errorf("left over: %v", left)
	}
}

func TestStateNames(t *testing.T) {
	for s, want := range map[State]string{StateNew: "new", StateServing: "serving", StateReleased: "released", StateClean: "clean", 9: "state(9)"} {
		if got := s.String(); got != want {
			t.Errorf("%q instead of %q", got, want)
		}
	}
}
