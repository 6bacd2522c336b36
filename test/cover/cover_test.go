package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

const source1 = `package pool

func (p *Pool) Close() error {
	if err := p.free(); err != nil {
		return err
	}
	return nil
	if planted.Has(planted.Nothing) {
		if p == nil {
			return nil
		}
	}
}
`

// two profiles of one file: the first reaches the beginning, the second the end.
const (
	profile1 = "mode: atomic\n" + module + "/internal/pool/x.go:4.2,4.33 1 3\n" + module + "/internal/pool/x.go:4.33,6.3 1 0\n" + module + "/internal/pool/x.go:7.2,7.12 1 0\n" + module + "/internal/pool/x.go:9.13,11.4 1 0\n"
	profile2 = "mode: atomic\n" + module + "/internal/pool/x.go:4.33,6.3 1 0\n" + module + "/internal/pool/x.go:7.2,7.12 1 1\n" + module + "/internal/cli/x.go:7.2,7.12 1 1\n"
)

func TestUnreachedBlocksWantReasons(t *testing.T) {
	dir := t.TempDir()
	t.Chdir(dir)
	for name, text := range map[string]string{"internal/pool/x.go": source1, "1.cov": profile1, "2.cov": profile2} {
		if err := os.MkdirAll(filepath.Dir(name), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	pkgs, err := load([]string{"1.cov", "2.cov"})
	if err != nil {
		t.Fatal(err)
	}
	if len(pkgs) != 1 {
		t.Fatalf("packages %v, want the measured one only", pkgs)
	}
	p := pkgs[0]
	if p.statements != 3 || p.reached[0] != 1 || p.reached[1] != 1 || p.together != 2 {
		t.Errorf("counts %+v, want 3 statements, one reached by each, two together", p)
	}
	const place = "internal/pool/x.go Close: if err := p.free(); err != nil { return err"
	if got := strings.Join(told(nil).untold(p), "\n"); got != place {
		t.Errorf("without reasons: %q, want %q", got, place)
	}
	for _, tt := range []struct {
		text        string
		untold, use int
	}{
		{"# It cannot\n# fail.\n" + place, 0, 1},
		{"# Cut short.\ninternal/pool/x.go Close: if err := p.free()", 0, 1},
		{"# Another function.\ninternal/pool/x.go Open: if err := p.free()", 1, 0},
	} {
		r, err := parseReasons("internal-pool.txt", []byte(tt.text))
		if err != nil {
			t.Fatal(err)
		}
		used := 0
		n := len(r.untold(p))
		for _, l := range r[0].places {
			if l.used {
				used++
			}
		}
		if n != tt.untold || used != tt.use {
			t.Errorf("%q: %d untold, %d used; want %d, %d", tt.text, n, used, tt.untold, tt.use)
		}
		if page := string(report(pkgs, r)); !strings.Contains(page, "| internal/pool | 3 | 33.3 | 33.3 | 66.7 |") || !strings.Contains(page, "### internal/pool") {
			t.Errorf("the page:\n%s", page)
		}
	}
}

func TestPlaceWithoutReasonIsRefused(t *testing.T) {
	if _, err := parseReasons("f.txt", []byte("\ninternal/pool/x.go Close: return err\n")); err == nil || !strings.Contains(err.Error(), "f.txt:2") {
		t.Errorf("got %v, want an error that names the line", err)
	}
}

// Every place that is written down names a file and a function of the program.
func TestReasonsNamePlacesThatExist(t *testing.T) {
	t.Chdir("../..")
	all, err := loadReasons(reasons)
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]*source{}
	for _, r := range all {
		for _, l := range r.places {
			file, rest, _ := strings.Cut(l.text, " ")
			fn, _, _ := strings.Cut(rest, ":")
			s, err := read(files, file)
			if err != nil {
				t.Errorf("%s: %q: %v", r.file, l.text, err)
				continue
			}
			found := fn == "-"
			for _, f := range s.funcs {
				found = found || f.name == fn
			}
			if !found {
				t.Errorf("%s: %q: %s has no function %s", r.file, l.text, file, fn)
			}
		}
	}
}
