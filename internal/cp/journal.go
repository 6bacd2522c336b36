package cp

import (
	"cmp"
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/planted"
)

// errJournalFull says that a fold has to free journal space first.
var errJournalFull = fmt.Errorf("metadata journal is full: %w", ErrFoldFirst)

// journal is a circular area of device 0. Positions are virtual and only rise;
// a record that would cross the end of the area starts at its beginning.
//
//	tail <= head <= tail + size
type journal struct {
	set   *devices.Set
	pool  block.PoolID
	start uint64 // first block of the area on device 0
	size  uint64 // bytes
	tail  uint64 // virtual; everything before it is folded
	next  JournalPos
	kept  *KeptJournal // nil where no memory keeps what is not folded
}

// place returns where a record of n bytes goes that follows offset.
func (j *journal) place(offset uint64, n int) uint64 {
	if in := offset % j.size; in+uint64(n) > j.size {
		offset += j.size - in
	}
	return offset
}

func (j *journal) at(offset uint64) block.Physical {
	return block.At(0, j.start+offset%j.size/block.Size)
}

// roomForCommit reports whether a commit of n bytes may be appended. Commits
// take at most three eighths of the area, so that the record of the fold that
// frees them, which lists at most about as many pages as they have mappings,
// always fits, wherever the end of the area lies.
func (j *journal) roomForCommit(n int) bool {
	return j.place(j.next.Offset, n)+uint64(n)-j.tail <= j.size*3/8
}

// used returns how much of the area records take that are not folded.
func (j *journal) used() uint64 { return j.next.Offset - j.tail }

// prepare encodes r as the next record.
func (j *journal) prepare(r *record) (buf []byte, offset uint64, err error) {
	r.Number, r.Prev = j.next.Number, j.next.Prev
	enc := r.encode(j.pool)
	offset = j.place(j.next.Offset, len(enc))
	if offset+uint64(len(enc)) > j.tail+j.size {
		return nil, 0, errJournalFull
	}
	// Direct I/O wants aligned memory.
	if buf, err = hpdi.AllocPrivate(len(enc)); err != nil {
		return nil, 0, err
	}
	copy(buf, enc)
	return buf, offset, nil
}

// append writes r as the next record and syncs all devices. After an error
// that is not errJournalFull it is unknown whether the record exists, and
// nothing may be appended any more.
func (j *journal) append(r *record) error {
	buf, offset, err := j.prepare(r)
	if err != nil {
		return err
	}
	defer func() { _ = hpdi.Free(buf) }()
	if err := j.set.Do([]*devices.IO{{Op: hpdi.OpWrite, At: j.at(offset), Vec: [][]byte{buf}}}); err != nil {
		return fmt.Errorf("write journal record %d: %w", r.Number, err)
	}
	next := JournalPos{Offset: offset + uint64(len(buf)), Number: r.Number + 1, Prev: ondisk.CRC(buf)}
	if planted.Has(planted.KeptJournalEarly) && j.kept != nil {
		j.kept.put(j.next, offset, buf, next)
	}
	if !planted.Has(planted.RecordSyncMissing) {
		if err := j.set.Sync(); err != nil {
			return fmt.Errorf("journal record %d: %w", r.Number, err)
		}
	}
	if j.kept != nil {
		j.kept.put(j.next, offset, buf, next)
	}
	j.next = next
	return nil
}

// How much of the journal is read at once: little at first, twice as much each
// time that what follows is wanted, and at most so much. Most replays are short,
// and whoever takes over waits for them.
const (
	scanFirst = 256 << 10
	scanMost  = 4 << 20
)

// chain is the records that follow a position, as they are stored.
type chain struct {
	j      *journal
	w      *window
	frames []frame
	mended int // copies of records that were written anew
	// recalled is how many of frames, the first ones, came out of memory.
	recalled int
}

// frame is a stored record, whole according to its checksum.
type frame struct {
	head   ondisk.Header
	prev   uint32
	raw    []byte // all of it
	body   []byte // what follows the header
	offset uint64 // virtual, once it has its place in a chain
	n      int    // bytes that it takes on the device
	sum    uint32 // of all of them
}

// chain reads every record from pos on, the first ones from memory that a guest before has
// left, if there is any. It ends at the first one that is not
// there or not whole, which a power cut explains, unless a later record proves
// that it had been: then the journal is damaged.
func (j *journal) chain(pos JournalPos) (*chain, error) {
	j.tail, j.next = pos.Offset, pos
	c := &chain{j: j, w: &window{j: j, keep: true}}
	pos, err := c.recall(pos)
	if err != nil {
		c.free()
		return nil, err
	}
	for {
		f, ok, err := c.w.next(pos)
		if err == nil && !ok {
			f, ok, err = c.elsewhere(pos)
		}
		if err == nil && !ok {
			err = c.settle()
		}
		if err != nil {
			j.next = pos
			c.free()
			return nil, err
		}
		if !ok {
			return c, nil
		}
		c.frames = append(c.frames, f)
		pos = f.after()
	}
}

// elsewhere looks for the record that belongs at pos on each copy of the device,
// and writes it to the others: one that was read of another copy has decayed, or
// was being written when power was cut.
func (c *chain) elsewhere(pos JournalPos) (f frame, ok bool, err error) {
	defer func() { c.w.copy, c.w.n = 0, 0 }()
	for n := c.j.set.Copies(0); n > 1 && c.w.copy < n && !planted.Has(planted.JournalOneCopy); {
		c.w.copy, c.w.n = c.w.copy+1, 0
		if f, ok, err := c.w.next(pos); ok && err == nil {
			return f, true, c.write(&f)
		}
	}
	return f, false, nil
}

// settle writes the last record to the copies of the device that lack it: what
// follows it counts on it. All others were durable before it was begun.
func (c *chain) settle() error {
	if len(c.frames) == 0 || planted.Has(planted.JournalEndUnsettled) {
		return nil
	}
	return c.write(&c.frames[len(c.frames)-1])
}

// write makes all copies of a record alike.
func (c *chain) write(f *frame) error {
	n, err := c.j.set.Settle(c.j.at(f.offset), f.raw)
	c.mended += n
	return err
}

// ProveJournal reads what recovery would read, from all copies, and makes those of a
// record alike. It returns how many copies of records it has written anew, and
// whether all records are there: if not, a fold makes them superfluous. It is called
// between steps.
func (m *Machine) ProveJournal() (mended int, whole bool, err error) {
	j := m.journal // chain moves its positions
	j.kept = nil   // it is the device that is proved
	c, err := j.chain(m.sb.Journal)
	if err != nil {
		return 0, false, err
	}
	defer c.free()
	end := m.sb.Journal
	for i := range c.frames {
		f := &c.frames[i]
		if err := c.write(f); err != nil {
			return c.mended, false, err
		}
		end = f.after()
	}
	return c.mended, end == m.journal.next, nil
}

func (c *chain) free() { c.w.free() }

// mappings returns how many blocks the records map: no fewer, and hardly more.
func (c *chain) mappings() (n int) {
	for i := range c.frames {
		n += c.frames[i].mappings()
	}
	return n
}

// each calls fn with every record, which is valid during the call, and leaves the
// journal ready to append after the last one.
func (c *chain) each(fn func(*record) error) error {
	r := &record{}
	for _, f := range c.frames {
		if f.decode(r) != nil {
			return nil // it is whole and of nobody who writes journals: the end, too
		}
		if err := fn(r); err != nil {
			return err
		}
		c.j.next = f.after()
	}
	return nil
}

// damaged looks for a record that follows the end that replay found, or that
// should be the next and does not continue the chain, and returns an error if
// one exists. No crash leaves one: a record is begun when the one before is
// durable. It reads the whole area.
func (j *journal) damaged() error {
	w := &window{j: j}
	defer w.free()
	for off := uint64(0); off < j.size; off += block.Size {
		b, err := w.bytes(off, block.Size)
		if err != nil {
			return err
		}
		if _, err := ondisk.Open(b, ondisk.KindJournal, journalVersion); errors.Is(err, ondisk.ErrMagic) {
			continue
		}
		f, ok, err := w.frame(off)
		if err != nil {
			return err
		}
		ok = ok && f.decode(&record{}) == nil
		switch where := fmt.Sprintf("device block %v, record %d", j.at(j.next.Offset), j.next.Number); {
		case !ok || f.number() < j.next.Number:
		case f.number() == j.next.Number:
			return &block.CorruptError{What: "journal record", Where: where, Why: "it does not continue the record before it, which was changed since"}
		default:
			return &block.CorruptError{What: "journal record", Where: where, Why: fmt.Sprintf("it is unreadable although record %d exists", f.number())}
		}
	}
	return nil
}

// window is a piece of the journal in memory.
type window struct {
	j     *journal
	buf   []byte
	from  uint64 // offset in the area
	n     uint64
	keep  bool     // what was returned stays until free
	first int      // how much is read where nothing was read before; 0 for scanFirst
	kept  [][]byte // earlier ones of buf
	copy  int      // of the device, from 1, that is read alone; 0 for any
}

func (w *window) free() {
	for _, buf := range append(w.kept, w.buf) {
		_ = hpdi.Free(buf)
	}
	w.buf, w.kept, w.n = nil, nil, 0
}

// errBeyond says that bytes were asked for which the area does not have.
var errBeyond = errors.New("beyond the journal")

// bytes returns n bytes of the area from offset off on.
func (w *window) bytes(off uint64, n int) ([]byte, error) {
	if off+uint64(n) > w.j.size {
		return nil, errBeyond
	}
	if off < w.from || off+uint64(n) > w.from+w.n {
		chunk := cmp.Or(w.first, scanFirst)
		switch {
		case w.copy > 0:
			chunk = n
		case off > w.from && off <= w.from+w.n:
			chunk = min(2*int(w.n), scanMost)
		}
		if err := w.room(max(n, chunk)); err != nil {
			return nil, err
		}
		w.from, w.n = off, min(uint64(max(n, chunk)), w.j.size-off)
		if err := w.read(w.j.at(off), w.buf[:w.n]); err != nil {
			w.n = 0
			return nil, err
		}
	}
	return w.buf[off-w.from:][:n], nil
}

func (w *window) read(at block.Physical, p []byte) error {
	if w.copy > 0 {
		return w.j.set.ReadCopy(w.copy-1, at, p)
	}
	return w.j.set.Read(at, p)
}

// room makes buf one of at least n bytes.
func (w *window) room(n int) error {
	if w.keep && w.buf != nil {
		w.kept, w.buf = append(w.kept, w.buf), nil
	}
	if len(w.buf) >= n {
		return nil
	}
	_ = hpdi.Free(w.buf)
	w.n = 0
	var err error
	w.buf, err = hpdi.AllocPrivate(n)
	return err
}

// frame returns what is stored at offset off of the area; ok is false if no whole
// record of this pool is there. A device that cannot be read is an error: what it
// hides may exist.
func (w *window) frame(off uint64) (f frame, ok bool, err error) {
	b, err := w.bytes(off, block.Size)
	if err != nil {
		return f, false, err
	}
	n, ok := recordLength(b)
	if !ok {
		return f, false, nil
	}
	switch b, err = w.bytes(off, n); {
	case errors.Is(err, errBeyond):
		return f, false, nil
	case err != nil:
		return f, false, err
	}
	switch f, err = openFrame(b, w.j.pool); {
	case errors.Is(err, ondisk.ErrVersion):
		return f, false, err
	case err != nil:
		return f, false, nil
	}
	// What lies behind the record was zero when it was written, and no checksum but
	// that of the chain covers it.
	clear(b[f.head.Length:f.n])
	f.raw = b[:f.n]
	f.sum = ondisk.CRC(f.raw)
	return f, true, nil
}

// next returns the record that belongs at pos: right there, or at the start of the
// area when it did not fit before the end.
func (w *window) next(pos JournalPos) (f frame, ok bool, err error) {
	for _, offset := range []uint64{pos.Offset, w.j.place(pos.Offset, int(w.j.size))} {
		f, ok, err := w.frame(offset % w.j.size)
		if err != nil {
			return f, false, err
		}
		f.offset = offset
		if planted.Has(planted.JournalChainUnchecked) && ok && offset == pos.Offset && offset < w.j.tail+w.j.size {
			return f, true, nil
		}
		if ok && f.follows(pos) {
			return f, true, nil
		}
	}
	return f, false, nil
}

// number returns that of the record.
func (f *frame) number() uint64 { return f.head.Generation }

// follows reports whether the record is the one that belongs at pos.
func (f *frame) follows(pos JournalPos) bool { return f.number() == pos.Number && f.prev == pos.Prev }

// after returns where the next record belongs.
func (f *frame) after() JournalPos {
	return JournalPos{Offset: f.offset + uint64(f.n), Number: f.number() + 1, Prev: f.sum}
}
