package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/pollux-storage/pollux/bench/stat"
)

// The cases that something is promised of.
const (
	caseKill = "kill"
	caseHang = "hang"
	// Of the restart before a takeover.
	caseRestart = "kill-restart"
)

// report is what goes to the JSON file.
type report struct {
	Started   time.Time         `json:"started"`
	CPUs      int               `json:"cpus"`
	Seed      uint64            `json:"seed"`
	TCP       bool              `json:"tcp"`
	Region    int64             `json:"region_bytes"`
	HugePages bool              `json:"huge_pages"`
	Versions  map[string]string `json:"versions"`
	// Load averages of the machine, those of the benchmark included.
	LoadBefore string    `json:"load_before"`
	LoadAfter  string    `json:"load_after"`
	Cases      []*result `json:"cases"`
}

// result is one case. All times are milliseconds.
type result struct {
	Name     string   `json:"name"`
	Title    string   `json:"title"`
	Pause    spread   `json:"pause_ms"`
	Steps    []step   `json:"steps_ms"`
	After    float64  `json:"longest_later_gap_ms"`
	LoadIOPS float64  `json:"load_writes_per_s,omitempty"`
	Samples  []sample `json:"samples"`
}

// sample is one round.
type sample struct {
	Pause   float64     `json:"pause_ms"`
	After   float64     `json:"longest_later_gap_ms"` // until the look ended
	First   string      `json:"first_reply"`          // what the first reply of the survivor answered
	Noticed float64     `json:"noticed_after_ms"`     // from the fault to the start of the first step
	Steps   []namedTime `json:"steps"`
	Total   float64     `json:"total_ms"` // of the steps, as the pair says
}

type namedTime struct {
	Name string  `json:"name"`
	Took float64 `json:"took_ms"`
}

// spread is a distribution.
type spread struct {
	P50 float64 `json:"p50"`
	P90 float64 `json:"p90"`
	P99 float64 `json:"p99"`
	Max float64 `json:"max"`
}

type step struct {
	Name string `json:"name"`
	spread
}

func newReport(ctx context.Context, bin string, o options) *report {
	rep := &report{Started: time.Now().UTC(), CPUs: runtime.NumCPU(), Seed: o.seed, TCP: o.tcp, LoadBefore: loadAverage(), Versions: map[string]string{}}
	for name, argv := range map[string][]string{"pollux": {bin, "version"}, "qemu-storage-daemon": {"qemu-storage-daemon", "--version"}} {
		ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
		if out, err := exec.CommandContext(ctx, argv[0], argv[1:]...).Output(); err == nil {
			rep.Versions[name], _, _ = strings.Cut(string(out), "\n")
		}
		cancel()
	}
	return rep
}

func (rep *report) add(name, title string) *result {
	r := &result{Name: name, Title: title}
	rep.Cases = append(rep.Cases, r)
	return r
}

// finish computes the distributions.
func (rep *report) finish() {
	rep.LoadAfter = loadAverage()
	for _, r := range rep.Cases {
		var pauses, noticed, totals []float64
		var names []string
		steps := map[string][]float64{}
		for _, s := range r.Samples {
			pauses, noticed, totals = append(pauses, s.Pause), append(noticed, s.Noticed), append(totals, s.Total)
			r.After = max(r.After, s.After)
			// A step may come more than once in a takeover: it took their sum.
			once := map[string]float64{}
			for _, t := range s.Steps {
				if !slices.Contains(names, t.Name) {
					names = append(names, t.Name)
				}
				once[t.Name] += t.Took
			}
			for name, took := range once {
				steps[name] = append(steps[name], took)
			}
		}
		r.Pause = spreadOf(pauses)
		r.Steps = []step{{"until noticed", spreadOf(noticed)}}
		for _, name := range names {
			r.Steps = append(r.Steps, step{name, spreadOf(steps[name])})
		}
		r.Steps = append(r.Steps, step{"all steps", spreadOf(totals)})
	}
}

func spreadOf(v []float64) spread {
	v = slices.Sorted(slices.Values(v))
	return spread{stat.Rank(v, 50), stat.Rank(v, 90), stat.Rank(v, 99), stat.Rank(v, 100)}
}

// print writes the report as Markdown.
func (rep *report) print(w io.Writer) {
	var b strings.Builder
	over := "a unix socket"
	if rep.TCP {
		over = "TCP"
	}
	fmt.Fprintf(&b, "What a client sees of a failover: 4 KiB writes and reads, queue depth 1, over %s, %d CPUs, seed %d.\n", over, rep.CPUs, rep.Seed)
	pages := "small"
	if rep.HugePages {
		pages = "huge"
	}
	fmt.Fprintf(&b, "Regions of %d MiB on %s pages.\n", rep.Region>>20, pages)
	b.WriteString("Pause: last reply before the fault to first reply after it.\n\n")
	b.WriteString("| case | rounds | p50 ms | p90 ms | p99 ms | max ms | longest later gap ms |\n|---|--:|--:|--:|--:|--:|--:|\n")
	for _, r := range rep.Cases {
		p := r.Pause
		later := fmt.Sprintf("%.1f", r.After)
		if strings.HasPrefix(r.Name, "qemu") {
			later = "–" // the pause is the longest of all
		}
		fmt.Fprintf(&b, "| %s | %d | %.1f | %.1f | %.1f | %.1f | %s |\n", r.Title, len(r.Samples), p.P50, p.P90, p.P99, p.Max, later)
	}
	b.WriteString("\nThe steps, as the pair reports them:\n\n| case | step | p50 ms | p99 ms |\n|---|---|--:|--:|\n")
	for _, r := range rep.Cases {
		for _, s := range r.Steps {
			fmt.Fprintf(&b, "| %s | %s | %.2f | %.2f |\n", r.Title, s.Name, s.P50, s.P99)
		}
	}
	b.WriteString("\n")
	for _, r := range rep.Cases {
		if r.LoadIOPS > 0 {
			fmt.Fprintf(&b, "* %s: the load had %.0f writes acknowledged a second, pauses included.\n", r.Title, r.LoadIOPS)
		}
	}
	fmt.Fprintf(&b, "* Load averages of the machine: %s before, %s after.\n", rep.LoadBefore, rep.LoadAfter)
	_, _ = io.WriteString(w, b.String()) // stdout
}

// judge compares with what is promised.
func (rep *report) judge() error {
	var errs []error
	for _, r := range rep.Cases {
		if limit := ms(killLimit); r.Name == caseKill && r.Pause.P99 > limit {
			errs = append(errs, fmt.Errorf("%s: p99 of the pause is %.1f ms, promised are %.0f ms", r.Title, r.Pause.P99, limit))
		}
		if limit := ms(restartLimit); r.Name == caseRestart && r.Pause.P99 > limit {
			errs = append(errs, fmt.Errorf("%s: p99 of the pause is %.1f ms, promised are %.0f ms", r.Title, r.Pause.P99, limit))
		}
		if limit := ms(hangLimit); r.Name == caseHang && r.Pause.Max > limit {
			errs = append(errs, fmt.Errorf("%s: the longest pause is %.1f ms, promised are %.0f ms", r.Title, r.Pause.Max, limit))
		}
	}
	return errors.Join(errs...)
}

func loadAverage() string {
	b, err := os.ReadFile("/proc/loadavg")
	if err != nil {
		return "unknown"
	}
	f := strings.Fields(string(b))
	return strings.Join(f[:min(3, len(f))], " ")
}
