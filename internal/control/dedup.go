package control

import (
	"context"
	"net/http"
	"net/url"
	"time"
)

// PoolDedup tells what the volumes of a pool share. Sizes are bytes.
type PoolDedup struct {
	Pool  string `json:"pool"`
	Guest string `json:"guest"` // its identity
	// Error is why nothing is known of the pool; then the rest is empty.
	Error string `json:"error,omitempty"`
	// Refers is the data that volumes refer to, also what they have overwritten, trimmed
	// or deleted and what is not freed yet. Stored is what that takes on the devices,
	// Saved the difference. Metadata are in use beside it.
	Refers   int64 `json:"refers"`
	Stored   int64 `json:"stored"`
	Saved    int64 `json:"saved"`
	Metadata int64 `json:"metadata"`
	// DedupCounts are those since the pool was opened.
	DedupCounts
	Unequal uint64 `json:"unequal_series"`
	// References says how many blocks have how many references. Each block of metadata
	// is one of those with one.
	References []DedupReferences `json:"references"`
	// Index is nil as long as no volume of the pool has shared blocks.
	Index *DedupIndex `json:"index,omitempty"`
	// Resized is one of another size that is being made, and takes the place of Index
	// when it is complete.
	Resized *DedupIndex `json:"resized_index,omitempty"`
	// LLRRM is nil where the pool has none. What is there is part of Stored.
	LLRRM *LLRRMStatus `json:"llrrm,omitempty"`
	Scan  DedupScan    `json:"scan"`
	// Survey tells how far the newest survey is, and MeanExtent what it has found of all
	// volumes together: the mean length in blocks of pieces that lie in one, 0 if nothing
	// is known.
	Survey     DedupSurvey   `json:"survey"`
	MeanExtent float64       `json:"mean_extent_blocks,omitempty"`
	Volumes    []VolumeDedup `json:"volumes"`
}

// DedupCounts count blocks of 4 KiB.
type DedupCounts struct {
	// Shared were stored already, Written were not, or were not looked up.
	Shared  uint64 `json:"shared_blocks"`
	Written uint64 `json:"written_blocks"`
	Zeros   uint64 `json:"zero_blocks"` // became holes
}

// DedupStatus is what the figures of a pool tell of deduplication: what has happened
// since it was opened, and what can be had without waiting for anything. PoolDedup has
// the rest.
type DedupStatus struct {
	DedupCounts
	Unequal      uint64 `json:"unequal_series"`
	Saved        int64  `json:"saved"`
	IndexBytes   int64  `json:"index_bytes"`
	IndexEntries int64  `json:"index_entries"`
	// MeanExtent is that of PoolDedup.
	MeanExtent float64 `json:"mean_extent_blocks,omitempty"`
	// IndexOwn are bytes of the index that end with the guest, IndexKept those that the rest
	// takes of the pool's region.
	IndexOwn  int64 `json:"index_own_bytes,omitempty"`
	IndexKept int64 `json:"index_region_bytes,omitempty"`
}

// DedupReferences says how many blocks have From to To references.
type DedupReferences struct {
	From   int   `json:"from"`
	To     int   `json:"to"`
	Blocks int64 `json:"blocks"`
}

// DedupIndex describes the index that finds blocks which are stored.
type DedupIndex struct {
	Bytes   int64 `json:"bytes"` // of memory
	Entries int64 `json:"entries"`
	Slots   int64 `json:"slots"`
	Every   int   `json:"one_block_in"` // of a track that it has an entry for
	// Ends is why it ends with its guest, empty where it outlives it in the pool's region.
	Ends string `json:"ends_with_guest,omitempty"`
	// Done of Pages have been read to make it, or to make it anew.
	Done  int `json:"pages_done"`
	Pages int `json:"pages"`
}

// Complete reports whether all that is stored with a fingerprint has been looked at.
func (x *DedupIndex) Complete() bool { return x.Done >= x.Pages }

// What may be asked of the scan of a volume.
const (
	ScanStart  = "start" // deduplicate what was written before
	ScanUndo   = "undo"  // make copies again of all that is shared
	ScanPause  = "pause"
	ScanResume = "resume"
	ScanStop   = "stop"
)

// DedupScan tells of the newest scan of a volume since its pool was opened.
type DedupScan struct {
	State  string `json:"state"` // never, running, paused, stopped or done
	Volume string `json:"volume,omitempty"`
	Undo   bool   `json:"undo,omitempty"` // it makes copies of what is shared
	// Done of Total blocks were looked at, Moved of them are shared now, or not any more;
	// Raced were changed by clients in time, Failed cannot be read.
	Done   int64  `json:"done_blocks"`
	Total  int64  `json:"total_blocks"`
	Moved  uint64 `json:"moved_blocks"`
	Raced  uint64 `json:"raced_blocks"`
	Failed uint64 `json:"failed_blocks"`
	Why    string `json:"why,omitempty"` // what it waits for, or why it has ended
}

// VolumeDedup tells what one volume shares. Its counts are those since the pool was
// opened.
type VolumeDedup struct {
	Name   string `json:"name"`
	Dedup  bool   `json:"dedup"`
	THN    int    `json:"thn"`
	Refers int64  `json:"refers"` // as of the last fold
	DedupCounts
	Survey *VolumeSurvey `json:"survey,omitempty"` // nil if the volume was not surveyed
}

// What may be asked of the survey of a pool.
const (
	SurveyStart = "start"
	SurveyStop  = "stop"
)

// SurveyChange asks for a change of the survey of a pool.
type SurveyChange struct {
	Action string `json:"action"` // one of SurveyStart and SurveyStop
}

// DedupSurvey tells of the newest survey of a pool since it was opened: what deleting
// each volume would free, and in which pieces volumes lie.
type DedupSurvey struct {
	State string `json:"state"` // never, running, stopped or done
	// Done of Total entries of maps were looked at. Total grows by a volume that has to be
	// walked once more.
	Done  int64  `json:"done_blocks"`
	Total int64  `json:"total_blocks"`
	Why   string `json:"why,omitempty"` // what it waits for, or could not do
}

// VolumeSurvey is what the newest survey that has come to a volume found there.
type VolumeSurvey struct {
	At time.Time `json:"at"`
	// Exact is false where something was written or freed meanwhile: then what has changed
	// may be counted as it was or as it is.
	Exact bool `json:"exact"`
	// WouldFree is how many bytes of data deleting the volume would free: what nothing
	// else refers to.
	WouldFree int64 `json:"would_free"`
	// MeanExtent is the mean length of a piece in blocks: Blocks lie in Pieces.
	MeanExtent float64 `json:"mean_extent_blocks"`
	Blocks     int64   `json:"blocks"`
	Pieces     int64   `json:"pieces"`
}

// Dedup tells what the pools of both identities share, of those that are open.
func (c *Client) Dedup(ctx context.Context) (p []PoolDedup, err error) {
	err = c.agent.call(ctx, http.MethodGet, "/v1/dedup", nil, &p)
	return p, err
}

// SurveyPool begins or ends the survey of a pool, and tells of its deduplication.
func (c *Client) SurveyPool(ctx context.Context, pool string, req SurveyChange) (p PoolDedup, err error) {
	err = c.agent.call(ctx, http.MethodPost, "/v1/pools/"+url.PathEscape(pool)+"/survey", req, &p)
	return p, err
}
