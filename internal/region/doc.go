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
//   - The memory of header, words and log is allocated at creation, that of
//     another section before it is named. Touching it cannot fail later
//     for lack of memory (SIGBUS); Open refuses a file that does not have all of
//     the log, and MapSection gives another section again what it lacks.
//   - Header, words and log keep their places, and are all that is mapped by
//     who opens a region read-only. Advisory sections come and go, see
//     AddSection: what is wrong with them is no reason to refuse a region.
//   - word epoch >= header epoch. SetOwner stores the word first, so that the
//     former owner sees it as early as possible.
//   - Sections lie within the file, after the words, and do not overlap.
//
// A Region's methods may be called concurrently, except Close and Remove,
// after which no memory of the region may be touched. One lock guards the
// cached header and the rewriting of the stored one, and is a leaf; changes of
// the sections have another one, which is not held while the host finds memory.
package region
