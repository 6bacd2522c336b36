package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"runtime"
	"sort"
	"strings"
	"time"
)

// cell is a row on a server.
type cell struct {
	Row     string   `json:"row"`
	Server  string   `json:"server"`
	Samples []sample `json:"samples"`
	Median  sample   `json:"median"`
	// Ratios are the median IOPS over those of others, see references.
	Ratios map[string]float64 `json:"ratios,omitempty"`
}

// report is what goes to the JSON file.
type report struct {
	Started  time.Time         `json:"started"`
	CPUs     int               `json:"cpus"`
	Size     int64             `json:"data_set_bytes"`
	Runtime  float64           `json:"runtime_s"`
	Repeats  int               `json:"repeats"`
	Versions map[string]string `json:"versions"`
	Notes    map[string]string `json:"notes"`
	LeftOut  map[string]string `json:"left_out,omitempty"`
	Cells    []*cell           `json:"cells"`
}

// compare starts all servers, measures the rows in turn and reports.
func compare(ctx context.Context, o options, dir string) error {
	list, err := servers(ctx, o, dir)
	if err != nil {
		return err
	}
	rep := &report{Started: time.Now().UTC(), CPUs: runtime.NumCPU(), Size: o.size, Runtime: o.runtime.Seconds(), Repeats: o.n,
		Versions: versions(ctx, o), Notes: map[string]string{}, LeftOut: map[string]string{}}
	var running []server
	defer func() {
		for _, s := range running {
			s.stop()
		}
	}()
	var failed error
	for _, s := range list {
		fmt.Fprintf(os.Stderr, "starting %s\n", s.name())
		running = append(running, s) // also what started in part must be stopped
		if err := s.start(ctx); err != nil {
			if ctx.Err() != nil {
				return err
			}
			fmt.Fprintf(os.Stderr, "left out: %s: %v\n", s.name(), err)
			rep.LeftOut[s.name()] = err.Error()
			if strings.HasPrefix(s.name(), "pollux") {
				failed = fmt.Errorf("%s was not measured: %w", s.name(), err)
			}
			continue
		}
		if n := s.note(); n != "" {
			rep.Notes[s.name()] = n
		}
	}
	if err := rep.measureAll(ctx, o, running); err != nil {
		return err
	}
	rep.finish()
	rep.table(os.Stdout)
	if err := writeJSON(o.out, rep); err != nil {
		return err
	}
	return failed
}

// measureAll runs each row on each server in turn, and that n times: what
// changes on the machine meanwhile hits all alike.
func (rep *report) measureAll(ctx context.Context, o options, list []server) error {
	cells := map[string]*cell{}
	for i := range o.n {
		for _, r := range allRows {
			if !chosen(r.Name, o.rows) {
				continue
			}
			for _, s := range list {
				if rep.LeftOut[s.name()] != "" || !r.suits(s.name()) {
					continue
				}
				m, err := measure(ctx, s, r, o.size, o.log, o.runtime)
				if err == nil && r.writes() {
					err = s.settle(ctx)
				}
				if err != nil {
					return fmt.Errorf("%s on %s: %w", r.Name, s.name(), err)
				}
				fmt.Fprintf(os.Stderr, "%d/%d %-22s %-15s %9.0f IOPS  %6.2f µs CPU\n", i+1, o.n, r.Name, s.name(), m.IOPS, m.CPUus)
				key := r.Name + " " + s.name()
				if cells[key] == nil {
					cells[key] = &cell{Row: r.Name, Server: s.name()}
					rep.Cells = append(rep.Cells, cells[key])
				}
				cells[key].Samples = append(cells[key].Samples, m)
			}
		}
	}
	return nil
}

// reference is what rows are compared with: the best of some servers.
type reference struct {
	title string
	among func(server string) bool
}

var references = []reference{
	{"cached peer", func(s string) bool { return strings.HasSuffix(s, "-cached") }},
	{"direct peer", func(s string) bool { return s == "qsd-direct" }},
	{"ceiling", func(s string) bool { return s == "ceiling" }},
}

// finish computes medians and ratios.
func (rep *report) finish() {
	best := map[string]float64{}
	for _, c := range rep.Cells {
		c.Median = median(c.Samples)
		for _, ref := range references {
			if key := c.Row + " " + ref.title; ref.among(c.Server) {
				best[key] = max(best[key], c.Median.IOPS)
			}
		}
	}
	for _, c := range rep.Cells {
		c.Ratios = map[string]float64{}
		for _, ref := range references {
			if b := best[c.Row+" "+ref.title]; b > 0 {
				c.Ratios[ref.title] = c.Median.IOPS / b
			}
		}
	}
}

// median takes the median of each number on its own.
func median(s []sample) sample {
	pick := func(f func(sample) float64) float64 {
		v := make([]float64, 0, len(s))
		for _, x := range s {
			v = append(v, f(x))
		}
		sort.Float64s(v)
		if n := len(v); n%2 == 0 {
			return (v[n/2-1] + v[n/2]) / 2
		}
		return v[len(v)/2]
	}
	return sample{
		IOPS: pick(func(x sample) float64 { return x.IOPS }), MBps: pick(func(x sample) float64 { return x.MBps }),
		P50us: pick(func(x sample) float64 { return x.P50us }), P99us: pick(func(x sample) float64 { return x.P99us }),
		CPUus: pick(func(x sample) float64 { return x.CPUus }),
	}
}

// table prints the report as Markdown.
func (rep *report) table(w io.Writer) {
	var b strings.Builder
	fmt.Fprintf(&b, "NBD over unix sockets, client fio, %d CPUs, data set %d MiB, %d × %gs each, medians.\n",
		rep.CPUs, rep.Size>>20, rep.Repeats, rep.Runtime)
	fmt.Fprintf(&b, "The last columns are ratios of IOPS: to the better page-cached peer, to the one with\ndirect I/O, to the ceiling.\n\n")
	fmt.Fprintf(&b, "| row | server | IOPS | MB/s | p50 µs | p99 µs | CPU µs/request |")
	for _, ref := range references {
		fmt.Fprintf(&b, " %s |", ref.title)
	}
	fmt.Fprintf(&b, "\n|---|---|%s\n", strings.Repeat("--:|", 5+len(references)))
	for _, r := range allRows {
		for _, c := range rep.Cells {
			if c.Row != r.Name {
				continue
			}
			m := c.Median
			fmt.Fprintf(&b, "| %s | %s | %.0f | %.0f | %.0f | %.0f | %.1f |", c.Row, c.Server, m.IOPS, m.MBps, m.P50us, m.P99us, m.CPUus)
			for _, ref := range references {
				if r, ok := c.Ratios[ref.title]; ok {
					fmt.Fprintf(&b, " %.2f |", r)
				} else {
					b.WriteString(" – |")
				}
			}
			b.WriteString("\n")
		}
	}
	b.WriteString("\n")
	for _, name := range sortedKeys(rep.Notes) {
		fmt.Fprintf(&b, "* %s: %s.\n", name, rep.Notes[name])
	}
	for _, name := range sortedKeys(rep.LeftOut) {
		fmt.Fprintf(&b, "* %s was left out: %s\n", name, strings.TrimSpace(rep.LeftOut[name]))
	}
	_, _ = io.WriteString(w, b.String()) // stdout
}

func sortedKeys(m map[string]string) []string {
	var keys []string
	for k := range m {
		keys = append(keys, k)
	}
	sort.Strings(keys)
	return keys
}

// versions asks the programs who they are.
func versions(ctx context.Context, o options) map[string]string {
	v := map[string]string{}
	asks := [][]string{{"fio", "--version"}, {"qemu-storage-daemon", "--version"}, {"nbdkit", "--version"}}
	if o.pollux != "" {
		asks = append(asks, []string{o.pollux, "version"})
	}
	for _, argv := range asks {
		if b, err := output(ctx, 10*time.Second, argv...); err == nil {
			line, _, _ := strings.Cut(string(b), "\n")
			v[filepath.Base(argv[0])] = line
		}
	}
	return v
}

func writeJSON(path string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return err
	}
	return os.WriteFile(path, append(b, '\n'), 0o644)
}
