package flashmap

import (
	crand "crypto/rand"
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/stack"
)

// CreateOptions says how a flash device is to be used.
type CreateOptions struct {
	// SetBytes is the size of a data set, a power of two from MinSetBytes to
	// MaxSetBytes: what is moved and remembered as one.
	SetBytes int64
	// Reach is how many bytes of primary devices the map has room for; 0 is 64 times
	// the size of the flash device.
	Reach int64
	// Notes is how many bytes what was collected may have, see WriteNote; 0 is 1/256 of the
	// device, 1 MiB at least and 64 MiB at most, as far as that takes no more than an
	// eighth of a small one. They are kept twice.
	Notes int64
}

// notesOf returns how many blocks are kept for what was collected on a device.
func (o CreateOptions) notesOf(size int64) int {
	n := o.Notes
	if n == 0 {
		// There are two places.
		n = max(0, min(max(size/256, 1<<20), 64<<20, (size-reserved*block.Size)/16-block.Size))
		return int(n / block.Size)
	}
	return int((n + block.Size - 1) / block.Size)
}

// Create makes a flash device on which nothing is. What was there is lost, but for
// blocks 0 to 63 and 128 to 191, which are left alone. The device remains open.
func Create(dev hpdi.Device, o CreateOptions) (ID, error) {
	info := dev.Info()
	l := label{notes: o.notesOf(info.Size)}
	for l.shift = block.Shift; int64(1)<<l.shift < o.SetBytes; {
		l.shift++
	}
	switch {
	case o.SetBytes != 1<<l.shift || o.SetBytes < MinSetBytes || o.SetBytes > MaxSetBytes:
		return ID{}, fmt.Errorf("data sets of %d bytes; powers of two from %d to %d are possible: %w", o.SetBytes, MinSetBytes, MaxSetBytes, block.ErrInvalid)
	case o.Reach < 0:
		return ID{}, fmt.Errorf("a map for %d bytes: %w", o.Reach, block.ErrInvalid)
	case o.Notes < 0 || o.Notes > maxNotes:
		return ID{}, fmt.Errorf("notes of %d bytes; up to %d are possible: %w", o.Notes, maxNotes, block.ErrInvalid)
	case info.ReadOnly:
		return ID{}, fmt.Errorf("make %s a flash device: %w", info.Name, hpdi.ErrReadOnly)
	case block.Size%info.BlockSize != 0:
		return ID{}, fmt.Errorf("make %s, with blocks of %d bytes, a flash device: %w", info.Name, info.BlockSize, block.ErrUnsupported)
	case o.Reach == 0:
		o.Reach = 64 * info.Size
	}
	// Each primary begins a page, wherever the one before has ended.
	mapPages := rangesOf(Set(min(o.Reach>>l.shift, maxSets))) + sparePages
	seg := fit(l.front(), uint64(info.Size)/block.Size, mapPages, l.shift)
	if seg.slots == 0 {
		return ID{}, fmt.Errorf("make %s a flash device: its %d bytes have no room for labels, notes, a map for %d bytes and one data set: %w", info.Name, info.Size, o.Reach, block.ErrInvalid)
	}
	l.segments = []segment{seg}
	_, _ = crand.Read(l.id[:]) // documented never to fail
	f, err := newFlash(dev, l)
	if err == nil {
		err = errors.Join(f.format(), f.giveBack())
	}
	if err != nil {
		return ID{}, fmt.Errorf("make %s a flash device: %w", info.Name, err)
	}
	return l.id, nil
}

// sparePages are pages of the map beyond those for the reach.
const sparePages = 8

// format writes what makes a device a flash device, the label last.
func (f *Flash) format() error {
	f.tableLock.Lock()
	defer f.tableLock.Unlock()
	f.sure = true // nothing was read
	clear(f.page[:block.Size])
	for _, b := range labelBlocks {
		if err := f.io.Do(&hpdi.Request{Op: hpdi.OpWrite, Offset: int64(b) * block.Size, Vec: [][]byte{f.page[:block.Size]}}); err != nil {
			return err
		}
	}
	if err := f.io.Flush(); err != nil {
		return err
	}
	if err := f.storeNewLocked(f.segmentChanges(0, 0)); err != nil {
		return err
	}
	return f.storeLabelLocked(f.label)
}

// segmentChanges returns the changes that write all pages from those of the map and
// of the table with the given numbers on, empty.
func (f *Flash) segmentChanges(mapPage, tablePage int) (changes []change) {
	for n := mapPage; n < len(f.maps); n++ {
		changes = append(changes, f.emptyMapChange(n))
	}
	for n := tablePage; n < len(f.table); n++ {
		changes = append(changes, f.tableChange(n, none, 0))
	}
	return changes
}

// storeLabelLocked makes l the label, and takes it for the present one when it is
// durable at both places: each of them says where data are.
func (f *Flash) storeLabelLocked(l label) error {
	if why := l.wrong(); l.generation > 0 && why != "" {
		panic("flashmap: label with " + why)
	}
	f.labelDoubt = true
	if err := f.storeLocked(true, f.labelChange(&l)); err != nil {
		return err
	}
	if err := f.io.Flush(); err != nil {
		return err
	}
	f.labelDoubt = false
	f.lockAll()
	f.label = l
	f.unlockAll()
	return nil
}

// certainLocked makes sure that the label on the device is the present one, which is
// not known after a change of it has failed: the label says where everything else is.
func (f *Flash) certainLocked() error {
	if !f.labelDoubt {
		return nil
	}
	return f.storeLabelLocked(f.label)
}

// newFlash returns a flash device with an empty table for a label.
func newFlash(dev hpdi.Device, l label) (*Flash, error) {
	info := dev.Info()
	f := &Flash{io: stack.NewQueues(dev, changesAtOnce), name: info.Name, info: info, readOnly: info.ReadOnly, id: l.id, shift: l.shift, label: l,
		tableLock: stack.NewLock(), abandoned: map[key]struct{}{}, wake: make(chan struct{}, 1)}
	for i := range f.notes {
		f.notes[i].lock = stack.NewLock()
	}
	f.extend()
	f.limit = none
	var err error
	f.page, err = hpdi.AllocPrivate(changesAtOnce * block.Size)
	return f, err
}

// extend gives all that is counted by slot or page the size that the label says. New
// slots are taken. The caller has all stripes, or nobody else has the flash device.
func (f *Flash) extend() {
	pages, old := f.label.tablePages(), len(f.table)
	f.table = append(f.table, make([]sheet, pages-old)...)
	f.maps = append(f.maps, make([]sheet, f.label.mapPages()-len(f.maps))...)
	f.keys = append(f.keys[:len(f.keys):len(f.keys)], make([]key, pages*pageWords-len(f.keys))...)
	f.unwanted = f.unwanted.Resized(pages * pageWords)
	f.slotsMu.Lock()
	defer f.slotsMu.Unlock()
	// The last word of the set may have room for more numbers than there are.
	f.taken = f.taken.Resized(pages * pageWords)
	for i := old * pageWords; i < len(f.taken)*64; i++ {
		f.taken.Set(i)
	}
}

// Open opens a flash device, which Close closes. After an error it is the caller's.
//
// Of a mirror label, table and map are read from every copy, because its copies need not
// be alike after a crash, and it is told which slots are free, see Unused.
//
// Data sets whose entries cannot be read are not taken for sets of the primary: see
// the package comment. Without writing to it a device is opened that is open for
// reading only.
func Open(dev hpdi.Device) (*Flash, error) {
	info := dev.Info()
	// The label says how large everything else is.
	f, err := newFlash(dev, label{})
	if err == nil {
		if err = f.load(); err == nil {
			if c, ok := dev.(hpdi.Copies); ok {
				c.Unused(f.Unused)
			}
			return f, nil
		}
	}
	return nil, errors.Join(fmt.Errorf("open flash device %s: %w", info.Name, err), f.giveBack())
}

func (f *Flash) load() error {
	f.tableLock.Lock()
	defer f.tableLock.Unlock()
	var why error
	sheets := make([]sheet, 1)
	err := f.readSheets(sheets, func(int) [2]uint64 { return labelBlocks }, func(_ int, p []byte) (uint64, error) {
		l, err := decodeLabel(p)
		return l.generation, err
	}, func(_ int, p []byte, w error) {
		if why = w; w == nil {
			f.label, why = decodeLabel(p)
		}
	})
	switch {
	case err != nil:
		return err
	case why != nil:
		return fmt.Errorf("its labels: %w", why)
	}
	f.labelSheet, f.id, f.shift = sheets[0], f.label.id, f.label.shift
	if end := int64(f.label.end()) * block.Size; f.info.Size < end {
		return fmt.Errorf("it has shrunk to %d bytes and needs %d; make it as large as it was: %w", f.info.Size, end, block.ErrInvalid)
	}
	f.extend()
	for _, m := range f.label.primaries {
		f.primaries[m.number] = f.label.primary(m)
	}
	if err := f.readTable(); err != nil {
		return err
	}
	if err := f.readMap(); err != nil {
		return err
	}
	f.settleLocked()
	return nil
}

// primary returns a primary of which nothing is known but what the label says.
func (l *label) primary(m member) *primary {
	p := &primary{number: m.number, id: m.id, sets: m.sets, use: &use{}}
	for _, r := range l.runs {
		for i := range r.count {
			if r.primary == m.number {
				p.pages = append(p.pages, r.page+i)
			}
		}
	}
	p.bits = stack.NewBits(len(p.pages) * pageSets)
	return p
}

// readTable reads which data set is in which slot.
func (f *Flash) readTable() error {
	var wrong error
	err := f.readSheets(f.table, f.tableAt, func(n int, p []byte) (uint64, error) {
		return decodePage(p, ondisk.KindFlashTable, f.id, n)
	}, func(n int, p []byte, why error) {
		if why != nil {
			f.lostPages.Add(1)
			return
		}
		for i := range pageWords {
			slot, k := slotNumber(n*pageWords+i), key(word(p, i))
			if k == 0 {
				continue
			}
			if number := k.primary(); number < 0 || number >= MaxPrimaries || f.primaries[number] == nil || k.set() >= f.primaries[number].sets || !f.label.valid(slot) {
				wrong = &block.CorruptError{What: "page of the table", Where: fmt.Sprintf("block %d of flash device %s", f.tableAt(n)[0], f.name), Why: fmt.Sprintf("slot %d holds %v, which is not possible", slot, k)}
			}
			f.keys[slot] = k
		}
	})
	return errors.Join(err, wrong)
}

// readMap reads which data sets are on flash. Pages that are nobody's are not read:
// whoever gets them has them written anew.
func (f *Flash) readMap() error {
	var wrong error
	for _, r := range f.label.runs {
		p := f.primaries[r.primary]
		err := f.readSheets(f.maps[r.page:][:r.count], func(n int) [2]uint64 { return f.mapAt(r.page + n) }, func(n int, page []byte) (uint64, error) {
			return decodePage(page, ondisk.KindFlashMap, f.id, r.page+n)
		}, func(n int, page []byte, why error) {
			if why != nil {
				p.unknown = append(p.unknown, r.first+n)
				return
			}
			for i := range pageWords {
				p.bits[(r.first+n)*pageWords+i].Store(word(page, i))
			}
			if i := p.bits.Next(int(p.sets)); i >= 0 {
				wrong = &block.CorruptError{What: "page of the map", Where: fmt.Sprintf("block %d of flash device %s", f.mapAt(r.page + n)[0], f.name), Why: fmt.Sprintf("it names data set %d of primary device %d, which has %d", i, p.number, p.sets)}
			}
		})
		if err != nil {
			return err
		}
	}
	return wrong
}
