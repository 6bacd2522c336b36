// Command plot draws what the other benchmarks have measured, for
// docs/performance.md:
//
//	go run ./bench/plot -in out -to docs
//
// It reads bench.json, memory.json, scale.json, failover.json and
// failover-small.json, leaves out what is not there, and writes one SVG file for
// each picture. The files have colours for light and for dark viewers.
package main

import (
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

func main() {
	in := flag.String("in", "out", "folder of the benchmarks' JSON files")
	to := flag.String("to", "docs", "folder for the pictures")
	flag.Parse()
	if err := run(*in, *to); err != nil {
		fmt.Fprintln(os.Stderr, "bench/plot:", err)
		os.Exit(1)
	}
}

// picture is a file that is drawn from a file of numbers.
type picture struct {
	name string
	from string
	draw func(path string) ([]byte, error)
}

var pictures = []picture{
	{"ratios.svg", "bench.json", drawn(ratios)},
	{"latencies.svg", "bench.json", drawn(latencies)},
	{"soak.svg", "memory.json", drawn(soak)},
	{"scale.svg", "scale.json", drawn(scale)},
	{"failover.svg", "failover.json", failover},
}

// drawn reads a JSON file for a picture.
func drawn[T any](draw func(*T) []byte) func(string) ([]byte, error) {
	return func(path string) ([]byte, error) {
		var v T
		if err := read(path, &v); err != nil {
			return nil, err
		}
		return draw(&v), nil
	}
}

func read(path string, v any) error {
	b, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s: %w", path, err)
	}
	return nil
}

func run(in, to string) error {
	n := 0
	for _, p := range pictures {
		b, err := p.draw(filepath.Join(in, p.from))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return err
		}
		path := filepath.Join(to, p.name)
		if err := os.WriteFile(path, b, 0o644); err != nil {
			return err
		}
		fmt.Println(path)
		n++
	}
	if n == 0 {
		return fmt.Errorf("%s holds nothing that was measured: run `make bench` first", in)
	}
	return nil
}
