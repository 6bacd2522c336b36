// Package pool assembles the layers below it into one pool: it opens or
// recovers it, runs its consistency points and folds, manages its volumes and
// checks it.
//
// One goroutine, [Pool.Run], owns the cp.Machine. Whatever must not run
// beside a consistency point (changes of the catalogue, checks, adding a
// device) is a job that is handed to it. Requests of clients never wait for a
// job, except for room in the log.
//
// # Cleaner
//
// The cleaner makes whole free tracks of tracks that are mostly free, so that
// what is written together can lie together. Scattered overwrites free blocks
// here and there; without it the allocator hands out ever shorter pieces.
//
// A block is moved by writing it again, on the way of any write: it is read and
// verified, put into the log, published, and the next consistency point stores
// it at another place. The only difference to a client's write is a condition
// that dirty.Set.Move checks as it publishes: nobody has written or trimmed the
// block since it was read, and no consistency point came between. So a move
// needs no format and no recovery of its own, its record may be lost or kept by
// a crash like any other, and one that loses a race has not happened.
//
// Nothing says which volume refers to a block. A pass therefore chooses many
// tracks, keeps allocations out of them, and walks all maps once in logical
// order: it moves the blocks that lie in one of the tracks. A fold before the
// pass brings into the trees what is only in overlays, one after it gives up
// the old places.
//
// Pages of maps lie among the data. A leaf in one of the tracks is moved by
// moving one of the blocks that it maps, because the fold then writes the leaf
// anew. The pages above leaves, the counts and the catalogue are few, and
// change with folds anyway; a track with one of these stays as it is until then.
//
// The cleaner is a machine without a goroutine: Pool.Run calls its steps, each
// of at most scanLeaves pages or moveBlocks blocks, between consistency points.
// It yields to clients: it works at a bounded rate, past the cache, and only
// while the log is less than a quarter full and nobody waits for room. It begins
// a pass only when whole free tracks are few and the pass pays for what it
// reads, and after one that gained nothing it waits until somebody has written.
//
// # Scrub
//
// A scrub reads all that is in use from every copy and proves it by the checksum
// in its pointer. What no pointer names, labels and superblock, it decodes. It
// writes nothing but through devices.Set.Repair, which makes bad copies like one
// that is proved while nobody else writes to that track.
//
// Its steps are made by Pool.Run, as those of the cleaner are, of at most 4 MiB of
// data. Between two steps of all else that Run does nothing is freed, and so no
// place used again: what a tree refers to is there until the fold that gives it
// up. A fold before the walk brings into the trees what is only in overlays.
//
// A step takes a window of the leaves of a tree, and of the pages above them those
// whose first leaf is in it. Each page is in one window, whatever folds do to the
// tree in between, so the place is two numbers, which a record on the device keeps
// for the next owner. The record is advice and never synced.
//
// # Survey
//
// Counts tell how often blocks are referred to and not by whom. A survey walks the maps for
// that, see survey.go.
//
// # Flash
//
// The layer of package flashmap lies over all disks of a pool that has a flash device, from
// when it is opened, or the device is added: then devices.Set exchanges each disk for one with
// the layer, and waits until nobody uses the old one, before anything moves. All else sees
// devices as before, some ranges of which space.Space knows to be cheap.
//
// The flash device has a root in the superblock, and there only blocks that never hold data:
// nothing is allocated from it, and counts, checks and scrubs find nothing to do. It leaves
// like other devices, but instead of blocks data sets are moved, back to the disks, and once
// nothing is on it the layer is taken off them.
//
// The machine, a part of Pool.Run like the cleaner, counts what recorders have noted, asks the
// policy's engine for moves each interval, and makes one at a time, a piece a step, when
// clients want nothing of the disk (policy.Pace). What waits is decided anew each time. It does
// not stop where clients need room in the log, as cleaner and scrub do: on a pool that is
// always busy nothing would ever come to flash.
//
//	what people have said, pins    a note on the flash device, written before it counts
//	what was collected, wear       a section of the region, every few seconds, and a note
//	                               there every five minutes, for who loses the region
//	where data sets are            the layer's table
//
// Pins are of volumes, whose blocks are elsewhere with each write. So a walk through their maps
// finds the data sets again and again; rewrites of what is on flash stay there by themselves.
//
// # Repair
//
// A repair belongs to a [View], a pool that nobody serves: nothing changes while it
// counts, and it needs neither ownership nor a log. It finds references by the walks of
// a check, has space.Space count them, and hands that to cp.Machine.Rebuild. What is
// only in overlays stays there.
//
// # Sessions
//
// Clients that send requests again when their guest has died have sessions, in a section of the
// region that there is from the first one on (sessions.go, package session). Open adopts it
// before it restores the dirty index, which tells it of the tags in the log. A region whose
// header has no room for the section, or whose memory has none, refuses the session and nothing
// else.
//
// # Removal of a device
//
// A device leaves in these steps, of which only the superblocks must be durable in
// this order. Whoever opens the pool goes on by the state that it finds.
//
//	leaving   a superblock says so; nothing is allocated from the device, and room
//	          for what it has in use is kept on the others
//	fold      after it all that refers to the device is in the trees
//	move      blocks that lie on it, and leaves of maps, as the cleaner does
//	folds     give up the old places, and rewrite all other pages that lie there:
//	          those above leaves, of counts and of the catalogue. The next fold counts
//	          what the last one has freed
//	gone      when nothing refers to it: a superblock, and the next one, so that both
//	          slots say so
//	erase     its label
//
// What is left after the folds is moved by another pass. A block with several
// references is moved once for each. They share again what is a series that is long
// enough, and, if the block leaves low-latency memory, each single one. A device that is gone keeps its number, because pointers have numbers in
// them; it is a gap in devices.Set and space.Space. While a superblock is written that
// says leaving, used or gone no fold may be under way, which would write the states as
// they were when it began.
//
// Invariants:
//
//	a device is leaving, which may not be durable yet  =>  nothing is allocated from it
//	a superblock says gone   =>  no count of the device is above 0, and neither the
//	                             last fold's pages nor overlays refer to it
//	the label is erased      =>  both slots say gone
package pool
