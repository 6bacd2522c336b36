// Package estimate tells beforehand what deduplication would save, and how it would
// scatter what is read in sequence: it lets the policy of package dedup decide about
// blocks that nobody stores.
//
// A [Stream] is what volumes receive, a fingerprint for each block that is not zero,
// cut into consistency points. [Stream.Simulate] plays a [Policy] on it: blocks that
// are not shared go one behind the other to tracks of a pool without end, and become
// targets for what is received after them. The [Layout] that results says what is
// stored, and with [Layout.Read] how a volume is read back.
//
// [Scan] makes the stream of files and devices. As long as fingerprints of all blocks
// fit its memory the result is exact; beyond that it follows only contents that it draws
// by their fingerprints ([Sample]), all occurrences of each with what is around them.
//
// # Where a simulation differs from a pool
//
// Nothing is overwritten or freed, there is one device, and a point of 64 MiB has blocks
// of one volume only. Blocks of zeroes become holes and do not part what lies on both
// sides of them: it is neighbouring on the device and read without a seek.
package estimate
