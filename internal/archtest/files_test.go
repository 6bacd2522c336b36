package archtest

import (
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// files is what opens, reads or writes files by itself, and what for. Everything else
// reaches what lies on devices through hpdi alone, so that each byte of a pool passes one
// interface: there it can be traced, spoilt and cut off by tests, mirrored and moved to
// flash. A name ends in .go where one file of a package may and the others may not.
var files = map[string]string{
	"internal/cli":                "settings, reports and output for people",
	"internal/config":             "settings and state of the pair",
	"internal/crash":              "reports of guests that failed",
	"internal/domain/...":         "processes and what the kernel tells of them",
	"internal/estimate":           "files and devices of people, read in place of a pool's",
	"internal/export/...":         "sockets, and descriptors of events",
	"internal/guest/check.go":     "what the kernel tells of memory",
	"internal/guest/lastwords.go": "the file for what is left of a failure",
	"internal/guest/memory.go":    "what the kernel tells of the guest's memory",
	"internal/guest/process.go":   "descriptors that the agent passes on",
	"internal/guest/serve.go":     "descriptors that the agent passes on",
	"internal/guest/service.go":   "descriptors that the agent passes on",
	"internal/guest/spare.go":     "the pipe of a spare process",
	"internal/host":               "the agent's own files; it touches no device",
	"internal/eventfd":            "event descriptors that a peer has too",
	"internal/identity":           "sockets and addresses",
	"internal/region":             "shared memory, which is a file of a tmpfs",
	"internal/restart":            "the record, which lies beside the pair",
}

// opens are the functions that reach a file.
var opens = map[string][]string{
	"os": {"Open", "OpenFile", "OpenRoot", "OpenInRoot", "Create", "CreateTemp", "NewFile", "ReadFile", "WriteFile", "Truncate"},
	"unix": {
		"Open", "Openat", "Openat2", "Creat", "Read", "Readv", "Pread", "Preadv", "Preadv2", "Write", "Writev", "Pwrite", "Pwritev", "Pwritev2",
		"Fallocate", "Fsync", "Fdatasync", "SyncFileRange", "CopyFileRange", "Sendfile", "Splice",
	},
}

func TestDevicesByInterfaceAlone(t *testing.T) {
	used := map[string]bool{}
	for _, p := range list(t) {
		path, ok := name(p.ImportPath)
		if !ok || !strings.HasPrefix(path, "internal/") {
			continue
		}
		for _, file := range p.GoFiles {
			fset := token.NewFileSet()
			f, err := parser.ParseFile(fset, filepath.Join(p.Dir, file), nil, parser.SkipObjectResolution)
			if err != nil {
				continue // the compiler says it better
			}
			found := opened(fset, f)
			if len(found) == 0 {
				continue
			}
			allowed := false
			for pattern := range files {
				if match(pattern, path) || pattern == path+"/"+file {
					allowed, used[pattern] = true, true
				}
			}
			if !allowed {
				t.Errorf("%s: %s; devices are reached through hpdi alone, and other files by who stands in the table of this test", path, strings.Join(found, ", "))
			}
		}
	}
	for _, pattern := range slices.Sorted(maps.Keys(files)) {
		if !used[pattern] {
			t.Errorf("%s opens no file any more: take it out of the table", pattern)
		}
	}
}

// opened returns where a file of the program reaches a file by itself.
func opened(fset *token.FileSet, f *ast.File) []string {
	names := map[string]string{} // as the file calls the packages
	for _, imp := range f.Imports {
		of := map[string]string{"os": "os", "syscall": "unix", "golang.org/x/sys/unix": "unix"}[strings.Trim(imp.Path.Value, `"`)]
		if of == "" {
			continue
		}
		as := filepath.Base(strings.Trim(imp.Path.Value, `"`))
		if imp.Name != nil {
			as = imp.Name.Name
		}
		names[as] = of
	}
	var found []string
	ast.Inspect(f, func(n ast.Node) bool {
		if s, ok := n.(*ast.SelectorExpr); ok {
			if x, ok := s.X.(*ast.Ident); ok && slices.Contains(opens[names[x.Name]], s.Sel.Name) {
				pos := fset.Position(s.Pos())
				found = append(found, fmt.Sprintf("%s:%d has %s.%s", filepath.Base(pos.Filename), pos.Line, x.Name, s.Sel.Name))
			}
		}
		return true
	})
	return found
}

// The test finds what it is for, under whatever name.
func TestOpened(t *testing.T) {
	for source, want := range map[string]int{
		"package x\nimport \"os\"\nfunc f() { os.Open(\"\"); os.Stat(\"\") }":                                              1,
		"package x\nimport sys \"golang.org/x/sys/unix\"\nfunc f() { sys.Pread(0, nil, 0); g := sys.Open; g(\"\", 0, 0) }": 2,
		"package x\nimport \"syscall\"\nfunc f() { syscall.Write(0, nil) }":                                                1,
		"package x\nfunc f() { os.Open() }\ntype t struct{}\nvar os t\nfunc (t) Open() {}":                                 0,
	} {
		fset := token.NewFileSet()
		f, err := parser.ParseFile(fset, "x.go", source, 0)
		if err != nil {
			t.Fatal(err)
		}
		if got := opened(fset, f); len(got) != want {
			t.Errorf("%s: %v", source, got)
		}
	}
}
