// Package oplog is the operation log: the records of acknowledged changes of
// one pool. It has two sides that share nothing but [Record].
//
// # Memory side
//
// A [Log] lives in a section of a region, memory that outlives the process. A
// write is acknowledged once its payload is in extents of the log's arena and
// its record is published; no device is touched. It holds no Go pointers.
//
//	header A | ring A | arena of 4 KiB extents | ring B | header B
//
// The ring of 64-byte records is kept twice, and so are the header and the
// two positions in its page. Record n lives in slot n mod slots of each ring.
// Positions, all rising:
//
//	start <= tail <= stored head <= head <= tail + slots
//
//	records up to tail         committed on the devices; extents reusable
//	tail < records <= head     published; payload and record never change
//	records after head         do not exist
//
// What holds at every instruction, so that the process may be killed there:
//
//   - Record n is whole in at least one ring for every n with
//     tail < n <= head. A record is stored in ring A, then in ring B, and only
//     then the next one: nothing after the head is whole, and a whole record
//     after a bad one is damage.
//   - The sequence is the last word of a record that is stored. Until then the
//     slot carries a sequence that does not belong into it.
//   - At least one of the two copies of each position and of the header is
//     whole. The stored head is moved after the records, before Publish
//     returns. Therefore head < stored head at Attach means that the end of
//     the log was lost, which no checksum of records could tell.
//   - An extent is free only if no record after the stored tail names it:
//     Release stores the tail first and frees extents afterwards. Which
//     extents are free is not stored; Attach computes it from the records.
//
// # Tagged changes
//
// The records of one change of a client that sends requests again have a record before them
// that names its submission (KindTag) and how many they are. All are published at once, and
// the stored head moves after the last. So a log that ends within a change was left by a guest
// that died over it, and nobody has seen any of it: Attach ends the log before the tag and
// erases the rest, from the end, for a whole record there would count as published once others
// lie before it. A change is therefore in the log with its tag, or neither is, whatever its
// length. An alternative is a mark on the last record of each change; then records of all
// changes would have to be read to know what an unmarked one belongs to. Changes without a tag
// cost nothing. What becomes of tags when they are released is for package session.
//
// Checksums start from a random identity of the log, so that bytes which
// another log left in the same memory are never taken for records.
//
// The memory of a killed process is exact: it holds all stores up to an
// instruction and none later. That is why no fences or cache flushes are
// needed; a host that loses power loses the region altogether, and then the
// disk side counts.
//
// A [View] looks at the same memory and stores nothing: at the log of a guest
// that is working, and at what a dead one left, damage included.
//
// An alternative is to keep checksums in the records only and to find the end
// of the log by the first bad one. It was rejected because a flipped bit in
// the last record would silently forget an acknowledged write.
//
// # Disk side
//
// A [Disk] makes a published prefix survive a power cut: [Disk.Append] writes
// it to a reserved circular area of a device with large sequential writes and
// one flush. Everything in the area is a chain of batches:
//
//	nonce     the same in all batches of a chain, never used by two chains
//	batch     number, rising by one
//	chain     checksum of the batch before, so that order cannot be faked
//	durable   the last batch that was known flushed when this one was written
//
//	committed <= position of the oldest kept batch <= flushed <= published
//	used blocks <= area blocks
//
// [Scan] starts from a [DiskPos] that the pool's last commit record holds and
// yields the longest chain of whole batches: a prefix of the log that contains
// every record for which an Append had returned nil. A batch that is not whole
// ends the scan: a power cut tears what was not flushed. If a later batch says
// that the torn one had been flushed, the device lost it, and Scan says so
// instead of silently forgetting acknowledged flushes.
//
// # Locks
//
// The arena's lock and the Disk's lock are leaves: nothing is called while
// one of them is held, and no I/O is done under them.
package oplog
