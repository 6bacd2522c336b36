package pool

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/file"
	"github.com/pollux-storage/pollux/internal/mirror"
)

// BenchmarkScrub measures scrubs without a limit of a pool on files, which holds
// 256 MiB, or 2 GiB with POLLUX_SOAK=1, that are written in sequence: bytes of all
// copies a second, and processor time for them.
func BenchmarkScrub(b *testing.B) {
	for _, copies := range []int{1, 2} {
		b.Run(fmt.Sprint("copies ", copies), func(b *testing.B) { benchScrub(b, copies) })
	}
}

func benchScrub(b *testing.B, copies int) {
	size := int64(256 << 20)
	if soak {
		size = 2 << 30
	}
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	p := openOnFiles(b, copies, 2*size+1<<30)
	ran := make(chan error, 1)
	go func() { ran <- p.Run(ctx) }()
	if _, err := p.CreateVolume(ctx, "v", size); err != nil {
		b.Fatal(err)
	}
	v, err := p.Volume("v")
	if err != nil {
		b.Fatal(err)
	}
	rng := rand.New(rand.NewPCG(1, 1))
	buf := make([]byte, 1<<20)
	for at := int64(0); at < size; at += int64(len(buf)) {
		for i := range buf {
			buf[i] = byte(rng.Uint64())
		}
		if err := write(v, at, buf); err != nil {
			b.Fatal(err)
		}
	}
	if err := p.Fold(ctx); err != nil {
		b.Fatal(err)
	}
	var bytes uint64
	var took time.Duration
	before := processorTime(b)
	for b.Loop() {
		if err := p.Scrub(ctx, ScrubStart); err != nil {
			b.Fatal(err)
		}
		s := p.Stats().Scrub
		for ; s.State == ScrubRunning; s = p.Stats().Scrub {
			time.Sleep(time.Millisecond)
		}
		if s.Now.Repaired+s.Now.Unreadable > 0 {
			b.Fatalf("%+v", s.Now)
		}
		bytes += s.Now.Bytes
		took += s.Now.Took
	}
	b.ReportMetric(float64(bytes)/1e6/took.Seconds(), "MB/s")
	b.ReportMetric((processorTime(b)-before).Seconds()/(float64(bytes)/1e9), "cpu-s/GB")
	cancel()
	if err := <-ran; err != nil {
		b.Error(err)
	}
	if err := p.Close(context.Background()); err != nil {
		b.Error(err)
	}
}

// openOnFiles opens a new pool on files of that size.
func openOnFiles(b *testing.B, copies int, size int64) *Pool {
	b.Helper()
	dir := b.TempDir()
	var devs []hpdi.Device
	for i := range copies {
		path := filepath.Join(dir, fmt.Sprint("disk", i))
		f, err := os.Create(path)
		if err == nil {
			err = f.Truncate(size)
		}
		if err != nil {
			b.Fatal(err)
		}
		f.Close()
		d, err := file.Open(path, file.Options{})
		if err != nil {
			b.Fatal(err)
		}
		devs = append(devs, d)
	}
	if copies > 1 {
		if _, err := mirror.Create(devs); err != nil {
			b.Fatal(err)
		}
		m, err := mirror.Open(mirror.Options{Devices: devs})
		if err != nil {
			b.Fatal(err)
		}
		devs = []hpdi.Device{m}
	}
	if _, err := Create(context.Background(), CreateOptions{Name: "p", Identity: "a", Devices: devs}); err != nil {
		b.Fatal(err)
	}
	p, err := Open(context.Background(), OpenOptions{Devices: devs, RegionPath: filepath.Join(dir, "region"),
		CacheBytes: 64 << 20, Owner: "a", Scrub: ScrubOptions{Rate: 1 << 50}, Cleaner: CleanerOptions{Off: true}})
	if err != nil {
		b.Fatal(err)
	}
	return p
}

// processorTime returns what this process has used.
func processorTime(b *testing.B) time.Duration {
	b.Helper()
	var u syscall.Rusage
	if err := syscall.Getrusage(syscall.RUSAGE_SELF, &u); err != nil {
		b.Fatal(err)
	}
	return time.Duration(u.Utime.Nano() + u.Stime.Nano())
}
