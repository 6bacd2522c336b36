package region

import (
	"bytes"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/block"
)

// other is a kind that this program does not use.
const other SectionKind = 99

func add(t testing.TB, r *Region, kind SectionKind, n int64) (Section, []byte) {
	t.Helper()
	s, mem, err := r.AddSection(kind, n)
	if err != nil {
		t.Fatal(err)
	}
	if int64(len(mem)) != s.Length || s.Length < n || bytes.ContainsFunc(mem, func(b rune) bool { return b != 0 }) {
		t.Fatalf("section %+v for %d bytes, of %d bytes or not all zero", s, n, len(mem))
	}
	return s, mem
}

func openAgain(t testing.TB, path string, readOnly bool) *Region {
	t.Helper()
	r, err := Open(path, readOnly)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = r.Close() })
	return r
}

// memoryDir returns a folder for regions of which every byte of memory is counted, as
// disks do not.
func memoryDir(t testing.TB) string {
	t.Helper()
	dir, err := os.MkdirTemp(shm, "pollux-test")
	if err != nil {
		t.Skip("no ", shm)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func fileOf(t testing.TB, path string) (size, memory int64) {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	return st.Size, st.Blocks * 512
}

// Sections come with zeroes, keep what is written to them, and go with their memory,
// whatever other sections there are.
func TestSections(t *testing.T) {
	for _, log := range []int64{logBytes, 3 << 20} {
		path := filepath.Join(memoryDir(t), "r")
		r, err := Create(path, Options{Owner: "a", Epoch: 4, LogBytes: log})
		if err != nil {
			t.Fatal(err)
		}
		copy(r.Log()[log-4:], "tail")
		base := r.Header().Size
		partner := openAgain(t, path, true)
		a, mem := add(t, r, SectionIndex, 70_000)
		copy(mem, "a")
		b, mem := add(t, r, other, 5<<20)
		copy(mem[5<<20-1:], "b")
		unit := int64(pageSize)
		if log > hugePage {
			unit = hugePage
		}
		if a.Offset != base || a.Length != roundUp(70_000, unit) || b.Offset != a.end() || r.Header().Size != b.end() {
			t.Fatalf("%+v %+v in a region of %d", a, b, r.Header().Size)
		}
		if size, _ := fileOf(t, path); size != b.end() {
			t.Errorf("a file of %d bytes and not %d", size, b.end())
		}
		if got := partner.Sections(SectionIndex); !slices.Equal(got, []Section{a}) || len(partner.Log()) != int(log) || partner.Header().Size != b.end() {
			t.Errorf("the partner sees %+v, %d bytes", got, partner.Header().Size)
		}
		if err := r.Close(); err != nil {
			t.Fatal(err)
		}

		r = openAgain(t, path, false)
		if got := r.Sections(other); !slices.Equal(got, []Section{b}) {
			t.Fatalf("%+v", got)
		}
		for s, want := range map[Section]func(mem []byte) bool{
			a: func(mem []byte) bool { return mem[0] == 'a' },
			b: func(mem []byte) bool { return mem[5<<20-1] == 'b' },
		} {
			mem, err := r.MapSection(s)
			if err != nil || !want(mem) {
				t.Errorf("section %+v: %v", s, err)
			}
			if again, err := r.MapSection(s); err != nil || &again[0] != &mem[0] {
				t.Errorf("section %+v is mapped twice: %v", s, err)
			}
		}
		// The first one goes, and a smaller one takes its place; a larger one does not
		// fit there.
		_, before := fileOf(t, path)
		if err := r.RemoveSection(a); err != nil {
			t.Fatal(err)
		}
		if size, memory := fileOf(t, path); size != b.end() || memory != before-a.Length {
			t.Errorf("%d bytes with memory for %d after %d of %d went", size, memory, a.Length, before)
		}
		c, _ := add(t, r, other, a.Length+1)
		d, _ := add(t, r, other, 1)
		if c.Offset != b.end() || d.Offset != a.Offset {
			t.Errorf("%+v %+v", c, d)
		}
		for _, s := range []Section{c, b, d} {
			if err := r.RemoveSection(s); err != nil {
				t.Fatal(err)
			}
		}
		if size, memory := fileOf(t, path); size != base || memory < base || memory >= base+unit || r.Header().Size != base {
			t.Errorf("%d bytes with memory for %d are left of %d", size, memory, base)
		}
		if string(r.Log()[log-4:]) != "tail" || string(partner.Log()[log-4:]) != "tail" {
			t.Error("the log is another one")
		}
	}
}

// Whoever dies at any step of a change leaves a region that opens, with the section or
// without, and from which a tidy owner gets all other memory back.
func TestSectionCrash(t *testing.T) {
	stores := func(r *Region, h Header, n int) error { // the first n words of the next header
		h.generation++
		var p [headerLen]byte
		if err := h.encode(p[:]); err != nil {
			return err
		}
		copy(r.mem, p[:min(n*8, headerLen)])
		copy(r.mem[pageSize:2*pageSize], p[:max(0, n*8-headerLen)])
		return nil
	}
	// What is left is proven, and put right, by others than who died.
	prove := func(what string, path string, base int64, either ...[]Section) {
		t.Helper()
		for _, ro := range []bool{true, false} {
			r, err := Open(path, ro)
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			if got := r.Header().Sections[1:]; !slices.ContainsFunc(either, func(s []Section) bool { return slices.Equal(s, got) }) {
				t.Fatalf("%s: %+v", what, got)
			}
			if string(r.Log()[logBytes-4:]) != "tail" {
				t.Fatalf("%s: the log is another one", what)
			}
			if !ro {
				if err := r.SetOwner("b", r.Epoch()+1); err != nil {
					t.Fatalf("%s: %v", what, err)
				}
				if err := r.Tidy(); err != nil {
					t.Fatalf("%s: %v", what, err)
				}
				want := base
				for _, s := range r.Header().Sections[1:] {
					want += s.Length
				}
				if size, memory := fileOf(t, path); size != r.Header().Size || memory != want {
					t.Fatalf("%s: %d bytes, memory for %d and not for %d", what, size, memory, want)
				}
				for _, s := range r.Header().Sections[1:] {
					if _, err := r.MapSection(s); err != nil {
						t.Fatalf("%s: %v", what, err)
					}
				}
				s, _ := add(t, r, other, 2*pageSize)
				if err := r.RemoveSection(s); err != nil {
					t.Fatalf("%s: %v", what, err)
				}
			}
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
	const words = 2 * headerLen / 8
	// Which words are stored is TestHeaderCopies' business.
	some := func(last int) (steps []int) {
		for i := 0; i < last; i += 7 {
			steps = append(steps, i)
		}
		return append(steps, last-1, last)
	}
	dir := memoryDir(t)
	for _, where := range []string{"at the end", "in a gap"} {
		// Steps of adding: memory, a mapping, and the words of the header.
		for _, step := range append([]int{1}, some(2+words)...) {
			path := filepath.Join(dir, fmt.Sprint(where, " ", step))
			r := create1(t, path)
			copy(r.Log()[logBytes-4:], "tail")
			_, base := fileOf(t, path)
			var had []Section
			if where == "in a gap" {
				gap, mem := add(t, r, other, 4*pageSize)
				mem[0] = 1
				s, _ := add(t, r, other, pageSize)
				if err := r.RemoveSection(gap); err != nil {
					t.Fatal(err)
				}
				had = []Section{s}
			}
			h := r.Header()
			s := Section{Kind: SectionIndex, Length: 3 * pageSize}
			h.place(&s)
			h.insert(s)
			if step == 0 {
				if err := unix.Fallocate(int(r.file.Fd()), 0, s.Offset, s.Length); err != nil {
					t.Fatal(err)
				}
			} else {
				mem, err := r.provide(s, func() bool { return false })
				if err != nil {
					t.Fatal(err)
				}
				mem[0] = 7
			}
			if step > 1 {
				if err := stores(r, h, step-2); err != nil {
					t.Fatal(err)
				}
			}
			prove(fmt.Sprint("adding ", where, ", step ", step), path, base, had, h.Sections[1:])
			_ = r.Remove()
		}
		// Steps of removing: the words of the header, the memory, the end of the file.
		for _, step := range some(words + 1) {
			path := filepath.Join(dir, fmt.Sprint(where, " removing ", step))
			r := create1(t, path)
			copy(r.Log()[logBytes-4:], "tail")
			_, base := fileOf(t, path)
			s, _ := add(t, r, SectionIndex, 3*pageSize)
			if where == "in a gap" {
				add(t, r, other, pageSize)
			}
			h := r.Header()
			had := h.Sections[1:]
			h.Sections = slices.Delete(slices.Clone(h.Sections), 1, 2)
			if h.Size = r.Header().Size; len(h.Sections) == 1 {
				h.Size = s.Offset
			}
			if err := stores(r, h, min(step, words)); err != nil {
				t.Fatal(err)
			}
			if step > words {
				if err := r.punch(s.Offset, s.Length); err != nil {
					t.Fatal(err)
				}
			}
			prove(fmt.Sprint("removing ", where, ", step ", step), path, base, had, h.Sections[1:])
			_ = r.Remove()
		}
	}
}

// Any sequence of changes keeps what the sections hold, and the log.
func TestSectionsRandomly(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 1))
	path := filepath.Join(memoryDir(t), "r")
	r := create1(t, path)
	_, base := fileOf(t, path)
	type held struct {
		Section
		fill byte
	}
	var all []held
	for step := range 120 {
		switch n := rng.IntN(8); {
		case n < 4:
			s, mem, err := r.AddSection(other, 1+rng.Int64N(9*pageSize))
			if full := len(all) == maxSections-1; full != (err != nil) {
				t.Fatalf("seed %d step %d: %v with %d sections", seed, step, err, len(all))
			}
			if err == nil {
				all = append(all, held{s, byte(1 + step)})
				for i := range mem {
					if mem[i] != 0 {
						t.Fatalf("seed %d step %d: a new section is not empty", seed, step)
					}
					mem[i] = byte(1 + step)
				}
			}
		case n < 7 && len(all) > 0:
			i := rng.IntN(len(all))
			if err := r.RemoveSection(all[i].Section); err != nil {
				t.Fatalf("seed %d step %d: %v", seed, step, err)
			}
			all = slices.Delete(all, i, i+1)
		default:
			if err := r.Close(); err != nil {
				t.Fatal(err)
			}
			r = openAgain(t, path, false)
			if err := r.Tidy(); err != nil {
				t.Fatalf("seed %d step %d: %v", seed, step, err)
			}
		}
		want := base
		for _, s := range all {
			mem, err := r.MapSection(s.Section)
			if err != nil || len(bytes.Trim(mem, string([]byte{s.fill}))) != 0 {
				t.Fatalf("seed %d step %d: section %+v: %v", seed, step, s, err)
			}
			want += s.Length
		}
		if size, memory := fileOf(t, path); size != r.Header().Size || memory != want || len(r.Header().Sections) != 1+len(all) {
			t.Fatalf("seed %d step %d: %d bytes, memory for %d and not for %d, %+v", seed, step, size, memory, want, r.Header())
		}
	}
}

// What a partner opens and looks at is whole while the owner changes sections.
func TestSectionsUnderReaders(t *testing.T) {
	path := filepath.Join(memoryDir(t), "r")
	r := create1(t, path)
	copy(r.Log()[logBytes-4:], "tail")
	var wg sync.WaitGroup
	defer wg.Wait()
	stop := make(chan struct{})
	defer close(stop)
	wg.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			s, _, err := r.AddSection(SectionIndex, 64<<10)
			if err == nil {
				err = r.RemoveSection(s)
			}
			if err != nil {
				t.Error(err)
				return
			}
		}
	})
	watch := openAgain(t, path, true)
	for range 150 {
		p, err := Open(path, true)
		if err != nil {
			t.Fatal(err)
		}
		for _, q := range []*Region{p, watch} {
			if h := q.Header(); h.Owner != "a" || string(q.Log()[logBytes-4:]) != "tail" || len(h.Sections) > 2 {
				t.Fatalf("%+v", h)
			}
		}
		in, err := Inspect(path)
		if err != nil || !in.Valid() || string(in.Log()[logBytes-4:]) != "tail" {
			t.Fatalf("%v, %+v", err, in)
		}
		if err := errors.Join(p.Close(), in.Close()); err != nil {
			t.Fatal(err)
		}
	}
}

// What cannot be done changes nothing.
func TestSectionRefusals(t *testing.T) {
	path := filepath.Join(memoryDir(t), "r")
	r := create1(t, path)
	before, memory := fileOf(t, path)
	refused := func(what string, err, kind error) {
		t.Helper()
		if !errors.Is(err, kind) {
			t.Errorf("%s: %v", what, err)
		}
		if size, now := fileOf(t, path); size != before || now != memory {
			t.Errorf("%s: %d bytes with memory for %d", what, size, now)
		}
	}
	_, _, err := r.AddSection(other, 0)
	refused("nothing", err, block.ErrInvalid)
	_, _, err = r.AddSection(other, maxSize)
	refused("too much", err, block.ErrInvalid)
	_, _, err = r.AddSection(other, maxSize/2)
	if err == nil || errors.Is(err, block.ErrInvalid) {
		t.Errorf("more memory than there is: %v", err)
	}
	refused("more memory than there is", err, err)
	log := r.Header().Sections[0]
	refused("the log", r.RemoveSection(log), block.ErrNotFound)
	_, err = r.MapSection(log)
	refused("the log as a section", err, block.ErrNotFound)
	refused("no section", r.RemoveSection(Section{other, log.end(), pageSize}), block.ErrNotFound)
	partner := openAgain(t, path, true)
	_, _, err = partner.AddSection(other, 1)
	refused("through a read-only map", err, block.ErrReadOnly)
	refused("tidy through a read-only map", partner.Tidy(), block.ErrReadOnly)

	s, _ := add(t, r, other, 1)
	before, memory = fileOf(t, path)
	next := openAgain(t, path, false)
	if err := next.SetOwner("b", 5); err != nil {
		t.Fatal(err)
	}
	_, _, err = r.AddSection(other, 1)
	refused("after a takeover", err, block.ErrStale)
	refused("remove after a takeover", r.RemoveSection(s), block.ErrStale)
	refused("tidy after a takeover", r.Tidy(), block.ErrStale)
	if _, err = r.MapSection(s); err != nil {
		t.Errorf("what it has mapped stays mapped: %v", err)
	}
	_, err = r.MapSection(Section{s.Kind, s.end(), s.Length})
	refused("map after a takeover", err, block.ErrStale)
	for range maxSections - 2 {
		add(t, next, other, 1)
	}
	before, memory = fileOf(t, path)
	_, _, err = next.AddSection(other, 1)
	refused("one too many", err, block.ErrInvalid)
}

// A section that is damaged is no reason to refuse a region; a log is.
func TestSectionWithoutMemory(t *testing.T) {
	for _, what := range []string{"hole", "cut off", "hole in the log", "longer"} {
		path := filepath.Join(memoryDir(t), "r")
		r := create1(t, path)
		s, mem := add(t, r, SectionIndex, 128<<10)
		mem[0], mem[100<<10] = 1, 1
		var err error
		switch what {
		case "hole":
			err = r.punch(s.Offset+64<<10, 64<<10)
		case "cut off":
			err = os.Truncate(path, s.Offset+64<<10)
		case "hole in the log":
			err = errors.Join(r.punch(64<<10, 64<<10), unix.Fallocate(int(r.file.Fd()), 0, s.end(), 60<<10))
		case "longer":
			err = os.Truncate(path, 64<<20)
		}
		if err = errors.Join(err, r.Close()); err != nil {
			t.Fatal(err)
		}
		for _, ro := range []bool{true, false} {
			r, err := Open(path, ro)
			if what == "hole in the log" {
				if !errors.Is(err, block.ErrCorrupt) {
					t.Errorf("%s: %v", what, err)
				}
				continue
			}
			if err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			if !ro {
				if err := r.Tidy(); err != nil {
					t.Errorf("%s: %v", what, err)
				}
				mem, err := r.MapSection(s)
				if err != nil {
					t.Fatalf("%s: %v", what, err)
				}
				if mem[0] != 1 || (mem[100<<10] == 1) != (what == "longer") {
					t.Errorf("%s: the section holds something else", what)
				}
				clear(mem) // all of it has memory
				if size, _ := fileOf(t, path); size != s.end() {
					t.Errorf("%s: %d bytes", what, size)
				}
			}
			if err := r.Close(); err != nil {
				t.Error(err)
			}
		}
	}
}

// BenchmarkSection measures what a pool's one goroutine waits for when it makes a section
// of 256 MiB, maps it after a takeover, and takes it out.
func BenchmarkSection(b *testing.B) {
	base := filepath.Join(b.TempDir(), "regions")
	best, err := Dir(base)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = RemoveDir(base) })
	for _, dir := range []string{best.Path, memoryDir(b)} {
		b.Run(fmt.Sprint("huge pages ", mediumOf(dir).HugePages), func(b *testing.B) {
			const n = 256 << 20
			path := filepath.Join(dir, "r")
			r, err := Create(path, Options{Owner: "a", Epoch: 1, LogBytes: 4 << 20})
			if err != nil {
				b.Fatal(err)
			}
			defer func() { _ = r.Remove() }()
			var took [3]time.Duration
			for b.Loop() {
				var s Section
				next := openAgain(b, path, false)
				for i, step := range []func() error{
					func() (err error) { s, _, err = r.AddSection(SectionIndex, n); return err },
					func() error { _, err := next.MapSection(s); return err },
					func() error { return errors.Join(next.Close(), r.RemoveSection(s)) },
				} {
					begun := time.Now()
					if err := step(); err != nil {
						b.Fatal(err)
					}
					took[i] += time.Since(begun)
				}
			}
			for i, what := range []string{"add", "map", "remove"} {
				b.ReportMetric(float64(took[i].Microseconds())/1000/float64(b.N), what+"-ms/op")
			}
		})
	}
}
