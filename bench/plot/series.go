package main

import (
	"errors"
	"fmt"
	"io/fs"
	"path/filepath"
)

// series is a curve of a panel.
type series struct {
	class, name string
	y           []float64
}

// panel draws curves over common x, with an axis from 0 that holds them all.
func (c *canvas) panel(title string, x axis, xs []float64, top, height float64, curves ...series) {
	y := axis{start: top + height, end: top}
	for _, s := range curves {
		for _, v := range s.y {
			y.to = max(y.to, v*1.1)
		}
	}
	if y.to == 0 {
		y.to = 1
	}
	for _, t := range y.ticks() {
		c.line(x.start, y.at(t), x.end, y.at(t), "grid")
		c.text(x.start-6, y.at(t)+4, "dim", "end", fmt.Sprintf("%g", t))
	}
	c.text(16, top-10, "", "start", title)
	entries := make([][2]string, 0, len(curves))
	px := make([]float64, len(xs))
	for i, v := range xs {
		px[i] = x.at(v)
	}
	for _, s := range curves {
		py := make([]float64, len(s.y))
		for i, v := range s.y {
			py[i] = y.at(v)
		}
		c.curve(px, py, s.class)
		for i := range px {
			c.dot(px[i], py[i], 1.8, "fill "+s.class)
		}
		entries = append(entries, [2]string{s.class, s.name})
	}
	c.legend(260, top-10, entries...)
}

// memory is what is needed of bench/nbd -memory.
type memory struct {
	Seconds float64
	Watches []struct {
		After       float64 `json:"after_s"`
		RSS         float64
		Anonymous   float64
		Shared      float64
		Read, Write struct {
			MBps float64 `json:"mb_per_s"`
			P99  float64 `json:"p99_us"`
		}
	}
}

// soak draws throughput, p99 and memory over time.
func soak(m *memory) []byte {
	c := newCanvas(width, 560, fmt.Sprintf("Four volumes under reads, writes, trims and flushes for %.0f minutes", m.Seconds/60))
	var t, read, write, readP99, writeP99, anon, shared, rss []float64
	const mib = 1 << 20
	for _, w := range m.Watches {
		t = append(t, w.After/60)
		read, write = append(read, w.Read.MBps), append(write, w.Write.MBps)
		readP99, writeP99 = append(readP99, w.Read.P99/1e3), append(writeP99, w.Write.P99/1e3)
		rss, anon, shared = append(rss, w.RSS/mib), append(anon, w.Anonymous/mib), append(shared, w.Shared/mib)
	}
	x := axis{to: m.Seconds / 60, start: 70, end: width - 20}
	c.panel("throughput, MB/s", x, t, 70, 120, series{"a", "reads", read}, series{"b", "writes", write})
	c.panel("p99 of each interval, ms", x, t, 235, 120, series{"a", "reads", readP99}, series{"b", "writes", writeP99})
	c.panel("memory of the guest, MiB", x, t, 400, 120, series{"a", "resident", rss}, series{"b", "anonymous", anon}, series{"c", "shared: the region", shared})
	for _, v := range x.ticks() {
		c.text(x.at(v), 538, "dim", "middle", fmt.Sprintf("%g min", v))
	}
	return c.bytes()
}

// scaled is what is needed of bench/nbd -scale.
type scaled struct {
	Volumes, Connections []loaded
}

// loaded is how requests do with n volumes or connections.
type loaded struct {
	N           float64
	Write, Read struct {
		CPU float64 `json:"server_cpu_us_per_request"`
	}
}

// scale draws CPU time over volumes and connections.
func scale(s *scaled) []byte {
	c := newCanvas(width, 370, "CPU time of a request of 4 KiB, µs")
	for i, p := range []struct {
		title string
		of    []loaded
	}{{"volumes", s.Volumes}, {"connections", s.Connections}} {
		var n, write, read []float64
		x := axis{from: 1, to: 2, start: 70, end: width - 30, log: true}
		for _, v := range p.of {
			n, write, read = append(n, v.N), append(write, v.Write.CPU), append(read, v.Read.CPU)
			x.to = max(x.to, v.N)
		}
		top := 70 + 170*float64(i)
		c.panel(p.title, x, n, top, 100, series{"b", "writes", write}, series{"a", "reads", read})
		for _, v := range n {
			c.text(x.at(v), top+118, "dim", "middle", fmt.Sprint(v))
		}
	}
	return c.bytes()
}

// pauses is what is needed of bench/failover.
type pauses struct {
	Region int64 `json:"region_bytes"`
	Huge   bool  `json:"huge_pages"`
	Cases  []struct {
		Title   string
		Pause   struct{ P50, P90, P99, Max float64 } `json:"pause_ms"`
		Samples []struct{}
	}
}

// promised is the longest p99 of a pause, in milliseconds; see bench/failover.
const promised = 100

// failover draws the pauses of both kinds of pages.
func failover(path string) ([]byte, error) {
	var all []pauses
	for _, name := range []string{path, filepath.Join(filepath.Dir(path), "failover-small.json")} {
		var p pauses
		if err := read(name, &p); err == nil {
			all = append(all, p)
		} else if !errors.Is(err, fs.ErrNotExist) || name == path {
			return nil, err
		}
	}
	n := 0
	x := axis{start: 290, end: width - 50}
	for _, p := range all {
		for _, k := range p.Cases {
			n++
			x.to = max(x.to, k.Pause.Max*1.05)
		}
	}
	const line = 26.0
	bottom := top + line*float64(n)
	c := newCanvas(width, bottom+30, fmt.Sprintf("What a client waits at a failover, regions of %.1f GiB: p50, p90, p99, longest, ms", float64(all[0].Region)/(1<<30)))
	for _, t := range x.ticks() {
		c.line(x.at(t), top, x.at(t), bottom, "grid")
		c.text(x.at(t), bottom+16, "dim", "middle", fmt.Sprintf("%g", t))
	}
	if x.to > promised {
		c.line(x.at(promised), top-6, x.at(promised), bottom, "want")
		c.text(x.at(promised)+5, top-2, "dim", "start", "promised for p99")
	}
	y := top + line/2
	for _, p := range all {
		class, pages := " b", "small pages"
		if p.Huge {
			class, pages = " a", "huge pages"
		}
		for _, k := range p.Cases {
			c.text(x.start-12, y+4, "", "end", fmt.Sprintf("%s, %s, %d rounds", k.Title, pages, len(k.Samples)))
			c.line(x.at(k.Pause.P50), y, x.at(k.Pause.Max), y, "thin"+class)
			for _, v := range []float64{k.Pause.P50, k.Pause.P90, k.Pause.P99, k.Pause.Max} {
				c.dot(x.at(v), y, 4, "fill"+class)
			}
			c.text(x.at(k.Pause.Max)+8, y+4, "dim", "start", fmt.Sprintf("%.0f", k.Pause.Max))
			y += line
		}
	}
	return c.bytes(), nil
}
