package vhost

import (
	"bytes"
	"errors"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"github.com/pollux-storage/pollux/internal/virtio"
)

const testSize = 8

// areaMemory returns memory for an area.
func areaMemory(n int) []byte {
	b := make([]uint64, (n+areaAlign)/8+1)
	m := unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(b))), len(b)*8)
	for uintptr(unsafe.Pointer(unsafe.SliceData(m)))%areaAlign != 0 {
		m = m[8:]
	}
	return m[:n:n]
}

func newArea(t testing.TB, packed bool) (*Area, []byte) {
	t.Helper()
	mem := areaMemory(AreaBytes(2, testSize, packed))
	a, err := OpenArea(mem, 2, testSize, packed)
	if err != nil {
		t.Fatal(err)
	}
	a.Format(77)
	return a, mem
}

func TestArea(t *testing.T) {
	for _, packed := range []bool{false, true} {
		_, mem := newArea(t, packed)
		a, err := OpenArea(mem, 2, testSize, packed)
		if err != nil {
			t.Fatal(err)
		}
		if id, err := a.Session(); id != 77 || err != nil {
			t.Errorf("session %d, %v", id, err)
		}
		if q, n := a.Shape(); q != 2 || n != testSize {
			t.Errorf("%d queues of %d", q, n)
		}
		for name, c := range map[string]struct {
			do   func(mem []byte)
			want string
		}{
			"another's":   {func(mem []byte) { mem[len(a.mem)-len(a.trailer())] ^= 1 }, "not made by Pollux"},
			"the future":  {func(mem []byte) { mem[len(a.mem)-len(a.trailer())+8] = 9 }, "version 9"},
			"other shape": {func(mem []byte) { mem[len(a.mem)-len(a.trailer())+10] = 9 }, "for 9 queues"},
			"no session":  {func(mem []byte) { clear(mem[len(a.mem)-len(a.trailer())+16:][:8]) }, "without a session"},
		} {
			bad := areaMemory(len(mem))
			copy(bad, mem)
			c.do(bad)
			b, err := OpenArea(bad, 2, testSize, packed)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := b.Session(); !errors.Is(err, ErrProtocol) || !strings.Contains(err.Error(), c.want) {
				t.Errorf("%s: %v", name, err)
			}
		}
		if _, err := OpenArea(mem[:len(mem)-1], 2, testSize, packed); !errors.Is(err, ErrProtocol) {
			t.Errorf("too short: %v", err)
		}
		if _, err := OpenArea(areaMemory(len(mem) + 8)[8:], 2, testSize, packed); !errors.Is(err, ErrProtocol) {
			t.Errorf("not aligned: %v", err)
		}
	}
}

// golden is how a split area looks with one request in flight and one completed, so that
// what another program, or another version of this one, has written is read.
func TestAreaBytes(t *testing.T) {
	a, mem := newArea(t, false)
	s, subs, err := a.AttachSplit(0, 5)
	if err != nil || subs != nil {
		t.Fatal(subs, err)
	}
	s.Fetch(3)
	s.Fetch(6)
	s.LinkEntry(3)
	s.LinkHead(3)
	s.Clear(3)
	s.Settle(1)
	a.SetWritethrough(true)
	want := make([]byte, len(mem))
	copy(want[8:], []byte{1, 0, testSize, 0, 3, 0, 6, 0})              // version, descriptors, last batch, used index
	copy(want[16+3*16+8:], []byte{1})                                  // counter of descriptor 3
	copy(want[16+6*16:], []byte{1, 0, 0, 0, 0, 0, 0, 0, 2})            // descriptor 6 is in flight, counter 2
	trailer := want[2*regionSize(testSize, false):]                    // 192 bytes each
	copy(trailer, "PLUXINF1")                                          // magic
	copy(trailer[8:], []byte{AreaVersion, 0, 2, 0, testSize, 0, 0, 0}) // version, queues, descriptors, layout
	copy(trailer[16:], []byte{77})                                     // session
	copy(trailer[24:], []byte{1})                                      // the write-back cache is off
	if !bytes.Equal(mem, want) {
		t.Errorf("the area is\n%x\nnot\n%x", mem, want)
	}
}

// What the area says of the write-back cache is 0 or 1.
func TestAreaWritethrough(t *testing.T) {
	a, _ := newArea(t, true)
	for _, on := range []bool{false, true, false} {
		if a.SetWritethrough(on); on {
			a, _ = OpenArea(a.mem, 2, testSize, true)
		}
		if got, err := a.Writethrough(); got != on || err != nil {
			t.Errorf("write through %t, %v, not %t", got, err, on)
		}
	}
	a.trailer()[cacheAt] = 2
	if _, err := a.Writethrough(); !errors.Is(err, ErrProtocol) {
		t.Errorf("a cache that is neither on nor off: %v", err)
	}
}

// Counters go on when a queue begins anew, whatever it was left with.
func TestCountersGoOn(t *testing.T) {
	a, _ := newArea(t, false)
	s, _, err := a.AttachSplit(1, 0)
	if err != nil {
		t.Fatal(err)
	}
	for range 5 {
		s.Fetch(2)
		s.Clear(2)
	}
	s.Retire()
	if s, _, err = a.AttachSplit(1, 700); err != nil || s.Resumed {
		t.Fatal(err)
	}
	if c := s.Fetch(2); c != 6 {
		t.Errorf("the sixth submission has counter %d", c)
	}
	s, subs, err := a.AttachSplit(1, 700)
	if err != nil || !s.Resumed || len(subs) != 1 || subs[0].Slot != 2 || subs[0].Counter != 6 {
		t.Fatal(subs, err)
	}
	if c := s.Fetch(3); c != 7 {
		t.Errorf("the seventh submission has counter %d", c)
	}
	p, _ := newArea(t, true)
	base := virtio.PackedPosition{Index: 3, Wrap: true}
	x, used, _, subs, err := p.AttachPacked(0, base, noRing{})
	if err != nil || used != base || subs != nil {
		t.Fatal(used, subs, err)
	}
	x.Fetch([]virtio.PackedDesc{{Addr: 1}, {Addr: 2}})
	x.Fetch([]virtio.PackedDesc{{Addr: 3}})
	x, used, avail, subs, err := p.AttachPacked(0, virtio.PackedPosition{}, noRing{})
	if err != nil || !x.Resumed || used != base || avail != base.Forward(3, testSize) || len(subs) != 2 ||
		!slices.Equal(subs[0].Descs, []virtio.PackedDesc{{Addr: 1}, {Addr: 2}}) || subs[1].Counter != 2 {
		t.Fatal(used, avail, subs, err)
	}
	x.Retire()
	x, _, _, _, err = p.AttachPacked(0, base, noRing{})
	if err != nil || x.Resumed {
		t.Fatal(err)
	}
	if _, c := x.Fetch([]virtio.PackedDesc{{}}); c != 3 {
		t.Errorf("the third submission has counter %d", c)
	}
}

// noRing is a packed ring in which nothing was used.
type noRing struct{}

func (noRing) Available(virtio.PackedPosition) bool { return true }
func (noRing) Unuse(virtio.PackedPosition)          {}

// FuzzAttach: whatever is in an area, attaching it is an error or gives requests of which
// each entry is named once, and the tracking goes on from there.
func FuzzAttach(f *testing.F) {
	for _, packed := range []bool{false, true} {
		a, mem := newArea(f, packed)
		if packed {
			x, _, _, _, _ := a.AttachPacked(0, virtio.PackedPosition{Wrap: true}, noRing{})
			x.Fetch([]virtio.PackedDesc{{Addr: 1}, {Addr: 2}})
			s, _ := x.Fetch([]virtio.PackedDesc{{Addr: 3}})
			x.LinkEntry(s)
			x.LinkHead(s)
			x.Advance(1)
		} else {
			x, _, _ := a.AttachSplit(0, 0)
			x.Fetch(1)
			x.Fetch(2)
			x.LinkEntry(1)
			x.LinkHead(1)
		}
		f.Add(packed, uint16(1), mem)
	}
	f.Fuzz(func(t *testing.T, packed bool, used uint16, b []byte) {
		mem := areaMemory(AreaBytes(1, testSize, packed))
		copy(mem, b)
		a, err := OpenArea(mem, 1, testSize, packed)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = a.Session()
		_, _ = a.Writethrough()
		taken := 0
		seen := map[uint16]bool{}
		check := func(subs []Submission, err error) bool {
			if err != nil {
				if !errors.Is(err, ErrProtocol) {
					t.Fatal(err)
				}
				return false
			}
			last := uint64(0)
			for _, s := range subs {
				if seen[s.Slot] || s.Slot >= testSize || s.Counter < last {
					t.Fatalf("%+v", subs)
				}
				seen[s.Slot], last = true, s.Counter
				taken += len(s.Descs)
			}
			return true
		}
		if packed {
			x, at, next, subs, err := a.AttachPacked(0, virtio.PositionOf(used%testSize), noRing{})
			if !check(subs, err) {
				return
			}
			if x.Resumed && next != at.Forward(taken, testSize) {
				t.Fatalf("%d descriptors from %+v to %+v", taken, at, next)
			}
			for ; taken < testSize; taken++ {
				slot, _ := x.Fetch([]virtio.PackedDesc{{Addr: 5}})
				if seen[slot] {
					t.Fatalf("entry %d is in flight twice", slot)
				}
				seen[slot] = true
			}
			for slot := range seen {
				x.LinkEntry(slot)
				x.LinkHead(slot)
			}
			x.Advance(testSize)
			for slot := range seen {
				x.Clear(slot)
			}
			x.Unlink()
			x.Settle(len(seen))
			x.Fetch(make([]virtio.PackedDesc, testSize))
			return
		}
		x, subs, err := a.AttachSplit(0, used)
		if !check(subs, err) {
			return
		}
		for slot := range uint16(testSize) {
			if !seen[slot] {
				x.Fetch(slot)
			}
			x.LinkEntry(slot)
			x.LinkHead(slot)
			x.Clear(slot)
		}
		x.Settle(testSize)
		if _, subs, err := a.AttachSplit(0, used+testSize); err != nil || len(subs) != 0 {
			t.Fatalf("after all is done: %v, %v", subs, err)
		}
	})
}
