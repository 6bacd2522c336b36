package flashmap

import (
	"encoding/binary"
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

const (
	labelVersion = 1
	pageVersion  = 1
	noteVersion  = 1

	// reserved is what lies at the front of a flash device, in blocks: its labels, and
	// whatever says whose device it is.
	reserved = block.TrackBlocks

	// MinSetBytes and MaxSetBytes bound the size of a data set, in bytes.
	MinSetBytes = 64 << 10
	MaxSetBytes = block.TrackBytes

	// MaxPrimaries is how many primary devices a flash device serves; their
	// numbers are less.
	MaxPrimaries = 64

	// maxNotes bounds the bytes of each place of a note.
	maxNotes = 1 << 30

	maxSegments = 16
	maxRuns     = 96

	// pageHead is what lies between a page's common header and its words.
	pageHead = 16
	// pageWords is the number of words of a page: slots of a page of the table.
	pageWords = (block.Size - ondisk.HeaderSize - pageHead) / 8
	// pageSets is the number of data sets of a page of the map.
	pageSets = pageWords * 64
)

// labelBlocks are the blocks in which the two labels lie. Blocks 0 and 128 are those of
// the label of whatever the device belongs to, as on each of its devices: nothing here
// reads or writes them.
var labelBlocks = [2]uint64{64, 192}

// The policy lies behind the labels, in what the front has left.
const policyBlocks = 62

// front returns the block behind what lies in front of the segments: the labels, and
// the notes.
func (l *label) front() uint64 {
	if l.notes == 0 {
		return reserved
	}
	return reserved + 2*uint64(1+l.notes)
}

// noteAt returns the blocks in which the headers of a note lie, and how many blocks for
// its content follow each of them.
func (l *label) noteAt(kind Note) (at [2]uint64, blocks int) {
	if kind == NotePolicy {
		return [2]uint64{labelBlocks[0] + 1, labelBlocks[1] + 1}, policyBlocks
	}
	return [2]uint64{reserved, reserved + 1 + uint64(l.notes)}, l.notes
}

// ID is the random identity of a flash device.
type ID = block.PoolID

// Set is the number of a data set on its primary device.
type Set uint64

// key names a data set among those of all primaries. It is not zero.
type key uint64

const (
	keyBits = 48
	maxSets = block.MaxDeviceBlocks * block.Size / MinSetBytes
)

func keyOf(primary int, set Set) key { return key(primary+1)<<keyBits | key(set) }

// primary returns the number of the primary device, less than 0 if the key names none.
func (k key) primary() int { return int(k>>keyBits) - 1 }
func (k key) set() Set     { return Set(k & (1<<keyBits - 1)) }

// String returns what messages show.
func (k key) String() string {
	return fmt.Sprintf("data set %d of primary device %d", k.set(), k.primary())
}

// label is what a flash device says about itself.
type label struct {
	id         ID
	generation uint64
	shift      uint // log2 of the bytes of a data set
	notes      int  // blocks of each place of what was collected
	segments   []segment
	primaries  []member
	runs       []run
}

// segment is a part of the flash device: pages, slots for data, and the pages again.
type segment struct {
	start      uint64 // block
	mapPages   int
	tablePages int // as many as slots need, or more since it has shrunk
	slots      int
}

// member is a primary device that the flash device knows.
type member struct {
	number int
	id     block.DeviceID
	sets   Set // data sets that it had
}

// run says that pages of the map are for ranges of a primary that follow each other.
type run struct {
	primary int
	first   int // range of pageSets data sets
	page    int // of the map, counted through all segments
	count   int
}

// pages returns how many blocks one copy of all pages of a segment takes.
func (s segment) pages() uint64 { return uint64(s.mapPages + s.tablePages) }

// data returns the block at which the first slot begins.
func (s segment) data(shift uint) uint64 {
	per := uint64(1) << (shift - block.Shift)
	return (s.start + s.pages() + per - 1) / per * per
}

// second returns the block at which the second copy of the pages begins, far from
// the first: what breaks in one place shall not take both.
func (s segment) second(shift uint) uint64 {
	return s.data(shift) + uint64(s.slots)<<(shift-block.Shift)
}

// end returns the block behind the segment.
func (s segment) end(shift uint) uint64 { return s.second(shift) + s.pages() }

// valid reports whether there is room for a slot of that number.
func (l *label) valid(slot slotNumber) bool {
	page := int(slot) / pageWords
	for _, s := range l.segments {
		if page < s.tablePages {
			return page*pageWords+int(slot)%pageWords < s.slots
		}
		page -= s.tablePages
	}
	return false
}

// fit returns a segment with as many slots as there is room for in [start, end).
func fit(start, end uint64, mapPages int, shift uint) segment {
	s := segment{start: start, mapPages: mapPages}
	if end <= start {
		return s
	}
	s.slots = int(min((end-start)>>(shift-block.Shift), maxSlots))
	for {
		s.tablePages = (s.slots + pageWords - 1) / pageWords
		if s.slots == 0 || s.end(shift) <= end {
			return s
		}
		over := (s.end(shift) - end + 1<<(shift-block.Shift) - 1) >> (shift - block.Shift)
		s.slots -= min(s.slots, int(over))
	}
}

// maxSlots is how many slots a flash device has at most: numbers of slots are kept
// in four bytes.
const maxSlots = 1<<31 - 1

func (l *label) slots() (n int) {
	for _, s := range l.segments {
		n += s.slots
	}
	return n
}

func (l *label) tablePages() (n int) {
	for _, s := range l.segments {
		n += s.tablePages
	}
	return n
}

func (l *label) mapPages() (n int) {
	for _, s := range l.segments {
		n += s.mapPages
	}
	return n
}

func (l *label) end() uint64 { return l.segments[len(l.segments)-1].end(l.shift) }

func (l *label) encode() []byte {
	le := binary.LittleEndian
	b := make([]byte, ondisk.HeaderSize, block.Size)
	b = le.AppendUint32(b, uint32(l.shift))
	b = le.AppendUint32(b, uint32(l.notes))
	b = le.AppendUint32(b, uint32(len(l.segments)))
	for _, s := range l.segments {
		b = le.AppendUint64(b, s.start)
		b = le.AppendUint32(b, uint32(s.mapPages))
		b = le.AppendUint32(b, uint32(s.tablePages))
		b = le.AppendUint32(b, uint32(s.slots))
	}
	b = le.AppendUint32(b, uint32(len(l.primaries)))
	for _, m := range l.primaries {
		b = le.AppendUint32(b, uint32(m.number))
		b = append(b, m.id[:]...)
		b = le.AppendUint64(b, uint64(m.sets))
	}
	b = le.AppendUint32(b, uint32(len(l.runs)))
	for _, r := range l.runs {
		for _, n := range []int{r.primary, r.first, r.page, r.count} {
			b = le.AppendUint32(b, uint32(n))
		}
	}
	n := len(b)
	b = b[:block.Size]
	ondisk.Seal(b, ondisk.Header{Kind: ondisk.KindFlash, Version: labelVersion, Length: n, Pool: l.id, Generation: l.generation})
	return b
}

// The sizes of what a label lists, in bytes.
const (
	segmentSize = 20
	memberSize  = 28
	runSize     = 16
)

func decodeLabel(b []byte) (label, error) {
	oh, err := ondisk.Open(b, ondisk.KindFlash, labelVersion)
	if err != nil {
		return label{}, err
	}
	d := ondisk.NewDecoder(b[ondisk.HeaderSize:oh.Length])
	l := label{id: oh.Pool, generation: oh.Generation, shift: uint(d.U32()), notes: int(d.U32())}
	for range d.Count(segmentSize) {
		l.segments = append(l.segments, segment{d.U64(), int(d.U32()), int(d.U32()), int(d.U32())})
	}
	for range d.Count(memberSize) {
		m := member{number: int(d.U32())}
		copy(m.id[:], d.Bytes(len(m.id)))
		m.sets = Set(d.U64())
		l.primaries = append(l.primaries, m)
	}
	for range d.Count(runSize) {
		l.runs = append(l.runs, run{int(d.U32()), int(d.U32()), int(d.U32()), int(d.U32())})
	}
	if d.Err() == nil {
		if why := l.wrong(); why != "" {
			d.Fail("%s", why)
		}
	}
	if err := d.Err(); err != nil {
		return label{}, fmt.Errorf("label of a flash device: %w", err)
	}
	return l, nil
}

// wrong says what makes a label impossible. Nothing of it is believed before.
func (l *label) wrong() string {
	switch {
	case l.generation == 0:
		return "generation 0"
	case 1<<l.shift < MinSetBytes || 1<<l.shift > MaxSetBytes:
		return fmt.Sprintf("data sets of 2^%d bytes", l.shift)
	case l.notes > maxNotes/block.Size:
		return fmt.Sprintf("notes of %d blocks", l.notes)
	case len(l.segments) == 0 || len(l.segments) > maxSegments:
		return fmt.Sprintf("%d segments", len(l.segments))
	case len(l.primaries) > MaxPrimaries || len(l.runs) > maxRuns:
		return fmt.Sprintf("%d primary devices in %d runs", len(l.primaries), len(l.runs))
	}
	for i, s := range l.segments {
		after := l.front()
		if i > 0 {
			after = l.segments[i-1].end(l.shift)
		}
		if s.start < after || s.start > block.MaxDeviceBlocks || s.slots > s.tablePages*pageWords || s.end(l.shift) > block.MaxDeviceBlocks {
			return fmt.Sprintf("segment %d at block %d", i, s.start)
		}
	}
	if l.tablePages() > maxSlots/pageWords {
		return fmt.Sprintf("%d pages of the table", l.tablePages())
	}
	return l.wrongRuns()
}

// wrongRuns says what makes the lists of primaries and of their runs impossible.
func (l *label) wrongRuns() string {
	ranges := map[int]int{}
	for _, m := range l.primaries {
		if _, twice := ranges[m.number]; twice || m.number >= MaxPrimaries || m.sets > maxSets {
			return fmt.Sprintf("primary device %d with %d data sets", m.number, m.sets)
		}
		ranges[m.number] = 0
	}
	type span struct{ from, to int }
	var used []span
	for i, r := range l.runs {
		next, known := ranges[r.primary]
		if !known || r.first != next || r.count < 1 || r.count > l.mapPages() || r.page > l.mapPages()-r.count {
			return fmt.Sprintf("run %d of pages of the map", i)
		}
		ranges[r.primary] += r.count
		if slices.ContainsFunc(used, func(s span) bool { return r.page < s.to && s.from < r.page+r.count }) {
			return fmt.Sprintf("run %d of pages of the map overlaps another", i)
		}
		used = append(used, span{r.page, r.page + r.count})
	}
	for _, m := range l.primaries {
		if ranges[m.number] != rangesOf(m.sets) {
			return fmt.Sprintf("primary device %d has %d pages of the map for %d data sets", m.number, ranges[m.number], m.sets)
		}
	}
	return ""
}

// rangesOf returns how many pages of the map so many data sets take.
func rangesOf(sets Set) int { return int((sets + pageSets - 1) / pageSets) }

// encodePage fills p with a page of the table or the map. The words must be in it
// already, see wordAt.
func encodePage(p []byte, kind ondisk.Kind, id ID, number int, generation uint64) {
	head := p[ondisk.HeaderSize:][:pageHead]
	clear(head)
	binary.LittleEndian.PutUint32(head, uint32(number))
	ondisk.Seal(p, ondisk.Header{Kind: kind, Version: pageVersion, Length: block.Size, Pool: id, Generation: generation})
}

// word returns word i of a page.
func word(p []byte, i int) uint64 {
	return binary.LittleEndian.Uint64(p[ondisk.HeaderSize+pageHead+8*i:])
}

// putWord sets word i of a page.
func putWord(p []byte, i int, w uint64) {
	binary.LittleEndian.PutUint64(p[ondisk.HeaderSize+pageHead+8*i:], w)
}

// decodePage returns the generation of a page, and an error when p is no whole page
// of that kind and number of this flash device. Its words are then read with word.
func decodePage(p []byte, kind ondisk.Kind, id ID, number int) (uint64, error) {
	h, err := ondisk.Open(p, kind, pageVersion)
	switch {
	case err != nil:
		return 0, err
	case h.Length != block.Size || h.Pool != id || h.Generation == 0:
		return 0, fmt.Errorf("page of flash device %v, generation %d: %w", h.Pool, h.Generation, block.ErrCorrupt)
	}
	if n := binary.LittleEndian.Uint32(p[ondisk.HeaderSize:]); int(n) != number {
		return 0, fmt.Errorf("it is page %d: %w", n, block.ErrCorrupt)
	}
	return h.Generation, nil
}

// noteHead says what the content of a note is that lies behind it.
type noteHead struct {
	kind       Note
	generation uint64
	length     int // bytes
	sum        uint32
}

// noteHeadSize is what the header of a note has behind the common one.
const noteHeadSize = 16

// encode fills a block with the header.
func (h noteHead) encode(p []byte, id ID) {
	b := p[ondisk.HeaderSize:]
	clear(b)
	le := binary.LittleEndian
	le.PutUint32(b, uint32(h.kind))
	le.PutUint32(b[4:], h.sum)
	le.PutUint64(b[8:], uint64(h.length))
	ondisk.Seal(p, ondisk.Header{Kind: ondisk.KindFlashNote, Version: noteVersion, Length: ondisk.HeaderSize + noteHeadSize, Pool: id, Generation: h.generation})
}

// decodeNote returns the header of a note of so many bytes at most. What another flash
// device has left there is ondisk.ErrMagic.
func decodeNote(p []byte, id ID, kind Note, limit int) (noteHead, error) {
	oh, err := ondisk.Open(p, ondisk.KindFlashNote, noteVersion)
	switch {
	case err != nil:
		return noteHead{}, err
	case oh.Pool != id:
		return noteHead{}, fmt.Errorf("of flash device %v: %w", oh.Pool, ondisk.ErrMagic)
	}
	d := ondisk.NewDecoder(p[ondisk.HeaderSize:oh.Length])
	h := noteHead{kind: Note(d.U32()), generation: oh.Generation, sum: d.U32()}
	length := d.U64()
	switch {
	case d.Err() != nil:
	case h.kind != kind || h.generation == 0:
		d.Fail("note %d of generation %d", h.kind, h.generation)
	case length > uint64(limit):
		d.Fail("%d bytes where %d have room", length, limit)
	}
	if err := d.Err(); err != nil {
		return noteHead{}, fmt.Errorf("header of a note: %w", err)
	}
	h.length = int(length)
	return h, nil
}
