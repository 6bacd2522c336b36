package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"runtime/pprof"
	"slices"
	"sync/atomic"
	"time"

	"github.com/pollux-storage/pollux/bench/counting"
	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/devbench"
	"github.com/pollux-storage/pollux/internal/export/nbd"
	"github.com/pollux-storage/pollux/internal/pool"
)

// served is a pool on files that a process of its own serves over NBD, so that its
// processor time is that of the pool.
type served struct {
	Dir     string `json:"dir"`
	Size    int64  `json:"size"`
	Log     int64  `json:"log"`
	Cache   int64  `json:"cache"`
	Rate    int64  `json:"rate"`    // bytes a second of its device; 0 is as fast as it is
	Profile string `json:"profile"` // file for a profile of its processor time
}

// An order is a line of JSON on standard input of such a process, and answer the line
// that it prints then.
type order struct {
	Create  string `json:"create,omitempty"` // a volume
	Size    int64  `json:"size,omitempty"`
	Shares  bool   `json:"shares,omitempty"`
	Commit  bool   `json:"commit,omitempty"` // make a consistency point of all there is
	Profile bool   `json:"profile,omitempty"`
}

type answer struct {
	Error     string        `json:"error,omitempty"`
	Processor time.Duration `json:"processor"` // time used by the process until now
	Shared    uint64        `json:"shared"`    // blocks, until now
}

func (c *served) socket() string { return filepath.Join(c.Dir, "nbd") }

// serve serves the pool that arg describes until standard input ends.
func serve(ctx context.Context, arg string) (err error) {
	var c served
	if err := json.Unmarshal([]byte(arg), &c); err != nil {
		return fmt.Errorf("-serve %s: %w", arg, err)
	}
	dev, err := counting.NewFile(filepath.Join(c.Dir, "disk"), c.Size)
	if err != nil {
		return err
	}
	p, err := counting.NewPool(ctx, counting.Options{On: &slow{Device: dev, rate: c.Rate}, Log: c.Log, Cache: c.Cache})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Close(ctx)) }()
	srv, err := nbd.New(nbd.Config{Exports: volumes{p.Pool}, Logger: slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))})
	if err != nil {
		return err
	}
	l, err := net.Listen("unix", c.socket())
	if err != nil {
		return err
	}
	defer func() { _ = l.Close() }() // removes the socket
	serving, stop := context.WithCancel(ctx)
	defer stop()
	go func() { _ = srv.Serve(serving, l) }()
	return c.obey(ctx, p.Pool)
}

func (c *served) obey(ctx context.Context, p *pool.Pool) error {
	say := json.NewEncoder(os.Stdout)
	if err := say.Encode(answer{}); err != nil { // it serves
		return err
	}
	for lines := bufio.NewScanner(os.Stdin); lines.Scan(); {
		var o order
		err := json.Unmarshal(lines.Bytes(), &o)
		if err == nil {
			err = c.do(ctx, p, o)
		}
		var a answer
		if err != nil {
			a.Error = err.Error()
		}
		a.Processor, a.Shared = devbench.CPU(), p.Stats().Sharing.Shared
		if err := say.Encode(a); err != nil {
			return err
		}
	}
	pprof.StopCPUProfile()
	return nil
}

func (c *served) do(ctx context.Context, p *pool.Pool, o order) error {
	switch {
	case o.Create != "":
		run := 0
		if o.Shares {
			run = thn
		}
		_, err := p.CreateSharing(ctx, o.Create, o.Size, run)
		return err
	case o.Profile:
		f, err := os.Create(c.Profile)
		if err != nil {
			return err
		}
		return pprof.StartCPUProfile(f)
	case o.Commit:
		return p.Commit(ctx)
	}
	return nil
}

// volumes are the exports of a pool.
type volumes struct{ p *pool.Pool }

func (v volumes) Lookup(name string) (nbd.Export, error) {
	vol, err := v.p.Volume(name)
	return nbd.Export{Name: name, Volume: vol}, err
}

func (v volumes) List() []nbd.Export { return nil }

// slow is a device that takes no more than so many bytes a second, reads and writes
// together.
type slow struct {
	hpdi.Device
	rate int64
	busy atomic.Int64 // until then, in nanoseconds since 1970
}

func (d *slow) NewQueue(depth int) (hpdi.Queue, error) {
	q, err := d.Device.NewQueue(depth)
	if err != nil || d.rate == 0 {
		return q, err
	}
	return &slowQueue{Queue: q, d: d}, nil
}

// Info leaves out what a queue that gives requests back late does not have.
func (d *slow) Info() hpdi.Info { return d.Device.Info().Plain() }

// slowQueue gives requests back when the device would have done them.
type slowQueue struct {
	hpdi.Queue
	d    *slow
	done []slowly
}

type slowly struct {
	r   *hpdi.Request
	due int64
}

func (q *slowQueue) Submit(reqs ...*hpdi.Request) error {
	for _, r := range reqs {
		n := int64(0)
		if r.Op == hpdi.OpRead || r.Op == hpdi.OpWrite {
			n = r.Bytes() * int64(time.Second) / q.d.rate
		}
		for {
			was := q.d.busy.Load()
			due := max(was, time.Now().UnixNano()) + n
			if q.d.busy.CompareAndSwap(was, due) {
				q.done = append(q.done, slowly{r, due})
				break
			}
		}
	}
	return q.Queue.Submit(reqs...)
}

func (q *slowQueue) Wait(min int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	first := len(done)
	done, err := q.Queue.Wait(min, done)
	for _, r := range done[first:] {
		i := slices.IndexFunc(q.done, func(s slowly) bool { return s.r == r })
		time.Sleep(time.Until(time.Unix(0, q.done[i].due)))
		q.done = slices.Delete(q.done, i, i+1)
	}
	return done, err
}
