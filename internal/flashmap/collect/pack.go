package collect

import (
	"encoding/binary"
	"math"
	"slices"
	"time"

	"github.com/pollux-storage/pollux/internal/ondisk"
)

// A history is many sets with small counts, so they are packed: numbers as differences, and
// all counts as whole numbers of as many bytes as they need (varint). What is counted is
// whole accesses, so that nothing is lost but of mean sizes, which are kept in steps.

// sizeStep is what mean sizes of requests are rounded to, in bytes.
const sizeStep = 512

// Sizes in bytes of what is packed: a set has five numbers, and a window its beginning, four
// numbers and the sets.
const (
	minPackedSet    = 5
	minPackedWindow = 8 + 4
)

// worthKeeping is how many bytes a window shall have at least, of those that are saved: with
// fewer it has too few sets to replay anything.
const worthKeeping = 2 << 10

// appendHistory appends windows in at most room bytes, beside their count: the newest first,
// of each the most used sets. What one does not need those before it get.
func appendHistory(p []byte, windows []Window, room int) []byte {
	start, written := len(p), uint32(0)
	p = binary.LittleEndian.AppendUint32(p, 0)
	for i := len(windows) - 1; i >= 0 && room >= worthKeeping; i-- {
		before := len(p)
		p = appendWindow(p, &windows[i], room/min(i+1, room/worthKeeping))
		room -= len(p) - before
		written++
	}
	binary.LittleEndian.PutUint32(p[start:], written)
	return p
}

// appendWindow appends a window with as many of its most used sets as find room, which is
// worthKeeping at least.
func appendWindow(p []byte, w *Window, room int) []byte {
	start, sets := len(p), w.Sets
	for {
		p = binary.LittleEndian.AppendUint64(p[:start], uint64(w.Start.UnixNano()))
		for _, v := range [3]float64{w.Reads, w.Writes, w.Runs} {
			p = binary.AppendUvarint(p, whole(v))
		}
		p = binary.AppendUvarint(p, uint64(len(sets)))
		next := Set(0)
		for i := range sets {
			u := &sets[i]
			p = binary.AppendUvarint(p, uint64(u.Set-next))
			next = u.Set + 1
			for _, v := range [3]float32{u.Reads, u.Writes, u.Runs} {
				p = binary.AppendUvarint(p, whole(float64(v)))
			}
			p = binary.AppendUvarint(p, whole(float64(u.Size)/sizeStep))
		}
		n := len(p) - start
		if n <= room || len(sets) == 0 {
			return p
		}
		// How many bytes a set takes depends on which there are.
		sets = most(w.Sets, min(len(sets)-1, len(sets)*room/n))
	}
}

// maxWhole is the largest count that is written.
const maxWhole = 1 << 62

func whole(v float64) uint64 { return uint64(math.Round(max(0, min(v, maxWhole)))) }

// past reads the history.
func (s *state) past(d *ondisk.Decoder) {
	n := d.Count(minPackedWindow)
	for i := 0; i < n && d.Err() == nil; i++ {
		s.windows = append(s.windows, s.packedWindow(d))
	}
	slices.Reverse(s.windows)
}

func (s *state) packedWindow(d *ondisk.Decoder) Window {
	w := Window{Start: time.Unix(0, int64(d.U64())), Length: s.window}
	for _, v := range [3]*float64{&w.Reads, &w.Writes, &w.Runs} {
		*v = float64(packedCount(d))
	}
	n := d.Uvarint()
	if n > uint64(d.Len()/minPackedSet) {
		d.Fail("%d sets of a window with %d bytes left", n, d.Len())
		return w
	}
	w.Sets = make([]Used, 0, n)
	sets, next := s.geometry.Sets(), uint64(0)
	for range n {
		by := d.Uvarint()
		if d.Err() != nil {
			break
		}
		if next >= sets || by >= sets-next {
			d.Fail("a set beyond the %d of the device", sets)
			break
		}
		u := Used{Set: Set(next + by)}
		next += by + 1
		for _, v := range [3]*float32{&u.Reads, &u.Writes, &u.Runs} {
			*v = float32(packedCount(d))
		}
		if size := d.Uvarint(); size <= maxEvent/sizeStep {
			u.Size = float32(size * sizeStep)
		} else {
			d.Fail("requests of %d times %d bytes", size, sizeStep)
		}
		w.Sets = append(w.Sets, u)
	}
	return w
}

func packedCount(d *ondisk.Decoder) uint64 {
	v := d.Uvarint()
	if v > maxWhole {
		d.Fail("a count of %d", v)
	}
	return v
}
