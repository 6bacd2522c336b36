package main

import (
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"

	"github.com/pollux-storage/pollux/bench/stat"
)

// figure is one of the ratios that something is wanted of: those of throughput
// to the best of some servers, those of latency and CPU time to the least of
// some.
type figure struct {
	title string
	of    func(sample) float64
	among func(r row, server string) bool
	// least says that the server with the least counts, and that at most what
	// is wanted is good.
	least bool
	want  func(wants) float64
}

func iops(s sample) float64 { return s.IOPS }

func cached(_ row, server string) bool { return server == "qsd-cached" || server == "nbdkit-cached" }

// direct is the peer that passes by the page cache. nbdkit with cache=none does not:
// it writes into the page cache and drops what it has used.
func direct(_ row, server string) bool { return server == "qsd-direct" }

// peers are those that latency and CPU time are compared with: the ones that
// have the data where Pollux has it.
func peers(r row, server string) bool {
	if r.Cold {
		return direct(r, server)
	}
	return cached(r, server)
}

var figures = []figure{
	{"to cached peer", iops, cached, false, func(w wants) float64 { return w.Cached }},
	{"to direct peer", iops, direct, false, func(w wants) float64 { return w.Direct }},
	{"to ceiling", iops, func(_ row, s string) bool { return s == "ceiling" }, false, func(w wants) float64 { return w.Ceiling }},
	{"p99 to peer", func(s sample) float64 { return s.P99us }, peers, true, func(w wants) float64 { return w.P99 }},
	{"CPU to peer", func(s sample) float64 { return s.CPUus }, peers, true, func(w wants) float64 { return w.CPU }},
}

// verdict is one ratio of a row of Pollux.
type verdict struct {
	Row    string  `json:"row"`
	Figure string  `json:"figure"`
	To     string  `json:"to"` // the server that it is compared with
	Ratio  float64 `json:"ratio"`
	// Wanted is 0 where nothing is.
	Wanted  float64 `json:"wanted,omitempty"`
	AtMost  bool    `json:"at_most,omitempty"` // or at least
	Reached bool    `json:"reached"`
}

// String is the ratio with what is wanted of it.
func (v verdict) String() string {
	switch {
	case v.Wanted == 0:
		return fmt.Sprintf("%.2f", v.Ratio)
	case v.Reached:
		return fmt.Sprintf("**%.2f** (%s %g)", v.Ratio, v.sign(), v.Wanted)
	}
	return fmt.Sprintf("%.2f (not %s %g)", v.Ratio, v.sign(), v.Wanted)
}

func (v verdict) sign() string {
	if v.AtMost {
		return "≤"
	}
	return "≥"
}

// finish computes medians and verdicts.
func (rep *report) finish() {
	for _, c := range rep.Cells {
		c.Median = median(c.Samples)
	}
	for _, r := range allRows {
		own := rep.own(r)
		if own == nil {
			continue
		}
		for _, f := range figures {
			best := rep.best(r, f)
			if best == nil || f.of(best.Median) <= 0 {
				continue
			}
			v := verdict{Row: r.Name, Figure: f.title, To: best.Server, Ratio: f.of(own.Median) / f.of(best.Median), Wanted: f.want(r.Want), AtMost: f.least}
			v.Reached = v.Wanted > 0 && (f.least && v.Ratio <= v.Wanted || !f.least && v.Ratio >= v.Wanted)
			rep.Verdicts = append(rep.Verdicts, v)
		}
	}
}

// own returns a row's cell of Pollux.
func (rep *report) own(r row) *cell {
	for _, c := range rep.Cells {
		if c.Row == r.Name && strings.HasPrefix(c.Server, "pollux") {
			return c
		}
	}
	return nil
}

// best returns the cell that a figure of a row is compared with.
func (rep *report) best(r row, f figure) (best *cell) {
	for _, c := range rep.Cells {
		if c.Row != r.Name || !f.among(r, c.Server) {
			continue
		}
		if best == nil || f.least == (f.of(c.Median) < f.of(best.Median)) {
			best = c
		}
	}
	return best
}

// median takes the median of each number on its own.
func median(s []sample) sample {
	pick := func(f func(sample) float64) float64 {
		v := make([]float64, 0, len(s))
		for _, x := range s {
			v = append(v, f(x))
		}
		return stat.Median(v)
	}
	return sample{
		IOPS: pick(iops), MBps: pick(func(x sample) float64 { return x.MBps }),
		P50us: pick(func(x sample) float64 { return x.P50us }), P99us: pick(func(x sample) float64 { return x.P99us }),
		P999us: pick(func(x sample) float64 { return x.P999us }), CPUus: pick(func(x sample) float64 { return x.CPUus }),
	}
}

// print writes the report as Markdown: how Pollux does, then all that was
// measured.
func (rep *report) print(w io.Writer) {
	var b strings.Builder
	fmt.Fprintf(&b, "NBD over unix sockets, client fio, %d CPUs, data set %d MiB, log %d MiB, %d × %gs each, medians.\n",
		rep.CPUs, rep.Size>>20, rep.Log>>20, rep.Repeats, rep.Runtime)
	b.WriteString("Ratios: throughput to the better page-cached peer, to the one with direct I/O, to the ceiling;\n" +
		"p99 and CPU time of a request to the better peer's.\n\n")
	rep.printVerdicts(&b)
	rep.printCells(&b)
	for _, name := range slices.Sorted(maps.Keys(rep.Notes)) {
		fmt.Fprintf(&b, "* %s: %s.\n", name, rep.Notes[name])
	}
	for _, name := range slices.Sorted(maps.Keys(rep.LeftOut)) {
		fmt.Fprintf(&b, "* left out: %s: %s\n", name, strings.TrimSpace(rep.LeftOut[name]))
	}
	_, _ = io.WriteString(w, b.String()) // stdout
}

func (rep *report) printVerdicts(b *strings.Builder) {
	b.WriteString("| row | MB/s | p99 µs | CPU µs |")
	for _, f := range figures {
		fmt.Fprintf(b, " %s |", f.title)
	}
	fmt.Fprintf(b, "\n|---|%s\n", strings.Repeat("--:|", 3+len(figures)))
	wanted, reached := 0, 0
	for _, r := range allRows {
		own := rep.own(r)
		if own == nil {
			continue
		}
		fmt.Fprintf(b, "| %s | %.0f | %.0f | %.1f |", r.Name, own.Median.MBps, own.Median.P99us, own.Median.CPUus)
		for _, f := range figures {
			text := "–"
			for _, v := range rep.Verdicts {
				if v.Row != r.Name || v.Figure != f.title {
					continue
				}
				text = v.String()
				if v.Wanted > 0 {
					wanted++
				}
				if v.Reached {
					reached++
				}
			}
			fmt.Fprintf(b, " %s |", text)
		}
		b.WriteString("\n")
	}
	fmt.Fprintf(b, "\n%d of %d wanted ratios are reached.\n\n", reached, wanted)
}

func (rep *report) printCells(b *strings.Builder) {
	b.WriteString("| row | server | IOPS | MB/s | p50 µs | p99 µs | p99.9 µs | CPU µs/request |\n|---|---|--:|--:|--:|--:|--:|--:|\n")
	for _, r := range allRows {
		for _, c := range rep.Cells {
			if m := c.Median; c.Row == r.Name {
				fmt.Fprintf(b, "| %s | %s | %.0f | %.0f | %.0f | %.0f | %.0f | %.1f |\n", c.Row, c.Server, m.IOPS, m.MBps, m.P50us, m.P99us, m.P999us, m.CPUus)
			}
		}
	}
	b.WriteString("\n")
}
