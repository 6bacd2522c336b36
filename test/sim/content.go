package sim

import (
	"encoding/binary"
	"fmt"
	"maps"
	"slices"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/dedup"
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

// written is a request whose content others may repeat.
type written struct {
	id  int
	off int64
}

// content returns what a request writes. Where volumes share blocks, every second one
// repeats what another has written, from the block on in which that began.
func (w *World) content(r *request) []byte {
	if n := len(w.written); w.opt.Run > 0 && n > 0 && r.id%2 == 0 {
		as := w.written[r.id/2*7%n]
		return stamped(as.id, as.off&^(block.Size-1)+r.off%block.Size, r.n)
	}
	w.written = append(w.written, written{r.id, r.off})
	return stamped(r.id, r.off, r.n)
}

// fingerprint returns what guests find equal blocks by, nil for what they do unless they
// are told otherwise.
func (w *World) fingerprint() func([]byte) dedup.Fingerprint {
	if !w.opt.Weak {
		return nil
	}
	return func(data []byte) dedup.Fingerprint { return 1 + dedup.Secret(1).Fingerprint(data)%8 }
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
