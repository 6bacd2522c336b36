package devices

import (
	"fmt"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

// LookOnly makes FromTwin repair nothing, or something again. No other call may be under
// way.
func (s *Set) LookOnly(on bool) { s.lookOnly = on }

// FromTwin reads a page that is bad at one of its two places from the other one, and
// writes it to the first again. good tells whether the bytes are right; if it fails the
// page is good at neither place. Nobody may free the page meanwhile. Copies that
// devices keep are not looked at: ReadGood does that.
func (s *Set) FromTwin(bad, other block.Physical, buf []byte, good func([]byte) bool) (mended bool, err error) {
	if err := s.Read(other, buf); err != nil {
		return false, err
	}
	if !good(buf) {
		return false, &block.CorruptError{What: "metadata page", Where: other.String(), Why: fmt.Sprintf("the only one left, as that at %v cannot be read either", bad)}
	}
	if s.lookOnly || s.Do([]*IO{{Op: hpdi.OpWrite, At: bad, Vec: [][]byte{buf}}}) != nil {
		return false, nil // what was read is right all the same
	}
	s.mended.Add(1)
	return true, nil
}

// Mended returns how many pages were written again by FromTwin.
func (s *Set) Mended() uint64 { return s.mended.Load() }
