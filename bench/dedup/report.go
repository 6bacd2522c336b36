package main

import (
	"fmt"
	"io"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/pollux-storage/pollux/internal/block"
)

// What iDedup (FAST'12) published of its first traces: the part of exact savings that a
// threshold kept with 1 GB of cache, in percent, and the mean size of a request to the
// disk in blocks, with the threshold 1 and without deduplication (0).
var (
	publishedKept    = map[int]float64{1: 100, 2: 82, 4: 75, 8: 50}
	publishedRequest = map[int]float64{0: 15.8, 1: 12.5, 2: 14.8, 4: 14.9, 8: 15.4}
)

func published(m map[int]float64, run int, format string) string {
	if v, ok := m[run]; ok {
		return fmt.Sprintf(format, v)
	}
	return "–"
}

func (m *measured) print(w io.Writer, name string) {
	size := func(blocks int64) string { return humanize.IBytes(uint64(blocks * block.Size)) }
	fmt.Fprintf(w, "\n## %s\n\n%s that are not zero, %s of zeroes; %s are different, so exact deduplication saves %s (%.1f %%).\n",
		name, size(m.blocks), size(m.zero), size(m.distinct), size(m.exact()), 100*float64(m.exact())/float64(m.blocks))
	fmt.Fprintf(w, "\n| THN | saved | of exact | iDedup | 1 in %d indexed, of exact | of dense | matches, blocks in the mean |\n|--:|--:|--:|--:|--:|--:|--:|\n", sampled)
	for _, r := range m.rows {
		fmt.Fprintf(w, "| %d | %s | %.1f %% | %s | %.1f %% | %.1f %% | %d, %.1f |\n", r.run, size(r.dense.Saved()), 100*m.kept(r.dense),
			published(publishedKept, r.run, "%.0f %%"), 100*m.kept(r.thin), 100*m.kept(r.thin)/m.kept(r.dense),
			r.dense.Matches, float64(r.dense.Saved())/float64(max(1, r.dense.Matches)))
	}
	fmt.Fprintf(w, "\nReading all in sequence, %d KiB at once; in one piece %v:\n\n", requestBlocks*block.Size>>10, round(m.whole.Busy))
	fmt.Fprintf(w, "| THN | time | beyond one piece | of exact's | jumps | blocks a jump | of exact's | most jumps in a request | requests with more than %d | blocks a request | iDedup | mean extent |\n|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|--:|\n", maxJumps)
	fmt.Fprintf(w, "| none | %v | | | %d | | | %d | %d | %.1f | %.1f | %.1f |\n", round(m.whole.Busy), m.whole.Jumps, m.whole.most, m.whole.over, m.whole.perRequest(), publishedRequest[0], float64(m.blocks)/float64(m.extents))
	exact := &m.rows[0].read
	for _, r := range m.rows {
		d := &r.read
		fmt.Fprintf(w, "| %d | %v | %v | %.2f | %d | %.1f | %.2f | %d | %d | %.1f | %s | %.1f |\n", r.run, round(d.Busy), round(m.beyond(d)),
			float64(m.beyond(d))/float64(m.beyond(exact)), d.Jumps, d.perJump(), d.perJump()/exact.perJump(), d.most, d.over,
			d.perRequest(), published(publishedRequest, r.run, "%.1f"), float64(m.blocks)/float64(r.dense.Extents()))
	}
	fmt.Fprintf(w, "\nWith low-latency memory (LLRRM), of exact / LLRRM of what is stored / time beyond one piece, of exact's / most seeks in a request, what passes under the head apart:\n\n| THN |")
	for _, t := range thresholds {
		fmt.Fprintf(w, " threshold %d |", t)
	}
	fmt.Fprintf(w, "\n|--:|--:|--:|--:|--:|\n")
	for _, r := range m.rows {
		fmt.Fprintf(w, "| %d |", r.run)
		for i, l := range r.memory {
			fmt.Fprintf(w, " %.1f %% / %.1f %% / %.2f / %d |", 100*m.kept(l), 100*float64(l.Memory)/float64(l.Memory+l.Disk),
				float64(m.beyond(&r.memoryRead[i]))/float64(m.beyond(exact)), r.memoryRead[i].mostSeeks)
		}
		fmt.Fprintln(w)
	}
	fmt.Fprintf(w, "\nThe same with 1 block in %d indexed, of exact / LLRRM:\n\n", sampled)
	for _, r := range m.rows {
		fmt.Fprintf(w, "| %d |", r.run)
		for _, l := range r.memoryThin {
			fmt.Fprintf(w, " %.1f %% / %.1f %% |", 100*m.kept(l), 100*float64(l.Memory)/float64(l.Memory+l.Disk))
		}
		fmt.Fprintln(w)
	}
}

func round(d time.Duration) time.Duration { return d.Round(time.Millisecond) }

// What is wanted, of THN 8.
const (
	wantedRun     = 8
	wantedKept    = 0.88 // of exact savings, on images of one release
	wantedThin    = 0.93 // of that, with one block of sampled in the index
	wantedBeyond  = 0.4  // of the time beyond one piece that exact deduplication costs
	wantedPerJump = 2.5  // times the blocks a jump
	maxJumps      = 3    // in a request of 64 KiB
	wantedMemory  = 0.95 // of exact savings with low-latency memory,
	memoryShare   = 0.05 // which is at most this part of what is stored
)

// verdict says what of it is reached, and whether anything is not.
func (m *measured) verdict(w io.Writer, s set) (missed bool) {
	fmt.Fprintf(w, "\nWanted of THN %d:\n\n", wantedRun)
	say := func(ok bool, format string, args ...any) {
		mark := "reached"
		if !ok {
			mark, missed = "MISSED", true
		}
		fmt.Fprintf(w, "* %s: %s\n", mark, fmt.Sprintf(format, args...))
	}
	exact := &m.rows[0].read
	for _, r := range m.rows {
		if r.dense.Different+r.thin.Different > 0 {
			say(false, "%d matches with THN %d had other bytes", r.dense.Different+r.thin.Different, r.run)
		}
		if r.run != wantedRun {
			continue
		}
		if s.release {
			say(m.kept(r.dense) >= wantedKept, "%.1f %% of exact savings are kept (%.0f)", 100*m.kept(r.dense), 100*wantedKept)
		}
		thin := m.kept(r.thin) / m.kept(r.dense)
		say(thin >= wantedThin, "%.1f %% of that with 1 in %d indexed (%.0f)", 100*thin, sampled, 100*wantedThin)
		beyond := float64(m.beyond(&r.read)) / float64(m.beyond(exact))
		say(beyond <= wantedBeyond, "%.2f of the time beyond one piece that exact costs (%.2f)", beyond, wantedBeyond)
		perJump := r.read.perJump() / exact.perJump()
		say(perJump >= wantedPerJump, "%.2f times the blocks a jump (%.2f)", perJump, wantedPerJump)
		say(r.read.most <= maxJumps, "%d jumps at most in a request (%d)", r.read.most, maxJumps)
		best := -1
		for i, l := range r.memory {
			if float64(l.Memory) <= memoryShare*float64(l.Memory+l.Disk) && (best < 0 || l.Saved() > r.memory[best].Saved()) {
				best = i
			}
		}
		if best < 0 {
			say(false, "no threshold keeps LLRRM below %.0f %% of what is stored", 100*memoryShare)
			continue
		}
		say(m.kept(r.memory[best]) >= wantedMemory, "%.1f %% with LLRRM of %.1f %% of what is stored, threshold %d (%.0f)", 100*m.kept(r.memory[best]),
			100*float64(r.memory[best].Memory)/float64(r.memory[best].Memory+r.memory[best].Disk), thresholds[best], 100*wantedMemory)
	}
	return missed
}
