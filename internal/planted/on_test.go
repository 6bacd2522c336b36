//go:build planted

package planted

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io/fs"
	"path/filepath"
	"strings"
	"testing"
)

func TestSelect(t *testing.T) {
	defer func() { _ = Select("") }()
	for _, i := range All() {
		if err := Select(i.Name); err != nil {
			t.Fatal(err)
		}
		for _, j := range All() {
			if Has(Fault(j.Name)) != (j.Name == i.Name) {
				t.Errorf("with %s selected, Has(%s) is %t", i.Name, j.Name, j.Name != i.Name)
			}
		}
	}
	if err := Select("no-such-fault"); err == nil || !strings.Contains(err.Error(), string(DataSyncMissing)) {
		t.Errorf("an unknown name is answered with %v", err)
	}
	if err := Select(""); err != nil || Has(Fault(All()[0].Name)) {
		t.Errorf("nothing is selected: %v, %t", err, Has(Fault(All()[0].Name)))
	}
}

// TestPlaces: each fault is in the table once, and in the program once, where
// the table says.
func TestPlaces(t *testing.T) {
	want := map[string]string{}
	for _, i := range All() {
		if want[i.Name] != "" || i.What == "" || i.Where == "" || i.Class == "" {
			t.Errorf("%s is in the table twice, or says nothing", i.Name)
		}
		want[i.Name] = i.Where
	}
	names := constants(t)
	for _, name := range names {
		if want[name] == "" {
			t.Errorf("%s is not in the table", name)
		}
	}
	found := map[string]string{}
	err := filepath.WalkDir("..", func(path string, d fs.DirEntry, err error) error {
		if err != nil || filepath.Ext(path) != ".go" || strings.HasSuffix(path, "_test.go") || filepath.Base(filepath.Dir(path)) == "planted" {
			return err
		}
		f, err := parser.ParseFile(token.NewFileSet(), path, nil, parser.SkipObjectResolution)
		if err != nil {
			return err
		}
		pkg := "internal/" + filepath.ToSlash(filepath.Dir(strings.TrimPrefix(path, "../")))
		for _, decl := range f.Decls {
			fn, ok := decl.(*ast.FuncDecl)
			if !ok {
				continue
			}
			ast.Inspect(fn, func(n ast.Node) bool {
				call, ok := n.(*ast.CallExpr)
				if !ok || !selects(call.Fun, "Has") || len(call.Args) != 1 {
					return true
				}
				name := names[call.Args[0].(*ast.SelectorExpr).Sel.Name]
				if found[name] != "" {
					t.Errorf("%s is planted twice: %s, %s", name, found[name], pkg)
				}
				found[name] = pkg + ": " + function(fn)
				return true
			})
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	for name, where := range want {
		if found[name] != where {
			t.Errorf("%s is planted in %q, the table says %q", name, found[name], where)
		}
	}
}

// constants returns the names of the faults by those of their constants.
func constants(t *testing.T) map[string]string {
	f, err := parser.ParseFile(token.NewFileSet(), "faults.go", nil, 0)
	if err != nil {
		t.Fatal(err)
	}
	names := map[string]string{}
	ast.Inspect(f, func(n ast.Node) bool {
		if v, ok := n.(*ast.ValueSpec); ok {
			names[v.Names[0].Name] = strings.Trim(v.Values[0].(*ast.BasicLit).Value, `"`)
		}
		return true
	})
	return names
}

func selects(e ast.Expr, name string) bool {
	s, ok := e.(*ast.SelectorExpr)
	if !ok {
		return false
	}
	x, ok := s.X.(*ast.Ident)
	return ok && x.Name == "planted" && s.Sel.Name == name
}

// function returns a function's name, after its receiver's type.
func function(fn *ast.FuncDecl) string {
	if fn.Recv == nil {
		return fn.Name.Name
	}
	t := fn.Recv.List[0].Type
	if star, ok := t.(*ast.StarExpr); ok {
		t = star.X
	}
	return fmt.Sprint(t.(*ast.Ident).Name, ".", fn.Name.Name)
}
