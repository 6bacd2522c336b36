package pool

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

const scanVersion = 1

// scanBlocks are the places of the record of scans.
var scanBlocks = [2]uint64{4, 132}

// scanStates are the states of a scan in the order of their numbers in the record.
var scanStates = []ScanState{ScanNever, ScanRunning, ScanPaused, ScanStopped, ScanDone}

// scanRecord is the advice about the newest scan of a pool. A pool without one was never
// scanned, as far as is known.
type scanRecord struct {
	generation uint64
	id         block.VolumeID
	leaf       uint64    // of its map, with which the scan goes on
	stats      ScanStats // without Volume and Why
}

func (r *scanRecord) number() uint64 { return r.generation }

// encode returns the block that holds the record.
func (r *scanRecord) encode(pool block.PoolID, epoch block.Epoch) []byte {
	le := binary.LittleEndian
	b := make([]byte, ondisk.HeaderSize, block.Size)
	b = le.AppendUint16(b, uint16(slices.Index(scanStates, r.stats.State)))
	undo := uint16(0)
	if r.stats.Undo {
		undo = 1
	}
	b = le.AppendUint16(b, undo)
	b = le.AppendUint32(b, uint32(r.id))
	for _, v := range []uint64{r.leaf, uint64(r.stats.Done), uint64(r.stats.Total), r.stats.Moved, r.stats.Raced, r.stats.Failed} {
		b = le.AppendUint64(b, v)
	}
	n := len(b)
	b = b[:block.Size]
	ondisk.Seal(b, ondisk.Header{Kind: ondisk.KindScan, Version: scanVersion, Length: n, Pool: pool, Epoch: epoch, Generation: r.generation})
	return b
}

func decodeScan(b []byte, pool block.PoolID) (*scanRecord, error) {
	h, err := ondisk.Open(b, ondisk.KindScan, scanVersion)
	if err != nil {
		return nil, err
	}
	d := ondisk.NewDecoder(b[ondisk.HeaderSize:h.Length])
	r := &scanRecord{generation: h.Generation}
	state, undo := d.U16(), d.U16()
	r.id, r.leaf = block.VolumeID(d.U32()), d.U64()
	r.stats = ScanStats{Undo: undo == 1, Done: int64(d.U64()), Total: int64(d.U64()), Moved: d.U64(), Raced: d.U64(), Failed: d.U64()}
	switch {
	case h.Pool != pool:
		d.Fail("it is of pool %v", h.Pool)
	case int(state) >= len(scanStates) || undo > 1 || r.leaf > blockmap.MaxLeaves || r.stats.Done < 0 || r.stats.Total < 0:
		d.Fail("state %d, undo %d, leaf %d, %d of %d blocks", state, undo, r.leaf, r.stats.Done, r.stats.Total)
	default:
		r.stats.State = scanStates[state]
	}
	if err := d.Err(); err != nil {
		return nil, fmt.Errorf("record of scans: %w", err)
	}
	return r, nil
}
