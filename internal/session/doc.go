// Package session is what a pool knows of clients that send requests again after their
// server has died: of each slot of each client, the last submission whose change is in the
// operation log.
//
// A client of this kind numbers its requests by queue, slot and a counter, and keeps a
// record of those in flight that its server does not take along when it dies. The next
// server finds them there. It must not run one again whose change was logged: the client may
// have been told so, and have written to the same blocks since, which the old change would
// undo. So the log tells: a change is published with a tag, atomically (package oplog), and
// the tag is kept here until the slot's next one.
//
// # The table
//
// A [Table] lives in a section of the pool's region, memory that outlives the process, and
// holds no Go pointers:
//
//	header | entries, one a session | cells of 16 bytes, one a slot
//
// What holds at every instruction, so that the process may be killed there:
//
//   - A cell is stored after its tag is published and before anything else is: so each
//     tag of the log but the last one is in its cell, and the last one is not released.
//     Who opens the pool next replays the log into the table, see [Table.Restore]. After
//     that the cells say what log and devices have.
//   - An entry is whole when it has an id, which is stored last, and removed by taking the
//     id away. Its cells are zero before it has one.
//   - A tag that was published before its session was made, by an earlier one of the same id,
//     means nothing: an entry has the position of the log where its session began.
//
// The table is trusted as little as other memory that somebody may have damaged. A cell has a
// check, and one that does not hold is an error for who asks: it may neither be taken for
// done, which would lose a change, nor for not done, which could undo one. The request ends
// with an error, as it would on a disk that does not know. An entry that is damaged is
// dropped, and its client finds a fresh session ([block.Session]).
//
// The alternative was to keep tags in the log alone, and to bring them here when it is
// released. It is more to do, at the moment when writers wait for room, and the store that it
// saves a write costs a few nanoseconds.
//
// Sessions survive what the region survives: restart and takeover, giveback, an upgrade. They
// are gone with it when the pool is closed in good order, exported, or deleted, before which
// its clients are ended, and after a power cut, which ends all clients of the host as well.
// The flush log on the devices therefore knows no tags. A region with a battery keeps them.
//
// # Limits
//
// A table of [Size] bytes has at most [MaxSessions] sessions, and slots for as many of 128
// slots in 4 queues. The clients of one volume have a quarter of both, not more: who reaches
// one volume cannot take what the others need to be served exactly once.
//
// When room is short, sessions that nobody has open are forgotten, those of the same volume
// first, and the one that was left first before others. Those of a guest that died, of whose
// clients nobody has heard yet, are awaited: for another volume none of them is forgotten
// within an hour. Else a new client could take the room of those that are about to come back
// after a takeover. One that is open is never forgotten: then there is no room.
//
// # Locks
//
// Table.mu guards everything. [Table.Begin] takes it and [Table.End] gives it back: between
// them the change is published, so that no session ends meanwhile and leaves its cells to
// another one. Below it are the log's stores and the lock of the allocator, from which space
// for the change is reserved in between: the allocator knows nothing of sessions. All writers
// of the pool wait for it, so that nothing long is done under it: what a session's cells have
// had before is cleared, and a check reads them, with changes between.
//
// Table.making is above it. It lets sessions be made one at a time, and holds the memory.
package session
