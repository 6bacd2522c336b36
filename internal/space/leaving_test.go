package space

import (
	"math/rand/v2"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
)

// A device that leaves gives no block, counts nowhere, and what is in use on it is kept
// free on the others; when it stays, all is as before.
func TestLeaving(t *testing.T) {
	for seed := range uint64(20) {
		rng := rand.New(rand.NewPCG(seed, 3))
		s := newSpace(t, 8*block.TrackBlocks, 8*block.TrackBlocks, 8*block.TrackBlocks)
		var runs []Run
		alloc := func(n int) {
			t.Helper()
			var err error
			if runs, err = s.Alloc(n, runs); err != nil {
				t.Fatal(err)
			}
		}
		alloc(300 + rng.IntN(1500))
		before := s.Usage()
		l, ok := s.Leave(1)
		if !ok || l.Used != s.InUse(1) {
			t.Fatalf("%+v, %v: %d are in use", l, ok, s.InUse(1))
		}
		u := s.Usage()
		size := int64(8 * block.TrackBlocks)
		if u.Total >= before.Total || u.Total < before.Total-size || u.Owed != l.Used || before.Total-before.Free != u.Total-u.Free+u.Owed {
			t.Errorf("before %+v, now %+v", before, u)
		}
		if again, ok := s.Leave(1); !ok || again.Used != l.Used {
			t.Errorf("%+v, %v", again, ok)
		}
		if spare := u.Spare(); s.Reserve(spare+1) || !s.Reserve(spare) || s.Reserve(1) {
			t.Error("Reserve gives what is owed, or less than there is")
		} else {
			if !s.ReserveOwed(l.Used) {
				t.Error("there is no room for what is moved")
			}
			s.Unreserve(spare + l.Used)
		}
		have := len(runs)
		alloc(rng.IntN(int(u.Spare())))
		for _, r := range runs[have:] {
			if r.At.Device() == 1 {
				t.Fatalf("%v was allocated", r.At)
			}
		}
		if tr := s.Tracks(); tr.All != 16 { // of the others
			t.Errorf("%+v", tr)
		}
		if err := s.CheckFree(); err != nil {
			t.Error(err)
		}
		stays := seed%2 == 0
		if stays {
			s.SetLeaving(1, false)
			if now := s.Usage(); now.Total != before.Total || now.Owed != 0 || now.Slop != before.Slop {
				t.Errorf("before %+v, now %+v", before, now)
			}
		}
		for _, r := range runs {
			if r.At.Device() == 1 {
				if err := s.Dec(r); err != nil {
					t.Fatal(err)
				}
			}
		}
		if err := s.CheckFree(); err != nil || s.InUse(1) != 0 {
			t.Error(err, s.InUse(1))
		}
		if stays {
			continue
		}
		if err := s.Gone(1); err != nil {
			t.Fatal(err)
		}
		if u := s.Usage(); u.Owed != 0 || s.Count(block.At(1, 300)) != 0 || s.Unused(1, 300, 1) {
			t.Errorf("%+v", u)
		}
		if err := s.Inc(Run{block.At(1, 300), 1}); err == nil {
			t.Error("a block of a device that is gone came into use")
		}
		counts := []byte{7, 7}
		if s.Counts(1, 0, counts); counts[0]+counts[1] != 0 {
			t.Error(counts)
		}
		alloc(100)
		d, err := NewDevice(8*block.TrackBlocks, 10)
		if err != nil {
			t.Fatal(err)
		}
		s.Replace(1, d)
		if now := s.Usage(); now.Total != before.Total {
			t.Errorf("before %+v, now %+v", before, now)
		}
		if err := s.CheckFree(); err != nil {
			t.Error(err)
		}
	}
}

// A device whose content has no room on the others stays.
func TestLeaveRefused(t *testing.T) {
	s := newSpace(t, 8*block.TrackBlocks, 8*block.TrackBlocks)
	if _, err := s.Alloc(9*block.TrackBlocks, nil); err != nil {
		t.Fatal(err)
	}
	before := s.Usage()
	if l, ok := s.Leave(1); ok || l.Used != s.InUse(1) || l.Room >= l.Used {
		t.Errorf("%+v, %v", l, ok)
	}
	if now := s.Usage(); now != before {
		t.Errorf("%+v became %+v", before, now)
	}
	if !s.Reserve(before.Spare()) {
		t.Error("what was free is not")
	}
	if l, ok := s.Leave(1); ok || l.Room > 0 {
		t.Errorf("with everything promised: %+v", l)
	}
}
