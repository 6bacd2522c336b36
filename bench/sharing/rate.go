package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"time"

	"github.com/pollux-storage/pollux/bench/stat"
)

// What deduplication may cost when it finds nothing, and must gain when it finds all.
const (
	wantedNew    = 0.9
	wantedStored = 1.2
)

// rates are how fast clients write with deduplication and without, on devices of several
// speeds.
type rates struct {
	Bytes int64      `json:"bytes"`
	Rows  []*rateRow `json:"rows"`
}

type rateRow struct {
	Device int64 `json:"device"` // bytes a second, 0 as fast as it is
	Cache  int64 `json:"cache"`
	// Of volumes that share nothing and of such that share.
	New    [2][]copied `json:"new"`
	Stored [2][]copied `json:"stored"`
}

// copied is one copy of all data to a volume, until a consistency point has them.
type copied struct {
	Took      time.Duration `json:"took_ns"`
	Processor time.Duration `json:"processor_ns"`
}

// measureRates copies noise to volumes: what is new, and the same again.
func measureRates(ctx context.Context, o options, r *report) (missed bool, err error) {
	r.Rates = &rates{Bytes: int64(o.copied)}
	for _, rate := range []int64{0, int64(o.device)} {
		for _, cache := range []int64{int64(o.cache), int64(2 * o.copied)} {
			row := &rateRow{Device: rate, Cache: cache}
			if err := row.measure(ctx, o); err != nil {
				return false, err
			}
			r.Rates.Rows = append(r.Rates.Rows, row)
		}
	}
	return r.Rates.print(), nil
}

func (row *rateRow) measure(ctx context.Context, o options) (err error) {
	dir, err := os.MkdirTemp(o.dir, "sharing-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	n := int64(o.copied)
	c := served{Dir: dir, Size: 5*n*int64(o.rounds+1) + 8<<30, Log: int64(o.log), Cache: row.Cache, Rate: row.Device, Profile: o.profile}
	s, err := c.start(ctx)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.end()) }()
	for round := range o.rounds {
		for k := range 2 {
			shares := (round + k) % 2
			// Another noise each time, or it would be stored already.
			data := filepath.Join("/dev/shm", fmt.Sprintf("sharing-%d", os.Getpid()))
			if err := noise(data, n, uint64(round*2+shares)); err != nil {
				return errors.Join(err, os.Remove(data))
			}
			fresh, err := s.copy(ctx, data, n, fmt.Sprintf("n%d-%d", round, shares), shares == 1, 0)
			if err == nil {
				row.New[shares] = append(row.New[shares], fresh)
				want := uint64(0)
				if shares == 1 {
					want = uint64(n) / 4096
				}
				var again copied
				again, err = s.copy(ctx, data, n, fmt.Sprintf("s%d-%d", round, shares), shares == 1, want)
				row.Stored[shares] = append(row.Stored[shares], again)
			}
			if err := errors.Join(err, os.Remove(data)); err != nil {
				return err
			}
		}
	}
	return nil
}

func noise(path string, n int64, seed uint64) (err error) {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	_, err = io.CopyN(f, rand.NewChaCha8([32]byte{byte(seed), 1}), n)
	return err
}

// server is a process that serves a pool.
type server struct {
	served
	cmd *exec.Cmd
	in  io.WriteCloser
	out *json.Decoder
	now answer
}

func (c served) start(ctx context.Context) (s *server, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, err
	}
	arg, err := json.Marshal(c)
	if err != nil {
		return nil, err
	}
	s = &server{served: c, cmd: exec.CommandContext(ctx, self, "-serve", string(arg))}
	s.cmd.Stderr = os.Stderr
	if s.in, err = s.cmd.StdinPipe(); err != nil {
		return nil, err
	}
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	s.out = json.NewDecoder(out)
	if err := s.cmd.Start(); err != nil {
		return nil, err
	}
	if err = s.read(); err == nil && c.Profile != "" {
		err = s.order(order{Profile: true})
	}
	if err != nil {
		return nil, errors.Join(err, s.end())
	}
	return s, nil
}

func (s *server) end() error { return errors.Join(s.in.Close(), s.cmd.Wait()) }

func (s *server) order(o order) error {
	if err := json.NewEncoder(s.in).Encode(o); err != nil {
		return err
	}
	return s.read()
}

func (s *server) read() error {
	s.now = answer{}
	if err := s.out.Decode(&s.now); err != nil {
		return fmt.Errorf("the process that serves the pool: %w", err)
	}
	if s.now.Error != "" {
		return errors.New(s.now.Error)
	}
	return nil
}

// copy copies a file to a new volume and says what that took. So many blocks are to be
// found stored.
func (s *server) copy(ctx context.Context, data string, n int64, name string, shares bool, stored uint64) (c copied, err error) {
	if err := s.order(order{Create: name, Size: n, Shares: shares}); err != nil {
		return c, err
	}
	before, begin := s.now, time.Now()
	cmd := exec.CommandContext(ctx, "nbdcopy", "--flush", "--connections=4", "--destination-is-zero", data, "nbd+unix:///"+name+"?socket="+s.socket())
	if out, err := cmd.CombinedOutput(); err != nil {
		return c, fmt.Errorf("nbdcopy: %w: %s", err, out)
	}
	if err := s.order(order{Commit: true}); err != nil {
		return c, err
	}
	c = copied{time.Since(begin), s.now.Processor - before.Processor}
	if found := s.now.Shared - before.Shared; found < stored*99/100 || found > stored {
		return c, fmt.Errorf("volume %s: %d blocks were found stored instead of %d", name, found, stored)
	}
	return c, nil
}

// ratio returns how many times as fast b is as a.
func ratio(a, b []copied) float64 {
	return medianCopy(a, copied.took) / medianCopy(b, copied.took)
}

func (c copied) took() float64      { return c.Took.Seconds() }
func (c copied) processor() float64 { return c.Processor.Seconds() }

func medianCopy(of []copied, number func(copied) float64) float64 {
	var all []float64
	for _, c := range of {
		all = append(all, number(c))
	}
	return stat.Median(all)
}

func (r *rates) print() (missed bool) {
	fmt.Printf("\n## %s are copied over NBD, until a consistency point has them: with deduplication and without\n\n", size(r.Bytes))
	fmt.Printf("| device | cache | data | MB/s without | with | ratio | processor s/GiB without | with |\n|---|--:|---|--:|--:|--:|--:|--:|\n")
	gib := float64(r.Bytes) / (1 << 30)
	for _, row := range r.Rows {
		device := "as it is"
		if row.Device > 0 {
			device = fmt.Sprintf("%d MB/s", row.Device/1e6)
		}
		for _, k := range []struct {
			name string
			of   [2][]copied
			want float64
		}{{"new", row.New, wantedNew}, {"stored already", row.Stored, wantedStored}} {
			mbs := func(i int) float64 { return float64(r.Bytes) / 1e6 / medianCopy(k.of[i], copied.took) }
			cpu := func(i int) float64 { return medianCopy(k.of[i], copied.processor) / gib }
			x := ratio(k.of[0], k.of[1])
			mark := ""
			// On a slow device it is the device's matter: to compare costs reading there, which
			// is as slow as writing.
			if row.Device == 0 && x < k.want {
				mark, missed = " MISSED", true
			}
			fmt.Printf("| %s | %s | %s | %.0f | %.0f | %.2f%s | %.2f | %.2f |\n", device, size(row.Cache), k.name, mbs(0), mbs(1), x, mark, cpu(0), cpu(1))
		}
	}
	return missed
}
