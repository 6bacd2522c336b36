package oplog

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

// Batch describes a batch of a flush log.
type Batch struct {
	At          int64 // byte of the device
	Number      uint64
	Epoch       block.Epoch
	First, Last block.Seq
	Records     int
	Blocks      int    // of payload
	Bytes       int64  // that the batch takes
	Durable     uint64 // last batch that was known flushed when it was written
	Damaged     int    // blocks that had been damaged in memory before they were flushed
}

// FlushEnd says where the chain of a flush log ends.
type FlushEnd struct {
	At    int64 // byte of the device
	Batch uint64
	Why   string
	// Damage says that the batch there is known to have been flushed, and
	// lost.
	Damage error
}

// InspectFlushLog follows a flush log from pos and calls fn for each batch. It
// changes nothing. The error is of the device, of pos, or of fn.
func InspectFlushLog(q hpdi.Queue, area Area, pos DiskPos, fn func(Batch) error) (FlushEnd, error) {
	s, err := newScanner(q, area, pos)
	if err != nil {
		return FlushEnd{}, err
	}
	defer s.close()
	for {
		at := s.pos.Offset
		ok, err := s.batch()
		if errors.Is(err, block.ErrCorrupt) { // it is whole and cannot be
			return FlushEnd{At: area.Start + at, Batch: s.pos.Batch, Why: err.Error(), Damage: err}, nil
		}
		if err != nil {
			return FlushEnd{}, err
		}
		if !ok {
			break
		}
		b := Batch{
			At: area.Start + at, Number: s.b.number, Epoch: s.b.epoch, First: s.b.first, Last: s.b.last,
			Records: int(s.b.records), Blocks: int(s.b.blocks), Bytes: s.size * block.Size, Durable: s.b.durable,
		}
		blk := 0
		for i := range s.recs {
			r := &s.recs[i]
			for n := range r.Count * isWrite(r.Kind) {
				if binary.LittleEndian.Uint32(s.sums[blk*4:]) != r.CRC[n] {
					b.Damaged++
				}
				blk++
			}
		}
		if err := fn(b); err != nil {
			return FlushEnd{}, err
		}
	}
	end := FlushEnd{At: area.Start + s.pos.Offset, Batch: s.pos.Batch}
	if end.Why, err = s.whyNot(); err != nil {
		return end, err
	}
	err = s.lost()
	if errors.Is(err, block.ErrCorrupt) {
		end.Damage, err = err, nil
	}
	return end, err
}

// whyNot says why the batch that would be next is not there.
func (s *scanner) whyNot() (string, error) {
	want := s.pos
	p, err := s.bytes(want.Offset, block.Size)
	if err != nil {
		return "", err
	}
	if batchMeta(p) == 0 {
		return "no batch begins there", nil
	}
	ours := s.ours(p)
	_, _, ok, err := s.meta(want.Offset)
	switch {
	case err != nil:
		return "", err
	case !ours:
		return "the batch there is of another chain, or not whole", nil
	case !ok:
		return "the batch there is not whole", nil
	case s.b.number != want.Batch:
		return fmt.Sprintf("batch %d is there, of an earlier lap", s.b.number), nil
	case s.b.chain != want.Chain:
		return "the batch there follows another one", nil
	}
	return "the payload of the batch there is not whole", nil
}
