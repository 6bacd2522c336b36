package archtest

import (
	"go/parser"
	"go/token"
	"strings"
	"testing"
)

// TestTable: the table is consistent in itself.
func TestTable(t *testing.T) {
	seen := map[string]bool{}
	for depth, row := range layers {
		for _, l := range row {
			if l.path == "" || l.why == "" || seen[l.path] {
				t.Errorf("layer %d: %q is twice in the table, or lacks path or reason", depth, l.path)
			}
			seen[l.path] = true
			for _, o := range append(append([]string{}, l.only...), l.by...) {
				if _, _, ok := find(layers, strings.TrimSuffix(o, "/...")); !ok {
					t.Errorf("%s names %s, which is not in the table", l.path, o)
				}
			}
		}
	}
}

// TestRules: the rules forbid what they should, with a reason, and no more.
func TestRules(t *testing.T) {
	tests := []struct {
		from, to string
		test     bool
		want     string // part of the message; empty: allowed
	}{
		{from: "internal/cache", to: "internal/block"},
		{from: "internal/cp", to: "internal/oplog"},
		{from: "internal/guest", to: "internal/export/nbd"},
		{from: "internal/guest", to: "hpdi/file"},
		{from: "cmd/pollux", to: "internal/cli"},
		{from: "test/sim", to: "internal/partner"},
		{from: "bench/dedup", to: "internal/block/blocktest"},
		{from: "internal/pool", to: "internal/volume"},
		{from: "internal/cp", to: "internal/block/blocktest", test: true},
		{from: "internal/block", to: "internal/block/blocktest", test: true},
		{from: "internal/space", to: "hpdi/hpditest", test: true},
		{from: "internal/export/nbd", to: "internal/pool", test: true},

		{from: "hpdi", to: "internal/block", want: "exports no internal type"},
		{from: "hpdi/file", to: "internal/ondisk", want: "it may import only hpdi"},
		{from: "hpdi/file", to: "hpdi/mem", want: "it may import only hpdi"},
		{from: "internal/oplog", to: "internal/cp", want: "it may import only"},
		{from: "internal/table", to: "internal/block", want: "it may import only hpdi"},
		{from: "internal/space", to: "internal/cp", want: "imports go down only"},
		{from: "internal/space", to: "internal/cp", test: true, want: "in tests too"},
		{from: "internal/space", to: "internal/blockio", want: "of one layer"},
		{from: "internal/cp", to: "internal/block/blocktest", want: "only test files may"},
		{from: "internal/export/nbd", to: "internal/volume", want: "it may import only internal/block"},
		{from: "internal/volume", to: "hpdi/file", want: "nobody but who assembles"},
		{from: "internal/partner", to: "internal/control", want: "pure machine"},
		{from: "internal/host", to: "internal/cli", want: "nothing calls commands"},
		{from: "cmd/pollux", to: "internal/guest", want: "main is for starting"},
		{from: "internal/util", to: "internal/block", want: "give it a layer"},
	}
	for _, tt := range tests {
		p := pkg{ImportPath: module + "/" + tt.from}
		if tt.test {
			p.XTestImports = []string{module + "/" + tt.to, "testing"}
		} else {
			p.Imports = []string{module + "/" + tt.to, "fmt"}
		}
		got := strings.Join(check([]pkg{p}, layers), "\n")
		if tt.want == "" && got != "" || tt.want != "" && (!strings.Contains(got, tt.want) || strings.Contains(got, "\n")) {
			t.Errorf("%s imports %s (test: %t): %q, want %q", tt.from, tt.to, tt.test, got, tt.want)
		}
	}
}

func TestImpure(t *testing.T) {
	const src = `package p
import ("os"; "time")
func f() {
	go f()
	_ = time.Now()
	_ = time.Second
}`
	fset := token.NewFileSet()
	f, err := parser.ParseFile(fset, "p.go", src, 0)
	if err != nil {
		t.Fatal(err)
	}
	got := strings.Join(impure(fset, f), "; ")
	if want := "p.go:2 imports os; p.go:4 starts a goroutine; p.go:5 looks at the clock with time.Now"; got != want {
		t.Errorf("found %q, want %q", got, want)
	}
}
