package block

import "slices"

// Range is a range of logical blocks: [Start, End).
type Range struct {
	Start, End Logical
}

// Ranges is a set of blocks as ascending, disjoint ranges that do not touch.
type Ranges []Range

// Add returns the set with r added, joining what touches. It may change s.
func (s Ranges) Add(r Range) Ranges {
	if r.Start >= r.End {
		return s
	}
	i, _ := slices.BinarySearchFunc(s, r.Start, func(x Range, start Logical) int {
		if x.End < start {
			return -1
		}
		return 1
	})
	j := i
	for j < len(s) && s[j].Start <= r.End {
		r.Start = min(r.Start, s[j].Start)
		r.End = max(r.End, s[j].End)
		j++
	}
	return slices.Replace(s, i, j, r)
}

// Contains reports whether lba is in the set.
func (s Ranges) Contains(lba Logical) bool {
	i := s.after(lba)
	return i < len(s) && s[i].Start <= lba
}

// Within returns the parts of the set that are in [start, end).
func (s Ranges) Within(start, end Logical) Ranges {
	var in Ranges
	for i := s.after(start); i < len(s) && s[i].Start < end; i++ {
		in = append(in, Range{max(s[i].Start, start), min(s[i].End, end)})
	}
	return in
}

// Intersects reports whether any block of [start, end) is in the set.
func (s Ranges) Intersects(start, end Logical) bool {
	i := s.after(start)
	return start < end && i < len(s) && s[i].Start < end
}

// after returns the index of the first range that ends after lba.
func (s Ranges) after(lba Logical) int {
	i, _ := slices.BinarySearchFunc(s, lba, func(x Range, l Logical) int {
		if x.End <= l {
			return -1
		}
		return 1
	})
	return i
}
