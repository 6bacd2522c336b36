package space

import (
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
)

// Tracks are chosen by what is free in them, and left alone by allocations
// while there is a free block elsewhere.
func TestChoose(t *testing.T) {
	const tracks = 8
	s := newSpace(t, tracks*block.TrackBlocks)
	if _, err := s.Alloc(tracks*block.TrackBlocks-10, nil); err != nil {
		t.Fatal(err)
	}
	free := func(track, n int) {
		t.Helper()
		if err := s.Dec(Run{At: block.At(0, uint64(track*block.TrackBlocks)+16), N: n}); err != nil {
			t.Fatal(err)
		}
	}
	free(1, 100)
	free(2, 200)
	free(3, 220)
	free(4, 30)
	free(5, 210)
	if err := s.Inc(Run{At: block.At(0, 5*block.TrackBlocks), N: 1}); err != nil { // shared
		t.Fatal(err)
	}
	has := func(e *Emptying, track int) bool { return e.Has(block.At(0, uint64(track*block.TrackBlocks))) }
	if e := s.Choose(Choice{MinFree: 50, Tracks: 1, Used: 1000}); e.Tracks != 1 || !has(e, 3) || e.Used != 36 || e.Free != 220 {
		t.Errorf("the emptiest track was not chosen: %+v", e)
	}
	s.StopEmptying()
	if e := s.Choose(Choice{MinFree: 50, Tracks: 9, Used: 36}); e.Tracks != 1 || !has(e, 3) {
		t.Errorf("more is to be moved than may be: %+v", e)
	}
	s.StopEmptying()
	e := s.Choose(Choice{MinFree: 50, Tracks: 9, Used: 1000})
	if e.Tracks != 3 || !has(e, 1) || !has(e, 2) || has(e, 4) || has(e, 5) {
		t.Errorf("wrong tracks: %+v", e)
	}
	// 240 blocks are free elsewhere.
	runs, err := s.Alloc(240, nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range runs {
		if e.Has(r.At) {
			t.Errorf("%v was allocated from a track that is being emptied", r)
		}
	}
	if runs, err = s.Alloc(1, nil); err != nil || !e.Has(runs[0].At) {
		t.Errorf("what is free in tracks that are being emptied cannot be had: %v, %v", runs, err)
	}
	if err := s.CheckFree(); err != nil {
		t.Error(err)
	}
	free0 := e.Tracks
	for track := 1; track <= 3; track++ {
		for b := range uint64(block.TrackBlocks) {
			if at := block.At(0, uint64(track*block.TrackBlocks)+b); s.Count(at) == 1 {
				if err := s.Dec(Run{At: at, N: 1}); err != nil {
					t.Fatal(err)
				}
			}
		}
	}
	if n := s.Emptied(e); n != free0 {
		t.Errorf("%d of %d tracks are empty", n, free0)
	}
}
