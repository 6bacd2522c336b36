package release

import (
	"cmp"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// packages parses the program's files, by directory below internal/.
func packages(t *testing.T) map[string][]*ast.File {
	t.Helper()
	out := map[string][]*ast.File{}
	fset := token.NewFileSet()
	root := filepath.Join("..")
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		if d.IsDir() && d.Name() == "testdata" {
			return fs.SkipDir
		}
		if d.IsDir() || !strings.HasSuffix(path, ".go") || strings.HasSuffix(path, "_test.go") {
			return nil
		}
		f, err := parser.ParseFile(fset, path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		dir, err := filepath.Rel(root, filepath.Dir(path))
		if err != nil {
			return err
		}
		out[filepath.ToSlash(dir)] = append(out[filepath.ToSlash(dir)], f)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	if len(out) < 20 {
		t.Fatalf("only %d packages", len(out))
	}
	return out
}

// numbers finds the constants of packages that are versions: those whose names end
// with the word and that are whole numbers.
func numbers(pkgs map[string][]*ast.File) map[string]int {
	out := map[string]int{}
	for dir, files := range pkgs {
		for _, f := range files {
			for _, d := range f.Decls {
				g, ok := d.(*ast.GenDecl)
				if !ok || g.Tok != token.CONST {
					continue
				}
				for _, s := range g.Specs {
					v := s.(*ast.ValueSpec)
					for i, n := range v.Names {
						if !strings.HasSuffix(strings.ToLower(n.Name), "version") || i >= len(v.Values) {
							continue
						}
						if lit, ok := v.Values[i].(*ast.BasicLit); ok && lit.Kind == token.INT {
							number, _ := strconv.Atoi(lit.Value)
							out[dir+"."+n.Name] = number
						}
					}
				}
			}
		}
	}
	return out
}

// Each format's own number stands in the table, and the table has no other.
func TestTableHasAllVersions(t *testing.T) {
	have := numbers(packages(t))
	named := map[string]bool{}
	for _, f := range formats {
		n, ok := have[f.number]
		named[f.number] = true
		if !ok {
			t.Errorf("format %s: there is no constant internal/%s", f.Name, f.number)
		} else if n != f.ReadsTo {
			t.Errorf("format %s: internal/%s is %d, and the table says that versions up to %d are read; "+
				"where the version was raised, say in the table which of it is written unasked", f.Name, f.number, n, f.ReadsTo)
		}
	}
	for name, n := range have {
		if !named[name] {
			t.Errorf("internal/%s = %d is the version of a format that is not in the table: add a row to internal/release/formats.go and to docs/format/README.md", name, n)
		}
	}
}

// Whatever is sealed or opened has a row, and its version is a constant that the other
// test finds: a literal in its place would be out of sight.
func TestEverySealedKindIsInTheTable(t *testing.T) {
	pkgs := packages(t)
	kinds := map[string]string{} // name of a constant to its value
	for dir, files := range pkgs {
		for _, f := range files {
			ast.Inspect(f, func(n ast.Node) bool {
				v, ok := n.(*ast.ValueSpec)
				if !ok {
					return true
				}
				for i, name := range v.Names {
					if i < len(v.Values) && strings.HasPrefix(name.Name, "Kind") {
						if lit, ok := v.Values[i].(*ast.BasicLit); ok && lit.Kind == token.STRING && strings.HasPrefix(lit.Value, `"PLX`) {
							kinds[dir+"."+name.Name], _ = strconv.Unquote(lit.Value)
						}
					}
				}
				return true
			})
		}
	}
	used := 0
	for dir, files := range pkgs {
		for _, f := range files {
			ast.Inspect(f, func(n ast.Node) bool {
				call, ok := n.(*ast.CallExpr)
				if !ok || len(call.Args) != 3 || text(call.Fun) != "ondisk.Open" {
					return true
				}
				used++
				if _, ok := call.Args[2].(*ast.BasicLit); ok {
					t.Errorf("package %s opens %s with a literal version: give it a constant whose name ends with Version", dir, text(call.Args[1]))
				}
				name := text(call.Args[1])
				if !strings.Contains(name, "Kind") {
					return true // a variable: the kinds that it can be stand elsewhere
				}
				kind := cmp.Or(kinds[name], kinds[dir+"."+name])
				if kind == "" {
					t.Errorf("package %s opens %s, of which no value is known", dir, name)
				} else if !slices.ContainsFunc(formats, func(f Format) bool { return f.Kind == kind }) {
					t.Errorf("package %s reads structures %q, and the table has none: add a row to internal/release/formats.go", dir, kind)
				}
				return true
			})
		}
	}
	if used < 10 {
		t.Errorf("only %d structures are opened anywhere: the test looks in the wrong place", used)
	}
}

func text(e ast.Expr) string {
	switch e := e.(type) {
	case *ast.Ident:
		return e.Name
	case *ast.SelectorExpr:
		return text(e.X) + "." + e.Sel.Name
	}
	return ""
}

// row is how docs/format/README.md shows a format.
func row(f Format) string {
	writes := strconv.Itoa(f.Writes)
	if f.Writes == 0 {
		writes = "–"
	}
	without := ""
	if f.Advisory {
		without = "yes"
	}
	page := "[" + f.page + "](" + f.page + ")"
	return fmt.Sprintf("| %s | %s | %s | %d to %d | %s | %d | %s |", f.Name, page, f.Place, f.ReadsFrom, f.ReadsTo, writes, f.Asked, without)
}

func TestTableIsDocumented(t *testing.T) {
	p, err := os.ReadFile("../../docs/format/README.md")
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range formats {
		if !strings.Contains(string(p), row(f)) {
			t.Errorf("docs/format/README.md lacks the row\n%s", row(f))
		}
		if _, err := os.Stat("../../docs/format/" + f.page); err != nil {
			t.Errorf("format %s: %v", f.Name, err)
		}
	}
}

func TestThisBuildIsSound(t *testing.T) {
	if err := This().Validate(); err != nil {
		t.Error(err)
	}
	if v := Compare(This(), This()); len(v.Refusals)+len(v.Held)+len(v.Lost) != 0 {
		t.Errorf("a build does not work with itself: %+v", v)
	}
}

// with returns a build with changed rows.
func with(t *testing.T, version, claims string) Build {
	t.Helper()
	b := Build{Version: version, Formats: Formats()}
	if err := claim(b.Formats, claims); err != nil {
		t.Fatal(err)
	}
	if err := b.Validate(); err != nil {
		t.Fatal(err)
	}
	return b
}

func TestCompare(t *testing.T) {
	old := with(t, "1.0", "")
	for _, c := range []struct {
		name, claims         string
		refusals, held, lost string
	}{
		{"the same", "", "", "", ""},
		{"reads more", "superblock=1-7/3/6", "", "", ""},
		{"writes more when asked", "superblock=1-7/3/7", "", "superblock: 2.0 writes version 7 when it is asked to, 1.0 reads 1 to 6", ""},
		{"writes more", "superblock=1-7/7/7", "superblock: 2.0 writes version 7, 1.0 reads 1 to 6", "", ""},
		{"reads less", "operation log=2-2/2/2,index=2-2/2/2",
			"operation log: 1.0 writes version 1, 2.0 reads 2 to 2",
			"", "index: 1.0 writes version 1, 2.0 reads 2 to 2; index: 2.0 writes version 2, 1.0 reads 1 to 1"},
		{"flash of another kind", "flash label=1-2/0/2", "", "flash label: 2.0 writes version 2 when it is asked to, 1.0 reads 1 to 1", ""},
	} {
		v := Compare(old, with(t, "2.0", c.claims))
		for _, x := range []struct {
			what, want string
			got        []string
		}{{"refusals", c.refusals, v.Refusals}, {"held", c.held, v.Held}, {"lost", c.lost, v.Lost}} {
			slices.Sort(x.got)
			if got := strings.Join(x.got, "; "); got != x.want {
				t.Errorf("%s: %s %q, want %q", c.name, x.what, got, x.want)
			}
		}
	}
	// A format that only one of them knows.
	more := with(t, "2.0", "")
	more.Formats = append(more.Formats, Format{Name: "snapshots", Place: OnDevices, Kind: "PLXsnaps", ReadsFrom: 1, ReadsTo: 1, Asked: 1})
	if v := Compare(old, more); len(v.Refusals) != 0 || len(v.Held) != 1 || !strings.Contains(v.Held[0], "1.0 does not know it") {
		t.Errorf("%+v", v)
	}
	more.Formats[len(more.Formats)-1].Writes = 1
	if v := Compare(more, old); len(v.Refusals) != 1 || len(v.Held) != 0 {
		t.Errorf("%+v", v)
	}
}

func TestUnreadable(t *testing.T) {
	old := with(t, "1.0", "")
	got := old.Unreadable([]Seen{{"PLXsuper", 6, "pool p"}, {"PLXsuper", 7, "pool p"}, {"PLXscrub", 9, "pool p"}, {"PLXsnaps", 1, "device d"}})
	want := []string{"pool p has a superblock of version 7, 1.0 reads 1 to 6", `device d has a structure "PLXsnaps", which 1.0 does not know`}
	if !slices.Equal(got, want) {
		t.Errorf("%q", got)
	}
}

func TestClaimsThatMakeNoSense(t *testing.T) {
	for _, c := range []string{"nothing=1-1/1/1", "label", "label=1-1/1", "label=1-1/1/x"} {
		if err := claim(Formats(), c); err == nil {
			t.Errorf("%q is taken", c)
		}
	}
	for _, b := range []Build{{}, {Version: "v"}, {Version: "v", Formats: []Format{{Name: "x", ReadsFrom: 1, ReadsTo: 1, Writes: 2, Asked: 2}}},
		{Version: "v", Formats: []Format{{ReadsFrom: 1, ReadsTo: 1, Writes: 1, Asked: 1}}},
		{Version: "v", Formats: []Format{formats[0], formats[0]}}} {
		if b.Validate() == nil {
			t.Errorf("%+v is valid", b)
		}
	}
}
