package main

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"sort"
	"strings"
	"time"
)

// thinVolume is the size of the volume whose guest is watched.
const thinVolume = 100 << 30

// slice is how long each part of a watch is; latencies are those of a part.
const slice = 30 * time.Second

// watch is a part of the load: its latencies, and the guest's memory after it.
type watch struct {
	After time.Duration `json:"after_ns"`
	RSS   int64         `json:"rss"`
	Anon  int64         `json:"anonymous"`
	Shmem int64         `json:"shared"`
	Read  latency       `json:"read"`
	Write latency       `json:"write"`
}

type latency struct {
	IOPS  float64 `json:"iops"`
	P50us float64 `json:"p50_us"`
	P99us float64 `json:"p99_us"`
	P999  float64 `json:"p999_us"`
}

func latencyOf(s fioSide) latency {
	p := s.Clat.Percentile
	return latency{s.IOPS, p["50.000000"] / 1e3, p["99.000000"] / 1e3, p["99.900000"] / 1e3}
}

// memoryReport is what goes to the JSON file.
type memoryReport struct {
	Volume  int64   `json:"volume_bytes"`
	Seconds float64 `json:"seconds"`
	First   int64   `json:"rss_first_quarter"` // median
	Last    int64   `json:"rss_last_quarter"`  // median
	Peak    int64   `json:"rss_peak"`
	Watches []watch `json:"watches"`
}

// watchMemory loads a thin volume with reads and writes of several sizes and
// with flushes, prints the latencies and the memory of the guest that serves it
// as time goes by, and checks the pool at the end.
func watchMemory(ctx context.Context, o options, dir string) error {
	if o.pollux == "" {
		return fmt.Errorf("-memory needs -pollux")
	}
	p := &pollux{title: "pollux", program: o.pollux, dir: filepath.Join(dir, "pair"), volume: "bench", size: thinVolume, poolSize: 128 << 30}
	defer p.stop()
	if err := p.start(ctx); err != nil {
		return err
	}
	fmt.Printf("guest %d, volume 100 GiB thin, reads and writes of 4 to 128 KiB at random, at most %d a second, a flush after 64 writes, for %v\n\n", p.first, o.iops, o.duration)
	fmt.Printf("| after | resident | anonymous | reads/s | p50 µs | p99 | p99.9 | writes/s | p50 µs | p99 | p99.9 |\n|--:|%s\n", strings.Repeat("--:|", 10))
	rep := &memoryReport{Volume: thinVolume, Seconds: o.duration.Seconds()}
	for begin := time.Now(); time.Since(begin) < o.duration; {
		length := min(slice, o.duration)
		read, write, err := fio(ctx, p.uri(), thinVolume, length+time.Minute, "--rw=randrw", "--bssplit=4k/80:64k/15:128k/5", "--iodepth=16", "--fsync=64",
			"--time_based", fmt.Sprintf("--runtime=%d", int(length.Seconds())), fmt.Sprintf("--rate_iops=%d", o.iops/2))
		if err != nil {
			return err
		}
		m, err := resident(p.first)
		if err != nil {
			return fmt.Errorf("the guest is gone: %w\n%s", err, tail(filepath.Join(p.dir, "log", "guest-a.log")))
		}
		w := watch{time.Since(begin).Round(time.Second), m["VmRSS"], m["RssAnon"], m["RssShmem"], latencyOf(read), latencyOf(write)}
		rep.Watches = append(rep.Watches, w)
		fmt.Printf("| %v | %d MiB | %d MiB | %.0f | %.0f | %.0f | %.0f | %.0f | %.0f | %.0f | %.0f |\n", w.After, w.RSS>>20, w.Anon>>20,
			w.Read.IOPS, w.Read.P50us, w.Read.P99us, w.Read.P999, w.Write.IOPS, w.Write.P50us, w.Write.P99us, w.Write.P999)
	}
	rep.finish()
	if err := writeJSON(filepath.Join(filepath.Dir(o.out), "memory.json"), rep); err != nil {
		return err
	}
	out, err := output(ctx, 10*time.Minute, p.program, "check", "--dir", p.dir)
	if err != nil {
		return fmt.Errorf("the pool is not consistent afterwards: %w", err)
	}
	_, err = os.Stdout.Write(out)
	return err
}

// finish says whether the memory stayed flat.
func (rep *memoryReport) finish() {
	quarter := max(1, len(rep.Watches)/4)
	rep.First, rep.Last = medianRSS(rep.Watches[:quarter]), medianRSS(rep.Watches[len(rep.Watches)-quarter:])
	for _, w := range rep.Watches {
		rep.Peak = max(rep.Peak, w.RSS)
	}
	fmt.Printf("\nresident memory: %d MiB in the first quarter, %d MiB in the last, %d MiB at most\n\n", rep.First>>20, rep.Last>>20, rep.Peak>>20)
}

func medianRSS(ws []watch) int64 {
	v := make([]int64, 0, len(ws))
	for _, w := range ws {
		v = append(v, w.RSS)
	}
	sort.Slice(v, func(i, j int) bool { return v[i] < v[j] })
	return v[len(v)/2]
}
