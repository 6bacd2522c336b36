package archtest

import (
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/pollux-storage/pollux"

// pkg is what go list says of a package.
type pkg struct {
	ImportPath   string
	Dir          string
	GoFiles      []string
	Imports      []string
	TestImports  []string
	XTestImports []string
}

// name returns the path below the module, and whether it is in the module.
func name(importPath string) (string, bool) {
	return strings.CutPrefix(importPath, module+"/")
}

func TestImports(t *testing.T) {
	pkgs := list(t)
	if len(pkgs) < 5 {
		t.Fatalf("go list names only %d packages", len(pkgs))
	}
	for _, problem := range check(pkgs, layers) {
		t.Error(problem)
	}
}

func TestStepMachines(t *testing.T) {
	for _, p := range list(t) {
		path, _ := name(p.ImportPath)
		l, _, ok := find(layers, path)
		if !ok || !l.steps {
			continue
		}
		fset := token.NewFileSet()
		for _, file := range p.GoFiles {
			f, err := parser.ParseFile(fset, filepath.Join(p.Dir, file), nil, parser.SkipObjectResolution)
			if err != nil {
				continue // the compiler says it better
			}
			for _, problem := range impure(fset, f) {
				t.Errorf("%s; a step machine does not, because %s", problem, l.why)
			}
		}
	}
}

// list returns all packages of the module.
func list(t *testing.T) []pkg {
	t.Helper()
	touch(t)
	// -e: a package that does not compile is the compiler's to report.
	cmd := exec.Command("go", "list", "-e", "-json=ImportPath,Dir,GoFiles,Imports,TestImports,XTestImports", module+"/...")
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v: %s", err, stderr.String())
	}
	var pkgs []pkg
	for dec := json.NewDecoder(bytes.NewReader(out)); ; {
		var p pkg
		if err := dec.Decode(&p); errors.Is(err, io.EOF) {
			return pkgs
		} else if err != nil {
			t.Fatalf("go list: %v", err)
		}
		pkgs = append(pkgs, p)
	}
}

// touch looks at every source file. What go list reads is unknown to the cache
// of test results; without this a passed test would be believed for ever.
func touch(t *testing.T) {
	t.Helper()
	root := filepath.Join("..", "..")
	if _, err := os.Stat(filepath.Join(root, "go.mod")); err != nil {
		t.Fatalf("the module is not where this test expects it: %v", err)
	}
	err := filepath.WalkDir(root, func(path string, d fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, fs.ErrNotExist): // vanished meanwhile
			return nil
		case err != nil:
			return err
		case d.IsDir() && path != root && (strings.HasPrefix(d.Name(), ".") || d.Name() == "testdata"):
			return fs.SkipDir
		case strings.HasSuffix(path, ".go"):
			_, err = os.Stat(path)
		}
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// check returns what is wrong with the imports of pkgs.
func check(pkgs []pkg, table [][]layer) []string {
	var problems []string
	for _, p := range pkgs {
		path, ok := name(p.ImportPath)
		if !ok {
			continue
		}
		from, depth, ok := find(table, path)
		if !ok {
			problems = append(problems, fmt.Sprintf("%s: unknown package: give it a layer in internal/archtest/layers_test.go", path))
			continue
		}
		forbid := func(imp, why string) {
			problems = append(problems, fmt.Sprintf("%s imports %s: %s", path, imp, why))
		}
		for _, imp := range p.Imports {
			if to, ok := name(imp); ok {
				if why := edge(table, from, depth, path, to); why != "" {
					forbid(to, why)
				}
			}
		}
		for _, imp := range append(slices.Clone(p.TestImports), p.XTestImports...) {
			if to, ok := name(imp); ok && to != path {
				if why := testEdge(table, depth, path, to); why != "" {
					forbid(to+" in a test", why)
				}
			}
		}
	}
	return problems
}

// edge returns why the package path may not import to; empty if it may.
func edge(table [][]layer, from layer, depth int, path, to string) string {
	target, at, ok := find(table, to)
	if !ok {
		return "" // reported as unknown by itself
	}
	if target.tests && !strings.HasPrefix(path, "test/") && !strings.HasPrefix(path, "bench/") { // what lies there is no part of the program
		return fmt.Sprintf("only test files may (%s)", target.why)
	}
	if from.only != nil && !matchAny(from.only, to) {
		return fmt.Sprintf("it may import only %s, because %s", orNothing(from.only), from.why)
	}
	if target.by != nil && !matchAny(target.by, path) {
		return fmt.Sprintf("only %s may, because %s", orNothing(target.by), target.why)
	}
	if at > depth {
		return fmt.Sprintf("imports go down only, and %s lies above (%s)", to, target.why)
	}
	// A list that names a sibling is the exception.
	if at == depth && !matchAny(from.only, to) && !matchAny(target.by, path) {
		return fmt.Sprintf("they are of one layer; what both need belongs below them (%s)", target.why)
	}
	return ""
}

// testEdge is edge for test files, which may use what lies below, and its
// neighbours, without regard to the shorter lists.
func testEdge(table [][]layer, depth int, path, to string) string {
	target, at, ok := find(table, to)
	if !ok || target.tests || at <= depth || strings.HasPrefix(to, path+"/") {
		return ""
	}
	return fmt.Sprintf("imports go down only, in tests too, and %s lies above (%s)", to, target.why)
}

// find returns the entry for a package and how high it lies. A whole path
// goes before a wildcard.
func find(table [][]layer, path string) (layer, int, bool) {
	for _, whole := range []bool{true, false} {
		for depth, row := range table {
			for _, l := range row {
				if whole && l.path == path || !whole && match(l.path, path) {
					return l, depth, true
				}
			}
		}
	}
	return layer{}, 0, false
}

func match(pattern, path string) bool {
	if dir, ok := strings.CutSuffix(pattern, "/..."); ok {
		return path == dir || strings.HasPrefix(path, dir+"/")
	}
	return pattern == path
}

func matchAny(patterns []string, path string) bool {
	return slices.ContainsFunc(patterns, func(p string) bool { return match(p, path) })
}

func orNothing(paths []string) string {
	if len(paths) == 0 {
		return "nothing of the program"
	}
	return strings.Join(paths, ", ")
}

// impure returns the places where a file does what no step machine may.
func impure(fset *token.FileSet, f *ast.File) []string {
	var problems []string
	add := func(n ast.Node, what string) {
		pos := fset.Position(n.Pos())
		problems = append(problems, fmt.Sprintf("%s:%d %s", filepath.Base(pos.Filename), pos.Line, what))
	}
	for _, imp := range f.Imports {
		switch p := strings.Trim(imp.Path.Value, `"`); p {
		case "os", "os/exec", "net", "net/http", "syscall", "golang.org/x/sys/unix", "golang.org/x/sync/errgroup":
			add(imp, "imports "+p)
		}
	}
	ast.Inspect(f, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.GoStmt:
			add(n, "starts a goroutine")
		case *ast.SelectorExpr:
			x, ok := n.X.(*ast.Ident)
			if ok && x.Name == "time" && slices.Contains([]string{"Now", "Since", "Until", "Sleep", "After", "AfterFunc", "NewTimer", "NewTicker", "Tick"}, n.Sel.Name) {
				add(n, "looks at the clock with time."+n.Sel.Name)
			}
		}
		return true
	})
	return problems
}
