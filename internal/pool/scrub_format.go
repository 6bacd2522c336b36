package pool

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

const scrubVersion = 1

// scrubBlocks are the places of the record of scrubs.
var scrubBlocks = [2]uint64{3, 131}

// ScrubState says whether a pool is being scrubbed.
type ScrubState uint16

// The states of a scrub.
const (
	ScrubNever   ScrubState = iota // the pool was never scrubbed, as far as is known
	ScrubRunning                   // it is being scrubbed
	ScrubPaused                    // somebody has paused it
	ScrubStopped                   // somebody has ended the newest scrub before it was through
	ScrubDone                      // the newest scrub went through
	scrubStates
)

var scrubStateNames = [scrubStates]string{"never", "running", "paused", "stopped", "done"}

// String returns the state as status shows it.
func (s ScrubState) String() string {
	if s < scrubStates {
		return scrubStateNames[s]
	}
	return fmt.Sprintf("ScrubState(%d)", uint16(s))
}

// ScrubKind says what a block is for.
type ScrubKind uint16

// The kinds of block that a scrub reads.
const (
	ScrubData       ScrubKind = iota // of a volume
	ScrubMap                         // page of a volume's map
	ScrubCounts                      // page of a device's reference counts
	ScrubCatalogue                   // page of the list of volumes
	ScrubLabel                       // one of the copies of a device's label
	ScrubSuperblock                  // one of the copies of the superblock
	ScrubJournal                     // of the metadata journal
	ScrubMirror                      // what a mirror keeps for itself
	ScrubPrints                      // page of fingerprints
	ScrubFlash                       // what a flash device keeps for itself
	scrubKinds
)

// scrubFinding is a block that no copy has.
type scrubFinding struct {
	kind   ScrubKind
	volume block.VolumeID // of ScrubData and ScrubMap, else 0
	lba    block.Logical  // of the volume; the first one below a page
	at     block.Physical
}

// scrubFindings is how many findings of one scrub are remembered.
const scrubFindings = 32

// scrubResult is what one scrub has come to.
type scrubResult struct {
	begun, ended time.Time     // ended is zero while it goes on
	took         time.Duration // without pauses
	total        uint64        // blocks that it will read, an estimate
	blocks       uint64        // that it has read, whatever the number of copies
	bytes        uint64        // from all copies
	repaired     uint64        // copies of blocks
	unreadable   uint64        // blocks that no copy has
	findings     []scrubFinding
}

// scrubPart is what a scrub reads, in this order.
type scrubPart uint16

const (
	scrubFolds     scrubPart = iota // waits until all that is committed is in the trees
	scrubCopies                     // labels and superblock
	scrubCounts                     // reference counts, id is the device
	scrubCatalogue                  // list of volumes
	scrubVolumes                    // maps and data, id is the volume
	scrubPrints                     // fingerprints, id is the device; before the volumes
	scrubParts
)

// scrubPlace is where a scrub goes on.
type scrubPlace struct {
	part scrubPart
	id   uint64
	leaf uint64 // of the tree of part and id
}

// scrubRecord is what is known of the scrubs of a pool. It is advice: a pool
// without one was never scrubbed, as far as is known.
type scrubRecord struct {
	generation uint64
	state      ScrubState
	place      scrubPlace
	since      time.Time   // when the first record was written
	now        scrubResult // of the newest scrub
	last       scrubResult // of the newest one that went through
}

func (r *scrubRecord) number() uint64 { return r.generation }

// encode returns the block that holds the record.
func (r *scrubRecord) encode(pool block.PoolID, epoch block.Epoch) []byte {
	le := binary.LittleEndian
	b := make([]byte, ondisk.HeaderSize, block.Size)
	b = le.AppendUint16(b, uint16(r.state))
	b = le.AppendUint16(b, uint16(r.place.part))
	b = le.AppendUint64(b, r.place.id)
	b = le.AppendUint64(b, r.place.leaf)
	b = appendTime(b, r.since)
	b = r.now.append(b)
	b = r.last.append(b)
	n := len(b)
	b = b[:block.Size]
	ondisk.Seal(b, ondisk.Header{Kind: ondisk.KindScrub, Version: scrubVersion, Length: n, Pool: pool, Epoch: epoch, Generation: r.generation})
	return b
}

func (r *scrubResult) append(b []byte) []byte {
	le := binary.LittleEndian
	b = appendTime(appendTime(b, r.begun), r.ended)
	for _, v := range []uint64{uint64(r.took), r.total, r.blocks, r.bytes, r.repaired, r.unreadable} {
		b = le.AppendUint64(b, v)
	}
	b = le.AppendUint32(b, uint32(len(r.findings)))
	for _, f := range r.findings {
		b = le.AppendUint16(b, uint16(f.kind))
		b = le.AppendUint32(b, uint32(f.volume))
		b = le.AppendUint64(b, uint64(f.lba))
		b = le.AppendUint64(b, uint64(f.at))
	}
	return b
}

// findingSize is the size of an encoded finding in bytes.
const findingSize = 2 + 4 + 8 + 8

func appendTime(b []byte, t time.Time) []byte {
	var ns int64
	if !t.IsZero() {
		ns = t.UnixNano()
	}
	return binary.LittleEndian.AppendUint64(b, uint64(ns))
}

func decodeTime(d *ondisk.Decoder) time.Time {
	if ns := int64(d.U64()); ns != 0 {
		return time.Unix(0, ns)
	}
	return time.Time{}
}

func decodeScrub(b []byte, pool block.PoolID) (*scrubRecord, error) {
	h, err := ondisk.Open(b, ondisk.KindScrub, scrubVersion)
	if err != nil {
		return nil, err
	}
	d := ondisk.NewDecoder(b[ondisk.HeaderSize:h.Length])
	r := &scrubRecord{generation: h.Generation}
	r.state, r.place.part = ScrubState(d.U16()), scrubPart(d.U16())
	r.place.id, r.place.leaf, r.since = d.U64(), d.U64(), decodeTime(d)
	r.now.decode(d)
	r.last.decode(d)
	switch {
	case h.Pool != pool:
		d.Fail("it is of pool %v", h.Pool)
	case r.state >= scrubStates || r.place.part >= scrubParts:
		d.Fail("state %d, part %d", r.state, r.place.part)
	}
	if err := d.Err(); err != nil {
		return nil, fmt.Errorf("record of scrubs: %w", err)
	}
	return r, nil
}

func (r *scrubResult) decode(d *ondisk.Decoder) {
	r.begun, r.ended = decodeTime(d), decodeTime(d)
	r.took, r.total, r.blocks = time.Duration(d.U64()), d.U64(), d.U64()
	r.bytes, r.repaired, r.unreadable = d.U64(), d.U64(), d.U64()
	n := d.Count(findingSize)
	if n > scrubFindings {
		d.Fail("%d findings", n)
	}
	for range n {
		f := scrubFinding{kind: ScrubKind(d.U16()), volume: block.VolumeID(d.U32()), lba: block.Logical(d.U64()), at: block.Physical(d.U64())}
		if f.kind >= scrubKinds {
			d.Fail("finding of kind %d", f.kind)
		}
		if d.Err() != nil {
			return
		}
		r.findings = append(r.findings, f)
	}
}
