// Package table keeps large tables of numbers outside the Go heap, where the
// garbage collector need not look at them: which block of the log is the newest
// version of which block of a volume, what the map has for it, which pages of
// a tree have to be rewritten.
//
// # Theory
//
// A [Table] is an extendible hash table. A directory leads from the upper bits
// of a key's hash to a segment of 1024 slots, in which the lower bits are the
// place where probing, slot by slot, starts. A segment that is five eighths
// full is split in two by one more bit of the hash, and the directory doubles
// when it does not tell them apart yet. So a table grows by steps: an insertion
// moves at most 640 entries, some microseconds, whatever the size. That matters
// because insertions are made under locks that all requests of a pool take. A
// table that doubles would move everything at once; one that moves it piece by
// piece would have to look in two places meanwhile.
//
// Only key>>3 is hashed, the rest counts slots: eight neighbours are on one
// line of the processor's cache. Keys and values lie apart, so that a search
// that finds nothing, which most are, passes over eight keys a line.
//
// Nothing comes out in the order of keys but through a [Sorter], which gathers
// and sorts them by radix in memory that it keeps.
//
// # Invariants
//
// For each segment, with key 0 stored as 1 and so on, and 0 for an empty slot:
//
//   - no empty slot lies between the home of an entry and the entry;
//   - at most fill of its slots are used;
//   - of the 1<<depth places in the directory, exactly those lead to it that
//     agree with it in its own, upper bits.
//
// Tables are not safe for concurrent use. Whoever reads one must hold what it
// belongs to (a lock of it will do): memory of a table that nothing refers to
// any more goes back by itself, like that of a freed one at once.
package table
