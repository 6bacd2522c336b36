package region

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"
)

const childEnv = "POLLUX_TEST_REGION"

// TestMain turns the test binary into the process that is killed.
func TestMain(m *testing.M) {
	if path := os.Getenv(childEnv); path != "" {
		hold(path)
	}
	os.Exit(m.Run())
}

// hold maps the region, touches all of it, says so and waits for its death.
func hold(path string) {
	r, err := Open(path, false)
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	for i, log := 0, r.Log(); i < len(log); i += 4096 {
		log[i]++
	}
	fmt.Println("ready")
	_, _ = os.Stdin.Read(make([]byte, 1))
	os.Exit(0)
}

// BenchmarkReap measures how long the host needs from SIGKILL until a process
// with a touched region is reaped: a part of the pause of every takeover.
func BenchmarkReap(b *testing.B) {
	mount := filepath.Join(b.TempDir(), "regions")
	best, err := Dir(mount)
	if err != nil {
		b.Fatal(err)
	}
	plain, err := shared(fallback(mount))
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() {
		if err := RemoveDir(mount); err != nil {
			b.Error(err)
		}
	})
	for _, m := range []Medium{best, plain} {
		for _, mib := range []int64{256, 1024} {
			b.Run(fmt.Sprintf("huge=%v/%dMiB", m.HugePages, mib), func(b *testing.B) {
				r, err := Create(filepath.Join(m.Path, "r"), Options{Owner: "a", LogBytes: mib << 20})
				if err != nil {
					b.Fatal(err)
				}
				defer func() {
					if err := r.Remove(); err != nil {
						b.Error(err)
					}
				}()
				var total, worst time.Duration
				for range b.N {
					took := reap(b, r.Path())
					total += took
					worst = max(worst, took)
				}
				b.ReportMetric(float64(total.Microseconds())/float64(b.N)/1000, "ms/reap")
				b.ReportMetric(float64(worst.Microseconds())/1000, "ms/worst")
			})
		}
	}
}

func reap(b *testing.B, path string) time.Duration {
	cmd := exec.Command(os.Args[0], "-test.run=^$")
	cmd.Env = append(os.Environ(), childEnv+"="+path)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		b.Fatal(err)
	}
	in, err := cmd.StdinPipe()
	if err != nil {
		b.Fatal(err)
	}
	defer in.Close()
	if err := cmd.Start(); err != nil {
		b.Fatal(err)
	}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil {
		b.Fatalf("child said %q: %v", line, err)
	}
	start := time.Now()
	if err := cmd.Process.Kill(); err != nil {
		b.Fatal(err)
	}
	if _, err := cmd.Process.Wait(); err != nil {
		b.Fatal(err)
	}
	return time.Since(start)
}
