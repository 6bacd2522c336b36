// Package cp makes consistency points: the moments at which everything up to a
// position of the operation log is on the devices, atomically. It is the only
// writer of the metadata journal, of the metadata trees and of superblocks.
//
// # Commit
//
// [Machine.Commit] takes one consistency point through its steps:
//
//	freeze    the dirty index; its log position is the point's
//	share     what is stored already, where volumes do that
//	write     the other data to free blocks, in logical order, zeroes as holes
//	sync      all devices
//	journal   one record: mappings, changes of the catalogue, log position
//	sync      the journal's device; from here on the point exists
//	install   mappings into the map's overlay, drop the frozen generation
//
// But for sharing it reads nothing: what the new mappings replace in the trees is found
// by the fold. A point whose writes failed has changed nothing; its generation stays
// frozen and readable in memory, and Commit can be tried again, onto other
// blocks.
//
// # Sharing
//
// Before a point allocates anything it looks which of its blocks are stored already, or
// are written by it twice: see internal/dedup for what is shared. A match is compared
// byte for byte, with what the cache has of it or else with one sequential read, and one
// of each copy that a device keeps; then the blocks get their references, so that nothing
// can free them any more, and are mapped like others. A block whose count is at its limit is not shared: another copy
// is written, and is the one that is shared from then on. A point that fails gives the
// references back and looks again when it is tried again.
//
// The fingerprints of blocks that were written lie in memory and in the journal until a
// fold brings them into trees of their own, see prints.go.
//
// # Flash
//
// Where a layer below keeps ranges of devices on flash, the new places of blocks whose old
// ones lie in such ranges are to lie there, too, see hot.go.
//
// # Fold
//
// The journal is finite and the overlay lies in memory, so [Machine.Fold]
// merges them into the trees now and then, in small steps between which
// consistency points go on:
//
//	begin     the active overlay becomes the folding one; the journal position
//	          after the last point is where replay will start
//	sort      its mappings by volume and block
//	volumes   rewrite changed leaves and their parents, copy-on-write
//	prints    bring the fingerprints of new blocks into theirs
//	counts    apply the changes of references to the trees of counts
//	catalogue rewrite the list of volumes with the new roots
//	journal   a record of the metadata pages that the fold took and freed
//	sync
//	superblock, in two copies, into the slot of its generation; sync
//	install   new roots; only now are replaced blocks and pages free
//	free      them
//
// A step is bounded, and consistency points that are due go first: it sorts
// some 100,000 numbers (a millisecond), rewrites one page above leaves with
// those of its 256 leaves that changed, which at worst reads as many pages from
// a device and writes 1 MiB, or frees 4096 runs of blocks. Only the list of
// volumes, and forgetting the folded overlay, are done at once.
//
// What waits for folds is bounded, for a takeover replays it: see
// [Machine.MostUnfolded]. Commit refuses a point that would exceed it; before that
// its caller lets the fold get on first, see [Machine.FoldFirst].
//
// The pages that a fold itself takes and frees are not in the counts that it
// writes, which would be a circle: its journal record carries them, and the
// next fold counts them. The record belongs to the superblock that follows it:
// replay heeds it only when that superblock is the one it started from.
//
// [Machine.Rebuild] replaces all trees of counts, for a repair, without a fold.
//
// # Recovery
//
//	newest valid superblock → journal records after its position, in a chain →
//	operation log after the last record's position
//
// A new owner writes its epoch into a superblock and syncs before it writes
// anything else, but not before it serves: see [Machine.Claim].
//
// Invariants:
//
//	fold's point <= last committed point
//	what a new owner claims is durable before anything else is written
//	count of a block = entries of trees and overlays that point at it
//	a block in use has the fingerprint of what it holds, or none; also before it is
//	         written
//	a block is reused only when the commit that freed it is durable
//	unfolded mappings <= MostUnfolded, but for a single larger point, and while
//	         folds fail
//	journal: tail <= head <= tail + size; a record never overwrites one that
//	         replay from the newest superblock needs
package cp
