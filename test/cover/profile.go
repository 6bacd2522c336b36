package main

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"

	"golang.org/x/tools/cover"
)

// block is a run of statements that are executed together.
type block struct {
	file                 string // from the root of the module
	line, col, end, ecol int
}

// pkg is what was counted in a package.
type pkg struct {
	name       string
	statements int
	reached    []int // statements, for each kind of tests
	together   int
	missed     []string // places that nothing reaches, sorted
}

func (p *pkg) add(q pkg) {
	if p.reached == nil {
		p.reached = make([]int, len(q.reached))
	}
	p.statements += q.statements
	p.together += q.together
	for i, n := range q.reached {
		p.reached[i] += n
	}
}

// row writes the line of a table.
func (p *pkg) row(w io.Writer) {
	fmt.Fprintf(w, "| %s | %d |", p.name, p.statements)
	for _, n := range append(slices.Clone(p.reached), p.together) {
		fmt.Fprintf(w, " %.1f |", 100*float64(n)/float64(max(p.statements, 1)))
	}
	fmt.Fprintln(w)
}

// load merges profiles, one for each kind of tests.
func load(files []string) ([]pkg, error) {
	type count struct {
		statements int
		by         []bool
	}
	blocks := map[block]*count{}
	for kind, f := range files {
		profiles, err := cover.ParseProfiles(f)
		if err != nil {
			return nil, fmt.Errorf("read the profile %s: %w; run the tests anew without -old", f, err)
		}
		for _, p := range profiles {
			name := strings.TrimPrefix(p.FileName, module+"/")
			if !slices.Contains(measured, path.Dir(name)) {
				continue
			}
			for _, b := range p.Blocks {
				k := block{name, b.StartLine, b.StartCol, b.EndLine, b.EndCol}
				if blocks[k] == nil {
					blocks[k] = &count{b.NumStmt, make([]bool, len(files))}
				}
				blocks[k].by[kind] = blocks[k].by[kind] || b.Count > 0
			}
		}
	}
	pkgs := map[string]*pkg{}
	sources := map[string]*source{}
	for b, c := range blocks {
		s, err := read(sources, b.file)
		if errors.Is(err, fs.ErrNotExist) {
			continue // removed since
		} else if err != nil {
			return nil, err
		}
		if c.statements == 0 || s.planted(b) {
			continue
		}
		name := path.Dir(b.file)
		p := pkgs[name]
		if p == nil {
			p = &pkg{name: name, reached: make([]int, len(files))}
			pkgs[name] = p
		}
		p.statements += c.statements
		for i, yes := range c.by {
			if yes {
				p.reached[i] += c.statements
			}
		}
		if slices.Contains(c.by, true) {
			p.together += c.statements
		} else {
			p.missed = append(p.missed, s.place(b))
		}
	}
	var out []pkg
	for _, p := range pkgs {
		slices.Sort(p.missed)
		p.missed = slices.Compact(p.missed)
		out = append(out, *p)
	}
	slices.SortFunc(out, func(x, y pkg) int { return strings.Compare(x.name, y.name) })
	return out, nil
}

// source is a file of the program.
type source struct {
	lines  []string
	funcs  []function
	faults []span // what is not in the program without the build tag for planted faults
}

type function struct {
	name string
	span
}

// span is a range of lines.
type span struct{ begin, end int }

func (s span) has(line int) bool { return s.begin <= line && line <= s.end }

func read(known map[string]*source, file string) (*source, error) {
	if s := known[file]; s != nil {
		return s, nil
	}
	text, err := os.ReadFile(filepath.FromSlash(file))
	if err != nil {
		return nil, err
	}
	set := token.NewFileSet()
	f, err := parser.ParseFile(set, file, text, 0)
	if err != nil {
		return nil, err
	}
	s := &source{lines: strings.Split(string(text), "\n")}
	lines := func(n ast.Node) span { return span{set.Position(n.Pos()).Line, set.Position(n.End()).Line} }
	ast.Inspect(f, func(n ast.Node) bool {
		switch n := n.(type) {
		case *ast.FuncDecl:
			s.funcs = append(s.funcs, function{n.Name.Name, lines(n)})
		case *ast.IfStmt:
			if span := lines(n.Body); strings.Contains(s.lines[span.begin-1], "planted.Has(") {
				s.faults = append(s.faults, span)
			}
		}
		return true
	})
	known[file] = s
	return s, nil
}

// planted reports whether a block is part of a planted fault.
func (s *source) planted(b block) bool {
	return slices.ContainsFunc(s.faults, func(f span) bool { return f.has(b.line) && b.end <= f.end })
}

// place names a block: file, function, and the text with which it begins.
func (s *source) place(b block) string {
	name := "-"
	for _, f := range s.funcs {
		if f.has(b.line) {
			name = f.name
		}
	}
	var text []string
	for n := b.line; n <= min(b.end, b.line+1, len(s.lines)); n++ {
		text = append(text, strings.TrimSpace(s.lines[n-1]))
	}
	return fmt.Sprintf("%s %s: %s", b.file, name, strings.TrimSpace(strings.Join(text, " ")))
}
