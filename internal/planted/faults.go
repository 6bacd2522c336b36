// Package planted names bugs that somebody could have made in this program
// and, in builds with the tag planted, makes them: one at a time, chosen by
// [Select] or the environment. A test that claims to find faults of a kind is
// believed when it finds the planted ones of that kind.
//
// In all other builds [Has] is false at compile time and every use of it is
// gone from the program. A fault has one place: a condition where a developer
// might have made that very mistake, with no state or hook of its own.
package planted

// Fault is a planted bug, by its name.
type Fault string

// What is written, synced and committed in which order.
const (
	DataSyncMissing       Fault = "data-sync-missing"
	RecordSyncMissing     Fault = "record-sync-missing"
	SuperblockSyncMissing Fault = "superblock-sync-missing"
	SyncFirstDeviceOnly   Fault = "sync-first-device-only"
	ReuseBeforeCommit     Fault = "reuse-before-commit"
	FreedAtFoldBegin      Fault = "freed-at-fold-begin"
	ReleaseBeforeCommit   Fault = "release-before-commit"
	ShareUnverified       Fault = "share-unverified"
	SharedNotCounted      Fault = "shared-not-counted"
	IgnoredWriteError     Fault = "ignored-write-error"
	IgnoredPageWriteError Fault = "ignored-page-write-error"
	TwinNotWritten        Fault = "twin-not-written"
	TwinNotCounted        Fault = "twin-not-counted"
	HolesAfterRuns        Fault = "holes-after-runs"
	TrimNotCommitted      Fault = "trim-not-committed"
	DeletedResurrected    Fault = "deleted-volume-resurrected"
	JournalTailEarly      Fault = "journal-tail-early"
	PublishBeforeRecord   Fault = "publish-before-record"
	PublishBeforeChecksum Fault = "publish-before-checksum"
	ReleaseNotRecorded    Fault = "release-not-recorded"
	SingleHeaderCopy      Fault = "single-header-copy"
	ReplayStartsLate      Fault = "replay-starts-late"
	DoubleFree            Fault = "double-free"
	FoldWithoutSuperblock Fault = "fold-without-superblock"
	CountsWithoutJournal  Fault = "counts-without-journal"
	OlderSuperblockWins   Fault = "older-superblock-wins"
	JournalChainUnchecked Fault = "journal-chain-unchecked"
	ReplaySkipsFirst      Fault = "replay-skips-first"
	ReplaySkipsLast       Fault = "replay-skips-last"
	ResizeNotCommitted    Fault = "resize-not-committed"
	TornRecordAccepted    Fault = "torn-record-accepted"
	TakeoverExtentsFree   Fault = "takeover-extents-free"
	RegionReplaced        Fault = "region-replaced"
	EpochNotRaised        Fault = "epoch-not-raised"
	EpochUnchecked        Fault = "epoch-unchecked"
	FlushWithoutSync      Fault = "flush-without-sync"
	FlushPositionAhead    Fault = "flush-position-ahead"
	FlushPositionKept     Fault = "flush-position-kept"
	FlushCoversLess       Fault = "flush-covers-less"
	FlushBeforeChain      Fault = "flush-before-chain"
	FlushNonceReused      Fault = "flush-nonce-reused"
	StaleCacheFrame       Fault = "stale-cache-frame"
	AdoptedUnproved       Fault = "adopted-unproved"
	ReadErrorAsZeroes     Fault = "read-error-as-zeroes"
	ChecksumUnverified    Fault = "checksum-unverified"
	DirtyReadOrder        Fault = "dirty-read-order"
	OverlayOrder          Fault = "overlay-order"
	HoleOrder             Fault = "hole-order"
	PendingWithoutBirth   Fault = "pending-without-birth"
	PartialBlockRace      Fault = "partial-block-race"
	MoveIgnoresRace       Fault = "move-ignores-race"
	MoveStalePointer      Fault = "move-stale-pointer"
	PartialBlockZeroRest  Fault = "partial-block-zero-rest"
	TrimTakesEdges        Fault = "trim-takes-edges"
	ReservationMissing    Fault = "reservation-missing"
	ReservationLeak       Fault = "reservation-leak"
	PermitLeak            Fault = "permit-leak"
	SlopMissing           Fault = "slop-missing"
	RelieveMissing        Fault = "relieve-missing"
	TakeoverBeforeFence   Fault = "takeover-before-fence"
	GiveBackBeforeRelease Fault = "give-back-before-release"
	RecordUnproved        Fault = "record-unproved"
	LateWatcher           Fault = "late-watcher"
	HelloIgnored          Fault = "hello-ignored"
	StaleTermAccepted     Fault = "stale-term-accepted"
	RestartNotFenced      Fault = "restart-not-fenced"
)

// What outlives a guest in its region beside the log.
const (
	KeptJournalEarly    Fault = "kept-journal-early"
	KeptJournalUnproved Fault = "kept-journal-unproved"
)

// What a client that sends requests again is told of them.
const (
	TagForgotten   Fault = "tag-forgotten"
	TagAfterChange Fault = "tag-after-change"
	GroupNotCut    Fault = "group-not-cut"
	CutNotErased   Fault = "cut-not-erased"
	DoneWrongSlot  Fault = "done-wrong-slot"
)

// Which copy has what.
const (
	MirrorMarkMissing      Fault = "mirror-mark-missing"
	MirrorMarkClearedEarly Fault = "mirror-mark-cleared-early"
	MirrorLossUnrecorded   Fault = "mirror-loss-unrecorded"
	MirrorWriteErrorKept   Fault = "mirror-write-error-kept"
	MirrorHeaderBehind     Fault = "mirror-header-behind"
	MirrorReturnNotFilled  Fault = "mirror-return-not-filled"
	MirrorHealsWithBad     Fault = "mirror-heals-with-bad"
	StaleCopyWins          Fault = "stale-copy-wins"
	JournalOneCopy         Fault = "journal-one-copy"
	JournalEndUnsettled    Fault = "journal-end-unsettled"
	FlushLogOneCopy        Fault = "flush-log-one-copy"
	FlushLogUnsettled      Fault = "flush-log-unsettled"
)

// What is on flash, and who is told.
const (
	FlashRedirectEarly   Fault = "flash-redirect-early"
	FlashSlotReusedEarly Fault = "flash-slot-reused-early"
	FlashMarkForgotten   Fault = "flash-mark-forgotten"
	FlashCopyNotSynced   Fault = "flash-copy-not-synced"
	FlushLeavesOutFlash  Fault = "flush-leaves-out-flash"
	FlashCopyUnseen      Fault = "flash-copy-unseen"
	FlashReturnUnseen    Fault = "flash-return-unseen"
	FlashNoteEarly       Fault = "flash-note-early"
	FlashNoteInPlace     Fault = "flash-note-in-place"
	FlashNoteUnsure      Fault = "flash-note-unsure"
	FlashTableUnsure     Fault = "flash-table-unsure"
	FlashNotOverAdded    Fault = "flash-not-over-added"
	FlashFreeByOne       Fault = "flash-free-by-one"
	FlashNotRequired     Fault = "flash-not-required"
	FlashGoneEarly       Fault = "flash-gone-early"
	ExchangeInUse        Fault = "exchange-in-use"
)

// What a disk of a virtual machine finds when its server has died.
const (
	InflightBatchIgnored Fault = "inflight-batch-ignored"
	InflightTailKept     Fault = "inflight-tail-kept"
	InflightCounterReset Fault = "inflight-counter-reset"
	InflightClearedEarly Fault = "inflight-cleared-early"
	InflightRunAgain     Fault = "inflight-run-again"
)

// What is said to the other side of a ring in shared memory, and when.
const (
	RingSubmitEarly   Fault = "ring-submit-early"
	RingCompleteEarly Fault = "ring-complete-early"
	RingTakenEarly    Fault = "ring-taken-early"
	RingUnordered     Fault = "ring-unordered"
	RingRunsCompleted Fault = "ring-runs-completed"
	RingTagUnasked    Fault = "ring-tag-unasked"
)
