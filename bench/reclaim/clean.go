package main

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"time"

	"github.com/pollux-storage/pollux/bench/counting"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/pool"
)

// A disk as the design page has it, for what the lengths of runs mean.
const (
	diskBytes = 150e6 // a second
	diskJump  = 5700 * time.Microsecond
)

// clean measures a pool before, while and after it is cleaned.
func clean(ctx context.Context, o options) (err error) {
	const others = 256 << 20
	off := pool.CleanerOptions{Off: true, Pause: time.Second}
	// A third of the space is free, in pieces.
	r, err := newPool(ctx, o, int64(o.size)*3/2+3*int64(o.log)+others, off)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, r.Close(ctx)) }()
	v, err := fill(ctx, r, "others", others, others)
	if err != nil {
		return err
	}
	big, err := fill(ctx, r, "big", int64(o.size), int64(o.size))
	if err != nil {
		return err
	}
	if err := scatter(ctx, r, big, o); err != nil {
		return err
	}
	fmt.Printf("| pool | tracks wholly free | blocks a run | MB/s of a disk %s\n|---|--:|--:|--:|--:|--:|--:|--:|--:|\n", counting.LatencyHead)
	row := func(name string, fn func() error) error {
		before := r.Device.Count()
		l, err := counting.Clients{Volume: v, Size: others, Rate: o.rate}.Beside(ctx, fn)
		if err != nil {
			return err
		}
		c, s := r.Device.Count().Minus(before), r.Stats().Cleaner
		run, speed := "", ""
		if c.Jumps > 0 {
			seconds := float64(c.Data)/diskBytes + float64(c.Jumps)*diskJump.Seconds()
			run = fmt.Sprintf("%.0f", float64(c.Data/block.Size)/float64(c.Requests))
			speed = fmt.Sprintf("%.0f", float64(c.Data)/1e6/seconds)
		}
		fmt.Printf("| %s | %d of %d | %s | %s %s\n", name, s.Whole, s.Tracks, run, speed, l)
		return nil
	}
	sequential := func() error {
		for at := int64(0); at < int64(o.size)/8; at += counting.Track {
			if err := counting.Write(ctx, big, at, counting.Track); err != nil {
				return err
			}
		}
		return r.Commit(ctx)
	}
	on := pool.CleanerOptions{Pause: time.Second}
	return profiled(o, func() error {
		if err := errors.Join(row("fragmented, clients alone", pause(o.window)), row("fragmented, written in sequence", sequential)); err != nil {
			return err
		}
		if err := r.Reopen(ctx, on); err != nil {
			return err
		}
		v, _ = r.Volume("others")
		big, _ = r.Volume("big")
		begin, moved := time.Now(), uint64(0)
		err := row("being cleaned", func() error {
			for {
				time.Sleep(100 * time.Millisecond)
				if s := r.Stats().Cleaner; time.Since(begin) > 12*o.window || s.Passes > 0 && s.Whole*10 >= s.Tracks {
					moved = s.Moved
					return nil
				}
			}
		})
		took := time.Since(begin)
		fmt.Fprintf(os.Stderr, "cleaned for %v, %d blocks moved: %+v\n", took.Round(time.Second), moved, r.Stats().Cleaner)
		if err := errors.Join(err, r.Reopen(ctx, off)); err != nil {
			return err
		}
		v, _ = r.Volume("others")
		big, _ = r.Volume("big")
		return errors.Join(row("cleaned, written in sequence", sequential), row("cleaned, clients alone", pause(o.window)))
	})
}

// scatter overwrites blocks at random until few tracks are wholly free.
func scatter(ctx context.Context, r *counting.Pool, big block.Volume, o options) error {
	rng := rand.New(rand.NewPCG(1, 2))
	begin := time.Now()
	blocks := int64(o.size) / block.Size
	for n := int64(0); n < blocks; n++ {
		if err := counting.Write(ctx, big, rng.Int64N(blocks)*block.Size, block.Size); err != nil {
			return err
		}
	}
	fmt.Fprintf(os.Stderr, "fragmented after %v\n", time.Since(begin).Round(time.Second))
	return r.Fold(ctx)
}

// pause waits.
func pause(d time.Duration) func() error {
	return func() error {
		time.Sleep(d)
		return nil
	}
}
