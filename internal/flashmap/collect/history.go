package collect

import (
	"cmp"
	"slices"
	"time"
	"unsafe"
)

// Window is what happened in a window that has ended.
type Window struct {
	Start  time.Time
	Length time.Duration
	// Reads, Writes and Runs are the accesses of all sets, outside of runs and in them.
	Reads, Writes, Runs float64
	// Sets are those that were used most, in the order of their numbers. What is missing
	// to the sums above was of others.
	Sets []Used
}

// Used is how often a set was used in a window.
type Used struct {
	Set                 Set
	Reads, Writes, Runs float32 // accesses outside of runs, and in them
	Size                float32 // mean size of the requests, bytes
}

// Accesses returns all accesses, those in runs among them.
func (u *Used) Accesses() float64 { return float64(u.Reads) + float64(u.Writes) + float64(u.Runs) }

// Random returns the share of accesses that are outside of runs, 0 without any.
func (u *Used) Random() float64 {
	if all := u.Accesses(); all > 0 {
		return (float64(u.Reads) + float64(u.Writes)) / all
	}
	return 0
}

// history keeps windows that have ended, in bounded memory.
type history struct {
	windows []Window
	most    int // windows
	sets    int // of each
}

const (
	usedBytes     = int64(unsafe.Sizeof(Used{}))
	windowBytes   = int64(unsafe.Sizeof(Window{}))
	recorderBytes = int64(unsafe.Sizeof(Recorder{}))
)

// bound sets the memory in bytes and the number of windows that share it.
func (h *history) bound(bytes int64, windows int) {
	h.most, h.sets = windows, 0
	if windows > 0 {
		h.sets = int(max(0, bytes/int64(windows)-windowBytes) / usedBytes)
	}
	if h.sets == 0 {
		h.most = 0
	}
	h.windows = slices.Clone(h.windows[max(0, len(h.windows)-h.most):])
	for i := range h.windows {
		h.windows[i].Sets = most(slices.Clone(h.windows[i].Sets), h.sets)
	}
}

func (h *history) clear() { h.windows = nil }

// bytes returns the memory of what is kept.
func (h *history) bytes() int64 {
	n := int64(cap(h.windows)) * windowBytes
	for i := range h.windows {
		n += int64(cap(h.windows[i].Sets)) * usedBytes
	}
	return n
}

// add keeps the present window of a collector.
func (h *history) add(c *Collector) {
	if h.most == 0 {
		return
	}
	var used []Used
	for i := range c.table.entries {
		if c.totals == (sums{}) {
			break
		}
		e := &c.table.entries[i]
		if all := e.current.accesses() + e.current.runs; e.window == c.window && all > 0 {
			used = append(used, Used{e.set, e.current.reads, e.current.writes, e.current.runs, e.current.bytes / all})
		}
	}
	w := Window{
		Start: c.begun, Length: c.p.Window,
		Reads: c.totals.reads, Writes: c.totals.writes, Runs: c.totals.runs,
		Sets: most(used, h.sets),
	}
	if len(h.windows) == h.most {
		copy(h.windows, h.windows[1:])
		h.windows[len(h.windows)-1] = w
		return
	}
	h.windows = append(h.windows, w)
}

// most returns the n most used sets in the order of their numbers, in memory of their own.
// Accesses in runs count least: no policy moves a set for them.
func most(used []Used, n int) []Used {
	if len(used) > n {
		worth := func(u *Used) float32 { return u.Reads + u.Writes + u.Runs/16 }
		slices.SortFunc(used, func(a, b Used) int {
			return cmp.Or(cmp.Compare(worth(&b), worth(&a)), cmp.Compare(a.Set, b.Set))
		})
		used = used[:n]
	}
	used = slices.Clip(slices.Clone(used))
	slices.SortFunc(used, func(a, b Used) int { return cmp.Compare(a.Set, b.Set) })
	return used
}
