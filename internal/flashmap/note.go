package flashmap

import (
	"cmp"
	"errors"
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/planted"
	"github.com/pollux-storage/pollux/internal/stack"
)

// Note says what a note is about. A note is a piece of bytes that whoever decides what
// is moved keeps on the flash device, and that is replaced as a whole.
type Note int

// The notes of a flash device.
const (
	// NotePolicy is by what is decided what is moved.
	NotePolicy Note = iota
	// NoteAccess is what was seen of how data sets are used.
	NoteAccess

	noteCount
)

// String returns what messages show.
func (n Note) String() string {
	if n == NotePolicy {
		return "the policy"
	}
	return "what was collected"
}

// noteStep is how many bytes a step of a NoteWriter writes at most.
const noteStep = 256 << 10

// noteState is what is known of a note. The place that does not hold the newest one is
// written next.
type noteState struct {
	lock       stack.Lock // guards all below, and is held while the note is read or written
	known      bool       // newest is
	newest     int        // place that holds the newest one that is whole, -1 for none
	durable    bool       // whatever is at newest would survive a power cut
	generation uint64     // the highest that was found or tried
	writer     *NoteWriter
}

// NoteLimit returns how many bytes a note may have.
// It is 0 where a label keeps no room for what was collected.
func (f *Flash) NoteLimit(kind Note) int {
	_, blocks := f.noteAt(kind)
	return blocks * block.Size
}

func (f *Flash) noteAt(kind Note) (at [2]uint64, blocks int) {
	f.stripes[0].mu.Lock() // who changes the label has all stripes
	defer f.stripes[0].mu.Unlock()
	return f.label.noteAt(kind)
}

// NoteWriter writes a note. It is a machine of steps that whoever calls Step drives.
type NoteWriter struct {
	f       *Flash
	kind    Note
	content []byte
	at      uint64 // block of the header
	place   int
	head    noteHead
	stage   noteStage
	off     int // bytes of content that are written
}

type noteStage int

const (
	noteFinding noteStage = iota // where the newest is
	noteWriting
	noteSyncing
	noteSealing
	noteOver
)

// WriteNote begins to replace a note, of which content must not change until that is
// done. Until the last step, and after a power cut in any of them, the note is what it
// was; afterwards it is content, durably. Writing that is begun while the same note is
// being written ends the earlier one, with an error. A note that is longer than
// [Flash.NoteLimit] is refused.
func (f *Flash) WriteNote(kind Note, content []byte) (*NoteWriter, error) {
	limit := f.NoteLimit(kind)
	switch {
	case f.readOnly:
		return nil, fmt.Errorf("write %v to flash device %s: %w", kind, f.name, hpdi.ErrReadOnly)
	case len(content) > limit || limit == 0: // without room not even a header has any
		return nil, fmt.Errorf("write %v to flash device %s: %d bytes are more than the %d that it has room for: %w", kind, f.name, len(content), limit, block.ErrInvalid)
	}
	n := &f.notes[kind]
	n.lock.Lock()
	defer n.lock.Unlock()
	n.writer = &NoteWriter{f: f, kind: kind, content: content}
	return n.writer, nil
}

// errSuperseded: somebody else writes the note.
var errSuperseded = errors.New("it is being written by somebody else since")

// Step does a part of the writing: it writes at most 256 KiB, and waits for the device. It
// returns true when the note is durable. After an error it can be called again. The first
// step reads the newest note if nobody has read or written it since the flash device
// was opened.
func (w *NoteWriter) Step() (done bool, err error) {
	n := &w.f.notes[w.kind]
	n.lock.Lock()
	defer n.lock.Unlock()
	switch {
	case w.stage == noteOver:
		return true, nil
	case n.writer != w:
		err = errSuperseded
	default:
		err = w.step(n)
	}
	if err != nil {
		return false, fmt.Errorf("write %v to flash device %s: %w", w.kind, w.f.name, err)
	}
	return w.stage == noteOver, nil
}

func (w *NoteWriter) step(n *noteState) error {
	switch w.stage {
	case noteFinding:
		return w.find(n)
	case noteWriting:
		return w.write()
	case noteSyncing:
		return w.sync()
	}
	return w.seal(n)
}

// find chooses the place.
func (w *NoteWriter) find(n *noteState) error {
	if !n.known {
		if _, err := w.f.readNoteLocked(w.kind); err != nil && !n.known {
			return err
		}
	}
	// The newest may be one whose header could not be made durable, and what is written
	// now goes over the one before.
	if !n.durable && !planted.Has(planted.FlashNoteUnsure) {
		if err := w.f.io.Flush(); err != nil {
			return w.f.fail(err)
		}
	}
	n.durable = true
	w.place = 0
	if n.newest == 0 {
		w.place = 1
	}
	if planted.Has(planted.FlashNoteInPlace) {
		w.place = max(0, n.newest)
	}
	n.generation++
	places, _ := w.f.noteAt(w.kind)
	w.at = places[w.place]
	w.head = noteHead{kind: w.kind, generation: n.generation, length: len(w.content), sum: ondisk.CRC(w.content)}
	w.stage = noteWriting
	return nil
}

// write writes a piece of the content.
func (w *NoteWriter) write() error {
	if k := min(len(w.content)-w.off, noteStep); k > 0 {
		buf, err := hpdi.AllocPrivate((k + block.Size - 1) / block.Size * block.Size)
		if err != nil {
			return err
		}
		copy(buf, w.content[w.off:][:k])
		err = w.f.io.Do(&hpdi.Request{Op: hpdi.OpWrite, Offset: int64(w.at+1)*block.Size + int64(w.off), Vec: [][]byte{buf}})
		if err = errors.Join(err, hpdi.Free(buf)); err != nil {
			return w.f.fail(err)
		}
		w.off += k
	}
	if w.off == len(w.content) {
		w.stage = noteSyncing
	}
	return nil
}

// sync makes the content durable. What a sync that failed has left behind is unknown:
// all is written again.
func (w *NoteWriter) sync() error {
	if err := w.f.io.Flush(); err != nil {
		w.stage, w.off = noteWriting, 0
		return w.f.fail(err)
	}
	w.stage = noteSealing
	return nil
}

// seal writes the header, which makes the content the note.
func (w *NoteWriter) seal(n *noteState) error {
	buf, err := hpdi.AllocPrivate(block.Size)
	if err != nil {
		return err
	}
	w.head.encode(buf, w.f.id)
	n.durable = false
	err = w.f.io.Do(&hpdi.Request{Op: hpdi.OpWrite, Offset: int64(w.at) * block.Size, Vec: [][]byte{buf}})
	if err == nil && !planted.Has(planted.FlashNoteEarly) {
		err = w.f.io.Flush()
	}
	if err = errors.Join(err, hpdi.Free(buf)); err != nil {
		return w.f.fail(err)
	}
	n.newest, n.durable, n.writer = w.place, true, nil
	w.content, w.stage = nil, noteOver
	return nil
}

// ReadNote returns a note, the newest one that is whole. The error is of kind
// block.ErrNotFound when there is none, also when those that were written are damaged,
// which it says then.
func (f *Flash) ReadNote(kind Note) ([]byte, error) {
	n := &f.notes[kind]
	n.lock.Lock()
	defer n.lock.Unlock()
	content, err := f.readNoteLocked(kind)
	if err != nil {
		return nil, fmt.Errorf("read %v from flash device %s: %w", kind, f.name, err)
	}
	return content, nil
}

// readNoteLocked is ReadNote, and finds out at which place the newest is. Only when the
// device fails that remains unknown.
func (f *Flash) readNoteLocked(kind Note) ([]byte, error) {
	n := &f.notes[kind]
	places, blocks := f.noteAt(kind)
	if blocks == 0 {
		return nil, fmt.Errorf("the flash device has no room for it: %w", block.ErrNotFound)
	}
	var heads [2]noteHead
	var errs []error
	for i, at := range places {
		h, err := f.readNoteHead(kind, at, blocks*block.Size)
		switch {
		case errors.Is(err, ondisk.ErrVersion):
			return nil, fmt.Errorf("block %d: %w", at, err)
		case err == nil:
			n.generation = max(n.generation, h.generation)
			heads[i] = h
		case !errors.Is(err, ondisk.ErrMagic):
			errs = append(errs, fmt.Errorf("block %d: %w", at, err))
		}
	}
	order := []int{0, 1}
	slices.SortStableFunc(order, func(a, b int) int { return cmp.Compare(heads[b].generation, heads[a].generation) })
	for _, i := range order {
		if heads[i].generation == 0 {
			continue
		}
		content, err := f.readNoteContent(places[i]+1, heads[i])
		if err == nil {
			n.known, n.newest = true, i
			return content, nil
		}
		errs = append(errs, fmt.Errorf("%d bytes from block %d on: %w", heads[i].length, places[i]+1, err))
	}
	if slices.ContainsFunc(errs, func(err error) bool { return !errors.Is(err, block.ErrCorrupt) }) {
		return nil, f.fail(errors.Join(errs...))
	}
	n.known, n.newest = true, -1
	if len(errs) > 0 {
		return nil, fmt.Errorf("it is damaged at each of its places: %w: %w", block.ErrNotFound, errors.Join(errs...))
	}
	return nil, fmt.Errorf("it was never written: %w", block.ErrNotFound)
}

// readNoteHead reads the header at one place of a note. A header of another flash
// device, which was there before, is none.
func (f *Flash) readNoteHead(kind Note, at uint64, limit int) (noteHead, error) {
	buf, err := hpdi.AllocPrivate(block.Size)
	if err != nil {
		return noteHead{}, err
	}
	defer func() { _ = hpdi.Free(buf) }()
	errs := make([]error, 1)
	err = f.readBlocks(at, buf, errs, func(_ int, p []byte) (uint64, error) {
		h, err := decodeNote(p, f.id, kind, limit)
		return h.generation, err
	})
	if err = errors.Join(err, errs[0]); err != nil {
		return noteHead{}, err
	}
	return decodeNote(buf, f.id, kind, limit)
}

// readNoteContent reads what a header is about: as the device gives it, and if that is
// not it from each of its copies.
func (f *Flash) readNoteContent(at uint64, h noteHead) ([]byte, error) {
	buf, err := hpdi.AllocPrivate(noteStep)
	if err != nil {
		return nil, err
	}
	defer func() { _ = hpdi.Free(buf) }()
	content := make([]byte, h.length)
	read := func(from func(off int64, p []byte) error) error {
		for off := 0; off < h.length; off += noteStep {
			part := content[off:min(off+noteStep, h.length)]
			p := buf[:(len(part)+block.Size-1)/block.Size*block.Size]
			if err := from(int64(at)*block.Size+int64(off), p); err != nil {
				return err
			}
			copy(part, p)
		}
		if sum := ondisk.CRC(content); sum != h.sum {
			return fmt.Errorf("stored %08x, computed %08x: %w", h.sum, sum, ondisk.ErrChecksum)
		}
		return nil
	}
	err = read(f.readAny)
	for _, one := range f.copiesOf() {
		if err == nil || read(one) == nil {
			return content, nil
		}
	}
	return content, err
}
