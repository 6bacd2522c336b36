package oplog

import (
	"encoding/binary"
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/planted"
)

// Scan follows a flush log from pos and calls fn for each record of each
// whole batch in order, with the payload of a write. A block of payload is nil
// when it had been damaged in memory before it was flushed: it must read as an
// error. The first records may be committed already; fn skips those. Only
// committed records are missing between two that follow each other. Payload is
// valid only during the call, and Record.First means nothing.
//
// It returns the last record it found, 0 when there is none. A batch that is
// torn or missing ends the chain and is no error. It is an error that is a
// block.ErrCorrupt when that batch is known to have been flushed; last is then
// where the intact part ends.
//
// Where a device keeps several copies, each batch is written to those that lack
// it, unless the device is read-only: whoever is told of a record once must find
// it again after the next power cut, with whichever copy is left.
func Scan(q hpdi.Queue, area Area, pos DiskPos, fn func(rec Record, payload [][]byte) error) (last block.Seq, err error) {
	s, err := newScanner(q, area, pos)
	if err != nil {
		return 0, err
	}
	defer s.close()
	payload := make([][]byte, 0, MaxRecordBlocks)
	for {
		ok, err := s.batch()
		if err != nil {
			return last, err
		}
		if !ok {
			return last, s.lost()
		}
		if err := s.settle(); err != nil {
			return last, err
		}
		blk := 0
		for _, r := range s.recs {
			payload = payload[:0]
			for i := range r.Count * isWrite(r.Kind) {
				p := s.payload[blk*block.Size : (blk+1)*block.Size : (blk+1)*block.Size]
				if binary.LittleEndian.Uint32(s.sums[blk*4:]) != r.CRC[i] {
					p = nil
				}
				payload = append(payload, p)
				blk++
			}
			if err := fn(r, payload); err != nil {
				return last, err
			}
			last = r.Seq
		}
	}
}

// Resume goes on with the chain that a former owner of the pool left: it
// finds the batches from pos on, as Scan does, and appends after the last one,
// which it returns (0 when there is none). The operation log of that owner
// must be at hand, as after a takeover; after a power cut Scan and Reset are
// the way.
func (d *Disk) Resume(pos DiskPos, epoch block.Epoch) (last block.Seq, err error) {
	s, err := newScanner(d.q, d.area, pos)
	if err != nil {
		return 0, err
	}
	defer s.close()
	var kept []keptBatch
	var used int64
	durable := pos.Batch - 1
	for {
		at := s.pos
		ok, err := s.batch()
		if err != nil {
			return 0, err
		}
		if !ok {
			break
		}
		kept = append(kept, keptBatch{pos: at, last: s.b.last, blocks: s.size})
		used += s.size
		last, durable = s.b.last, max(durable, s.b.durable)
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	d.epoch, d.next, d.kept, d.used, d.flushed, d.durable = epoch, s.pos, kept, used, last, durable
	return last, nil
}

// window is how much a scanner reads at once.
const window = 1 << 20

// scanner reads batches one after the other.
type scanner struct {
	q    hpdi.Queue
	area Area
	pos  DiskPos // of the next batch
	left int64   // blocks of the area not yet scanned

	mem []byte // window on the area: aligned memory
	at  int64  // offset in the area of the window's first byte
	n   int64  // bytes in the window

	copy int // of the device, from 1, that is read alone; 0 for any

	// The batch that was read last.
	b       batch
	raw     []byte // all of it
	size    int64  // blocks
	recs    []Record
	payload []byte
	sums    []byte
	last    block.Seq
}

func newScanner(q hpdi.Queue, area Area, pos DiskPos) (*scanner, error) {
	if err := area.check(); err != nil {
		return nil, err
	}
	if pos.Offset < 0 || pos.Offset >= area.Length || pos.Offset%block.Size != 0 || pos.Batch == 0 {
		return nil, &block.CorruptError{What: "position in the flush log", Where: fmt.Sprint(pos.Offset),
			Why: fmt.Sprintf("batch %d, area of %d bytes", pos.Batch, area.Length)}
	}
	// The largest batch, and it may begin anywhere in what was read.
	size := min(area.Length, (maxBatchMeta+maxBatchBlocks)*block.Size)
	mem, err := hpdi.AllocPrivate(int(size))
	if err != nil {
		return nil, fmt.Errorf("scan flush log: %w", err)
	}
	return &scanner{q: q, area: area, pos: pos, left: area.blocks(), mem: mem}, nil
}

func (s *scanner) close() { _ = hpdi.Free(s.mem) }

// bytes returns n bytes of the area from offset at on, around its end.
func (s *scanner) bytes(at, n int64) ([]byte, error) {
	if skip := (at - s.at + s.area.Length) % s.area.Length; skip+n <= s.n {
		return s.mem[skip : skip+n], nil
	}
	want := min(max(n, window), int64(len(s.mem)))
	head := min(want, s.area.Length-at)
	reqs := []*hpdi.Request{{Op: hpdi.OpRead, Offset: s.area.Start + at, Vec: [][]byte{s.mem[:head]}}}
	if head < want {
		reqs = append(reqs, &hpdi.Request{Op: hpdi.OpRead, Offset: s.area.Start, Vec: [][]byte{s.mem[head:want]}})
	}
	s.n = 0
	if err := s.read(reqs); err != nil {
		return nil, fmt.Errorf("scan flush log: %w", err)
	}
	s.at, s.n = at, want
	return s.mem[:n], nil
}

func (s *scanner) read(reqs []*hpdi.Request) error {
	if s.copy == 0 {
		return hpdi.Do(s.q, reqs...)
	}
	for _, r := range reqs {
		if err := s.area.Copies.ReadCopy(s.copy-1, r.Offset, r.Vec...); err != nil {
			return err
		}
	}
	return nil
}

// meta reads header and records at an offset into s.b and s.recs and returns
// the batch's own checksum. ok is false where no whole batch of the chain is.
// Only what carries the marks of pool and chain is believed: every other block
// may be payload, which is whatever a client wrote.
func (s *scanner) meta(at int64) (sum uint32, n int64, ok bool, err error) {
	p, err := s.bytes(at, block.Size)
	if err != nil {
		return 0, 0, false, err
	}
	n = int64(batchMeta(p))
	if n == 0 || n > s.area.Length || !s.ours(p) {
		return 0, 0, false, nil
	}
	if p, err = s.bytes(at, n); err != nil {
		return 0, 0, false, err
	}
	s.recs, err = s.b.decode(p, s.recs[:0])
	var bad *block.CorruptError
	switch {
	case err == nil:
		return batchSum(p), n, true, nil
	case errors.Is(err, ondisk.ErrVersion):
		return 0, 0, false, fmt.Errorf("flush log batch at byte %d: %w; use the release of Pollux that wrote it, or a later one", s.area.Start+at, err)
	case errors.As(err, &bad) && s.b.number >= s.pos.Batch: // not of an earlier lap
		bad.Where = s.where(s.b.number, at)
		return 0, 0, false, bad
	}
	return 0, 0, false, nil
}

// ours says whether a batch at the beginning of p carries the mark of the pool
// and the chain.
func (s *scanner) ours(p []byte) bool {
	pool, nonce := batchMark(p)
	return pool == s.area.Pool && nonce == s.pos.Nonce
}

func (s *scanner) where(number uint64, at int64) string {
	return fmt.Sprintf("batch %d at byte %d", number, s.area.Start+at)
}

// settle writes the batch that was read last to the copies that lack it.
func (s *scanner) settle() error {
	if s.area.Copies == nil || planted.Has(planted.FlushLogUnsettled) {
		return nil
	}
	at, p := (s.pos.Offset-int64(len(s.raw))+s.area.Length)%s.area.Length, s.raw
	for len(p) > 0 { // twice where the area ends within it
		n := min(int64(len(p)), s.area.Length-at)
		if _, err := s.area.Copies.Settle(s.area.Start+at, p[:n]); err != nil {
			return fmt.Errorf("%s: make all copies of it alike: %w", s.where(s.b.number, at), err)
		}
		at, p = 0, p[n:]
	}
	return nil
}

// batch reads the next batch and returns false when no copy has a whole one.
func (s *scanner) batch() (ok bool, err error) {
	ok, err = s.batchOf()
	if ok || s.area.Copies == nil || planted.Has(planted.FlushLogOneCopy) || errors.Is(err, ondisk.ErrVersion) {
		return ok, err
	}
	for s.copy = 1; s.copy <= s.area.Copies.NumCopies(); s.copy++ {
		s.n = 0
		if found, err := s.batchOf(); found && err == nil {
			s.copy = 0 // the window may be used by the next one
			return true, nil
		}
	}
	s.copy, s.n = 0, 0
	return false, err
}

// batchOf is batch of the copy that is read.
func (s *scanner) batchOf() (ok bool, err error) {
	sum, meta, ok, err := s.meta(s.pos.Offset)
	if err != nil || !ok || s.b.number != s.pos.Batch || s.b.chain != s.pos.Chain {
		return false, err
	}
	size := meta/block.Size + int64(s.b.blocks)
	if size > s.left {
		return false, nil
	}
	p, err := s.bytes(s.pos.Offset, size*block.Size)
	if err != nil {
		return false, err
	}
	s.payload, s.sums = p[meta:], s.sums[:0]
	for i := 0; i < len(s.payload); i += block.Size {
		s.sums = binary.LittleEndian.AppendUint32(s.sums, ondisk.CRC(s.payload[i:i+block.Size]))
	}
	if ondisk.CRC(s.sums) != s.b.sum {
		return false, nil
	}
	if s.b.first <= s.last {
		return false, &block.CorruptError{What: "flush log", Where: s.where(s.b.number, s.pos.Offset),
			Why: fmt.Sprintf("it begins with record %d after %d", s.b.first, s.last)}
	}
	s.last = s.b.last
	s.raw, s.size = p, size
	s.left -= size
	s.pos.Offset = (s.pos.Offset + size*block.Size) % s.area.Length
	s.pos.Batch++
	s.pos.Chain = sum
	return true, nil
}

// lost looks through the rest of the area for a later batch of the chain that
// says that the missing one had been flushed. It returns nil when the chain
// simply ends, a block.ErrCorrupt when it does not, or the device's error.
func (s *scanner) lost() error {
	for i := int64(0); i < s.left; i++ {
		at := (s.pos.Offset + i*block.Size) % s.area.Length
		_, _, ok, err := s.meta(at)
		if err != nil {
			return err
		}
		if ok && s.b.number > s.pos.Batch && s.b.durable >= s.pos.Batch {
			return &block.CorruptError{
				What: "flush log", Where: s.where(s.pos.Batch, s.pos.Offset),
				Why: fmt.Sprintf("it was flushed before batch %d was written and is not whole any more; "+
					"records after %d are lost", s.b.number, s.last),
			}
		}
	}
	return nil
}
