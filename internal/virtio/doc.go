// Package virtio holds virtqueues as VIRTIO 1.2 lays them out (section 2.7 for split
// ones, 2.8 for packed ones) and the bytes of a virtio-blk device (section 5.2): both
// sides of a queue over memory that somebody else has mapped, without system calls. How
// the other side is notified, and where the memory comes from, is for the callers.
//
// # The other side is a stranger
//
// It may write to the shared memory at any time, whatever the specification says. So
// each side reads a word once, copies it to memory of its own, checks it there, and uses
// only the copy. Nothing that a side must know later is kept in the shared memory alone.
// What breaks a rule is an error that wraps [ErrBroken] and names the queue's rule and
// the numbers that broke it; the queue is not used any more after one.
//
// # Words and their order
//
// All indices, flags and events lie so that each pair of 16-bit fields is one aligned
// word of 32 bits with one writer: flags and index of a split ring, id and flags of a
// packed descriptor, offset and flags of a packed event structure. They are loaded and
// stored with sync/atomic, which orders everything before a store for whoever loads it,
// and a store before a load that follows. The two events of a split ring have their word
// alone with padding. A ring must therefore be aligned to 4 bytes in all of its parts,
// which is more than the specification demands of the available ring, and what all
// known drivers do. Bytes are little-endian, as the machines are that this runs on.
package virtio
