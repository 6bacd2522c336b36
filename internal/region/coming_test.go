package region

import (
	"bytes"
	"errors"
	"path/filepath"
	"slices"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
)

// While the host finds memory for a section others come and go beside it, and it gets the
// place that was kept for it, or leaves nothing when it is given up or comes too late.
func TestSectionComing(t *testing.T) {
	for _, how := range []string{"made", "given up", "too late"} {
		path := filepath.Join(memoryDir(t), "r")
		r := create1(t, path)
		first, mem := add(t, r, other, 70_000)
		copy(mem, "first")
		_, before := fileOf(t, path)
		var beside Section
		step := 0
		s, mem, err := r.AddSectionUnless(SectionCache, 3*clearAtOnce, func() bool {
			switch step++; step {
			case 1:
				beside, mem = add(t, r, other, 50_000)
				copy(mem, "beside")
				if n := len(r.Sections(SectionCache)); n != 0 {
					t.Errorf("%d sections are named before they have memory", n)
				}
			case 2:
				if err := r.RemoveSection(first); err != nil {
					t.Error(err)
				}
				if err := r.Tidy(); err != nil {
					t.Error(err)
				}
				first, mem = add(t, r, other, 60_000) // where it was
				copy(mem, "again")
				if err := r.RemoveSection(beside); err != nil {
					t.Error(err)
				}
				if how == "too late" {
					if err := openAgain(t, path, false).SetOwner("b", 9); err != nil {
						t.Error(err)
					}
				}
			case 3:
				return how == "given up"
			}
			return false
		})
		sections := r.Header().Sections[1:]
		switch how {
		case "made":
			if err != nil || len(mem) != 3*clearAtOnce || bytes.ContainsFunc(mem, func(b rune) bool { return b != 0 }) || !slices.Equal(sections, []Section{first, s}) {
				t.Fatalf("%v, %+v beside %+v", err, s, sections)
			}
			mem[0], mem[len(mem)-1] = 1, 1
			if err := r.RemoveSection(s); err != nil {
				t.Error(err)
			}
		case "given up":
			if !errors.Is(err, block.ErrClosed) || mem != nil || !slices.Equal(sections, []Section{first}) {
				t.Errorf("%v, %+v", err, sections)
			}
		default:
			if !errors.Is(err, block.ErrStale) || mem != nil || !slices.Equal(sections, []Section{first}) {
				t.Errorf("%v, %+v", err, sections)
			}
		}
		if size, after := fileOf(t, path); after > before || size > first.end() {
			t.Errorf("%s: %d bytes of memory became %d, the file has %d", how, before, after, size)
		}
		if got, err := r.MapSection(first); err != nil || string(got[:5]) != "again" {
			t.Errorf("%s: %q, %v", how, got[:5], err)
		}
		if len(r.coming) != 0 {
			t.Errorf("%s: %+v are still coming", how, r.coming)
		}
	}
}
