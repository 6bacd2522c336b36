package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"time"

	"github.com/pollux-storage/pollux/bench/stat"
)

// cell is a row on a server.
type cell struct {
	Row     string   `json:"row"`
	Server  string   `json:"server"`
	Samples []sample `json:"samples"`
	Median  sample   `json:"median"`
}

// report is what goes to the JSON file.
type report struct {
	Started  time.Time         `json:"started"`
	CPUs     int               `json:"cpus"`
	Size     int64             `json:"data_set_bytes"`
	Log      int64             `json:"log_bytes"`
	Runtime  float64           `json:"runtime_s"`
	Repeats  int               `json:"repeats"`
	Versions map[string]string `json:"versions"`
	Notes    map[string]string `json:"notes"`
	LeftOut  map[string]string `json:"left_out,omitempty"`
	Cells    []*cell           `json:"cells"`
	Verdicts []verdict         `json:"verdicts"`
}

// compare starts all servers, measures the rows in turn and reports.
func compare(ctx context.Context, o options, dir string) error {
	list, err := servers(ctx, o, dir)
	if err != nil {
		return err
	}
	rep := &report{Started: time.Now().UTC(), CPUs: runtime.NumCPU(), Size: o.size, Log: o.log, Runtime: o.runtime.Seconds(), Repeats: o.n,
		Versions: versions(ctx, o), Notes: map[string]string{}, LeftOut: map[string]string{}}
	defer func() {
		for _, s := range list {
			s.stop()
		}
	}()
	running, failed := startAll(ctx, list, rep)
	if err := ctx.Err(); err != nil {
		return context.Cause(ctx)
	}
	if err := rep.measureAll(ctx, o, running); err != nil {
		return err
	}
	rep.finish()
	rep.print(os.Stdout)
	if err := stat.WriteJSON(o.out, rep); err != nil {
		return err
	}
	return failed
}

// startAll starts the servers and returns those that run. Peers that do not
// start are noted, and left out.
func startAll(ctx context.Context, list []server, rep *report) (running []server, failed error) {
	for _, s := range list {
		fmt.Fprintf(os.Stderr, "starting %s\n", s.name())
		if err := s.start(ctx); err != nil {
			fmt.Fprintf(os.Stderr, "left out: %s: %v\n", s.name(), err)
			rep.LeftOut[s.name()] = err.Error()
			if strings.HasPrefix(s.name(), "pollux") {
				failed = fmt.Errorf("%s was not measured: %w", s.name(), err)
			}
			continue
		}
		running = append(running, s)
		if n := s.note(); n != "" {
			rep.Notes[s.name()] = n
		}
	}
	return running, failed
}

// measureAll runs each row on each server in turn, and that n times, beginning
// with another server each time: what changes on the machine meanwhile hits all
// alike.
func (rep *report) measureAll(ctx context.Context, o options, list []server) error {
	cells := map[string]*cell{}
	root := os.Geteuid() == 0
	if !root {
		rep.LeftOut["cold rows"] = "only root may empty the page cache"
	}
	for _, s := range list {
		// Filling it has left something to be written.
		if err := s.settle(ctx); err != nil {
			return fmt.Errorf("%s: %w", s.name(), err)
		}
	}
	for i := range o.n {
		for _, r := range allRows {
			if !chosen(r.Name, o.rows) || r.Cold && !root {
				continue
			}
			for _, s := range rotated(list, i) {
				if !r.suits(s.name()) {
					continue
				}
				m, err := measure(ctx, s, r, o)
				if err != nil {
					if cause := context.Cause(ctx); cause != nil {
						err = cause
					}
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

// rotated returns the list from its nth element on, around the end.
func rotated(list []server, n int) []server {
	n %= max(len(list), 1)
	return slices.Concat(list[n:], list[:n])
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
