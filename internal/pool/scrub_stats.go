package pool

import (
	"fmt"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
)

// ScrubResult is what a scrub has come to.
type ScrubResult struct {
	Begun, Ended time.Time     // Ended is zero while it goes on
	Took         time.Duration // without pauses, and without the time in which nobody served the pool
	Blocks       uint64        // blocks read, whatever the number of copies
	Bytes        uint64        // read from all copies
	Repaired     uint64        // copies of blocks that were bad and are good again
	Unreadable   uint64        // blocks that no copy has
	Findings     []ScrubFinding
}

// ScrubFinding is a block that no copy has.
type ScrubFinding struct {
	Volume string        // its name; empty for what is no volume's
	Block  block.Logical // of the volume; the first one that a page of its map is for
	Text   string        // for people
}

// ScrubStats describes the scrubs of a pool.
type ScrubStats struct {
	State ScrubState
	// Now is the newest scrub, and Last the newest that went through. Both are
	// zero before the first.
	Now, Last ScrubResult
	// Done and Total are blocks that volumes refer to; Total is an estimate.
	Done, Total uint64
	Left        time.Duration // until it ends, at its pace up to now; 0 when that is not known
	Next        time.Time     // when one begins by itself; zero for never
}

// Unreadable returns how many blocks the newest scrub has found that no copy has,
// or the newest that went through, if that found more.
func (s *ScrubStats) Unreadable() uint64 { return max(s.Now.Unreadable, s.Last.Unreadable) }

// Stats may be called at any time.
func (s *scrub) Stats() ScrubStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stats
}

// publish makes Stats return what is known now.
func (s *scrub) publish() {
	r := &s.rec.now
	st := ScrubStats{State: s.rec.state, Now: s.result(r), Last: s.result(&s.rec.last), Done: r.blocks, Total: r.total, Next: s.due()}
	if s.rec.state == ScrubDone || r.blocks > r.total {
		st.Total = r.blocks // pages of metadata are not estimated
	}
	if r.blocks > 0 && s.rec.state == ScrubRunning {
		st.Left = time.Duration(float64(r.took) / float64(r.blocks) * float64(st.Total-st.Done))
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.stats = st
}

func (s *scrub) result(r *scrubResult) ScrubResult {
	out := ScrubResult{Begun: r.begun, Ended: r.ended, Took: r.took, Blocks: r.blocks, Bytes: r.bytes, Repaired: r.repaired, Unreadable: r.unreadable}
	for _, f := range r.findings {
		out.Findings = append(out.Findings, ScrubFinding{Volume: s.volumeName(f), Block: f.lba, Text: s.describe(f)})
	}
	return out
}

// volumeName returns the present name of the volume that a finding is in.
func (s *scrub) volumeName(f scrubFinding) string {
	if f.kind != ScrubData && f.kind != ScrubMap {
		return ""
	}
	if v, ok := s.p.catalogue.Get(f.volume); ok {
		return v.Name
	}
	return fmt.Sprintf("number %d, which was deleted", f.volume)
}

// describe names a block for people.
func (s *scrub) describe(f scrubFinding) string {
	switch f.kind {
	case ScrubData:
		return fmt.Sprintf("block %d of volume %q", f.lba, s.volumeName(f))
	case ScrubMap:
		return fmt.Sprintf("page of the map of volume %q for block %d and others", s.volumeName(f), f.lba)
	case ScrubCounts:
		return fmt.Sprintf("page of reference counts at block %v", f.at)
	case ScrubCatalogue:
		return fmt.Sprintf("page of the list of volumes at block %v", f.at)
	case ScrubLabel:
		return fmt.Sprintf("label at block %v", f.at)
	case ScrubSuperblock:
		return fmt.Sprintf("superblock at block %v", f.at)
	case ScrubPrints:
		return fmt.Sprintf("page of fingerprints at block %v", f.at)
	case ScrubFlash:
		return fmt.Sprintf("label or table of flash device %d", f.at.Device()+1)
	case ScrubMirror:
		return fmt.Sprintf("header or map of mirror %d", f.at.Device()+1)
	default:
		return fmt.Sprintf("metadata journal from block %v on", f.at)
	}
}
