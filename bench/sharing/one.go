package main

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"runtime/debug"
	"strconv"
	"strings"
	"sync/atomic"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/pollux-storage/pollux/bench/counting"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/pool"
)

// one is a pool that a process of its own fills, so that its memory is that of the pool.
type one struct {
	Size   int64  `json:"size"`
	Shares bool   `json:"shares"`
	Index  int64  `json:"index,omitempty"` // 0 is the default
	Log    int64  `json:"log"`
	Cache  int64  `json:"cache"`
	Spill  string `json:"spill"` // the device's memory is a file there, and not the process's
}

// state is how a pool is at a moment. Memory is anonymous, so not the device's, nor that of
// the region, which is shared; but the index, which lies in the region, is counted.
type state struct {
	Memory  int64 `json:"memory"`
	Most    int64 `json:"most_memory"` // since the state before
	Index   int64 `json:"index"`       // of it
	Entries int64 `json:"index_entries"`
	Counts  int64 `json:"counts"` // of it
	Data    int64 `json:"data"`   // that clients have written
	Pages   int64 `json:"pages"`  // bytes of metadata in use
}

// ofOne is what a pool was like when it was empty; when half of it was written, and some
// of that overwritten at random; and when nothing more could be written.
type ofOne struct {
	Empty     state `json:"empty"`
	Scattered state `json:"scattered"`
	Full      state `json:"full"`
}

// process measures a pool in a process of its own.
func (c one) process(ctx context.Context) (r ofOne, err error) {
	self, err := os.Executable()
	if err != nil {
		return r, err
	}
	arg, err := json.Marshal(c)
	if err != nil {
		return r, err
	}
	cmd := exec.CommandContext(ctx, self, "-one", string(arg))
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		return r, fmt.Errorf("a pool of %s in a process of its own: %w", size(c.Size), err)
	}
	return r, json.Unmarshal(out, &r)
}

// runOne measures the pool that arg describes, and prints what it was like.
func runOne(ctx context.Context, arg string) error {
	var c one
	if err := json.Unmarshal([]byte(arg), &c); err != nil {
		return fmt.Errorf("-one %s: %w", arg, err)
	}
	r, err := c.measure(ctx)
	if err != nil {
		return err
	}
	return json.NewEncoder(os.Stdout).Encode(r)
}

// mostOverwrites is how many blocks are overwritten at random, at most: enough for some
// folds, and no more in large pools, which take long enough.
const mostOverwrites = 1 << 30 / block.Size

func (c one) measure(ctx context.Context) (r ofOne, err error) {
	p, err := counting.NewPool(ctx, counting.Options{Size: c.Size, Log: c.Log, Cache: c.Cache, Index: c.Index, Spill: c.Spill})
	if err != nil {
		return r, err
	}
	defer func() { err = errors.Join(err, p.Close(ctx)) }()
	var most atomic.Int64
	watching, stop := context.WithCancel(ctx)
	defer stop()
	go watchMemory(watching, &most)
	v, err := create(ctx, p, "v", c.Size, c.Shares)
	if err != nil {
		return r, err
	}
	if r.Empty, err = stateOf(ctx, p, &most, 0); err != nil {
		return r, err
	}
	half := c.Size / 2 / counting.Track * counting.Track
	if err := fill(ctx, v, half, 1); err != nil {
		return r, err
	}
	number := uint64(c.Size) // none that fill has
	rng := rand.New(rand.NewPCG(1, 2))
	for range min(half/block.Size/4, mostOverwrites) {
		number++
		if err := counting.WriteContent(ctx, v, rng.Int64N(half/block.Size)*block.Size, block.Size, number); err != nil {
			return r, err
		}
	}
	if r.Scattered, err = stateOf(ctx, p, &most, half); err != nil {
		return r, err
	}
	data, err := fillUp(ctx, p, v, half)
	if err != nil {
		return r, err
	}
	r.Full, err = stateOf(ctx, p, &most, data)
	return r, err
}

// fillUp writes to a volume from off on until nothing more goes into its pool, and
// returns where that was.
func fillUp(ctx context.Context, p *counting.Pool, v block.Volume, off int64) (int64, error) {
	for n, full := counting.Track, false; off < v.Info().Size; {
		err := counting.WriteContent(ctx, v, off, n, 1+uint64(off/block.Size))
		switch {
		case err == nil:
			off += int64(n)
			full = false
		case !errors.Is(err, block.ErrNoSpace):
			return off, err
		case !full:
			// What the overlays have promised comes back with a fold.
			if err := p.Fold(ctx); err != nil {
				return off, err
			}
			full = true
		case n > block.Size:
			n, full = block.Size, false
		default:
			return off, nil
		}
	}
	return off, fmt.Errorf("the pool took all %s of the volume", size(v.Info().Size))
}

// stateOf folds all and looks at a pool.
func stateOf(ctx context.Context, p *counting.Pool, most *atomic.Int64, data int64) (s state, err error) {
	if err := p.Fold(ctx); err != nil {
		return s, err
	}
	s.Most = most.Load()
	report, err := p.Check(ctx, pool.CheckOptions{})
	if err != nil {
		return s, err
	}
	if len(report.Problems) > 0 {
		return s, fmt.Errorf("a check of the pool found: %s", strings.Join(report.Problems, "; "))
	}
	debug.FreeOSMemory() // what the heap has kept says nothing
	if s.Memory, err = anonymous(); err != nil {
		return s, err
	}
	now := p.Stats()
	s.Index, s.Entries, s.Counts = now.Sharing.IndexBytes, now.Sharing.IndexEntries, now.CountsBytes
	s.Data, s.Pages = data, report.Pages*block.Size
	s.Memory, s.Most = s.Memory+now.Sharing.IndexKept, s.Most+now.Sharing.IndexKept
	s.Most = max(s.Most, s.Memory)
	most.Store(0)
	return s, nil
}

// watchMemory keeps the most anonymous memory of this process that was seen.
func watchMemory(ctx context.Context, most *atomic.Int64) {
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if n, err := anonymous(); err == nil {
			most.Store(max(n, most.Load()))
		}
	}
}

// anonymous returns how many bytes of memory this process has for itself.
func anonymous() (int64, error) {
	const file, field = "/proc/self/status", "RssAnon:"
	b, err := os.ReadFile(file)
	if err != nil {
		return 0, err
	}
	for line := range bytes.Lines(b) {
		if rest, ok := strings.CutPrefix(string(line), field); ok {
			n, err := strconv.ParseInt(strings.TrimSpace(strings.TrimSuffix(strings.TrimSpace(rest), "kB")), 10, 64)
			return n << 10, err
		}
	}
	return 0, fmt.Errorf("%s has no %s", file, field)
}

func size(n int64) string { return humanize.IBytes(uint64(n)) }
