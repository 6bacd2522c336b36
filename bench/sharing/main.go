// Command sharing measures what deduplication takes beside what it saves:
//
//	go run ./bench/sharing write     bytes written to the device for each byte of new data
//	go run ./bench/sharing fixed     memory and disk that a pool of 8 GiB has less
//	go run ./bench/sharing memory    memory for each TiB stored; takes 10 GiB of it
//	go run ./bench/sharing delete    clients of one of fifty volumes that share all they
//	                                 have, while another one is deleted
//	go run ./bench/sharing rate      how fast clients write over NBD what is new, and what is
//	                                 stored already; with nbdcopy, on a disk
//	go run ./bench/sharing           all of these
//
// Pools are on a device that counts and answers at once (package counting), and each is
// compared with one whose volumes share nothing, in turns. All numbers go to a JSON file,
// those that were measured before and not this time stay in it. It fails when something
// that is wanted is missed; the output tells what.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"io/fs"
	"os"
	"os/signal"
	"syscall"
	"time"

	"github.com/pollux-storage/pollux/bench/counting"
	"github.com/pollux-storage/pollux/bench/stat"
	"github.com/pollux-storage/pollux/internal/block"
)

type options struct {
	out, spill, dir  string
	profile          string
	written, pool    uint64
	large, stored    uint64
	shared           uint64
	copied, device   uint64
	log, cache       uint64
	volumes, deletes int
	rounds, rate     int
	window           time.Duration
}

// report is what goes to the JSON file.
type report struct {
	Write  []written   `json:"write,omitempty"`
	Fixed  *fixed      `json:"fixed,omitempty"`
	Memory *perTiB     `json:"memory,omitempty"`
	Delete *beingFreed `json:"delete,omitempty"`
	Rates  *rates      `json:"rates,omitempty"`
}

// A measure puts its numbers into a report, prints them and says whether something
// wanted is missed.
type measure struct {
	name string
	run  func(context.Context, options, *report) (missed bool, err error)
}

var measures = []measure{{"write", measureWrites}, {"fixed", measureFixed}, {"memory", measureMemory}, {"delete", measureDeletes}, {"rate", measureRates}}

// errMissed says that what was wanted is not reached; the output tells what.
var errMissed = errors.New("not all is as it should be")

func main() {
	var o options
	flag.StringVar(&o.out, "out", "out/sharing.json", "file for all numbers")
	flag.StringVar(&o.spill, "spill", os.TempDir(), "fixed and memory: folder for files that hold metadata of devices")
	counting.SizeFlag(&o.written, "written", "8GiB", "write: bytes of new data")
	counting.SizeFlag(&o.pool, "pool", "8GiB", "fixed: size of the pool; memory: of the smaller one that is filled")
	counting.SizeFlag(&o.large, "large", "64GiB", "memory: size of the larger one")
	counting.SizeFlag(&o.stored, "stored", "1TiB", "memory: bytes of which index and counts are filled without a pool")
	counting.SizeFlag(&o.shared, "shared", "2GiB", "delete: bytes that all volumes have in common")
	flag.IntVar(&o.volumes, "volumes", 50, "delete: how many volumes share")
	flag.IntVar(&o.deletes, "deletes", 7, "delete: how many of them are deleted, one after the other")
	counting.SizeFlag(&o.log, "log", "256MiB", "bytes of the operation log")
	counting.SizeFlag(&o.cache, "cache", "256MiB", "bytes of the cache")
	flag.IntVar(&o.rounds, "rounds", 3, "how often each pool is measured")
	flag.IntVar(&o.rate, "rate", 4000, "delete: requests a second of the clients")
	flag.DurationVar(&o.window, "window", 5*time.Second, "delete: how long to look at clients alone")
	flag.StringVar(&o.dir, "dir", "/var/tmp", "rate: folder on the disk that the pool is on")
	flag.StringVar(&o.profile, "cpuprofile", "", "rate: file for a profile of the processor time of the last pool")
	counting.SizeFlag(&o.copied, "copied", "1GiB", "rate: bytes that are copied each time")
	counting.SizeFlag(&o.device, "device", "500MB", "rate: bytes a second of the slower device")
	pools := flag.String("serve", "", "serve one pool in this process, which is described in JSON, for the others")
	alone := flag.String("one", "", "measure one pool in this process, which is described in JSON, for the others")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := error(nil)
	switch {
	case *alone != "":
		err = runOne(ctx, *alone)
	case *pools != "":
		err = serve(ctx, *pools)
	default:
		err = run(ctx, o, flag.Args())
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "sharing:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options, names []string) error {
	all := map[string]bool{}
	for _, m := range measures {
		all[m.name] = len(names) == 0
	}
	for _, name := range names {
		if _, ok := all[name]; !ok {
			return fmt.Errorf("there is no measurement %q: write, fixed, memory, delete and rate are possible", name)
		}
		all[name] = true
	}
	if o.volumes < o.deletes+2 {
		return fmt.Errorf("%d of %d volumes cannot be deleted: one has the clients, and one more must share with it", o.deletes, o.volumes)
	}
	var r report
	if err := r.read(o.out); err != nil {
		return err
	}
	missed := false
	for _, m := range measures {
		if !all[m.name] {
			continue
		}
		bad, err := m.run(ctx, o, &r)
		if err != nil {
			return fmt.Errorf("%s: %w", m.name, err)
		}
		missed = missed || bad
		if err := stat.WriteJSON(o.out, r); err != nil {
			return err
		}
	}
	if missed {
		return errMissed
	}
	return nil
}

// read reads the numbers of earlier runs, if there are any.
func (r *report) read(path string) error {
	b, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, r); err != nil {
		return fmt.Errorf("%s is not of this benchmark, remove it or say -out: %w", path, err)
	}
	return nil
}

// say prints whether something wanted is reached, and returns whether it is not.
func say(ok bool, format string, args ...any) (missed bool) {
	mark := "reached"
	if !ok {
		mark = "MISSED"
	}
	fmt.Printf("* %s: %s\n", mark, fmt.Sprintf(format, args...))
	return !ok
}

// thn is that of the volumes that share, the default.
const thn = 8

// create makes a volume that shares, or not.
func create(ctx context.Context, p *counting.Pool, name string, size int64, shares bool) (block.Volume, error) {
	run := 0
	if shares {
		run = thn
	}
	if _, err := p.CreateSharing(ctx, name, size, run); err != nil {
		return nil, err
	}
	return p.Volume(name)
}

// fill writes n bytes of a volume in sequence: blocks of numbers from first on.
func fill(ctx context.Context, v block.Volume, n int64, first uint64) error {
	for off := int64(0); off < n; off += counting.Track {
		if err := counting.WriteContent(ctx, v, off, int(min(counting.Track, n-off)), first+uint64(off/block.Size)); err != nil {
			return err
		}
	}
	return nil
}
