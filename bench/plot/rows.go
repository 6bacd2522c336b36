package main

import (
	"fmt"
	"math"
	"slices"
	"strings"
)

// bench is what is needed of bench/nbd's report.
type bench struct {
	CPUs  int `json:"cpus"`
	Cells []struct {
		Row    string
		Server string
		Median struct {
			P50  float64 `json:"p50_us"`
			P99  float64 `json:"p99_us"`
			P999 float64 `json:"p999_us"`
		}
	}
	Verdicts []struct {
		Row, Figure   string
		Ratio, Wanted float64
		AtMost        bool `json:"at_most"`
		Reached       bool
	}
}

// rows returns their names in the order of the report.
func (b *bench) rows() (names []string) {
	for _, c := range b.Cells {
		if !slices.Contains(names, c.Row) {
			names = append(names, c.Row)
		}
	}
	return names
}

const (
	labels = 190.0 // pixels for the names of rows
	width  = 940.0
	top    = 60.0
)

// ratios draws a panel for each figure: a bar for each row, a line where the
// wanted ratio is.
func ratios(b *bench) []byte {
	names := b.rows()
	var figures []string
	for _, v := range b.Verdicts {
		if !slices.Contains(figures, v.Figure) {
			figures = append(figures, v.Figure)
		}
	}
	const line = 22.0
	c := newCanvas(width, top+line*float64(len(names))+34, "Pollux beside other NBD servers, ratio of medians")
	c.legend(labels, 44, [2]string{"good", "reached"}, [2]string{"bad", "not reached"}, [2]string{"c", "nothing wanted"})
	c.text(width-16, 44, "dim", "end", "| wanted; above it is good, except for p99 and CPU")
	bottom := top + line*float64(len(names))
	for i, name := range names {
		c.text(labels-10, top+line*float64(i)+15, "", "end", name)
	}
	panel := (width - labels - 16) / float64(max(len(figures), 1))
	for f, figure := range figures {
		x := axis{from: 0, to: 2.5, start: labels + panel*float64(f), end: labels + panel*float64(f+1) - 46}
		for _, t := range []float64{0, 1, 2} {
			c.line(x.at(t), top, x.at(t), bottom, "grid")
			c.text(x.at(t), bottom+13, "dim", "middle", fmt.Sprint(t))
		}
		c.text(x.start, bottom+28, "", "start", figure)
		for _, v := range b.Verdicts {
			i := slices.Index(names, v.Row)
			if v.Figure != figure || i < 0 {
				continue
			}
			class := "c"
			if v.Wanted > 0 {
				class = "bad"
			}
			if v.Reached {
				class = "good"
			}
			y := top + line*float64(i)
			c.rect(x.start, y+5, x.at(v.Ratio)-x.start, 12, "fill "+class)
			c.text(max(x.at(v.Ratio), x.at(v.Wanted))+4, y+15, "dim", "start", fmt.Sprintf("%.2f", v.Ratio))
			if v.Wanted > 0 {
				c.line(x.at(v.Wanted), y+2, x.at(v.Wanted), y+20, "want")
			}
		}
	}
	return c.bytes()
}

// latencies draws for each row and server its p50, p99 and p99.9.
func latencies(b *bench) []byte {
	names := b.rows()
	servers := [][2]string{{"a", "pollux"}, {"b", "qsd"}, {"c", "nbdkit"}}
	const line = 40.0
	c := newCanvas(width, top+line*float64(len(names))+30, "Latency of a request: p50, p99, p99.9")
	c.legend(labels, 44, [2]string{"a", "Pollux"}, [2]string{"b", "qemu-storage-daemon"}, [2]string{"c", "nbdkit"})
	c.text(width-16, 44, "dim", "end", "page-cached peers; cold rows: direct I/O")
	bottom := top + line*float64(len(names))
	x := axis{from: math.Inf(1), start: labels, end: width - 30, log: true}
	for _, cell := range b.Cells {
		if cell.Median.P50 > 0 {
			x.from = min(x.from, cell.Median.P50/1.2)
		}
		x.to = max(x.to, cell.Median.P999*1.2)
	}
	for _, t := range x.ticks() {
		c.line(x.at(t), top, x.at(t), bottom, "grid")
		c.text(x.at(t), bottom+16, "dim", "middle", duration(t))
	}
	for i, name := range names {
		y := top + line*float64(i)
		c.text(labels-10, y+line/2+4, "", "end", name)
		if i > 0 {
			c.line(16, y, width-16, y, "grid")
		}
		for s, server := range servers {
			for _, cell := range b.Cells {
				if cell.Row != name || !strings.HasPrefix(cell.Server, server[1]) || !shown(name, cell.Server) {
					continue
				}
				at, m := y+10+10*float64(s), cell.Median
				class := " " + server[0]
				c.line(x.at(m.P50), at, x.at(m.P999), at, "thin"+class)
				c.dot(x.at(m.P50), at, 3, "fill"+class)
				c.dot(x.at(m.P99), at, 4.5, "fill"+class)
				c.dot(x.at(m.P999), at, 3, "fill"+class)
			}
		}
	}
	return c.bytes()
}

// shown chooses between the two ways in which each peer is measured.
func shown(row, server string) bool {
	uncached := strings.HasSuffix(server, "-direct") || strings.HasSuffix(server, "-nocache")
	return strings.HasPrefix(server, "pollux") || strings.HasSuffix(row, "-cold") == uncached
}

func duration(us float64) string {
	switch {
	case us >= 1e6:
		return fmt.Sprintf("%g s", us/1e6)
	case us >= 1e3:
		return fmt.Sprintf("%g ms", us/1e3)
	}
	return fmt.Sprintf("%g µs", us)
}
