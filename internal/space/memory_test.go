package space

import (
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/block"
)

// mark writes to each page of words, where it is 0, what only giving its memory back wipes.
func mark[T uint32 | uint64](words []T) {
	for i := 0; i < len(words); i += unix.Getpagesize() / int(unsafe.Sizeof(words[0])) {
		if words[i] == 0 {
			words[i] = 1
		}
	}
}

// first returns the first word that is not 0, or -1.
func first[T uint32 | uint64](words []T) int {
	for i, w := range words {
		if w != 0 {
			return i
		}
	}
	return -1
}

// The memory of a group of tracks that have become free, or are no longer cheap, is the
// kernel's again, and that of its neighbours stays as it is.
func TestMemoryComesBack(t *testing.T) {
	const groups, group = 3, groupTracks * block.TrackBlocks
	s := newSpace(t, groups*group)
	d := s.devs[0]
	used := func(g int) []uint64 { return d.counts.used[g*groupTracks*trackWords:][:groupTracks*trackWords] }
	refs := func(g int) []uint32 { return d.counts.refs[g*groupTracks:][:groupTracks] }
	cheap := func(g int) []uint32 { return d.cheap.tracks[g*groupTracks:][:groupTracks] }
	// The last track of each group is in use, shared and cheap.
	last := func(g int) uint64 { return uint64((g+1)*group - block.TrackBlocks) }
	for g := range groups {
		run := Run{block.At(0, last(g)), block.TrackBlocks}
		if err := s.Inc(run); err != nil {
			t.Fatal(err)
		}
		if err := s.Inc(run); err != nil {
			t.Fatal(err)
		}
		s.SetCheap(0, last(g), block.TrackBlocks, true)
	}
	mark(used(1))
	mark(refs(1))
	run := Run{block.At(0, last(1)), block.TrackBlocks}
	if err := s.Dec(run); err != nil {
		t.Fatal(err)
	}
	if first(used(1)) != 0 || first(refs(1)) != 0 {
		t.Error("the memory of a group is given back while it has blocks in use")
	}
	if err := s.Dec(run); err != nil {
		t.Fatal(err)
	}
	if u, r := first(used(1)), first(refs(1)); u >= 0 || r >= 0 {
		t.Errorf("word %d of what is in use and %d of what is shared are left of a group without a block in use", u, r)
	}
	mark(cheap(1))
	s.SetCheap(0, last(1), block.TrackBlocks, false)
	if c := first(cheap(1)); c >= 0 {
		t.Errorf("word %d of what is cheap is left of a group without a cheap block", c)
	}
	// It knows of each block what its neighbours have, and of itself that it has nothing.
	if err := s.CheckFree(); err != nil {
		t.Error(err)
	}
	for g := range groups {
		want := 2
		if g == 1 {
			want = 0
		}
		if n := s.Count(block.At(0, last(g))); n != want {
			t.Errorf("a block of group %d has %d references instead of %d", g, n, want)
		}
	}
	if n := s.FreeCheap(); n != 0 {
		t.Errorf("%d cheap blocks are free, and all are in use", n)
	}
}
