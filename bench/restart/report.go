package main

import (
	"errors"
	"fmt"
	"io"
	"slices"
	"time"

	"github.com/pollux-storage/pollux/bench/stat"
)

// named is a time with a name, in milliseconds.
type named struct {
	Name string  `json:"name"`
	Took float64 `json:"ms"`
}

// sample is one round of a case, in milliseconds.
type sample struct {
	Read  float64 `json:"first_read_ms"`
	All   float64 `json:"all_exports_ms"`
	Steps []named `json:"steps,omitempty"`
	Warm  *warm   `json:"reads,omitempty"`
}

// result is a case.
type result struct {
	Name    string   `json:"case"`
	Read    float64  `json:"first_read_ms"` // medians
	All     float64  `json:"all_exports_ms"`
	Steps   []named  `json:"steps,omitempty"`
	Warm    *warm    `json:"reads,omitempty"` // medians
	Samples []sample `json:"samples"`
}

// report is what goes to the JSON file.
type report struct {
	Started time.Time `json:"started"`
	Devices int       `json:"devices"`
	Volumes int       `json:"volumes"`
	Used    int       `json:"volumes_in_use"`
	Written int64     `json:"bytes_written"`
	Seed    uint64    `json:"seed"`
	Asking  float64   `json:"asking_ms"` // all exports, while nothing restarts
	Cases   []*result `json:"cases"`
}

func newReport(o options) *report {
	return &report{Started: time.Now().UTC(), Devices: o.devices, Volumes: o.volumes, Used: o.used, Written: o.written, Seed: o.seed}
}

func (r *report) find(name string) *result {
	i := slices.IndexFunc(r.Cases, func(c *result) bool { return c.Name == name })
	if i < 0 {
		return nil
	}
	return r.Cases[i]
}

func (r *report) add(name string, s sample) {
	c := r.find(name)
	if c == nil {
		c = &result{Name: name}
		r.Cases = append(r.Cases, c)
	}
	c.Samples = append(c.Samples, s)
}

func (r *report) last(name string) sample {
	c := r.find(name)
	return c.Samples[len(c.Samples)-1]
}

// finish computes the medians. Steps keep the order in which they came first; one that a
// sample lacks took no time in it.
func (r *report) finish() {
	for _, c := range r.Cases {
		var read, all []float64
		var names []string
		took := map[string][]float64{}
		for i, s := range c.Samples {
			read, all = append(read, s.Read), append(all, s.All)
			for _, step := range s.Steps {
				if took[step.Name] == nil {
					names = append(names, step.Name)
					took[step.Name] = make([]float64, len(c.Samples))
				}
				took[step.Name][i] += step.Took
			}
		}
		c.warm()
		c.Read, c.All, c.Steps = stat.Median(read), stat.Median(all), nil
		for _, n := range names {
			c.Steps = append(c.Steps, named{n, stat.Median(took[n])})
		}
	}
	slices.SortFunc(r.Cases, func(x, y *result) int { return slices.Index(caseNames, x.Name) - slices.Index(caseNames, y.Name) })
}

// targets are what is wanted of each case: first read and all exports, 0 for nothing.
var targets = map[string][2]float64{
	caseOwn:      {0, bootLimit},
	caseClean:    {0, bootLimit},
	caseTakeover: {takeoverLimit, 0},
}

func (r *report) print(w io.Writer) {
	fmt.Fprintf(w, "%d devices, %d volumes, %d of them in use with %d MiB; asking all exports takes %.0f ms of each.\n\n", r.Devices, r.Volumes, r.Used, r.Written>>20, r.Asking)
	fmt.Fprintf(w, "| case | rounds | first read ms | all exports ms |\n|---|--:|--:|--:|\n")
	for _, c := range r.Cases {
		fmt.Fprintf(w, "| %s | %d | %.1f%s | %.1f%s |\n", c.Name, len(c.Samples), c.Read, limit(targets[c.Name][0]), c.All, limit(targets[c.Name][1]))
	}
	fmt.Fprintf(w, "| fast restart, wanted | | %.0f | %.0f |\n", fastRead, fastAll)
	r.printWarm(w)
	for _, c := range r.Cases {
		if len(c.Steps) == 0 {
			continue
		}
		fmt.Fprintf(w, "\n| step of %s | median ms |\n|---|--:|\n", c.Name)
		for _, s := range c.Steps {
			fmt.Fprintf(w, "| %s | %.2f |\n", s.Name, s.Took)
		}
	}
}

func limit(ms float64) string {
	if ms == 0 {
		return ""
	}
	return fmt.Sprintf(" (%.0f)", ms)
}

// judge tells which targets are missed.
func (r *report) judge() error {
	var errs []error
	for _, c := range r.Cases {
		if m := c.Warm; m != nil && m.After.Hits < warmLimit*m.Before.Hits {
			errs = append(errs, fmt.Errorf("of reads after %s the cache had %.4f, and %.4f before", c.Name, m.After.Hits, m.Before.Hits))
		}
		for i, got := range []float64{c.Read, c.All} {
			if want := targets[c.Name][i]; want > 0 && got > want {
				errs = append(errs, fmt.Errorf("%s took %.1f ms, wanted are %.0f", c.Name, got, want))
			}
		}
	}
	return errors.Join(errs...)
}
