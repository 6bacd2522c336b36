//go:build planted

package planted

// The classes say what a fault endangers.
const (
	durability = "durability" // what was acknowledged or flushed is lost
	recovery   = "recovery"   // what a takeover or restart finds is not what was left
	order      = "order"      // a reader sees something older than it must
	integrity  = "integrity"  // wrong bytes pass for right ones
	accounting = "accounting" // space, counts or permits are lost or given out twice
	ownership  = "ownership"  // two guests act on one pool
)

var table = []Info{
	{string(DataSyncMissing), "no sync between data and the record that maps it: the oldest bug of write-ahead logs", "internal/cp: Machine.write", durability},
	{string(ReleaseBeforeCommit), "the log is released when a consistency point begins, not when it is durable", "internal/cp: Machine.write", durability},
	{string(IgnoredWriteError), "a failed data write of a consistency point is ignored and the log released: OpenZFS 18366", "internal/cp: Machine.write", durability},
	{string(TrimNotCommitted), "ranges that became holes are missing from the consistency point: trimmed data comes back", "internal/cp: Machine.collect", durability},
	{string(ReplayStartsLate), "the record carries the log's head of when it is written, not of the freeze: what came between is taken for committed", "internal/cp: Machine.record", durability},
	{string(FlushPositionKept), "records go on naming the place where the flush log's chain began, which is overwritten later", "internal/cp: Machine.record", durability},
	{string(DeletedResurrected), "deletions are not in the record: a deleted volume is back after a takeover", "internal/cp: Machine.record", recovery},
	{string(RecordSyncMissing), "no sync after the journal record: a commit is announced that a power cut undoes", "internal/cp: journal.append", durability},
	{string(JournalChainUnchecked), "replay takes any whole record at the next place, also one of the lap before: a log without salt or sequence check", "internal/cp: window.next", recovery},
	{string(JournalTailEarly), "a fold says that replay starts after everything committed when it ends, not when it began", "internal/cp: fold.commit", durability},
	{string(ReuseBeforeCommit), "a fold writes new pages over old ones that the durable tree still needs", "internal/cp: pageWriter.allocate", durability},
	{string(FreedAtFoldBegin), "replaced pages are free at once, not with the fold, and the fold does not record them", "internal/cp: pageWriter.FreePage", accounting},
	{string(IgnoredPageWriteError), "failed writes of metadata pages are ignored; the cache hides it until a restart", "internal/cp: pageWriter.flush", durability},
	{string(HolesAfterRuns), "a point's holes are installed after its data: data written into a trimmed range die with it", "internal/cp: Machine.install", order},
	{string(FoldWithoutSuperblock), "replay believes the record of a fold whose superblock was never written", "internal/cp: Machine.replay", accounting},
	{string(ResizeNotCommitted), "replay skips changes of volumes that it knows already: a resize or new name is gone after a takeover", "internal/cp: Machine.replay", recovery},
	{string(CountsWithoutJournal), "recovery does not count the blocks that only the journal maps, so they are given out again", "internal/cp: Machine.LoadCounts", accounting},
	{string(SuperblockSyncMissing), "journal space and pages are reused before the superblock that frees them is durable", "internal/cp: WriteSuperblock", durability},
	{string(OlderSuperblockWins), "the first valid superblock is taken, not the newest", "internal/cp: ReadSuperblock", recovery},
	{string(FlushCoversLess), "a flush that waited for another counts as done with it, although that one had looked at the log before: the bug of group commits", "internal/cp: Flusher.try", durability},
	{string(FlushBeforeChain), "the flush log's chain begins when the pool is opened: flushes append to it before a durable commit names it", "internal/cp: NewFlusher", durability},
	{string(FlushNonceReused), "every chain of the flush log has the same nonce: batches of an earlier one pass for its own, as with a reused salt", "internal/cp: Flusher.positionLocked", recovery},
	{string(PublishBeforeRecord), "the position counts as published before the record is stored: a death in between looks like lost records", "internal/oplog: publish", recovery},
	{string(ReleaseNotRecorded), "a release is not stored in the region: recovery replays records whose extents are in use again", "internal/oplog: release", recovery},
	{string(TornRecordAccepted), "a record's checksum is not verified: a half-stored one is replayed", "internal/oplog: Record.decode", integrity},
	{string(TakeoverExtentsFree), "extents of adopted records count as free: new writes go over acknowledged ones", "internal/oplog: attach.walk", durability},
	{string(FlushPositionAhead), "the position in the flush log moves beyond flushed records that are not committed", "internal/oplog: Disk.Position", durability},
	{string(FlushWithoutSync), "a flush writes and does not sync", "internal/oplog: Disk.Append", durability},
	{string(ReplaySkipsFirst), "off by one: the first record after the last consistency point is not replayed", "internal/dirty: Set.Restore", durability},
	{string(ReplaySkipsLast), "off by one: the newest record is not replayed", "internal/dirty: Set.Restore", durability},
	{string(DirtyReadOrder), "the frozen generation answers before the active one: a read sees the older of two writes", "internal/dirty: Set.findLocked", order},
	{string(HoleOrder), "a large hole does not remove older entries of the index, which go on answering", "internal/dirty: Generation.insert", order},
	{string(PartialBlockRace), "a partial block keeps the rest that was read before a consistency point changed it: a lost update", "internal/dirty: Set.completeLocked", order},
	{string(MoveIgnoresRace), "the cleaner publishes what it read although a client has written the block since", "internal/dirty: Set.Move", order},
	{string(MoveStalePointer), "the cleaner reads a block from where it was when it was found, not from where it is when it is moved", "internal/pool: cleaner.current", order},
	{string(PublishBeforeChecksum), "the checksum of a partial block is that of before its rest was filled in", "internal/dirty: Set.completeLocked", integrity},
	{string(ReservationMissing), "writes are acknowledged without a promise of space: a full pool can not commit them", "internal/dirty: Set.reserveLocked", accounting},
	{string(ReservationLeak), "the reservation of a dropped generation stays: ENOSPC on a pool with room", "internal/dirty: Set.Drop", accounting},
	{string(PermitLeak), "blocks that were overwritten in the log do not give their permits back: writers wait for ever", "internal/dirty: Set.Drop", accounting},
	{string(PartialBlockZeroRest), "of a write within a block only what lies before it is kept, the rest reads as zero", "internal/volume: staged.fill", integrity},
	{string(TrimTakesEdges), "the end of a trim is rounded up: it takes bytes that were not asked for", "internal/volume: Volume.zero", integrity},
	{string(RelieveMissing), "ENOSPC although folds would free space", "internal/volume: staged.Commit", accounting},
	{string(OverlayOrder), "the overlay being folded answers before the active one", "internal/blockmap: Map.fromOverlays", order},
	{string(DoubleFree), "a block that was trimmed and then written again is freed for both", "internal/blockmap: VolumeFold.edit", accounting},
	{string(PendingWithoutBirth), "a pending trim kills whatever is in its range, also what was written after it", "internal/catalogue: Dead", order},
	{string(ReadErrorAsZeroes), "a failed read of a device returns zeroes and success", "internal/blockio: Reader.readChunk", integrity},
	{string(ChecksumUnverified), "what a device returns is not compared with its checksum", "internal/blockio: verify", integrity},
	{string(StaleCacheFrame), "a cached frame answers for any version of its physical block", "internal/cache: shard.hit", integrity},
	{string(SlopMissing), "writes may use the space that folds and deletes need: a full pool stays full", "internal/space: Space.Reserve", accounting},
	{string(SyncFirstDeviceOnly), "a sync covers only the first device of a pool", "internal/devices: Set.Sync", durability},
	{string(SingleHeaderCopy), "only one copy of a region's header is kept up to date", "internal/region: Region.storeHeader", recovery},
	{string(RegionReplaced), "a takeover makes a new log in the region instead of adopting the one that is there", "internal/pool: opener.attachLog", durability},
	{string(EpochNotRaised), "a takeover goes on in the epoch of the guest before", "internal/pool: opener.takeOwnership", ownership},
	{string(EpochUnchecked), "a guest does not look whether it still owns the pool", "internal/pool: Pool.owned", ownership},
	{string(TakeoverBeforeFence), "the referee grants when it orders the kill, not when the guest is reaped", "internal/partner: Referee.wantFence", ownership},
	{string(HelloIgnored), "a new agent grants before all living guests have told it what they hold", "internal/partner: Referee.grantable", ownership},
	{string(GiveBackBeforeRelease), "a guest reports the release when it begins it", "internal/partner: Machine.startRelease", ownership},
	{string(StaleTermAccepted), "what a guest says about an earlier grant is taken for the present one", "internal/partner: Referee.fromGuest", ownership},
	{string(LateWatcher), "a guest that was late itself takes the partner's silence for its death", "internal/partner: Machine.Tick", ownership},
}
