package space

import (
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
)

// What is apart is no part of what is free, promised or chosen, and goes to AllocApart
// alone; when it leaves, what it has is owed.
func TestApart(t *testing.T) {
	s := New()
	defer s.Close()
	if err := s.AddDevice(8*block.TrackBlocks, block.TrackBlocks); err != nil {
		t.Fatal(err)
	}
	before := s.Usage()
	d, err := NewDevice(5*block.TrackBlocks, block.TrackBlocks)
	if err != nil {
		t.Fatal(err)
	}
	d.SetApart()
	s.Attach(d)
	check := func(when string, total, free int64) {
		t.Helper()
		if n, f := s.Apart(); n != total || f != free {
			t.Errorf("%s: %d of %d are free", when, f, n)
		}
		if err := s.CheckFree(); err != nil {
			t.Errorf("%s: %v", when, err)
		}
	}
	const all = 4 * block.TrackBlocks
	check("attached", all, all)
	if u := s.Usage(); u != before || !s.IsApart(1) || s.IsApart(0) || s.IsApart(2) {
		t.Errorf("%+v, before %+v", u, before)
	}
	runs, err := s.Alloc(int(before.Free), nil)
	if err != nil {
		t.Fatal(err)
	}
	for _, r := range runs {
		if r.At.Device() != 0 {
			t.Fatalf("%v of what is apart was allocated", r)
		}
	}
	if _, err := s.Alloc(1, nil); err == nil {
		t.Error("more was allocated than there is")
	}
	if pairs := s.AllocTwins(4, func(int) bool { return true }); len(pairs) != 0 {
		t.Errorf("twins lie on %v", pairs)
	}
	apart := s.AllocApart(10, nil)
	if len(apart) != 1 || apart[0].N != 10 || apart[0].At.Device() != 1 {
		t.Fatalf("%v", apart)
	}
	check("ten blocks", all, all-10)
	if err := s.Inc(apart[0]); err != nil {
		t.Fatal(err)
	}
	if u := s.Usage(); u.More != 10 || u.Free != 0 || u.Owed != 0 {
		t.Errorf("%+v", u)
	}
	n := 0
	for _, r := range s.AllocApart(2*all, nil) {
		n += r.N
	}
	if n != all-10 {
		t.Errorf("%d blocks were allocated", n)
	}
	check("full", all, 0)
	if e := s.Choose(Choice{MinFree: 1, Tracks: 100, Used: 1 << 20}); e.Tracks != 0 {
		t.Errorf("%d tracks are worth emptying", e.Tracks)
	}
	if l, ok := s.Leave(1); ok || l.Used != all {
		t.Errorf("it leaves although nobody has room: %+v", l)
	}
	check("stays", all, 0)
	for _, r := range runs {
		if err := s.Dec(r); err != nil {
			t.Fatal(err)
		}
	}
	if l, ok := s.Leave(1); !ok {
		t.Errorf("it stays: %+v", l)
	}
	if u := s.Usage(); u.Owed != all || u.Free != before.Free {
		t.Errorf("%+v", u)
	}
	check("leaves", 0, 0)
	s.SetLeaving(1, false)
	check("stays after all", all, 0)
	if u := s.Usage(); u.Owed != 0 || u.Free != before.Free {
		t.Errorf("%+v", u)
	}
}
