package golden

import (
	"bytes"
	"context"
	"encoding/json"
	"maps"
	"math"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/pool"
	"github.com/pollux-storage/pollux/internal/release"
)

// kindOf returns the kind of a file of testdata.
func kindOf(t *testing.T, path string) kind {
	t.Helper()
	name, _, _ := strings.Cut(filepath.Base(path), "-")
	for _, k := range kinds {
		if k.name == name {
			return k
		}
	}
	t.Fatalf("%s is of no kind", path)
	return kind{}
}

// Pools that were released, or whose host lost power, open with what they held, can be
// written to, and are consistent; and again with what was written then.
func TestGoldenPoolsOpen(t *testing.T) {
	files, err := filepath.Glob("testdata/*.golden")
	if err != nil || len(files) < len(kinds) {
		t.Fatalf("%q, %v", files, err)
	}
	for _, path := range files {
		packed, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		var want content
		text, err := os.ReadFile(strings.TrimSuffix(path, ".golden") + ".json")
		if err == nil {
			err = json.Unmarshal(text, &want)
		}
		if err != nil {
			t.Fatal(err)
		}
		if maps.Equal(want.Region, want.Flushed) {
			t.Errorf("%s holds the same with and without its region", path)
		}
		k := kindOf(t, path)
		t.Run(strings.TrimSuffix(filepath.Base(path), ".golden"), func(t *testing.T) {
			t.Run("region", func(t *testing.T) { opens(t, k, packed, boot, want.Region, want.Session) })
			t.Run("power cut", func(t *testing.T) { opens(t, k, packed, later, want.Flushed, 0) })
		})
	}
}

// knows demands that a pool knows which submission of a session it has, and no other.
func knows(t *testing.T, l *life, id block.SessionID) {
	t.Helper()
	v, err := l.Volume("v")
	if err != nil {
		t.Fatal(err)
	}
	s, err := v.OpenSession(t.Context(), id, sessionQueues, sessionSlots)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Leave()
	for _, counter := range []uint64{tagged.Counter, tagged.Counter + 1} {
		if done, err := s.Done(int(tagged.Queue), int(tagged.Slot), counter); err != nil || done != (counter == tagged.Counter) || s.Fresh() {
			t.Errorf("submission %d done: %t, %v; a session of its own: %t", counter, done, err, s.Fresh())
		}
	}
}

func opens(t *testing.T, k kind, packed []byte, boot string, want map[string]string, session block.SessionID) {
	dir := t.TempDir()
	if _, err := unpack(bytes.NewReader(packed), dir); err != nil {
		t.Fatal(err)
	}
	if boot == later {
		if err := os.Remove(filepath.Join(dir, regionName)); err != nil {
			t.Fatal(err)
		}
	}
	for round := range 2 {
		l, err := k.begin(dir, boot)
		if err != nil {
			t.Fatal(err)
		}
		if session != 0 && round == 0 {
			knows(t, l, session)
		}
		got, err := l.sums()
		if err != nil {
			t.Fatal(err)
		}
		if !maps.Equal(got, want) {
			t.Fatalf("round %d: volumes hold %v, want %v", round, got, want)
		}
		v, err := l.Volume("v")
		if err != nil {
			t.Fatal(err)
		}
		if err := write(v, 6<<20, bytes.Repeat([]byte{byte(round + 1)}, 128<<10)); err != nil {
			t.Fatal(err)
		}
		if err := l.Commit(t.Context()); err != nil {
			t.Fatal(err)
		}
		if err := l.Fold(t.Context()); err != nil {
			t.Fatal(err)
		}
		if want, err = l.sums(); err != nil {
			t.Fatal(err)
		}
		report, err := l.Check(t.Context(), pool.CheckOptions{Data: true})
		if err != nil || len(report.Problems) > 0 {
			t.Errorf("check: %v, %q", err, report.Problems)
		}
		if err := l.end(); err != nil {
			t.Error(err)
		}
		if err := l.Close(context.Background()); err != nil {
			t.Fatal(err)
		}
	}
}

// What is made now opens, too: a set that is added will.
func TestMadeNow(t *testing.T) {
	for _, k := range kinds {
		t.Run(k.name, func(t *testing.T) {
			from := t.TempDir()
			c, err := k.build(from, rand.New(rand.NewPCG(1, 2)))
			if err != nil {
				t.Fatal(err)
			}
			var paths []string
			for _, f := range k.files() {
				paths = append(paths, filepath.Join(from, f))
			}
			var packed bytes.Buffer
			if err := pack(&packed, paths); err != nil {
				t.Fatal(err)
			}
			opens(t, k, packed.Bytes(), boot, c.Region, c.Session)
		})
	}
}

// FuzzUnpack: whatever a file of testdata holds, it is unpacked or refused.
func FuzzUnpack(f *testing.F) {
	files, err := filepath.Glob("testdata/*.golden")
	if err != nil {
		f.Fatal(err)
	}
	for _, path := range files {
		p, err := os.ReadFile(path)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(p[:min(len(p), 1<<10)])
	}
	f.Add([]byte(nil))
	f.Fuzz(func(t *testing.T, p []byte) {
		dir := t.TempDir()
		paths, err := unpack(bytes.NewReader(p), dir)
		for _, path := range paths {
			if filepath.Dir(path) != dir {
				t.Errorf("%s is outside of %s", path, dir)
			}
			if _, serr := os.Stat(path); err == nil && serr != nil {
				t.Error(serr)
			}
		}
	})
}

// Each format that is sealed, and that nobody does without, is there in its newest version:
// another version is in no pool until a further set was made.
func TestGoldenPoolsHaveAllFormats(t *testing.T) {
	files, err := filepath.Glob("testdata/*.golden")
	if err != nil {
		t.Fatal(err)
	}
	newest := map[string]int{}
	for _, path := range files {
		packed, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		paths, err := unpack(bytes.NewReader(packed), t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		for _, path := range paths {
			b, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			for ; len(b) > 0; b = b[128:] {
				if string(b[:3]) != "PLX" {
					continue
				}
				if h, err := ondisk.Open(b, ondisk.Kind(b[:8]), math.MaxUint16); err == nil {
					newest[string(h.Kind)] = max(newest[string(h.Kind)], int(h.Version))
				}
			}
		}
	}
	for _, f := range release.Formats() {
		if f.Kind == "" || f.Advisory {
			continue
		}
		if got := newest[f.Kind]; got != f.ReadsTo {
			t.Errorf("format %s: the newest in testdata is version %d, the program has %d: make a further set, see the package's comment", f.Name, got, f.ReadsTo)
		}
	}
}
