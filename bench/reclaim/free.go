package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/pollux-storage/pollux/bench/counting"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/pool"
)

// free measures clients while much space is given up at once, and how long it
// takes to come back.
func free(ctx context.Context, o options) (err error) {
	const others = 1 << 30
	r, err := newPool(ctx, o, 2*int64(o.size)*21/20+8<<30, pool.CleanerOptions{Off: true})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close(ctx)) }()
	began := time.Now()
	v, err := fill(ctx, r, "others", others, others)
	if err != nil {
		return err
	}
	trimmed, err := fill(ctx, r, "trimmed", 1<<40, int64(o.size))
	if err != nil {
		return err
	}
	if _, err := fill(ctx, r, "deleted", int64(o.size), int64(o.size)); err != nil {
		return err
	}
	fmt.Fprintf(os.Stderr, "filled after %v\n", time.Since(began).Round(time.Second))
	fmt.Printf("| %s freed, clients at %d requests a second | until half is free | until all is | folds %s\n|---|--:|--:|--:|--:|--:|--:|--:|--:|\n", humanize.IBytes(o.size), o.rate, counting.LatencyHead)
	row := func(name string, fn func() error, freed int64) error {
		var half, all time.Duration
		folds := r.Stats().Folds
		l, err := counting.Clients{Volume: v, Size: others, Rate: o.rate}.Beside(ctx, func() error {
			begin, before := time.Now(), r.Stats().FreeBytes
			if err := fn(); err != nil {
				return err
			}
			for all = 0; freed > 0 && all == 0; time.Sleep(time.Millisecond) {
				got := r.Stats().FreeBytes - before
				// Clients and metadata need some of it meanwhile.
				if since := time.Since(begin); got >= freed*97/100 {
					all = since
				} else if half == 0 && got >= freed/2 {
					half = since
				} else if since > 3*time.Minute {
					return fmt.Errorf("%s: only %s of %s are free after %v", name, humanize.IBytes(uint64(max(0, got))), humanize.IBytes(uint64(freed)), since)
				}
			}
			// The work of freeing may go on a little; give it its share.
			time.Sleep(max(0, o.window-time.Since(begin)))
			return nil
		})
		fmt.Printf("| %s | %v | %v | %d %s\n", name, half.Round(10*time.Millisecond), all.Round(10*time.Millisecond), r.Stats().Folds-folds, l)
		return err
	}
	return profiled(o, func() error {
		return errors.Join(
			row("nothing", func() error { return nil }, 0),
			row("trim of 1 TiB", func() error { return trimmed.Trim(ctx, 0, 1<<40, block.Tag{}) }, int64(o.size)),
			row("nothing", func() error { return nil }, 0),
			row("delete", func() error { return r.DeleteVolume(ctx, "deleted") }, int64(o.size)),
			row("nothing", func() error { return nil }, 0),
		)
	})
}
