package hpditest

import (
	"errors"
	"slices"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
)

// status asks what n bytes at off are made of, with place for so many extents at once,
// and checks that the answers fit together.
func status(t *testing.T, d hpdi.Device, q hpdi.Queue, off, n int64, place int) []hpdi.Extent {
	t.Helper()
	bs := int64(d.Info().BlockSize)
	guard := hpdi.Extent{Length: -77, State: 99}
	mem := make([]hpdi.Extent, place+1)
	var all []hpdi.Extent
	for at := off; at < off+n; {
		for i := range mem {
			mem[i] = guard
		}
		r := &hpdi.Request{Op: hpdi.OpStatus, Offset: at, Length: off + n - at, Extents: mem[:0:place]}
		do(t, q, r)
		if len(r.Extents) == 0 || len(r.Extents) > place || &r.Extents[0] != &mem[0] || mem[place] != guard {
			t.Fatalf("status of %d bytes at %d with place for %d: %d extents, or somewhere else", r.Length, at, place, len(r.Extents))
		}
		for _, e := range r.Extents {
			if e.Length <= 0 || e.Length%bs != 0 || e.State > hpdi.Zero {
				t.Fatalf("status of %d bytes at %d: extent of %d bytes that is %s", r.Length, r.Offset, e.Length, e.State)
			}
			at += e.Length
			if last := len(all) - 1; last >= 0 && all[last].State == e.State {
				all[last].Length += e.Length
			} else {
				all = append(all, e)
			}
		}
		if at > off+n {
			t.Fatalf("status of %d bytes at %d goes %d bytes beyond them", r.Length, r.Offset, at-off-n)
		}
	}
	return all
}

// testStatus compares what a device says of a range with what it reads as.
func testStatus(t *testing.T, d hpdi.Device) {
	info := d.Info()
	q := newQueue(t, d, 4)
	defer closeQueue(t, q)
	bs := int64(info.BlockSize)
	if !info.Status {
		r := &hpdi.Request{Op: hpdi.OpStatus, Length: bs, Extents: make([]hpdi.Extent, 0, 1)}
		if err := hpdi.Do(q, r); !errors.Is(err, hpdi.ErrUnsupported) || len(r.Extents) != 0 {
			t.Errorf("block status where there is none: %v, %v", r.Extents, err)
		}
		return
	}
	const n = 256
	mem := alloc(t, int(n*bs))
	fill(mem, 0, 3)
	do(t, q, write(0, mem))
	if info.Zeroes {
		do(t, q, &hpdi.Request{Op: hpdi.OpWriteZeroes, Offset: 64 * bs, Length: 32 * bs}, &hpdi.Request{Op: hpdi.OpWriteZeroes, Offset: 200 * bs, Length: bs})
	}
	if info.Discard {
		do(t, q, &hpdi.Request{Op: hpdi.OpDiscard, Offset: 128 * bs, Length: 16 * bs})
	}
	do(t, q, read(0, mem))
	var first []hpdi.Extent
	for _, place := range []int{100, 1, 2} {
		all := status(t, d, q, 0, n*bs, place)
		at := int64(0)
		for _, e := range all {
			for b := at / bs; b < (at+e.Length)/bs; b++ {
				zero := true
				for _, x := range mem[b*bs : (b+1)*bs] {
					zero = zero && x == 0
				}
				if e.State != hpdi.Data && !zero {
					t.Fatalf("block %d is said to be %s and has data", b, e.State)
				}
			}
			at += e.Length
		}
		if first == nil {
			first = all
		} else if !slices.Equal(all, first) {
			t.Errorf("with place for %d extents: %v, with more: %v", place, all, first)
		}
	}
	// A part of it, an empty range, and the last block.
	status(t, d, q, 63*bs, 3*bs, 3)
	status(t, d, q, info.Size-bs, bs, 1)
	empty := &hpdi.Request{Op: hpdi.OpStatus, Offset: info.Size, Extents: make([]hpdi.Extent, 0, 1)}
	if do(t, q, empty); len(empty.Extents) != 0 {
		t.Errorf("status of nothing: %v", empty.Extents)
	}
	for want, r := range map[error]*hpdi.Request{
		hpdi.ErrExtents: {Op: hpdi.OpStatus, Length: bs},
		hpdi.ErrRange:   {Op: hpdi.OpStatus, Offset: info.Size, Length: bs, Extents: make([]hpdi.Extent, 0, 1)},
		hpdi.ErrAlign:   {Op: hpdi.OpStatus, Length: bs / 2, Extents: make([]hpdi.Extent, 0, 1)},
	} {
		if err := hpdi.Do(q, r); !errors.Is(err, want) {
			t.Errorf("malformed status: %v, want %v", err, want)
		}
	}
}
