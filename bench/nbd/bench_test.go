package main

import (
	"strings"
	"testing"
	"time"
)

func TestParseSize(t *testing.T) {
	for s, want := range map[string]int64{"1": 1, "4096B": 4096, "512MiB": 512 << 20, "1GiB": 1 << 30, "100GiB": 100 << 30} {
		if got, err := parseSize(s); err != nil || got != want {
			t.Errorf("%s: %d, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "x", "-1GiB", "0", "1GB", "99999999TiB"} {
		if n, err := parseSize(s); err == nil {
			t.Errorf("%q was taken for %d", s, n)
		}
	}
}

func TestReport(t *testing.T) {
	at := func(iops ...float64) (s []sample) {
		for _, x := range iops {
			s = append(s, sample{IOPS: x})
		}
		return s
	}
	row := allRows[0].Name
	rep := &report{Cells: []*cell{
		{Row: row, Server: "pollux", Samples: at(90, 30, 60)},
		{Row: row, Server: "qsd-cached", Samples: at(10, 20)},
		{Row: row, Server: "nbdkit-cached", Samples: at(30)},
		{Row: row, Server: "qsd-direct", Samples: at(1000)},
	}}
	rep.finish()
	for i, want := range []float64{2, 0.5, 1, 1000.0 / 30} {
		c := rep.Cells[i]
		if got := c.Ratios["cached peer"]; got != want {
			t.Errorf("%s: ratio %v, want %v", c.Server, got, want)
		}
		if got := c.Ratios["direct peer"]; got != c.Median.IOPS/1000 {
			t.Errorf("%s: ratio %v to the direct peer, want %v", c.Server, got, c.Median.IOPS/1000)
		}
		if _, ok := c.Ratios["ceiling"]; ok {
			t.Errorf("%s: a ratio to a ceiling that was not measured", c.Server)
		}
	}
	var b strings.Builder
	rep.table(&b)
	if !strings.Contains(b.String(), "| "+row+" | pollux | 60 |") {
		t.Error(b.String())
	}
}

func TestMemoryMedian(t *testing.T) {
	if m := medianRSS([]watch{{RSS: 3}, {RSS: 1}, {RSS: 2}}); m != 2 {
		t.Error(m)
	}
}

func TestRowArguments(t *testing.T) {
	for _, r := range allRows {
		args := strings.Join(r.args(1<<30, 256<<20, 5*time.Second), " ")
		timed := strings.Contains(args, "--time_based --runtime=5")
		if sized := strings.Contains(args, "--io_size="); sized == timed || sized != (r.Bytes != nil) {
			t.Errorf("%s: %s", r.Name, args)
		}
		if !strings.Contains(args, "--iodepth=") || !strings.Contains(args, "--numjobs=") {
			t.Errorf("%s: %s", r.Name, args)
		}
		if r.suits("pollux") == r.suits("pollux-cold") {
			t.Errorf("%s is measured on both pairs or on none", r.Name)
		}
	}
}
