package main

import (
	"context"
	"fmt"

	"github.com/pollux-storage/pollux/bench/stat"
)

// What deduplication may take of a pool of 8 GiB.
const (
	wantedMemory = 128 << 20
	wantedDisk   = (1 << 30) / 5
)

// fixed is what deduplication takes of a pool, whatever it saves.
type fixed struct {
	Size int64   `json:"size"`
	Off  []ofOne `json:"off"`
	On   []ofOne `json:"on"`
	// Memory is what a pool takes beyond one that shares nothing, the most of all states.
	Memory int64 `json:"memory"`
	// Disk is how much less data fit.
	Disk int64 `json:"disk"`
}

// states are those of ofOne, by name.
var states = []struct {
	name string
	of   func(*ofOne) *state
}{
	{"empty", func(r *ofOne) *state { return &r.Empty }},
	{"half full, overwritten at random", func(r *ofOne) *state { return &r.Scattered }},
	{"full", func(r *ofOne) *state { return &r.Full }},
}

// medianOf returns the median of a number of several pools.
func medianOf(of []ofOne, number func(*ofOne) int64) int64 {
	var all []float64
	for i := range of {
		all = append(all, float64(number(&of[i])))
	}
	return int64(stat.Median(all))
}

// measureFixed compares pools that share with pools that do not, each in a process of
// its own.
func measureFixed(ctx context.Context, o options, r *report) (missed bool, err error) {
	f := &fixed{Size: int64(o.pool)}
	r.Fixed = f
	for i := range o.rounds {
		for k := range 2 {
			c := one{Size: f.Size, Shares: (i+k)%2 == 1, Log: int64(o.log), Cache: int64(o.cache), Spill: o.spill}
			of, err := c.process(ctx)
			if err != nil {
				return false, err
			}
			if c.Shares {
				f.On = append(f.On, of)
			} else {
				f.Off = append(f.Off, of)
			}
		}
	}
	fmt.Printf("\n## What a pool of %s has less, medians of %d\n\n", size(f.Size), o.rounds)
	fmt.Printf("| | memory without | with deduplication | more | at most, more | metadata without | with | more |\n|---|--:|--:|--:|--:|--:|--:|--:|\n")
	for _, s := range states {
		two := func(number func(*state) int64) (off, on int64) {
			of := func(r *ofOne) int64 { return number(s.of(r)) }
			return medianOf(f.Off, of), medianOf(f.On, of)
		}
		off, on := two(func(s *state) int64 { return s.Memory })
		mostOff, mostOn := two(func(s *state) int64 { return s.Most })
		pagesOff, pagesOn := two(func(s *state) int64 { return s.Pages })
		f.Memory = max(f.Memory, on-off, mostOn-mostOff)
		fmt.Printf("| %s | %s | %s | %s | %s | %s | %s | %s |\n", s.name, mib(off), mib(on), mib(on-off), mib(mostOn-mostOff),
			mib(pagesOff), mib(pagesOn), mib(pagesOn-pagesOff))
	}
	fits := func(r *ofOne) int64 { return r.Full.Data }
	off, on := medianOf(f.Off, fits), medianOf(f.On, fits)
	f.Disk = off - on
	fmt.Printf("\nData that fit: %s without and %s with deduplication; the rest of the device is %s and %s.\n\n",
		mib(off), mib(on), mib(f.Size-off), mib(f.Size-on))
	return or(
		say(f.Memory <= wantedMemory, "%s of memory at most (%s)", mib(f.Memory), mib(wantedMemory)),
		say(f.Disk <= wantedDisk, "%s of disk (%s)", mib(f.Disk), mib(wantedDisk)),
	), nil
}

// mib shows bytes, also less than 0, in MiB.
func mib(n int64) string { return fmt.Sprintf("%.1f MiB", float64(n)/(1<<20)) }

// or reports whether something is missed. Unlike || it has all said.
func or(missed ...bool) bool {
	for _, m := range missed {
		if m {
			return true
		}
	}
	return false
}
