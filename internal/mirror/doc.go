// Package mirror keeps two or three copies of the same blocks: an
// [hpdi.Device] made of others, for whatever a pool keeps only once.
//
// # Theory
//
// A write goes to all copies that are there, a read to one. Two things can make
// copies differ: a copy that missed writes, and writes that were under way when
// the guest or the host died. Both are known by region. Before the first write
// into a region its bit in a map that lies on every copy is made durable; it is
// cleared when all copies are there, the region has had no write for a while,
// and what was written is durable on each. So after a crash the map names the
// regions in which copies may differ, and while a copy is absent it names what
// that copy misses.
//
// Each copy carries a header that tells the state of all. It changes when a
// copy is lost or whole again, and is durable on the others before a write is
// acknowledged that the lost one does not have: the header of the highest
// generation knows who can be believed. When it is out of reach only a memory
// outside of the copies can tell that there is one ([Options.Known]).
//
//	InSync       has everything, but for regions that are old
//	Resilvering  the same, and is no source for regions that are old
//	Absent       not there, or left out because a write failed
//
// A region is old when its bit was set at the time at which the mirror was
// opened or a copy came back. Until [Mirror.Resync] has visited it, it is read
// from one InSync copy only, and what was read is written to the others before
// anybody sees it: a decision that was made by what a log holds must not depend
// on the copy that survives next. A region that is not old reads alike from all
// copies. That makes one mechanism of the four cases, crash, return, replacement
// and interrupted resilvering: the map is the record of what is left to do, and
// the work shrinks it.
//
// A guest that died while it wrote the map has left a mark on one copy alone, or
// where a power cut takes it. So its successor, for which the mark makes the region
// old, stores the map anew before its first write: should that copy be lost then, the
// others have to say what it lacks.
//
// Where whoever reads verifies what it reads ([Mirror.Verified]; of a pool
// everything), copies in sync are not made equal after a crash. One of them may
// have decayed, or have lost what it took, and only the reader can tell which: it
// asks for what a pointer names with ReadGood, and looks for the newest of what
// no pointer names on each copy ([Mirror.ReadCopy]) and makes the others like it
// ([Mirror.Settle]). There, too, a copy is filled with what is in use only
// ([Mirror.Unused]): what is written later goes to all copies.
//
// # Which copy is good
//
// A copy that returns an error is read around and written again. A copy that
// returns wrong bytes cannot be told from here: whoever knows the checksum asks
// with [Mirror.ReadGood], which repairs the bad copies by the good one, unless
// the block has been written since.
//
// # Invariants
//
//	the map on each InSync or Resilvering copy names at least the regions
//	that are written to, that are old, or that an Absent copy lacks
//	a write is acknowledged  =>  all copies that the durable header does not
//	call Absent have it
//	there is an InSync copy
//
// # Locks
//
// mark guards headers and the map on the copies, and is held while they are
// written. A write holds its stripes shared from submission to completion, a
// copying of one track holds one stripe alone. Who waits for a stripe alone
// holds none, and who has one waits only for devices, so nobody waits in a
// circle. mark is taken with stripes held, never the reverse.
//
// A queue's mu is held by whoever uses it, and otherwise only tried.
//
// The package starts no goroutines: its owner calls Resync and Tidy.
package mirror
