package sim

import (
	"encoding/binary"
	"fmt"
	"maps"
	"slices"

	"github.com/pollux-storage/pollux/internal/block"
)

// stampSize is the unit in which contents can be told apart.
const stampSize = 64

// stamped returns n bytes for a place that no other request writes.
func stamped(id int, off, n int64) []byte {
	p := make([]byte, n)
	for i := range p {
		at := off + int64(i)
		var word [8]byte
		binary.LittleEndian.PutUint64(word[:], uint64(id)<<40|uint64(at/stampSize)<<8|0x5a)
		p[i] = word[at%8]
	}
	return p
}

// describe says what a piece of content is.
func describe(p []byte) string {
	var parts []string
	last := ""
	for i := 0; i+8 <= len(p); i += 8 {
		s := "zeroes"
		if w := binary.LittleEndian.Uint64(p[i:]); w&0xff == 0x5a {
			s = fmt.Sprintf("request %d", w>>40)
		} else if w != 0 {
			s = fmt.Sprintf("%016x", w)
		}
		if s != last {
			parts = append(parts, fmt.Sprintf("[%d] %s", i, s))
			last = s
		}
		if len(parts) > 6 {
			return fmt.Sprint(append(parts, "..."))
		}
	}
	return fmt.Sprint(parts)
}

// ranges returns the parts of a volume in which something was written, in
// pieces of bounded size, each with a block more on both sides.
func (v *volume) ranges() []block.Range {
	const most = 256
	var out []block.Range
	for _, b := range slices.Sorted(maps.Keys(v.blocks)) {
		// A block may lie beyond the size that is known: of a resize that had
		// no answer.
		end := min(b+2, max(b+1, block.Logical(v.size/block.Size)))
		if n := len(out); n > 0 && b < out[n-1].End && out[n-1].End-out[n-1].Start < most {
			out[n-1].End = end
			continue
		}
		out = append(out, block.Range{Start: max(b, 1) - 1, End: end})
	}
	return out
}
