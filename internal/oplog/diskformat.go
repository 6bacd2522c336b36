package oplog

import (
	"encoding/binary"
	"fmt"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

const (
	flushVersion   = 1
	batchHeaderLen = 128
	// A batch is bounded so that a reader knows what memory it needs.
	maxBatchRecords = 1024
	maxBatchBlocks  = 4096 // of payload: 16 MiB
	maxBatchMeta    = (batchHeaderLen + maxBatchRecords*recordSize + block.Size - 1) / block.Size
)

// DiskPosSize is the size of an encoded DiskPos in bytes.
const DiskPosSize = 32

// DiskPos is a position in a flush log: where the next batch begins, and what
// it must look like to belong there. The pool keeps it in its commit records.
type DiskPos struct {
	Offset int64  // bytes from the start of the area
	Batch  uint64 // number of the batch that begins there
	Chain  uint32 // checksum of the batch before it
	Nonce  uint64 // of the chain
}

// Encode fills the first DiskPosSize bytes of p.
func (d DiskPos) Encode(p []byte) {
	le := binary.LittleEndian
	le.PutUint64(p, uint64(d.Offset))
	le.PutUint64(p[8:], d.Batch)
	le.PutUint64(p[16:], d.Nonce)
	le.PutUint32(p[24:], d.Chain)
	le.PutUint32(p[28:], 0)
}

// DecodeDiskPos reads what Encode wrote. It has no checksum of its own; Scan
// checks it against the area.
func DecodeDiskPos(p []byte) (DiskPos, error) {
	if len(p) < DiskPosSize {
		return DiskPos{}, fmt.Errorf("position in the flush log of %d bytes: %w", len(p), block.ErrCorrupt)
	}
	le := binary.LittleEndian
	return DiskPos{
		Offset: int64(le.Uint64(p)),
		Batch:  le.Uint64(p[8:]),
		Nonce:  le.Uint64(p[16:]),
		Chain:  le.Uint32(p[24:]),
	}, nil
}

// batch is the decoded header of a batch.
type batch struct {
	pool    block.PoolID
	epoch   block.Epoch
	number  uint64
	nonce   uint64
	first   block.Seq
	last    block.Seq
	durable uint64 // number of the last batch known flushed when this was written
	blocks  uint32 // of payload
	records uint32
	chain   uint32 // checksum of the batch before
	sum     uint32 // of the checksums of all payload blocks, as they were written
}

// metaBlocks returns how many blocks the header and n records take.
func metaBlocks(n int) int {
	return (batchHeaderLen + n*recordSize + block.Size - 1) / block.Size
}

// encode seals p, in which the records are in place already, and returns the
// batch's checksum.
func (b *batch) encode(p []byte) uint32 {
	le := binary.LittleEndian
	le.PutUint64(p[64:], b.nonce)
	le.PutUint64(p[72:], uint64(b.first))
	le.PutUint64(p[80:], uint64(b.last))
	le.PutUint64(p[88:], b.durable)
	le.PutUint32(p[96:], b.blocks)
	le.PutUint32(p[100:], b.records)
	le.PutUint32(p[104:], b.chain)
	le.PutUint32(p[108:], b.sum)
	clear(p[112:batchHeaderLen])
	ondisk.Seal(p, ondisk.Header{
		Kind: ondisk.KindFlushLog, Version: flushVersion,
		Length: batchHeaderLen + int(b.records)*recordSize,
		Pool:   b.pool, Epoch: b.epoch, Generation: b.number,
	})
	return batchSum(p)
}

// batchSum returns the checksum of a sealed batch.
func batchSum(p []byte) uint32 { return binary.LittleEndian.Uint32(p[56:]) }

// batchMark returns what p, if a batch begins there, says of whose it is.
// Nothing is verified.
func batchMark(p []byte) (block.PoolID, uint64) {
	return block.PoolID(p[16:32]), binary.LittleEndian.Uint64(p[64:])
}

// batchMeta returns how many bytes header and records of the batch take that
// p may begin with, or 0. Nothing is verified but the bounds.
func batchMeta(p []byte) int {
	n := int64(binary.LittleEndian.Uint32(p[12:])) - batchHeaderLen
	if string(p[:8]) != string(ondisk.KindFlushLog) || n <= 0 || n%recordSize != 0 || n/recordSize > maxBatchRecords {
		return 0
	}
	return metaBlocks(int(n/recordSize)) * block.Size
}

// decode reads header and records of a batch, of batchMeta(p) bytes. It
// appends the records to recs. The batch it accepts is consistent in itself.
func (b *batch) decode(p []byte, recs []Record) ([]Record, error) {
	oh, err := ondisk.Open(p, ondisk.KindFlushLog, flushVersion)
	if err != nil {
		return recs, err
	}
	le := binary.LittleEndian
	*b = batch{
		pool: oh.Pool, epoch: oh.Epoch, number: oh.Generation,
		nonce:   le.Uint64(p[64:]),
		first:   block.Seq(le.Uint64(p[72:])),
		last:    block.Seq(le.Uint64(p[80:])),
		durable: le.Uint64(p[88:]),
		blocks:  le.Uint32(p[96:]),
		records: le.Uint32(p[100:]),
		chain:   le.Uint32(p[104:]),
		sum:     le.Uint32(p[108:]),
	}
	if b.records < 1 || b.records > maxBatchRecords || b.blocks > maxBatchBlocks ||
		oh.Length != batchHeaderLen+int(b.records)*recordSize ||
		b.first < 1 || b.last < b.first || uint64(b.last-b.first) != uint64(b.records)-1 {
		return recs, batchCorrupt(b, "records %d to %d, %d of them, %d blocks, %d bytes", b.first, b.last, b.records, b.blocks, oh.Length)
	}
	blocks := uint64(0)
	for i := range int(b.records) {
		var r Record
		at := p[batchHeaderLen+i*recordSize:]
		if !r.decode((*[recordSize]byte)(at), 0, b.first+block.Seq(i)) {
			return recs, batchCorrupt(b, "record %d does not belong there", i)
		}
		if err := r.check(1 << 33); err != nil { // extents mean nothing on a device
			return recs, batchCorrupt(b, "record %d: %v", i, err)
		}
		switch r.Kind {
		case KindWrite:
			blocks += r.Count
		case KindTag:
			return recs, batchCorrupt(b, "record %d is a tag", i)
		}
		recs = append(recs, r)
	}
	if blocks != uint64(b.blocks) {
		return recs, batchCorrupt(b, "%d blocks of payload, its records have %d", b.blocks, blocks)
	}
	return recs, nil
}

func batchCorrupt(b *batch, why string, args ...any) error {
	return &block.CorruptError{What: "flush log", Where: fmt.Sprintf("batch %d", b.number), Why: fmt.Sprintf(why, args...)}
}

// chainStart is what the first batch of a chain has as the checksum of its
// predecessor.
func chainStart(nonce uint64) uint32 {
	var p [8]byte
	binary.LittleEndian.PutUint64(p[:], nonce)
	return ondisk.CRC(p[:])
}
