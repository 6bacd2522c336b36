package main

import (
	"container/list"
	"slices"
)

// counts are the accesses outside of runs to each data set in a window.
type counts map[int]int

// best returns how many of a window's accesses the n most used sets have, and how many there
// are: what an oracle with room for so many hits.
func (c counts) best(n int) (hits, all int) {
	var each []int
	for _, k := range c {
		each = append(each, k)
		all += k
	}
	slices.Sort(each)
	for _, k := range each[max(0, len(each)-n):] {
		hits += k
	}
	return hits, all
}

// roomFor returns with how many sets an oracle hits such a share of the accesses of all the
// windows.
func roomFor(share float64, windows []counts) int {
	most := 0
	for _, c := range windows {
		most = max(most, len(c))
	}
	lo, hi := 0, most
	for lo < hi {
		mid := (lo + hi) / 2
		hits, all := 0, 0
		for _, c := range windows {
			h, a := c.best(mid)
			hits, all = hits+h, all+a
		}
		if float64(hits) >= share*float64(all) {
			hi = mid
		} else {
			lo = mid + 1
		}
	}
	return lo
}

// lru is a cache of data sets that keeps those that were used last.
type lru struct {
	room  int
	order *list.List // of set numbers, the newest in front
	at    map[int]*list.Element
	taken int // sets that were fetched
}

func newLRU(room int) *lru { return &lru{room: room, order: list.New(), at: map[int]*list.Element{}} }

// use reports whether a set is in the cache, and puts it there if not.
func (l *lru) use(set int) bool {
	if e, ok := l.at[set]; ok {
		l.order.MoveToFront(e)
		return true
	}
	if l.order.Len() == l.room {
		delete(l.at, l.order.Remove(l.order.Back()).(int))
	}
	l.at[set] = l.order.PushFront(set)
	l.taken++
	return false
}
