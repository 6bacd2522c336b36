// Package collect counts how a primary device is used: how often each of its data sets,
// extents of one size that are numbered from 0, is read and written. It does no I/O and
// has no goroutines. What follows from the counts is decided by package policy.
//
// # The way of an access
//
//	owner of a queue          background
//	Recorder.Record  ──ring──►  Collector.Tick ──► runs ──► table ──► Snapshot
//	                                                          └─ at a window's end ──► History
//
// Each owner of a queue has a [Recorder], which it alone calls. Record puts the access into
// a ring and takes no lock; nothing of it is shared with other recorders. [Collector.Tick]
// empties all rings in the order of time. Of more than 2,000 accesses a second only some are
// taken, at random, each of which counts for several: so the processor's time that counting
// takes has a bound, and what is used much is known as well. Where ticks are late and a ring
// is more than half full, only one in eight of those is taken; what finds the ring full is
// lost, and [Status] tells how many were.
//
// # Runs
//
// A disk reads in sequence about as fast as flash does, and who reads everything once makes
// nothing worth moving. So accesses that continue each other are a run, whichever data sets
// and recorders they go through, and once a run has transferred Params.Run bytes all of its
// accesses are counted apart, from its first on: until then they are held back. A run may
// leave gaps and come a little out of order, as sampling, queues and clients with many
// requests make it, as long as at least a quarter of what it passes is transferred. Random
// accesses within a MiB of where a run is just then are taken for part of it. Up to 32
// runs and 64 beginnings are followed at a time.
//
// # Windows
//
// Counts are means over windows of time. When a window ends,
//
//	past = past·decay + current·(1-decay)
//
// and within one, of which the share f has passed, a count is told as
// past·decay^f + current/f·(1-decay^f), which agrees with both ends. So a steady load has
// steady counts, at all times. The first windows are told without the empty ones before
// them.
//
// # What is lost
//
// The table has room for a number of sets that follows from Params.Memory alone, 72 bytes a
// set, whatever the size of the device. A set that is new to a full table takes the place of
// the least used of sixteen, and is less likely to be thrown out again by as much as that one
// had been used (as space-saving does: Metwally and others, Efficient computation of frequent
// and top-k elements in data streams, 2005). Its own counts begin at 0, so that a count is
// never too high; it is too low by what was forgotten, which for a set that is used more
// than its share of the table is little.
//
// Who locks what: mu of the collector guards all but the rings, of which the recorder's
// owner writes the head and Tick, under mu, the tail.
package collect
