package main

import (
	"encoding/xml"
	"errors"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// Each benchmark's numbers become a picture that an XML parser reads to the end.
func TestPictures(t *testing.T) {
	in, to := t.TempDir(), t.TempDir()
	for name, text := range map[string]string{
		"bench.json": `{"cpus":2,"cells":[
			{"row":"4k & more","server":"pollux","median":{"p50_us":100,"p99_us":300,"p999_us":9000}},
			{"row":"4k & more","server":"qsd-cached","median":{"p50_us":200,"p99_us":300,"p999_us":400}},
			{"row":"4k & more","server":"qsd-direct","median":{"p50_us":200,"p99_us":300,"p999_us":400}}],
			"verdicts":[{"row":"4k & more","figure":"to cached peer","ratio":1.5,"wanted":1.2,"reached":true},
			{"row":"4k & more","figure":"p99 to peer","ratio":14,"wanted":1,"at_most":true}]}`,
		"memory.json":         `{"seconds":120,"watches":[{"after_s":30,"rss":1048576,"read":{"mb_per_s":3,"p99_us":9}},{"after_s":60,"rss":2097152}]}`,
		"scale.json":          `{"volumes":[{"n":1,"write":{"server_cpu_us_per_request":9}},{"n":1000}],"connections":[{"n":1},{"n":256}]}`,
		"failover.json":       `{"region_bytes":2147483648,"huge_pages":true,"cases":[{"title":"kill -9","pause_ms":{"p50":30,"p90":40,"p99":50,"max":60},"samples":[{},{}]}]}`,
		"failover-small.json": `{"region_bytes":2147483648,"cases":[{"title":"kill -9","pause_ms":{"p50":70,"p90":80,"p99":90,"max":300},"samples":[{}]}]}`,
	} {
		if err := os.WriteFile(filepath.Join(in, name), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := run(in, to); err != nil {
		t.Fatal(err)
	}
	want := map[string]string{
		"ratios.svg": "4k &amp; more", "latencies.svg": "10 ms", "soak.svg": "memory of the guest", "scale.svg": "connections",
		"failover.svg": "kill -9, small pages, 1 rounds",
	}
	for _, p := range pictures {
		b, err := os.ReadFile(filepath.Join(to, p.name))
		if err != nil {
			t.Fatal(err)
		}
		if !strings.Contains(string(b), want[p.name]) || strings.Contains(string(b), "NaN") || strings.Contains(string(b), "Inf") {
			t.Errorf("%s:\n%s", p.name, b)
		}
		for d := xml.NewDecoder(strings.NewReader(string(b))); ; {
			if _, err := d.Token(); errors.Is(err, io.EOF) {
				break
			} else if err != nil {
				t.Fatalf("%s: %v", p.name, err)
			}
		}
	}
	if err := run(t.TempDir(), to); err == nil {
		t.Error("nothing was drawn from nothing")
	}
}

func TestAxis(t *testing.T) {
	linear := axis{to: 2.5, start: 100, end: 200}
	log := axis{from: 1, to: 1000, start: 0, end: 300, log: true}
	for _, c := range []struct {
		a       axis
		v, want float64
	}{{linear, 0, 100}, {linear, 1.25, 150}, {linear, 9, 200}, {log, 10, 100}, {log, 0, 0}, {log, 1e9, 300}} {
		if got := c.a.at(c.v); got < c.want-1e-9 || got > c.want+1e-9 {
			t.Errorf("%+v: %v is at %v, want %v", c.a, c.v, got, c.want)
		}
	}
	if got := (axis{to: 25}).ticks(); !slices.Equal(got, []float64{0, 5, 10, 15, 20, 25}) {
		t.Error(got)
	}
	if got := log.ticks(); len(got) != 4 {
		t.Error(got)
	}
}
