package estimate

import (
	"context"
	"errors"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
)

// The same blocks, followed all and, when the stream did not fit, by a sample.
func TestReport(t *testing.T) {
	for _, fits := range []bool{true, false} {
		s := newScan(MinMemory)
		for range 2 {
			s.found.Stream.Volume()
			s.found.Sample.volume()
			for i := range 20 {
				if i != 12 { // 12 blocks, one of zeroes, and 7
					s.add(block.Logical(i), print(i))
				} else {
					s.zero(1)
				}
			}
			s.found.Stream.Volume()
			s.found.Sample.volume()
			s.add(0, print(3))
			s.add(1, print(100))
			s.add(2, print(101+int(s.found.Sample.blocks)))
		}
		s.found.Sample.volume()
		s.found.Stream.Flush()
		if !fits {
			s.found.Stream = nil
		}
		s.found.Inputs = []Input{{Path: "x", Bytes: 10, Unread: 3}}
		var done, total int64
		r, err := s.found.Report(t.Context(), 1, func(d, of int64) { done, total = d, of })
		if err != nil {
			t.Fatal(err)
		}
		if done != total || fits != (total > 0) {
			t.Errorf("progress ends at %d of %d", done, total)
		}
		if r.Data != 44*block.Size || r.Zero != 2*block.Size || r.OneIn != 1 || r.Threshold != 1 || r.Inputs[0] != (ReportInput{"x", 10, 3}) {
			t.Errorf("%+v", r)
		}
		// 19 blocks in a row are shared, and three singly: number 3 twice and 100, which the
		// second time follow each other. Number 3 is in the row, too: once it has moved to
		// low-latency memory three blocks of the row are by themselves, and 15.
		wants := []struct{ plain, llrrm, inLLRRM int64 }{
			{22, 22, 0}, {21, 22, 2}, {19, 22, 5}, {19, 22, 5}, {19, 22, 20}, {0, 22, 20},
		}
		if !fits { // of which a sample sees nothing
			wants = []struct{ plain, llrrm, inLLRRM int64 }{
				{22, 22, 0}, {21, 22, 1}, {19, 22, 2}, {19, 22, 2}, {19, 22, 2}, {0, 22, 20},
			}
		}
		for i, want := range wants {
			p := r.Policies[i]
			if p.THN != Runs[i] || p.Plain.Saved != want.plain*block.Size || p.WithLLRRM.Saved != want.llrrm*block.Size || p.WithLLRRM.LLRRM != want.inLLRRM*block.Size {
				t.Errorf("fits %t, THN %d: %d saved, with LLRRM %d and %d in it", fits, p.THN, p.Plain.Saved/block.Size, p.WithLLRRM.Saved/block.Size, p.WithLLRRM.LLRRM/block.Size)
			}
			if p.Plain.High != p.Plain.Saved || p.Plain.Low > p.Plain.Saved || fits && p.Plain.Low != p.Plain.Saved {
				t.Errorf("fits %t, THN %d: %+v", fits, p.THN, p.Plain)
			}
		}
	}
}

func TestReportEnds(t *testing.T) {
	s := newScan(MinMemory)
	s.found.Stream.Volume()
	s.add(0, print(1))
	s.found.Stream.Flush()
	ctx, cancel := context.WithCancel(t.Context())
	if _, err := s.found.Report(ctx, 2, func(int64, int64) { cancel() }); !errors.Is(err, context.Canceled) {
		t.Errorf("a report that was given up: %v", err)
	}
}
