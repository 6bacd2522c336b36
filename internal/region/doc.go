// Package region is the memory that outlives a guest: a file on a memory file
// system, one for each pool, that the owning guest maps read-write and its
// partner maps read-only until it has fenced the owner. The operation log of
// the pool lives in it.
//
//	header A | header B | words | room | section | section ...
//
// The header says what the file is, whose, and where the sections are. It is
// kept twice, checksummed, and rewritten as a whole, one copy after the other:
// a process that is killed meanwhile leaves at least one whole copy.
//
// Words are 8-byte values that are stored alone and often: heartbeat, epoch,
// state, announcement and the last committed position. They have no checksum,
// are read and stored atomically, and nothing that must not be lost depends on
// one of them: the pool's superblocks and the log's own positions do that.
//
// What holds:
//
//   - A file that has a region's name is a whole region: it gets its name
//     after everything is in place.
//   - All its memory is allocated at creation. Touching it cannot fail later
//     for lack of memory (SIGBUS); Open refuses a file that is shorter than
//     its header says or that has holes.
//   - word epoch >= header epoch. SetOwner stores the word first, so that the
//     former owner sees it as early as possible.
//   - Sections lie within the file, after the words, and do not overlap.
//
// A Region's methods may be called concurrently, except Close and Remove,
// after which no memory of the region may be touched. Its lock guards the
// cached header and the rewriting of the stored one, and is a leaf.
package region
