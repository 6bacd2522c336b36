package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"sync/atomic"
	"time"

	"github.com/pollux-storage/pollux/bench/counting"
	"github.com/pollux-storage/pollux/bench/stat"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/pool"
)

// wantedSlower is how many times the p99 of others may be while a volume goes.
const wantedSlower = 2.0

// beingFreed is what clients of a volume see while others, which share all with it, are
// deleted.
type beingFreed struct {
	Shared  int64      `json:"shared"`
	Volumes int        `json:"volumes"`
	Rate    int        `json:"rate"`
	Rounds  []deletion `json:"rounds"`
	// Slower are the ratios of medians: of all, of reads and of writes.
	Slower [3]float64 `json:"slower"`
}

// deletion is one, and the time before.
type deletion struct {
	Alone  counting.Latencies `json:"alone"`
	Beside counting.Latencies `json:"beside"`
	Took   time.Duration      `json:"took_ns"` // until all references were gone
	Folds  uint64             `json:"folds"`
}

// measureDeletes makes volumes that share all they have by writing the same to each.
func measureDeletes(ctx context.Context, o options, r *report) (missed bool, err error) {
	d := &beingFreed{Shared: int64(o.shared), Volumes: o.volumes, Rate: o.rate}
	r.Delete = d
	// Each volume has a map; and what clients overwrite is not shared any more.
	room := d.Shared*3/2 + int64(o.volumes)*d.Shared/64 + 8<<30
	p, err := counting.NewPool(ctx, counting.Options{Size: room, Log: int64(o.log), Cache: int64(o.cache), Cleaner: pool.CleanerOptions{Off: true}})
	if err != nil {
		return false, err
	}
	defer func() { err = errors.Join(err, p.Close(ctx)) }()
	name := func(i int) string { return fmt.Sprintf("v%02d", i) }
	begin := time.Now()
	var volumes []block.Volume
	for i := range o.volumes {
		v, err := create(ctx, p, name(i), d.Shared, true)
		if err == nil {
			err = errors.Join(fill(ctx, v, d.Shared, 1), p.Fold(ctx))
		}
		if err != nil {
			return false, err
		}
		volumes = append(volumes, v)
		if (i+1)%10 == 0 {
			fmt.Fprintf(os.Stderr, "%d volumes after %v\n", i+1, time.Since(begin).Round(time.Second))
		}
	}
	s := p.Stats().Sharing
	if want := uint64(o.volumes-1) * uint64(d.Shared/block.Size); s.Shared < want*99/100 {
		return false, fmt.Errorf("only %d of %d blocks are shared", s.Shared, want)
	}
	fmt.Fprintf(os.Stderr, "%d volumes that share %s after %v: %d blocks written, %d shared\n", o.volumes, size(d.Shared),
		time.Since(begin).Round(time.Second), s.Written, s.Shared)
	number := atomic.Uint64{} // of new data
	number.Store(uint64(d.Shared))
	clients := counting.Clients{Volume: volumes[0], Size: d.Shared, Rate: o.rate}
	clients.Write = func(ctx context.Context, off int64) error {
		return counting.WriteContent(ctx, volumes[0], off, block.Size, number.Add(1))
	}
	for i := range o.deletes {
		one, err := measureDelete(ctx, o, p, clients, name(o.volumes-1-i), d.Shared)
		if err != nil {
			return false, err
		}
		d.Rounds = append(d.Rounds, one)
	}
	return d.print(), nil
}

// measureDelete looks at clients alone, and then while a volume is deleted, of which all
// blocks are shared, until its references are gone.
func measureDelete(ctx context.Context, o options, p *counting.Pool, c counting.Clients, name string, n int64) (d deletion, err error) {
	d.Alone, err = c.Beside(ctx, func() error {
		time.Sleep(o.window)
		return nil
	})
	if err != nil {
		return d, err
	}
	// What the clients have overwritten until now is not to be taken for what is deleted.
	if err := p.Fold(ctx); err != nil {
		return d, err
	}
	before := p.Stats()
	d.Beside, err = c.Beside(ctx, func() error {
		begin := time.Now()
		if err := p.DeleteVolume(ctx, name); err != nil {
			return err
		}
		for {
			d.Took = time.Since(begin)
			// What the clients overwrite meanwhile counts too, so the fold must have ended
			// as well.
			now := p.Stats()
			if gone := before.Sharing.Saved - now.Sharing.Saved; gone >= n && now.Folds > before.Folds {
				return nil
			} else if d.Took > 5*time.Minute {
				return fmt.Errorf("volume %s: only %s of %s of references are gone after %v", name, size(max(0, gone)), size(n), d.Took)
			}
			time.Sleep(time.Millisecond)
		}
	})
	d.Folds = p.Stats().Folds - before.Folds
	return d, err
}

func (d *beingFreed) print() (missed bool) {
	fmt.Printf("\n## One of %d volumes that share %s is deleted, clients of another at %d requests a second\n\n", d.Volumes, size(d.Shared), d.Rate)
	fmt.Printf("| | until all is freed | folds %s reads' p99 | writes' p99 |\n|---|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n", counting.LatencyHead)
	for _, r := range d.Rounds {
		last := func(l counting.Latencies) string {
			return fmt.Sprintf("%s %d µs | %d µs |", l, l.ReadP99.Microseconds(), l.WriteP99.Microseconds())
		}
		fmt.Printf("| clients alone | | %s\n", last(r.Alone))
		fmt.Printf("| beside a delete | %v | %d %s\n", r.Took.Round(10*time.Millisecond), r.Folds, last(r.Beside))
	}
	for i, of := range []func(counting.Latencies) time.Duration{
		func(l counting.Latencies) time.Duration { return l.P99 },
		func(l counting.Latencies) time.Duration { return l.ReadP99 },
		func(l counting.Latencies) time.Duration { return l.WriteP99 },
	} {
		var alone, beside []float64
		for _, r := range d.Rounds {
			alone, beside = append(alone, float64(of(r.Alone))), append(beside, float64(of(r.Beside)))
		}
		d.Slower[i] = stat.Median(beside) / stat.Median(alone)
	}
	fmt.Printf("\nRatios of medians: reads %.2f, writes %.2f.\n\n", d.Slower[1], d.Slower[2])
	return say(d.Slower[0] < wantedSlower, "p99 of the others is %.2f times that of before (%.0f)", d.Slower[0], wantedSlower)
}
