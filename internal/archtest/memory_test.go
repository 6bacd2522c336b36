package archtest

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// sharers are the packages whose memory may go to a device that another process serves and
// maps: those that are given a device of any kind. Everybody else has the files and block
// devices of a pool below, and takes memory from hpdi.AllocPrivate. hpdi.Alloc would cost a
// file descriptor for each piece and five system calls instead of one, on the way of each
// takeover, and its pages cannot be given back with MADV_DONTNEED.
var sharers = []string{"hpdi/...", "internal/rawvolume", "internal/devbench", "internal/devcopy", "test/...", "bench/..."}

// TestPrivateMemory: nobody takes memory that can be shared who does not need it.
func TestPrivateMemory(t *testing.T) {
	used := map[string]bool{}
	for _, p := range list(t) {
		path, ok := name(p.ImportPath)
		if !ok || !slices.Contains(p.Imports, module+"/hpdi") {
			continue
		}
		fset := token.NewFileSet()
		for _, file := range p.GoFiles {
			f, err := parser.ParseFile(fset, filepath.Join(p.Dir, file), nil, parser.SkipObjectResolution)
			if err != nil {
				continue // the compiler says it better
			}
			for _, place := range shares(fset, f) {
				i := slices.IndexFunc(sharers, func(s string) bool {
					below, all := strings.CutSuffix(s, "...")
					return path == s || all && strings.HasPrefix(path, below)
				})
				if i < 0 {
					t.Errorf("%s: %s: no other process maps its memory, so hpdi.AllocPrivate is right", path, place)
				} else {
					used[sharers[i]] = true
				}
			}
		}
	}
	for _, s := range sharers {
		if !used[s] {
			t.Errorf("%s takes no memory that can be shared: it is no longer an exception", s)
		}
	}
}

// shares returns the places where a file takes memory that can be shared.
func shares(fset *token.FileSet, f *ast.File) (places []string) {
	ast.Inspect(f, func(n ast.Node) bool {
		if s, ok := n.(*ast.SelectorExpr); ok && s.Sel.Name == "Alloc" {
			if x, ok := s.X.(*ast.Ident); ok && x.Name == "hpdi" {
				pos := fset.Position(n.Pos())
				places = append(places, fmt.Sprintf("%s:%d calls hpdi.Alloc", filepath.Base(pos.Filename), pos.Line))
			}
		}
		return true
	})
	return places
}

func TestShares(t *testing.T) {
	const src = `package p
func f() {
	_, _ = hpdi.AllocPrivate(1)
	_, _ = hpdi.Alloc(1)
	space.Alloc(1)
	g := hpdi.Alloc
}`
	fset := token.NewFileSet()
	f, err := parser.ParseFile(fset, "p.go", src, 0)
	if err != nil {
		t.Fatal(err)
	}
	got := strings.Join(shares(fset, f), "; ")
	if want := "p.go:4 calls hpdi.Alloc; p.go:6 calls hpdi.Alloc"; got != want {
		t.Errorf("found %q, want %q", got, want)
	}
}
