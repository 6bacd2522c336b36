package sim

import (
	"flag"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

var (
	seeds   = flag.Int("seeds", 0, "number of random runs")
	first   = flag.Uint64("first", 0, "seed of the first random run; 0 draws one")
	tries   = flag.Int("shrink", 300, "runs to spend on making a failing script smaller")
	workers = flag.Int("workers", 1, "processes that share the random runs")
	stride  = flag.Uint64("stride", 1, "distance from one seed to the next")
	trail   = flag.Int("trail", 60, "lines of trace to show of a failing run")
)

// TestScenarios plays the scenarios that people wrote.
func TestScenarios(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	if err != nil || len(files) == 0 {
		t.Fatalf("no scenarios: %v", err)
	}
	for i, f := range files {
		if raced && i%2 > 0 && os.Getenv("POLLUX_SOAK") != "1" {
			continue // `make test` plays all of them without the race detector
		}
		t.Run(strings.TrimSuffix(filepath.Base(f), ".txt"), func(t *testing.T) {
			text, err := os.ReadFile(f)
			if err != nil {
				t.Fatal(err)
			}
			s, err := Parse(f, string(text))
			if err != nil {
				t.Fatal(err)
			}
			if r := Run(t, s, *trail); r.Err != nil {
				t.Fatalf("%v\nthe end of the trace:\n%s", r.Err, r.Trace)
			}
		})
	}
}

// TestRandom plays random runs. A failing one is shrunk and printed.
func TestRandom(t *testing.T) {
	from, n := *first, *seeds
	if from == 0 {
		from = uint64(time.Now().UnixNano()) >> 20
		if s, err := strconv.ParseUint(os.Getenv("POLLUX_SEED"), 10, 64); err == nil {
			from = s
		}
	}
	if n == 0 {
		if n = 60; raced {
			n = 5 // several times as slow
		}
	}
	if *workers > 1 {
		soak(t, from, n)
		return
	}
	t.Logf("%d runs from seed %d", n, from)
	var ops, requests, moves int64
	skipped := 0
	var promoted, demoted uint64
	began := time.Now()
	for i := range uint64(n) {
		seed := from + i**stride
		r := Run(t, Draw(seed), 0)
		ops, requests = ops+r.Ops, requests+int64(r.Requests)
		skipped += r.Skipped
		moves, promoted, demoted = moves+r.Moves, promoted+r.Promoted, demoted+r.Demoted
		if r.Err != nil {
			report(t, seed, r.Err)
		}
	}
	took := time.Since(began)
	t.Logf("%d runs in %s, %d requests, %d of them not run again, %d counted operations, %d blocks moved by cleaners, %d data sets to flash and %d back, %.2f runs a second",
		n, took.Round(time.Second), requests, skipped, ops, moves, promoted, demoted, float64(n)/took.Seconds())
}

// soak plays random runs in several processes, for a run has one processor.
func soak(t *testing.T, from uint64, n int) {
	began := time.Now()
	var wg sync.WaitGroup
	for i := range uint64(*workers) {
		wg.Go(func() {
			cmd := exec.Command(os.Args[0], "-test.run=^TestRandom$", "-test.v", "-test.timeout=0", fmt.Sprint("-first=", from+i),
				fmt.Sprint("-stride=", *workers), fmt.Sprint("-seeds=", (n-int(i)+*workers-1) / *workers), fmt.Sprint("-trail=", *trail))
			cmd.Env = append(os.Environ(), "GOMAXPROCS=1")
			out, err := cmd.CombinedOutput()
			t.Logf("%s", out)
			if err != nil {
				t.Errorf("worker %d: %v", i, err)
			}
		})
	}
	if wg.Wait(); t.Failed() {
		return
	}
	rate := float64(n) / time.Since(began).Seconds()
	t.Logf("%d runs from seed %d with %d workers: %.2f a second, %.0f in a night of 10 hours", n, from, *workers, rate, rate*36000)
}

// report shrinks a failing seed and ends the test.
func report(t *testing.T, seed uint64, err error) {
	t.Helper()
	t.Logf("seed %d: %v", seed, err)
	small := Shrink(Draw(seed), *tries, func(s *Script) bool { return kindOf(Run(t, s, 0).Err) == kindOf(err) })
	r := Run(t, small, *trail)
	t.Fatalf("seed %d fails: %v\nplay it again with: go test ./test/sim -run TestRandom -first=%d -seeds=1\n"+
		"shrunk to this scenario, which fails with: %v\n----\n%s----\nthe end of its trace:\n%s", seed, err, seed, r.Err, small, r.Trace)
}

// TestReplay plays runs twice: the traces must be the same to the byte. Where
// other programs take the processor away for longer than the scheduler of Go
// lets a goroutine run (10 ms), two goroutines can change places; so two of a few
// traces must agree.
func TestReplay(t *testing.T) {
	if raced {
		t.Skip("the race detector makes the order of goroutines random")
	}
	n := *seeds
	if n == 0 {
		n = 12
	}
	for i := range uint64(n) {
		s := Draw(*first + i)
		last := Run(t, s, 1<<20)
		for try := 0; ; try++ {
			r := Run(t, s, 1<<20)
			if r.Hash == last.Hash {
				break
			}
			if try == 3 {
				t.Fatalf("%s: %s", s.Name, difference(last.Trace, r.Trace))
			}
			t.Logf("%s: played again: %s", s.Name, difference(last.Trace, r.Trace))
			last = r
		}
	}
}

func difference(a, b string) string {
	x, y := strings.Split(a, "\n"), strings.Split(b, "\n")
	for i := range min(len(x), len(y)) {
		if x[i] != y[i] {
			return fmt.Sprintf("the traces part in line %d:\n%s\n%s\n%s", i, strings.Join(x[max(0, i-5):i], "\n"), x[i], y[i])
		}
	}
	return fmt.Sprintf("one trace has %d lines, the other %d", len(x), len(y))
}
