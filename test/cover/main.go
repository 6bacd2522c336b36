// Command cover measures which statements of the storage and failover packages
// the tests reach, and demands a reason for each block that nothing reaches.
//
// Three kinds of tests are measured apart: those of the packages, the simulator
// of test/sim, and real pairs (test/e2e and test/campaign with a program built
// to count; what a guest counted before it was killed with -9 is lost with it).
//
// A block that nothing reaches is named by its file, its function and the text
// where it begins, which outlives the lines above it. The files in unreached/
// give the reasons. A line that begins with # is a reason, and the places below
// it, up to the next reason, are those that it explains:
//
//	# The kernel does not refuse to unmap what it has mapped.
//	internal/region/region.go Close: if err != nil { return fmt.Errorf(
//
// What is missing there is printed in this form, and the exit status is 1. A
// line may be cut where the rest is not needed to tell the place from others.
//
//	go run ./test/cover                   measure, and write docs/coverage.md
//	go run ./test/cover -old              the same with the profiles of last time
//	go run ./test/cover -old -only PKG    only print what PKG has untold, for example internal/pool
package main

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
)

const (
	module  = "github.com/pollux-storage/pollux"
	reasons = "test/cover/unreached"
	page    = "docs/coverage.md"
)

// measured are the packages whose coverage is looked at: the data path and the
// failover, but not what only tests use.
var measured = []string{
	"hpdi", "hpdi/file", "hpdi/mem",
	"internal/block", "internal/blockio", "internal/blockmap", "internal/cache", "internal/catalogue", "internal/cp",
	"internal/dedup", "internal/devices", "internal/dirty", "internal/domain/process", "internal/estimate", "internal/export/nbd",
	"internal/guest", "internal/host",
	"internal/identity", "internal/ondisk", "internal/oplog", "internal/partner", "internal/pool", "internal/region",
	"internal/space", "internal/volume",
}

// kinds of tests, in the order of the table's columns.
var kinds = []struct{ name, file string }{
	{"packages", "packages.cov"},
	{"simulator", "simulator.cov"},
	{"pairs", "pairs.cov"},
}

func main() {
	dir := flag.String("dir", "out/cover", "where the profiles are kept")
	old := flag.Bool("old", false, "do not run the tests: use the profiles of last time")
	only := flag.String("only", "", "print what this package has untold, and write nothing")
	flag.Parse()
	if err := run(*dir, *old, *only); err != nil {
		fmt.Fprintln(os.Stderr, "cover:", err)
		os.Exit(1)
	}
}

func run(dir string, old bool, only string) error {
	if !old {
		if err := measure(context.Background(), dir); err != nil {
			return err
		}
	}
	var files []string
	for _, k := range kinds {
		files = append(files, filepath.Join(dir, k.file))
	}
	pkgs, err := load(files)
	if err != nil {
		return err
	}
	told, err := loadReasons(reasons)
	if err != nil {
		return err
	}
	var untold, stale []string
	for _, p := range pkgs {
		if only == "" || p.name == only {
			untold = append(untold, told.untold(p)...)
		}
	}
	for _, r := range told {
		for _, l := range r.places {
			if !l.used {
				stale = append(stale, l.text)
			}
		}
	}
	if only == "" {
		if err := os.WriteFile(page, report(pkgs, told), 0o644); err != nil {
			return err
		}
		fmt.Println("written:", page)
		if len(stale) > 0 {
			fmt.Printf("reached after all, or gone; take them out of %s unless only luck reached them:\n%s\n", reasons, strings.Join(stale, "\n"))
		}
	}
	if len(untold) > 0 {
		return fmt.Errorf("%d blocks are reached by nothing and have no reason in %s:\n%s", len(untold), reasons, strings.Join(untold, "\n"))
	}
	return nil
}

// measure runs the tests, one profile for each kind.
func measure(ctx context.Context, dir string) error {
	counts, err := filepath.Abs(filepath.Join(dir, "pairs"))
	if err != nil {
		return err
	}
	if err := os.RemoveAll(counts); err != nil {
		return err
	}
	if err := os.MkdirAll(counts, 0o755); err != nil {
		return err
	}
	var pkgs []string
	for _, p := range measured {
		pkgs = append(pkgs, module+"/"+p)
	}
	list := strings.Join(pkgs, ",")
	test := func(profile string, paths ...string) error {
		args := []string{"test", "-count=1", "-timeout", "20m", "-covermode=atomic", "-coverpkg=" + list, "-coverprofile=" + filepath.Join(dir, profile)}
		return goCommand(ctx, nil, append(args, paths...)...)
	}
	if err := test(kinds[0].file, "./hpdi/...", "./internal/..."); err != nil {
		return err
	}
	if err := test(kinds[1].file, "./test/sim"); err != nil {
		return err
	}
	// A program whose main package is not counted does not write what it has.
	env := []string{"GOCOVERDIR=" + counts, "POLLUX_COVERPKG=" + list + "," + module + "/cmd/pollux"}
	if err := goCommand(ctx, env, "test", "-count=1", "-timeout", "20m", "./test/e2e", "./test/campaign"); err != nil {
		return err
	}
	return goCommand(ctx, nil, "tool", "covdata", "textfmt", "-i="+counts, "-o="+filepath.Join(dir, kinds[2].file))
}

// goCommand runs the go command and shows what it said when it failed.
func goCommand(ctx context.Context, env []string, args ...string) error {
	fmt.Println("go", args[0], args[len(args)-1])
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), append(env, "POLLUX_SEED=1", "POLLUX_REQUIRE_CLIENTS=1")...)
	out, err := cmd.CombinedOutput()
	if err != nil {
		return fmt.Errorf("go %s: %w\n%s", args[0], err, out)
	}
	return nil
}

// report is the page for readers.
func report(pkgs []pkg, told told) []byte {
	var b bytes.Buffer
	fmt.Fprint(&b, "# Coverage\n\nWritten by `make cover`; do not edit. Statements of the storage and failover\npackages that tests reach, in percent: the packages' own tests, the simulator\n(`test/sim`), real pairs (`test/e2e` and `test/campaign`), and all together.\n\n")
	fmt.Fprint(&b, "| package | statements |")
	for _, k := range kinds {
		fmt.Fprintf(&b, " %s |", k.name)
	}
	fmt.Fprintf(&b, " together |\n|---|%s\n", strings.Repeat("---:|", len(kinds)+2))
	var sum pkg
	sum.name = "all"
	for _, p := range pkgs {
		p.row(&b)
		sum.add(p)
	}
	sum.row(&b)
	fmt.Fprint(&b, "\n## What nothing reaches\n\nBy reason; each place is a file, a function and where the block begins.\n")
	slices.SortStableFunc(told, func(x, y *reason) int { return strings.Compare(x.file, y.file) })
	last := ""
	for _, r := range told {
		if r.file != last {
			fmt.Fprintf(&b, "\n### %s\n", strings.ReplaceAll(strings.TrimSuffix(r.file, ".txt"), "-", "/"))
			last = r.file
		}
		fmt.Fprintf(&b, "\n%s\n\n", r.why)
		for _, l := range r.places {
			fmt.Fprintf(&b, "- `%s`\n", l.text)
		}
	}
	return b.Bytes()
}
