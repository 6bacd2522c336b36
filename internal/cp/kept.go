package cp

import (
	"bytes"
	"encoding/binary"
	"fmt"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/planted"
)

// KindKept names the state of a kept journal.
const KindKept ondisk.Kind = "PLXunfld"

const (
	keptVersion = 1
	keptLen     = 128        // of one copy of the state; there are two
	keptHead    = block.Size // what lies before the records
	// keptEntry is how many bytes of records a mapping takes where mappings are scattered,
	// with room for some fingerprints; records of series take a fraction of it.
	keptEntry = 32
	// keptStep is about how many bytes of records a step of FillKept reads.
	keptStep = 1 << 20
)

// KeptJournal is a copy of the journal's records that wait for a fold, in memory that
// outlives the guest: whoever opens the pool after it need not read them from a device. It
// is advisory. It has what a sync has made durable, and a beginning of what replay needs:
//
//	from <= end, end-from <= len(ring)
//	records between from and end are durable on device 0, in one chain
//	replay begins at from, or behind it when a guest died over a fold
//
// What does not fit is left out until a fold has made room; then it is read from the device.
// The records lie at their virtual offset modulo the ring's length, as in the area on the
// device. It belongs to the goroutine of its Machine.
type KeptJournal struct {
	keptFrom
	mem, ring []byte
	end       JournalPos // its number and checksum are known from the chain
	full      bool       // the next record does not fit
}

// keptFrom says of which journal a copy is, and where it begins.
type keptFrom struct {
	pool        block.PoolID
	epoch       block.Epoch
	generation  uint64 // of the state
	start, size uint64 // the journal's area: first block of it on device 0, and bytes
	from        uint64
}

// KeptBytes returns how many bytes a copy takes that has room for all that Config lets
// wait for folds, in mappings that are scattered, in a journal of so many blocks.
func KeptBytes(foldLimit int, journalBlocks uint64) int64 {
	if foldLimit == 0 {
		foldLimit = DefaultFoldLimit
	}
	most := int64(foldLimit) + int64(foldLimit)/3
	// Commits take three eighths of the area at most.
	return keptHead + max(block.Size, min(most*keptEntry, int64(journalBlocks*block.Size/8*3)))&^(block.Size-1)
}

// keptState is what is stored of a KeptJournal beside the records.
type keptState struct {
	keptFrom
	end, ring uint64
}

// encode fills p, which has keptLen bytes, all zero.
func (s *keptState) encode(p []byte) {
	for i, v := range [...]uint64{s.start, s.size, s.from, s.end, s.ring} {
		binary.LittleEndian.PutUint64(p[64+8*i:], v)
	}
	ondisk.Seal(p, ondisk.Header{Kind: KindKept, Version: keptVersion, Length: keptLen, Pool: s.pool, Epoch: s.epoch, Generation: s.generation})
}

// decode reads one copy, for memory that has room for so many bytes of records.
func (s *keptState) decode(p []byte, room int) error {
	h, err := ondisk.Open(p, KindKept, keptVersion)
	if err != nil {
		return err
	}
	le := binary.LittleEndian
	*s = keptState{
		keptFrom: keptFrom{pool: h.Pool, epoch: h.Epoch, generation: h.Generation, start: le.Uint64(p[64:]), size: le.Uint64(p[72:]), from: le.Uint64(p[80:])},
		end:      le.Uint64(p[88:]), ring: le.Uint64(p[96:]),
	}
	aligned := (s.from|s.end|s.ring|s.size)%block.Size == 0
	if h.Length != keptLen || !aligned || s.ring == 0 || s.ring > uint64(room) || s.from > s.end || s.end-s.from > s.ring || s.size == 0 {
		return keptCorrupt("records %d to %d in %d bytes, of a journal of %d", s.from, s.end, s.ring, s.size)
	}
	return nil
}

// newest settles on the newer whole one of the two copies at the beginning of the memory.
func (s *keptState) newest(mem []byte) error {
	if len(mem) < keptHead+block.Size {
		return keptCorrupt("only %d bytes of memory", len(mem))
	}
	var a, b keptState
	errA, errB := a.decode(mem[:keptLen], len(mem)-keptHead), b.decode(mem[keptLen:2*keptLen], len(mem)-keptHead)
	second, err := ondisk.Newer(errA, a.generation, errB, b.generation)
	if *s = a; second {
		*s = b
	}
	return err
}

func keptCorrupt(why string, args ...any) error {
	return &block.CorruptError{What: "unfolded journal in memory", Where: "its state", Why: fmt.Sprintf(why, args...)}
}

// AdoptJournal returns the copy that a guest before has left in memory, or an error that
// says why that is none of the pool's. The journal is journalBlocks blocks of device 0 from
// journalStart on. Nothing is changed, and no record is believed before Recover has proved
// it.
func AdoptJournal(mem []byte, pool block.PoolID, journalStart, journalBlocks uint64) (*KeptJournal, error) {
	var s keptState
	if err := s.newest(mem); err != nil {
		return nil, err
	}
	if s.pool != pool || s.start != journalStart || s.size != journalBlocks*block.Size {
		return nil, keptCorrupt("it is of pool %v, of a journal of %d bytes at block %d", s.pool, s.size, s.start)
	}
	return s.journal(mem), nil
}

// journal returns the copy whose state this is, in the memory that it was read from. Where
// it ends is known without number and checksum.
func (s *keptState) journal(mem []byte) *KeptJournal {
	return &KeptJournal{keptFrom: s.keptFrom, mem: mem, ring: mem[keptHead:][:s.ring], end: JournalPos{Offset: s.end}}
}

// save stores the state: the copy of it that is older is replaced.
func (k *KeptJournal) save() {
	k.generation++
	s := keptState{keptFrom: k.keptFrom, end: k.end.Offset, ring: uint64(len(k.ring))}
	var p [keptLen]byte
	s.encode(p[:])
	ondisk.StoreWords(k.mem[k.generation%2*keptLen:], p[:]) // behind the records
}

// put adds a durable record, whose bytes on the device are given, that follows before and
// lies at offset, if it follows what is there.
func (k *KeptJournal) put(before JournalPos, offset uint64, raw []byte, after JournalPos) {
	if k.end != before || k.full {
		return
	}
	if offset+uint64(len(raw))-k.from > uint64(len(k.ring)) {
		k.full = true
		return
	}
	at := offset % uint64(len(k.ring))
	copy(k.ring, raw[copy(k.ring[at:], raw):])
	k.end = after
	k.save()
}

// folded gives up what lies before a position.
func (k *KeptJournal) folded(pos JournalPos) {
	k.from, k.full = pos.Offset, false
	if k.end.Offset < k.from {
		k.end = pos
	}
	k.save()
}

// frames returns the records that follow pos as far as they are whole and continue each
// other as those on the device must. They lie in the memory.
func (k *KeptJournal) frames(j *journal, pos JournalPos) (all []frame) {
	if k.start != j.start || k.size != j.size || pos.Offset < k.from {
		return nil
	}
	epoch := block.Epoch(0)
	for {
		f, ok := k.frame(pos.Offset)
		if next := j.place(pos.Offset, int(j.size)); (!ok || !f.follows(pos)) && next != pos.Offset {
			f, ok = k.frame(next)
		}
		if !ok || !f.follows(pos) || f.head.Epoch < epoch {
			return all
		}
		all = append(all, f)
		pos, epoch = f.after(), f.head.Epoch
	}
}

// frame returns what is there for an offset of the journal; ok is false if it is no whole
// record.
func (k *KeptJournal) frame(offset uint64) (f frame, ok bool) {
	if offset%block.Size != 0 || offset < k.from || offset >= k.end.Offset {
		return f, false
	}
	at := offset % uint64(len(k.ring))
	n, ok := recordLength(k.ring[at:])
	if !ok || uint64(n) > k.end.Offset-offset {
		return f, false
	}
	raw := k.ring[at:min(at+uint64(n), uint64(len(k.ring)))]
	if len(raw) < n { // it goes on at the beginning
		raw = append(bytes.Clone(raw), k.ring[:n-len(raw)]...)
	}
	f, err := openFrame(raw, k.pool)
	if err != nil || f.n != n || len(bytes.Trim(raw[f.head.Length:], "\x00")) > 0 {
		return f, false
	}
	f.raw, f.sum, f.offset = raw, ondisk.CRC(raw), offset
	return f, true
}

// recall takes the records that follow pos out of memory, and returns where they end. The
// device must have the last of them, with which the checksums that chain them prove the
// others: it may be older than the memory.
func (c *chain) recall(pos JournalPos) (JournalPos, error) {
	k := c.j.kept
	if k == nil {
		return pos, nil
	}
	all := k.frames(c.j, pos)
	k.from, k.end = pos.Offset, pos
	if len(all) == 0 {
		return pos, nil
	}
	last := &all[len(all)-1]
	if same, err := c.stored(last); err != nil || !same {
		return pos, err
	}
	c.frames, c.recalled = all, len(all)
	k.end = last.after()
	return k.end, nil
}

// stored reports whether the device has a record. With what it reads it has looked for the
// next one, too.
func (c *chain) stored(f *frame) (bool, error) {
	if planted.Has(planted.KeptJournalUnproved) {
		return true, nil
	}
	in, n := f.offset%c.j.size, block.Size
	if f.n+block.Size <= scanFirst && in+uint64(f.n+block.Size) <= c.j.size {
		n = f.n + block.Size
	}
	c.w.first = n
	b, err := c.w.bytes(in, n)
	c.w.first = block.Size // hardly anything follows
	if err != nil {
		return false, err
	}
	n = min(n, f.n)
	if !bytes.Equal(b[:n], f.raw[:n]) {
		c.w.first, c.w.n = 0, 0
		return false, nil
	}
	return true, nil
}

// KeepJournal begins a copy of the unfolded journal in memory that outlives the guest, in
// place of the one that there may be. FillKept brings what the journal has already.
func (m *Machine) KeepJournal(mem []byte) error {
	if len(mem) < keptHead+block.Size {
		return keptCorrupt("only %d bytes of memory", len(mem))
	}
	j := &m.journal
	k := &KeptJournal{
		keptFrom: keptFrom{pool: j.pool, epoch: m.sb.Epoch, start: j.start, size: j.size, from: m.sb.Journal.Offset},
		mem:      mem, ring: mem[keptHead : len(mem)&^(block.Size-1)], end: m.sb.Journal,
	}
	k.save()
	j.kept = k
	return nil
}

// LeaveJournal ends that a copy of the unfolded journal is kept.
func (m *Machine) LeaveJournal() { m.journal.kept = nil }

// KeptJournalStats describes a copy of the unfolded journal.
type KeptJournalStats struct {
	Bytes    int64 // that it has room for; 0 where there is none
	Used     int64 // of them by records
	Unfolded int64 // bytes of the journal that wait for folds
	Whole    bool  // all of them are there
	Recalled int   // records that Recover found there
}

// KeptJournal returns the present figures.
func (m *Machine) KeptJournal() KeptJournalStats {
	s := KeptJournalStats{Unfolded: int64(m.journal.next.Offset - m.sb.Journal.Offset), Recalled: m.recalled}
	if k := m.journal.kept; k != nil {
		s.Bytes, s.Used, s.Whole = int64(len(k.ring)), int64(k.end.Offset-k.from), k.end == m.journal.next
	}
	return s
}

// KeptBehind reports whether the copy of the unfolded journal lacks records that it has
// room for.
func (m *Machine) KeptBehind() bool {
	k := m.journal.kept
	return k != nil && !k.full && k.end != m.journal.next && m.claim == nil && m.broken == nil
}

// FillKept reads some of the records that the copy lacks from the device. It is called
// between steps, and not before what Recover found is durable, see Claim. After an error
// no more is read until a fold has been made.
func (m *Machine) FillKept() error {
	j := m.journal // next and tail are the journal's
	k := j.kept
	w := &window{j: &j}
	defer w.free()
	for read := 0; read < keptStep && m.KeptBehind(); {
		f, ok, err := w.next(k.end)
		if err != nil || !ok {
			k.full = true
			return err
		}
		k.put(k.end, f.offset, f.raw, f.after())
		read += f.n
	}
	return nil
}
