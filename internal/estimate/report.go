package estimate

import (
	"context"
	"slices"

	"github.com/pollux-storage/pollux/internal/block"
)

// Runs are the THN that a report tells of.
var Runs = []int{1, 2, 4, 8, 16, 32}

// Report says what deduplication would save, in bytes.
type Report struct {
	Inputs []ReportInput `json:"inputs"`
	// Data is in blocks that are not zero, Zero in those that are, holes included.
	Data int64 `json:"data"`
	Zero int64 `json:"zero"`
	// OneIn is 1 when all of the data was followed. Otherwise it was one content in so
	// many, and what is saved lies between bounds, in 19 of 20 cases.
	OneIn int64 `json:"one_in"`
	// Threshold is after how many more receptions a block moves to low-latency memory.
	Threshold int            `json:"threshold"`
	Policies  []ReportPolicy `json:"policies"`
}

// ReportInput is a file or device.
type ReportInput struct {
	Path   string `json:"path"`
	Bytes  int64  `json:"bytes"`
	Unread int64  `json:"unread"` // in holes
}

// ReportPolicy is what a THN saves, without low-latency memory and with it.
type ReportPolicy struct {
	THN       int    `json:"thn"`
	Plain     Saving `json:"plain"`
	WithLLRRM Saving `json:"with_llrrm"`
}

// Saving is what a policy saves.
type Saving struct {
	Saved int64 `json:"saved"`
	Low   int64 `json:"low"`
	High  int64 `json:"high"`
	// LLRRM is what is in low-latency memory; of a sample the least that can be.
	LLRRM int64 `json:"llrrm"`
}

// Report plays all policies on what was scanned. step is told how far it is, in bytes; it
// may be nil.
func (s *Scanned) Report(ctx context.Context, threshold int, step func(done, total int64)) (*Report, error) {
	r := &Report{
		Data: s.Sample.blocks * block.Size, Zero: s.Sample.zero * block.Size, OneIn: 1, Threshold: threshold,
		Inputs: []ReportInput{}, Policies: []ReportPolicy{},
	}
	for _, in := range s.Inputs {
		r.Inputs = append(r.Inputs, ReportInput(in))
	}
	var policies []Policy
	for _, run := range Runs {
		policies = append(policies, Policy{Run: run}, Policy{Run: run, Threshold: threshold})
	}
	savings, err := s.savings(ctx, policies, step)
	if err != nil {
		return nil, err
	}
	if s.Stream == nil {
		r.OneIn = s.Sample.Every()
	}
	for i, pair := range slices.Collect(slices.Chunk(savings, 2)) {
		r.Policies = append(r.Policies, ReportPolicy{THN: Runs[i], Plain: pair[0], WithLLRRM: pair[1]})
	}
	return r, nil
}

// savings returns what policies save.
func (s *Scanned) savings(ctx context.Context, policies []Policy, step func(done, total int64)) ([]Saving, error) {
	var all []Saving
	if s.Stream == nil {
		for _, e := range s.Sample.Estimate(policies) {
			all = append(all, Saving{
				Saved: e.Saved * block.Size, Low: e.Low * block.Size, High: e.High * block.Size, LLRRM: e.Memory * block.Size,
			})
		}
		return all, nil
	}
	total := int64(len(policies)*len(s.Stream.points)) * PointBlocks * block.Size
	done := int64(0)
	for _, p := range policies {
		l, err := s.Stream.Simulate(p, Options{Step: func() error {
			if done += PointBlocks * block.Size; step != nil {
				step(done, total)
			}
			return ctx.Err()
		}})
		if err != nil {
			return nil, err
		}
		saved := l.Saved() * block.Size
		all = append(all, Saving{Saved: saved, Low: saved, High: saved, LLRRM: l.Memory * block.Size})
	}
	return all, nil
}
