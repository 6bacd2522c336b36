package region

import (
	"bytes"
	"encoding/hex"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/block"
)

const logBytes = 1 << 20

func create1(t testing.TB, path string) *Region {
	t.Helper()
	r, err := Create(path, Options{Pool: block.PoolID{1, 2, 3}, Owner: "a", Epoch: 4, LogBytes: logBytes})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

func TestCreateOpen(t *testing.T) {
	path := filepath.Join(t.TempDir(), "r")
	r := create1(t, path)
	if len(r.Log()) != logBytes {
		t.Fatalf("log of %d bytes", len(r.Log()))
	}
	copy(r.Log()[logBytes-4:], "tail")
	r.Beat()
	r.Beat()
	r.SetState(StateServing)
	r.SetCommitted(7, 70)
	r.SetCommitted(8, 80)
	r.Announce()

	p, err := Open(path, true)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	if string(p.Log()[logBytes-4:]) != "tail" {
		t.Error("the log is another one")
	}
	cp, seq := p.Committed()
	if p.Heartbeat() != 2 || p.State() != StateServing || cp != 8 || seq != 80 || p.Announced() != 1 || p.Epoch() != 4 {
		t.Errorf("heartbeat %d state %v committed %d/%d announced %d epoch %d", p.Heartbeat(), p.State(), cp, seq, p.Announced(), p.Epoch())
	}
	h := p.Header()
	boot, err := BootID()
	if err != nil {
		t.Fatal(err)
	}
	if h.Pool != (block.PoolID{1, 2, 3}) || h.Owner != "a" || h.Epoch != 4 || h.BootID != boot || h.ID != r.Header().ID || h.Medium.Note == "" {
		t.Errorf("header %+v", h)
	}
	if err := p.SetOwner("b", 5); !errors.Is(err, block.ErrReadOnly) {
		t.Errorf("owner through a read-only map: %v", err)
	}

	// Takeover: the reader sees the new owner without opening again.
	if err := r.SetOwner("b", 5); err != nil {
		t.Fatal(err)
	}
	if h := p.Header(); h.Owner != "b" || h.Epoch != 5 || p.Epoch() != 5 || h.Medium.Path == "" {
		t.Errorf("after takeover %+v", h)
	}
	if err := r.SetOwner("a", 4); !errors.Is(err, block.ErrStale) {
		t.Errorf("lower epoch: %v", err)
	}
	if err := r.SetOwner(strings.Repeat("x", 65), 6); !errors.Is(err, block.ErrInvalid) || r.Epoch() != 5 {
		t.Errorf("long owner: %v, epoch %d", err, r.Epoch())
	}

	if _, err := Create(path, Options{LogBytes: logBytes}); !errors.Is(err, block.ErrExists) {
		t.Errorf("create over a region: %v", err)
	}
	if err := r.Remove(); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(path, false); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("open a removed region: %v", err)
	}
	if left, _ := os.ReadDir(filepath.Dir(path)); len(left) != 0 {
		t.Errorf("left over: %v", left)
	}
}

// A removed and created-again name is not removed by the former region.
func TestRemoveOnlyOwn(t *testing.T) {
	path := filepath.Join(t.TempDir(), "r")
	r := create1(t, path)
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	create1(t, path)
	if err := r.Remove(); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Error("the second region is gone")
	}
}

func TestCreateRefuses(t *testing.T) {
	dir := t.TempDir()
	for name, o := range map[string]Options{
		"empty log":  {},
		"huge log":   {LogBytes: 1 << 62},
		"long owner": {LogBytes: 4096, Owner: strings.Repeat("x", 65)},
		"zero byte":  {LogBytes: 4096, Owner: "a\x00"},
	} {
		if _, err := Create(filepath.Join(dir, "r"), o); !errors.Is(err, block.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if left, _ := os.ReadDir(dir); len(left) != 0 {
		t.Errorf("left over: %v", left)
	}
}

func TestOpenRefuses(t *testing.T) {
	for name, spoil := range map[string]func(t *testing.T, path string) error{
		"truncated": func(_ *testing.T, p string) error { return os.Truncate(p, 1<<20) },
		"a few bytes": func(_ *testing.T, p string) error {
			return os.Truncate(p, 100)
		},
		"mode":    func(_ *testing.T, p string) error { return os.Chmod(p, 0o644) },
		"symlink": func(_ *testing.T, p string) error { return errors.Join(os.Rename(p, p+"x"), os.Symlink(p+"x", p)) },
		"folder":  func(_ *testing.T, p string) error { return errors.Join(os.Remove(p), os.Mkdir(p, 0o700)) },
		"pipe":    func(_ *testing.T, p string) error { return errors.Join(os.Remove(p), unix.Mkfifo(p, 0o600)) },
		"zeroes":  func(_ *testing.T, p string) error { return os.WriteFile(p, make([]byte, 1<<20), 0o600) },
		"hole": func(_ *testing.T, p string) error {
			f, err := os.OpenFile(p, os.O_RDWR, 0)
			if err != nil {
				return err
			}
			defer f.Close()
			return unix.Fallocate(int(f.Fd()), unix.FALLOC_FL_PUNCH_HOLE|unix.FALLOC_FL_KEEP_SIZE, 64<<10, 64<<10)
		},
	} {
		t.Run(name, func(t *testing.T) {
			path := filepath.Join(t.TempDir(), "r")
			if err := create1(t, path).Close(); err != nil {
				t.Fatal(err)
			}
			if err := spoil(t, path); err != nil {
				t.Fatal(err)
			}
			for _, ro := range []bool{true, false} {
				r, err := Open(path, ro)
				if err == nil {
					_ = r.Close()
					t.Fatal("opened")
				}
				t.Log(err)
			}
		})
	}
}

// Either copy of the header may be damaged in any bit, or half rewritten.
func TestHeaderCopies(t *testing.T) {
	path := filepath.Join(t.TempDir(), "r")
	r := create1(t, path)
	want := r.Header()
	pages := bytes.Clone(r.mem[:2*pageSize])
	for page := range 2 {
		for bit := range headerLen * 8 {
			at := page*pageSize + bit/8
			pages[at] ^= 1 << (bit % 8)
			var h Header
			if err := h.decodeTwice(pages); err != nil || h.ID != want.ID || h.Owner != want.Owner || h.Size != want.Size {
				t.Fatalf("page %d bit %d: %v, %+v", page, bit, err, h)
			}
			pages[at] ^= 1 << (bit % 8)
		}
	}
	// A killed rewriting: the new header cut off after any word.
	next := want
	next.Owner, next.Epoch, next.generation = "b", 5, want.generation+1
	var p [headerLen]byte
	if err := next.encode(p[:]); err != nil {
		t.Fatal(err)
	}
	for stores := range 2 * headerLen / 8 {
		torn := bytes.Clone(pages)
		copy(torn, p[:min(stores*8, headerLen)])
		copy(torn[pageSize:], p[:max(0, stores*8-headerLen)])
		var h Header
		if err := h.decodeTwice(torn); err != nil || h.Owner != "a" && h.Owner != "b" {
			t.Fatalf("after %d stores: %v, %+v", stores, err, h)
		}
	}
}

// The stored bytes of layout version 1.
func TestGolden(t *testing.T) {
	h := Header{
		ID: "00112233-4455-6677-8899-aabbccddeeff", BootID: "ffeeddcc-bbaa-9988-7766-554433221100",
		Pool: block.PoolID{0xaa, 0xbb}, Owner: "guest-a", Epoch: 0x1234, Size: 2 << 20, generation: 9,
		Sections: []Section{{SectionLog, firstAt, 1 << 20}},
	}
	var p [headerLen]byte
	if err := h.encode(p[:]); err != nil {
		t.Fatal(err)
	}
	golden(t, "testdata/header.hex", p[:])
	var back Header
	if err := back.decode(p[:]); err != nil || back.Owner != h.Owner || back.ID != h.ID || back.Sections[0] != h.Sections[0] {
		t.Errorf("%v, %+v", err, back)
	}
	h.Size, h.Sections = 6<<20, append(h.Sections, Section{SectionIndex, 4 << 20, 2 << 20})
	clear(p[:])
	if err := h.encode(p[:]); err != nil {
		t.Fatal(err)
	}
	golden(t, "testdata/header-index.hex", p[:])
	if err := back.decode(p[:]); err != nil || !slices.Equal(back.Sections, h.Sections) {
		t.Errorf("%v, %+v", err, back)
	}
}

// golden compares with a file of hexadecimal bytes. A format that changes
// gets a new version and a new file, made by hand from this message.
func golden(t *testing.T, file string, got []byte) {
	t.Helper()
	text, err := os.ReadFile(file)
	if err != nil {
		t.Errorf("%v; the bytes are\n%s", err, hex.Dump(got))
	}
	want, err := hex.DecodeString(strings.Join(strings.Fields(string(text)), ""))
	if err != nil || !bytes.Equal(want, got) {
		t.Errorf("%s: %v\n got %x\nwant %x", file, err, got, want)
	}
}

func FuzzHeader(f *testing.F) {
	h := Header{
		ID: "00112233-4455-6677-8899-aabbccddeeff", BootID: "ffeeddcc-bbaa-9988-7766-554433221100",
		Owner: "a", Size: 2 << 20, Sections: []Section{{SectionLog, firstAt, 1 << 20}},
	}
	var p [headerLen]byte
	if err := h.encode(p[:]); err != nil {
		f.Fatal(err)
	}
	f.Add(p[64:])
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, body []byte) {
		// The checksum is made right: it is the fields that are wrong.
		var p [headerLen]byte
		copy(p[64:], body)
		seal(p[:])
		var h Header
		if err := h.decode(p[:]); err != nil {
			return
		}
		if h.Size < firstAt || h.Size > maxSize {
			t.Fatalf("size %d", h.Size)
		}
		end := int64(firstAt)
		for _, s := range h.Sections {
			if s.Offset < end || s.Length <= 0 || s.Offset+s.Length > h.Size {
				t.Fatalf("section %+v of %d bytes", s, h.Size)
			}
			end = s.Offset + s.Length
		}
		if len(h.Sections) > 0 {
			if base := h.Fixed(); base < h.Sections[0].end() || base > h.Size || len(h.Sections) > 1 && base > h.Sections[1].Offset {
				t.Fatalf("what stays ends at %d: %+v", base, h)
			}
			s := Section{Kind: SectionIndex, Length: h.unit()}
			h.place(&s)
			h.insert(s)
			for i, next := range h.Sections[1:] {
				if next.Offset < h.Sections[i].end() || next.end() > h.Size {
					t.Fatalf("a new section %+v of %+v", s, h.Sections)
				}
			}
		}
	})
}
