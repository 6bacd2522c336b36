package oplog

import (
	"encoding/binary"
	"errors"
	"fmt"
	"sync"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/planted"
)

// ErrFull: what is to be flushed does not fit beside what is not committed
// yet. A consistency point makes room, and flushes as well.
var ErrFull = errors.New("flush log is full until the next consistency point")

// Area is the part of a device that a flush log may use.
type Area struct {
	Start  int64 // bytes, a multiple of 4 KiB
	Length int64 // bytes, a multiple of 4 KiB
	Pool   block.PoolID
	// DurableWrites says that the device takes hpdi.Request.Durable: then most
	// appends are one request.
	DurableWrites bool
	// Copies is the device if it keeps each block several times, else nil.
	Copies hpdi.Copies
}

func (a Area) check() error {
	if a.Start < 0 || a.Start%block.Size != 0 || a.Length%block.Size != 0 || a.Length < 2*block.Size {
		return fmt.Errorf("flush log area of %d bytes at %d: %w", a.Length, a.Start, block.ErrInvalid)
	}
	return nil
}

func (a Area) blocks() int64 { return a.Length / block.Size }

const (
	// maxWrite bounds one request, so that the device always has a next one
	// and the outstanding bytes stay few.
	maxWrite = 4 << 20
	maxVecs  = 256
)

// Disk appends to a flush log. Append, Reset and Resume are for one goroutine
// at a time, the one that owns the queue; the other methods may be called at
// any time and do not wait for I/O.
type Disk struct {
	area Area
	q    hpdi.Queue

	// Of the goroutine that appends, all reused.
	meta []byte // header and records of one batch, aligned memory
	sums []byte
	recs []Record
	reqs []*hpdi.Request
	nreq int

	mu      sync.Mutex
	epoch   block.Epoch // guarded by mu, as all below
	next    DiskPos     // where the next batch goes
	flushed block.Seq   // last record of the last batch
	// committed lets flushes leave out what needs none any more.
	committed block.Seq
	durable   uint64      // number of the last batch known flushed
	kept      []keptBatch // oldest first: blocks that may not be overwritten
	used      int64       // blocks of kept
}

type keptBatch struct {
	pos    DiskPos
	last   block.Seq
	blocks int64
}

// NewDisk returns the flush log in an area. Reset or Resume must come first.
func NewDisk(q hpdi.Queue, area Area) *Disk {
	return &Disk{q: q, area: area}
}

// Close frees memory. The queue remains the caller's.
func (d *Disk) Close() error {
	mem := d.meta
	d.meta = nil
	return hpdi.Free(mem)
}

// Reset begins an empty chain at the start of the area and forgets what is in
// it: everything flushed must be committed elsewhere. The nonce must never
// have been used in this area. Nothing is written; the position counts for
// recovery once a commit record holds it, and nothing may be appended before.
func (d *Disk) Reset(epoch block.Epoch, nonce uint64) DiskPos {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.epoch = epoch
	d.next = DiskPos{Batch: 1, Chain: chainStart(nonce), Nonce: nonce}
	d.flushed, d.durable, d.kept, d.used = 0, 0, d.kept[:0], 0
	return d.next
}

// Flushed returns the last record that an Append has made durable in this
// chain, or 0.
func (d *Disk) Flushed() block.Seq {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.flushed
}

// Used returns the bytes of the area that hold batches which are not
// committed, and its size.
func (d *Disk) Used() (used, size int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.used * block.Size, d.area.Length
}

// Position returns from where recovery must scan once everything up to seq is
// committed: what the commit record of that consistency point has to hold. It
// changes nothing; see Committed.
func (d *Disk) Position(seq block.Seq) DiskPos {
	d.mu.Lock()
	defer d.mu.Unlock()
	if planted.Has(planted.FlushPositionAhead) {
		return d.next
	}
	for _, k := range d.kept {
		if k.last > seq {
			return k.pos
		}
	}
	return d.next
}

// Committed forgets the batches before pos, so that their space is used again.
// It may be called only after a commit record is durable that commits
// everything up to seq and holds pos, which Position(seq) had returned: until
// then recovery would look for the batches that are overwritten here. pos may
// be older than what Position(seq) returns by now, and it is pos that counts.
func (d *Disk) Committed(seq block.Seq, pos DiskPos) {
	d.mu.Lock()
	defer d.mu.Unlock()
	d.committed = max(d.committed, seq)
	if pos.Nonce != d.next.Nonce {
		return // of the chain before a Reset
	}
	n := 0
	for n < len(d.kept) && d.kept[n].pos.Batch < pos.Batch {
		d.used -= d.kept[n].blocks
		n++
	}
	d.kept = append(d.kept[:0], d.kept[n:]...)
}

// Append makes the records after from, up to and including to, survive a
// power cut. from is the larger of Flushed and the last committed record. The
// records must not be released before it returns. After an error nothing was
// appended, and the same may be tried again; ErrFull asks for a consistency
// point instead.
func (d *Disk) Append(l *Log, from, to block.Seq) error {
	if to <= from {
		return nil
	}
	if err := d.area.check(); err != nil {
		return err
	}
	d.mu.Lock()
	pos, epoch, durable := d.next, d.epoch, d.durable
	free := d.area.blocks() - d.used
	gap := len(d.kept) > 0 && from != d.flushed && (from < d.flushed || from > d.committed)
	flushed, committed := d.flushed, d.committed
	d.mu.Unlock()
	if pos.Batch == 0 || gap {
		return fmt.Errorf("flush of records after %d, flushed are %d, committed %d: %w", from, flushed, committed, block.ErrInvalid)
	}
	need, err := d.measure(l, from, to)
	if err != nil {
		return err
	}
	if need > free {
		return fmt.Errorf("%d blocks, %d of %d free: %w", need, free, d.area.blocks(), ErrFull)
	}
	var done []keptBatch // one element unless the flush is huge
	synced := false
	for at := from; at < to; {
		b := batch{pool: d.area.Pool, epoch: epoch, number: pos.Batch, nonce: pos.Nonce, durable: durable, chain: pos.Chain}
		blocks, sum, one, err := d.write(l, at, to, pos, &b)
		if err != nil {
			return fmt.Errorf("flush log batch %d at byte %d: %w", pos.Batch, d.area.Start+pos.Offset, err)
		}
		done = append(done, keptBatch{pos: pos, last: b.last, blocks: blocks})
		pos.Offset = (pos.Offset + blocks*block.Size) % d.area.Length
		pos.Batch++
		pos.Chain = sum
		synced = one && at == from // and then it is the last
		at = b.last
	}
	if !synced {
		if err := hpdi.Do(d.q, &hpdi.Request{Op: hpdi.OpFlush}); err != nil {
			return fmt.Errorf("flush log: %w", err)
		}
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	for _, k := range done {
		d.kept = append(d.kept, k)
		d.used += k.blocks
	}
	d.next, d.flushed, d.durable = pos, to, pos.Batch-1
	return nil
}

// cut collects the records of one batch.
func (d *Disk) cut(l *Log, from, to block.Seq) (blocks int, err error) {
	d.recs = d.recs[:0]
	for seq := from + 1; seq <= to && len(d.recs) < maxBatchRecords; seq++ {
		r, err := l.Get(seq)
		if err != nil {
			return 0, err
		}
		if r.Kind == KindWrite {
			if blocks+int(r.Count) > maxBatchBlocks {
				break
			}
			blocks += int(r.Count)
		}
		if r.Kind == KindTag {
			// A power cut ends all clients of the host, too. So a change may be divided
			// between two batches, and programs that know no tags can read the log.
			r = Record{Seq: r.Seq, Kind: KindNop}
		}
		d.recs = append(d.recs, r)
	}
	return blocks, nil
}

// measure returns how many blocks of the area the records take.
func (d *Disk) measure(l *Log, from, to block.Seq) (need int64, err error) {
	for from < to {
		blocks, err := d.cut(l, from, to)
		if err != nil {
			return 0, err
		}
		need += int64(metaBlocks(len(d.recs)) + blocks)
		from += block.Seq(len(d.recs))
	}
	return need, nil
}

// write writes one batch at pos, as many records as it takes. It returns its
// size and checksum and fills in b. The batch is durable afterwards only if it
// ends with record to, the device can do that, and one request was enough.
func (d *Disk) write(l *Log, from, to block.Seq, pos DiskPos, b *batch) (blocks int64, sum uint32, durable bool, err error) {
	payload, err := d.cut(l, from, to)
	if err != nil {
		return 0, 0, false, err
	}
	if d.meta == nil {
		if d.meta, err = hpdi.AllocPrivate(maxBatchMeta * block.Size); err != nil {
			return 0, 0, false, err
		}
	}
	meta := d.meta[:metaBlocks(len(d.recs))*block.Size]
	clear(meta[len(meta)-block.Size:])
	b.first, b.last = from+1, from+block.Seq(len(d.recs))
	b.records, b.blocks = uint32(len(d.recs)), uint32(payload)
	d.sums = d.sums[:0]
	for i := range d.recs {
		r := d.recs[i]
		for j := range r.Count * isWrite(r.Kind) {
			// Taken anew and not from the record: a block that was
			// damaged in memory must not look like a torn batch.
			c := ondisk.CRC(l.Payload(r.First+Extent(j), 1))
			d.sums = binary.LittleEndian.AppendUint32(d.sums, c)
		}
		r.First = 0
		r.encode((*[recordSize]byte)(meta[batchHeaderLen+i*recordSize:]), 0)
	}
	b.sum = ondisk.CRC(d.sums)
	sum = b.encode(meta)

	w := vectors{d: d, at: pos.Offset}
	d.nreq = 0
	w.add(meta)
	for i := 0; i < len(d.recs); {
		r := &d.recs[i]
		i++
		if r.Kind != KindWrite {
			continue
		}
		n := int(r.Count)
		for ; i < len(d.recs) && d.recs[i].Kind == KindWrite && d.recs[i].First == r.First+Extent(n); i++ {
			n += int(d.recs[i].Count)
		}
		w.add(l.Payload(r.First, n))
	}
	blocks = int64(len(meta)/block.Size + payload)
	durable = d.area.DurableWrites && d.nreq == 1 && b.last == to
	d.reqs[0].Durable = durable && !planted.Has(planted.FlushWithoutSync)
	return blocks, sum, durable, hpdi.Do(d.q, d.reqs[:d.nreq]...)
}

func isWrite(k Kind) uint64 {
	if k == KindWrite {
		return 1
	}
	return 0
}

// vectors turns consecutive pieces of memory into requests for consecutive
// places of the circular area.
type vectors struct {
	d    *Disk
	at   int64 // offset in the area of the next piece
	cur  *hpdi.Request
	size int
}

func (w *vectors) add(p []byte) {
	for len(p) > 0 {
		if w.cur == nil || w.size == maxWrite || len(w.cur.Vec) == maxVecs || w.at == 0 {
			w.cur, w.size = w.d.request(), 0
			w.cur.Offset = w.d.area.Start + w.at
		}
		n := min(int64(len(p)), int64(maxWrite-w.size), w.d.area.Length-w.at)
		w.cur.Vec = append(w.cur.Vec, p[:n])
		w.size += int(n)
		w.at = (w.at + n) % w.d.area.Length
		p = p[n:]
	}
}

// request returns the next unused write request.
func (d *Disk) request() *hpdi.Request {
	if d.nreq == len(d.reqs) {
		d.reqs = append(d.reqs, &hpdi.Request{Op: hpdi.OpWrite})
	}
	r := d.reqs[d.nreq]
	d.nreq++
	r.Vec, r.Err, r.Durable = r.Vec[:0], nil, false
	return r
}
