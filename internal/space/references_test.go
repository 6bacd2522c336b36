package space

import (
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
)

// All devices are counted to their ends, those that leave as well, and none where one
// has left.
func TestReferencesOfDevices(t *testing.T) {
	s := New()
	t.Cleanup(s.Close)
	const tracks = 2*walkTracks + 3
	for range 2 {
		if err := s.AddDevice(tracks*block.TrackBlocks-5, 7); err != nil {
			t.Fatal(err)
		}
	}
	s.AddGone()
	if err := s.AddDevice(100, 10); err != nil {
		t.Fatal(err)
	}
	for _, dev := range []int{0, 1} {
		for i := range dev + 2 {
			for _, b := range []uint64{7, walkTracks * block.TrackBlocks, tracks*block.TrackBlocks - 6} {
				if err := s.Inc(Run{block.At(dev, b), 1}); err != nil {
					t.Fatal(dev, i, err)
				}
			}
		}
	}
	if err := s.Inc(Run{block.At(3, 50), 20}); err != nil {
		t.Fatal(err)
	}
	for _, leaving := range []bool{false, true} {
		s.SetLeaving(1, leaving)
		got := s.References()
		if got[1] != 20 || got[2] != 3 || got[3] != 3 || got[0] != 2*(tracks*block.TrackBlocks-5-7)+90-26 {
			t.Errorf("leaving %v: %v", leaving, got[:5])
		}
		if u := s.Usage(); u.InUse() != 26 || u.More != 3+6 {
			t.Errorf("leaving %v: %+v", leaving, u)
		}
	}
}
