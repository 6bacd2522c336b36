// Command upgrade takes a pair through rolling upgrades, back and forth between two
// programs that differ in nothing but their builds, and shows what clients see of it.
//
//	go run ./bench/upgrade             the table to stdout, all samples to out/upgrade.json
//
// Clients write and read 4 KiB blocks one request at a time and compare what they read:
// one of each guest that connects again by itself, and behind programs that people have
// and that must hold their clients' connections: qemu-storage-daemon with
// reconnect-delay=10, and nbdkit with its retry filter over its nbd plugin. An error, wrong
// content or a connection that the two do not hold ends the benchmark with a failure.
//
// A pause is the longest time between two replies that a client saw in one upgrade. Each
// upgrade moves each identity twice, to the partner and back. nbdkit waits a whole second
// before it connects again, so its pauses are its own.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"syscall"
	"time"

	"github.com/pollux-storage/pollux/bench/stat"
	"github.com/pollux-storage/pollux/bench/through"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/test/pair"
	"github.com/pollux-storage/pollux/test/prove"
)

type options struct {
	pollux string
	dir    string
	out    string
	rounds int
	watch  time.Duration
	seed   uint64
	limit  time.Duration
}

// client is one client and what it saw.
type client struct {
	Name    string    `json:"name"`
	Pauses  []float64 `json:"pauses_ms"`
	Ops     int       `json:"requests"`
	holds   bool      // its connection must not end
	program string    // that it is behind
	guest   string
	v       *prove.Client
}

type report struct {
	Started time.Time `json:"started"`
	CPUs    int       `json:"cpus"`
	Seed    uint64    `json:"seed"`
	Took    []float64 `json:"upgrades_ms"`
	Clients []*client `json:"clients"`
}

func main() {
	runtime.LockOSThread() // see through.Start
	var o options
	flag.StringVar(&o.pollux, "pollux", "bin/pollux", "the program")
	flag.StringVar(&o.dir, "dir", "", "where the pair's folder is made (default the system's temporary folder)")
	flag.StringVar(&o.out, "out", "out/upgrade.json", "where the numbers go")
	flag.IntVar(&o.rounds, "rounds", 50, "upgrades")
	flag.DurationVar(&o.watch, "watch", 500*time.Millisecond, "how long each guest is watched with its new program")
	flag.Uint64Var(&o.seed, "seed", uint64(time.Now().UnixNano()), "of the clients")
	flag.DurationVar(&o.limit, "limit", 20*time.Minute, "for everything together")
	flag.Parse()
	if err := run(o); err != nil {
		fmt.Fprintln(os.Stderr, "bench/upgrade:", err)
		os.Exit(1)
	}
}

func run(o options) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeoutCause(ctx, o.limit, fmt.Errorf("it took longer than %v, see -limit: %w", o.limit, context.DeadlineExceeded))
	defer cancel()
	for _, program := range []string{through.QEMU, through.NBDKit} {
		if _, err := exec.LookPath(program); err != nil {
			return fmt.Errorf("%w: install it with `make deps`", err)
		}
	}
	rep := &report{Started: time.Now().UTC(), CPUs: runtime.NumCPU(), Seed: o.seed, Clients: []*client{
		{Name: "own client, guest a", guest: "a"},
		{Name: "own client, guest b", guest: "b"},
		{Name: "QEMU, reconnect-delay", guest: "a", program: through.QEMU, holds: true},
		{Name: "nbdkit, retry filter", guest: "a", program: through.NBDKit, holds: true},
	}}
	if err := measure(ctx, o, rep); err != nil {
		return err
	}
	rep.print()
	return stat.WriteJSON(o.out, rep)
}

// programs makes two files of the program that differ in their builds.
func programs(o options, dir string) (two [2]string, err error) {
	content, err := os.ReadFile(o.pollux)
	if err != nil {
		return two, err
	}
	for i := range two {
		two[i] = filepath.Join(dir, fmt.Sprintf("pollux-%d", i))
		// What follows the end of a program is never run.
		if err := os.WriteFile(two[i], append(bytes.Clone(content), byte('0'+i)), 0o700); err != nil {
			return two, err
		}
	}
	return two, nil
}

// measure runs a pair from up to down.
func measure(ctx context.Context, o options, rep *report) (err error) {
	own, err := os.MkdirTemp(o.dir, "plx-up-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(own)) }()
	two, err := programs(o, own)
	if err != nil {
		return err
	}
	p, err := pair.New(two[0], o.dir, pair.Settings{PoolSize: "8GiB", Failover: []string{"giveback_delay: -1s"}})
	if err != nil {
		return err
	}
	defer func() {
		if cause := context.Cause(ctx); cause != nil {
			err = cause // whatever else failed, failed because of it
		} else if err != nil {
			err = fmt.Errorf("seed %d: %w\n%s", o.seed, err, p.Logs(25))
		}
		down, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		err = errors.Join(err, p.Remove(down))
	}()
	if err := p.Up(ctx); err != nil {
		return err
	}
	for i, c := range rep.Clients {
		end, serr := c.start(ctx, p, own, o.seed+uint64(i))
		if end != nil { // it may have begun and failed
			defer func() {
				if cerr := end(); cerr != nil {
					err = errors.Join(err, fmt.Errorf("%s: %w", c.Name, cerr))
				}
			}()
		}
		if serr != nil {
			return fmt.Errorf("%s: %w", c.Name, serr)
		}
	}
	for n := range o.rounds {
		if err := round(ctx, o, p, two[(n+1)%2], rep); err != nil {
			return fmt.Errorf("upgrade %d: %w", n+1, err)
		}
		fmt.Fprintf(os.Stderr, "upgrade %3d/%d  %.0f ms, pauses", n+1, o.rounds, rep.Took[n])
		for _, c := range rep.Clients {
			fmt.Fprintf(os.Stderr, " %.1f", c.Pauses[n])
		}
		fmt.Fprintln(os.Stderr, " ms")
	}
	if err := p.Until(ctx, 30*time.Second, pair.Well); err != nil {
		return err
	}
	_, err = p.Check(ctx)
	return err
}

// start makes a volume for a client and lets it begin.
func (c *client) start(ctx context.Context, p *pair.Pair, dir string, seed uint64) (end func() error, err error) {
	name := fmt.Sprintf("disk-%s-%d", c.guest, seed%1000)
	if _, err := p.Do(ctx, "volume", "create", name, "--size", fmt.Sprint(prove.Size), "--guest", c.guest); err != nil {
		return nil, err
	}
	e, err := p.Export(ctx, name)
	if err != nil {
		return nil, err
	}
	uri, stop := e.NBDUnix, func() error { return nil }
	if c.program != "" {
		t, err := through.Start(ctx, c.program, filepath.Join(dir, c.program+".sock"), uri)
		if err != nil {
			return nil, err
		}
		uri, stop = t.URI, t.Stop
	}
	if c.v, err = prove.Start(uri, seed); err != nil {
		return nil, errors.Join(err, stop())
	}
	return func() error { return errors.Join(c.v.Stop(), stop()) }, c.v.Await(ctx, 100)
}

// round is one upgrade.
func round(ctx context.Context, o options, p *pair.Pair, to string, rep *report) error {
	for _, c := range rep.Clients {
		if err := c.v.Await(ctx, 20); err != nil {
			return fmt.Errorf("%s: %w", c.Name, err)
		}
		c.v.Look()
	}
	began := time.Now()
	var done control.Programs
	if err := p.JSON(ctx, &done, "upgrade", "--binary", to, "--watch", o.watch.String()); err != nil {
		return err
	}
	rep.Took = append(rep.Took, ms(time.Since(began)))
	p.Bin = to
	for _, c := range rep.Clients {
		// Until then the last of its pauses may not be over.
		wait, cancel := context.WithTimeoutCause(ctx, 30*time.Second, errors.New("no reply 30 seconds after an upgrade"))
		err := c.v.Await(wait, 20)
		cancel()
		if err != nil {
			return fmt.Errorf("%s: %w", c.Name, err)
		}
		if n := c.v.Connects(); c.holds && n != 1 {
			return fmt.Errorf("%s: it had to connect %d times", c.Name, n)
		}
		pause, ops := c.v.Look()
		c.Pauses, c.Ops = append(c.Pauses, ms(pause)), ops
	}
	return nil
}

func (rep *report) print() {
	fmt.Printf("%d upgrades of a pair under load, none of which a client met an error in; %d CPUs, seed %d.\n", len(rep.Took), rep.CPUs, rep.Seed)
	fmt.Printf("One upgrade took %.0f ms (median), %.0f ms at most.\n\n", stat.Rank(rep.Took, 50), stat.Rank(rep.Took, 100))
	fmt.Println("| client | requests | median pause ms | p90 ms | p99 ms | max ms |\n|---|--:|--:|--:|--:|--:|")
	for _, c := range rep.Clients {
		fmt.Printf("| %s | %d | %.1f | %.1f | %.1f | %.1f |\n", c.Name, c.Ops, stat.Rank(c.Pauses, 50), stat.Rank(c.Pauses, 90), stat.Rank(c.Pauses, 99), stat.Rank(c.Pauses, 100))
	}
}

func ms(d time.Duration) float64 { return float64(d.Microseconds()) / 1e3 }
