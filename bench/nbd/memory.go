package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"time"
)

// thinVolume is the size of the volume whose guest is watched.
const thinVolume = 100 << 30

// watch is what a guest's memory was at a moment.
type watch struct {
	After time.Duration `json:"after_ns"`
	RSS   int64         `json:"rss"`
	Anon  int64         `json:"anonymous"`
	Shmem int64         `json:"shared"`
}

// memoryReport is what goes to the JSON file.
type memoryReport struct {
	Volume  int64   `json:"volume_bytes"`
	Seconds float64 `json:"seconds"`
	IOPS    float64 `json:"iops"`
	First   int64   `json:"rss_first_quarter"` // median
	Last    int64   `json:"rss_last_quarter"`  // median
	Peak    int64   `json:"rss_peak"`
	Watches []watch `json:"watches"`
}

// watchMemory loads a thin volume at random and prints the resident memory of
// the guest that serves it.
func watchMemory(ctx context.Context, o options, dir string) (err error) {
	if o.pollux == "" {
		return fmt.Errorf("-memory needs -pollux")
	}
	p := &pollux{program: o.pollux, dir: filepath.Join(dir, "pair"), volume: "bench", size: thinVolume, poolSize: 128 << 30}
	defer p.stop()
	if err := p.start(ctx); err != nil {
		return err
	}
	type result struct {
		iops float64
		err  error
	}
	done := make(chan result, 1)
	go func() {
		read, write, err := fio(ctx, p.uri(), thinVolume, o.duration+time.Minute, "--rw=randrw", "--bs=4k", "--iodepth=16",
			"--time_based", fmt.Sprintf("--runtime=%d", int(o.duration.Seconds())), fmt.Sprintf("--rate_iops=%d", o.iops/2))
		done <- result{read.IOPS + write.IOPS, err}
	}()
	rep := &memoryReport{Volume: thinVolume, Seconds: o.duration.Seconds()}
	every := max(time.Second, o.duration/60)
	tick := time.NewTicker(every)
	defer tick.Stop()
	fmt.Printf("guest %d, volume 100 GiB thin, random 4 KiB reads and writes for %v\n\n", p.first, o.duration)
	fmt.Printf("| after | resident | anonymous | shared |\n|--:|--:|--:|--:|\n")
	for begin := time.Now(); ; {
		m, err := resident(p.first)
		if err != nil {
			return fmt.Errorf("the guest is gone: %w\n%s", err, tail(filepath.Join(p.dir, "log", "guest-a.log")))
		}
		w := watch{time.Since(begin).Round(time.Second), m["VmRSS"], m["RssAnon"], m["RssShmem"]}
		rep.Watches = append(rep.Watches, w)
		fmt.Printf("| %v | %d MiB | %d MiB | %d MiB |\n", w.After, w.RSS>>20, w.Anon>>20, w.Shmem>>20)
		select {
		case <-tick.C:
			continue
		case r := <-done:
			if r.err != nil {
				return r.err
			}
			rep.IOPS = r.iops
		}
		break
	}
	return rep.finish(o)
}

// finish says whether the memory stayed flat.
func (rep *memoryReport) finish(o options) error {
	quarter := max(1, len(rep.Watches)/4)
	rep.First, rep.Last = medianRSS(rep.Watches[:quarter]), medianRSS(rep.Watches[len(rep.Watches)-quarter:])
	for _, w := range rep.Watches {
		rep.Peak = max(rep.Peak, w.RSS)
	}
	fmt.Printf("\n%.0f requests a second; resident memory: %d MiB in the first quarter, %d MiB in the last, %d MiB at most\n",
		rep.IOPS, rep.First>>20, rep.Last>>20, rep.Peak>>20)
	path := filepath.Join(filepath.Dir(o.out), "memory.json")
	if err := writeJSON(path, rep); err != nil {
		return err
	}
	fmt.Fprintln(os.Stderr, "wrote", path)
	return nil
}

func medianRSS(ws []watch) int64 {
	v := make([]int64, 0, len(ws))
	for _, w := range ws {
		v = append(v, w.RSS)
	}
	sort.Slice(v, func(i, j int) bool { return v[i] < v[j] })
	return v[len(v)/2]
}
