package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/pollux-storage/pollux/bench/fio"
	"github.com/pollux-storage/pollux/bench/stat"
)

// The volumes of a watch, all on one guest, and how each is loaded.
const (
	watchVolumes    = 4
	watchVolumeSize = 4 << 30
	watchConns      = 2 // that read and write; one more trims
)

// judged is how long a watch must be for a verdict: before, caches still fill.
const judged = 10 * time.Minute

// Limits of a verdict, as parts of what is compared.
const (
	growthLimit = 0.02 // of the memory, over the second half
	p99Limit    = 1.5  // second half to first
)

// watch is a part of the load: its latencies, and the guest's memory after it.
type watch struct {
	Seconds float64 `json:"after_s"`
	RSS     int64   `json:"rss"`
	Anon    int64   `json:"anonymous"`
	Shmem   int64   `json:"shared"`
	Read    latency `json:"read"`
	Write   latency `json:"write"`
	Trims   float64 `json:"trims_per_s"`
}

type latency struct {
	IOPS   float64 `json:"iops"`
	MBps   float64 `json:"mb_per_s"`
	P50us  float64 `json:"p50_us"`
	P99us  float64 `json:"p99_us"`
	P999us float64 `json:"p999_us"`
}

func latencyOf(s fio.Side) latency {
	l := latency{IOPS: s.IOPS, MBps: s.Moved / s.Runtime / 1e3}
	l.P50us, l.P99us, l.P999us = s.Clat.Us()
	return l
}

// memoryReport is what goes to the JSON file.
type memoryReport struct {
	Started time.Time `json:"started"`
	Seconds float64   `json:"seconds"`
	Limit   int       `json:"iops_limit"`
	Peak    int64     `json:"rss_peak"`
	// Slope is that of the memory over the second half, in bytes an hour.
	Slope float64 `json:"rss_slope_per_hour"`
	// Growth is what that slope makes of the second half, as a part of it.
	Growth float64 `json:"rss_growth"`
	// P99 of the second half to the first, medians.
	ReadP99  float64 `json:"read_p99_second_to_first_half"`
	WriteP99 float64 `json:"write_p99_second_to_first_half"`
	Watches  []watch `json:"watches"`
}

// watchMemory loads four volumes of one guest with reads and writes of several
// sizes, with trims and with flushes, prints the latencies and the memory of
// the guest as time goes by, and checks the pool at the end. It fails when the
// check finds something, or when memory or latencies did not stay flat.
func watchMemory(ctx context.Context, o options, dir string) error {
	if o.pollux == "" {
		return fmt.Errorf("-memory needs -pollux")
	}
	p := &pollux{title: "pollux", program: o.pollux, dir: filepath.Join(dir, "pair"), volume: "v0", size: watchVolumeSize, poolSize: watchVolumes*watchVolumeSize + 8<<30, log: o.log}
	defer p.stop()
	if err := p.start(ctx); err != nil {
		return err
	}
	uris := []string{p.uri()}
	for n := 1; n < watchVolumes; n++ {
		p.volume = fmt.Sprintf("v%d", n)
		if _, err := output(ctx, time.Minute, p.program, "volume", "create", p.volume, "--size", fmt.Sprint(watchVolumeSize), "--guest", "a", "--dir", p.dir); err != nil {
			return err
		}
		if err := p.find(ctx); err != nil {
			return err
		}
		uris = append(uris, p.uri())
	}
	// Full volumes: reads of what nobody has written yet would be faster than
	// those that come later.
	for _, uri := range uris {
		if err := fio.Fill(ctx, uri, watchVolumeSize); err != nil {
			return err
		}
	}
	fmt.Printf("guest %d, %d full volumes of %d GiB, on each %d connections with reads and writes of 4 to 128 KiB at random and a flush after 64 writes, and one with trims; at most %d requests a second, for %v\n\n",
		p.first, watchVolumes, watchVolumeSize>>30, watchConns, o.iops, o.duration)
	fmt.Printf("| after | resident | anonymous | shared | MB/s | reads/s | p50 µs | p99 | p99.9 | writes/s | p50 µs | p99 | p99.9 | trims/s |\n|--:|%s\n", strings.Repeat("--:|", 13))
	rep := &memoryReport{Started: time.Now().UTC(), Seconds: o.duration.Seconds(), Limit: o.iops}
	// Sixty parts, or fewer that are not too short for percentiles.
	length := max(10*time.Second, o.duration/60)
	for begin := time.Now(); time.Since(begin)+length/2 < o.duration; {
		f, err := fio.Run(ctx, length+time.Minute, watchLoad(uris, o.iops, length)...)
		if err != nil {
			return err
		}
		m, err := resident(p.first)
		if err != nil {
			return fmt.Errorf("the guest is gone: %w\n%s", err, tail(filepath.Join(p.dir, "log", "guest-a.log")))
		}
		w := watch{time.Since(begin).Seconds(), m["VmRSS"], m["RssAnon"], m["RssShmem"], latencyOf(f.Read), latencyOf(f.Write), f.Trim.IOPS}
		rep.Watches = append(rep.Watches, w)
		fmt.Printf("| %.0f s | %d MiB | %d MiB | %d MiB | %.0f | %.0f | %.0f | %.0f | %.0f | %.0f | %.0f | %.0f | %.0f | %.0f |\n", w.Seconds, w.RSS>>20, w.Anon>>20, w.Shmem>>20,
			w.Read.MBps+w.Write.MBps, w.Read.IOPS, w.Read.P50us, w.Read.P99us, w.Read.P999us, w.Write.IOPS, w.Write.P50us, w.Write.P99us, w.Write.P999us, w.Trims)
	}
	rep.finish()
	if err := stat.WriteJSON(filepath.Join(filepath.Dir(o.out), "memory.json"), rep); err != nil {
		return err
	}
	out, err := output(ctx, 10*time.Minute, p.program, "check", "--dir", p.dir)
	if err != nil {
		return fmt.Errorf("the pool is not consistent afterwards: %w", err)
	}
	if _, err := os.Stdout.Write(out); err != nil {
		return err
	}
	if o.duration < judged {
		fmt.Printf("Shorter than %v: whether it is flat is not judged, because caches may still fill.\n", judged)
		return nil
	}
	return rep.judge()
}

// watchSplit are the sizes of reads and writes, of watchMean bytes in the mean.
const (
	watchSplit = "4k/80:64k/15:128k/5"
	watchMean  = (4*80 + 64*15 + 128*5) << 10 / 100
)

// watchLoad are fio's jobs. Half of what is asked for are writes, and a trim
// comes for each forty requests. Limits are in bytes, because fio takes one in
// requests for so many of the smallest.
func watchLoad(uris []string, iops int, length time.Duration) []string {
	args := []string{"--time_based", fmt.Sprintf("--runtime=%d", int(length.Seconds())), fmt.Sprintf("--size=%d", watchVolumeSize)}
	for n, uri := range uris {
		args = append(args,
			fmt.Sprintf("--name=rw%d", n), "--uri="+uri, "--rw=randrw", "--bssplit="+watchSplit, "--iodepth=4", "--fsync=64",
			fmt.Sprintf("--numjobs=%d", watchConns), fmt.Sprintf("--rate=%d", max(1, iops/2/watchConns/len(uris))*watchMean),
			fmt.Sprintf("--name=trim%d", n), "--uri="+uri, "--rw=randtrim", "--bs=64k", "--iodepth=1",
			fmt.Sprintf("--rate_iops=%d", max(1, iops/40/len(uris))))
	}
	return args
}

// finish says whether memory and latencies stayed flat.
func (rep *memoryReport) finish() {
	half := len(rep.Watches) / 2
	first, second := rep.Watches[:half], rep.Watches[half:]
	for _, w := range rep.Watches {
		rep.Peak = max(rep.Peak, w.RSS)
	}
	slope := slopeOf(second)
	rep.Slope = slope * 3600
	if rss := medianOf(second, func(w watch) float64 { return float64(w.RSS) }); rss > 0 {
		rep.Growth = slope * (second[len(second)-1].Seconds - second[0].Seconds) / rss
	}
	ratio := func(f func(watch) float64) float64 {
		if m := medianOf(first, f); m > 0 {
			return medianOf(second, f) / m
		}
		return 0
	}
	rep.ReadP99 = ratio(func(w watch) float64 { return w.Read.P99us })
	rep.WriteP99 = ratio(func(w watch) float64 { return w.Write.P99us })
	fmt.Printf("\nresident memory: %d MiB at most, %+.1f MiB an hour over the second half, %+.2f %% of it; p99 of the second half to the first: reads %.2f, writes %.2f\n\n",
		rep.Peak>>20, rep.Slope/(1<<20), 100*rep.Growth, rep.ReadP99, rep.WriteP99)
}

// judge is an error when something grew.
func (rep *memoryReport) judge() error {
	var errs []error
	if rep.Growth > growthLimit {
		errs = append(errs, fmt.Errorf("resident memory grew by %.1f %% over the second half, allowed are %g %%", 100*rep.Growth, 100*growthLimit))
	}
	for name, ratio := range map[string]float64{"reads": rep.ReadP99, "writes": rep.WriteP99} {
		if ratio > p99Limit {
			errs = append(errs, fmt.Errorf("p99 of %s in the second half is %.2f times that of the first, allowed are %g", name, ratio, p99Limit))
		}
	}
	if len(errs) == 0 {
		fmt.Println("Memory and latencies stayed flat.")
	}
	return errors.Join(errs...)
}

func medianOf(ws []watch, f func(watch) float64) float64 {
	v := make([]float64, 0, len(ws))
	for _, w := range ws {
		v = append(v, f(w))
	}
	return stat.Median(v)
}

// slopeOf returns the least-squares slope of the memory in bytes a second.
func slopeOf(ws []watch) float64 {
	var t, m float64
	for _, w := range ws {
		t += w.Seconds / float64(len(ws))
		m += float64(w.RSS) / float64(len(ws))
	}
	var num, den float64
	for _, w := range ws {
		num += (w.Seconds - t) * (float64(w.RSS) - m)
		den += (w.Seconds - t) * (w.Seconds - t)
	}
	if den == 0 {
		return 0
	}
	return num / den
}
