// Package dedup decides which blocks that a consistency point is about to write
// are stored already and shall be shared instead: it holds the policy, the index
// of fingerprints and no data.
//
// # Theory
//
// Sharing every duplicate block scatters what was written together over the
// whole pool, and a sequential read becomes a seek for each block. So a volume
// shares only what it can read back with few seeks: a series of at least THN
// received blocks, onto a sequence of as many consecutive blocks of one track
// that hold the same (US patent 8,346,730; Srinivasan et al., iDedup, FAST'12). A
// seek is then paid back over THN blocks or more.
//
//	received   a b c d e f g h i j k
//	stored     ....a b c d e....   ....g h i j k...
//	shared         |-------|  write f  |-------|     THN 4
//
// A [Matcher] finds them. It looks each received block up in an [Index], follows
// all sequences that are found at the same time, forwards and, because the index
// may hold only a part of the blocks, backwards too, by the fingerprints that are
// kept for whole tracks. Of what it found it takes the choice that shares most; Space
// then gives up what would make a reader jump too often within a few blocks.
//
// What is shorter is written again. Where a pool has low-latency memory, single blocks
// of which there are several copies move there (US patents 7,908,436 and 8,145,843); see
// package cp, which alone knows devices.
//
// A fingerprint says that two blocks are probably equal. Nothing is shared because
// of it: who uses a Matcher compares the bytes.
//
// # The index
//
// An [Index] is a flat array without pointers: advisory, bounded, of eight bytes an
// entry. Losing it, or any part of it, costs savings and never data. It has every
// block until it is full of what is true; from then on one block in two of a track, in
// four, and so on: a sequence of stored blocks that is as long still has one that is
// found, from which tracks' fingerprints lead to the rest.
//
// It can lie in memory that outlives its guest, see [Memory], with a small state of two
// copies at its beginning (docs/format/index.md). Who adopts it believes the state as far as
// it is possible, and no entry at all: what an entry leads to is looked up and compared as
// always.
package dedup
