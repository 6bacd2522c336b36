package pool

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/flashmap"
	"github.com/pollux-storage/pollux/internal/flashmap/collect"
	"github.com/pollux-storage/pollux/internal/flashmap/policy"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

// What a pool keeps on its flash device beside data sets are two notes: what people have
// said (flashKept), and what was collected. docs/format/flash.md describes both.

// flashKept is what people have said about the flash of a pool.
type flashKept struct {
	Policy   policy.Params
	Classes  map[string]string // of devices, by their identities
	Pins     []keptPin
	Evacuate bool // everything is to go back
}

// keptPin is a pin whose volume may get another name.
type keptPin struct {
	Volume block.VolumeID `json:"volume"`
	Offset int64          `json:"offset"`
	Length int64          `json:"length,omitempty"` // 0 is to the end of the volume
}

func (k keptPin) key() string { return fmt.Sprintf("%d:%d:%d", k.Volume, k.Offset, k.Length) }

// first returns the first block of a pin, and end the one behind its last.
func (k keptPin) first() block.Logical { return block.Logical(k.Offset / block.Size) }

func (k keptPin) end() block.Logical {
	if k.Length == 0 || k.Length > math.MaxInt64-block.Size-k.Offset {
		return math.MaxInt64
	}
	return block.Logical((k.Offset + k.Length + block.Size - 1) / block.Size)
}

// maxPins is how many pins a pool may have.
const maxPins = 256

// keptVersion is the version of the note.
const keptVersion = 1

// keptNote is the note, as JSON.
type keptNote struct {
	Version  int               `json:"version"`
	Policy   json.RawMessage   `json:"policy"`
	Classes  map[string]string `json:"classes,omitempty"`
	Pins     []keptPin         `json:"pins,omitempty"`
	Evacuate bool              `json:"evacuate,omitempty"`
}

func defaultKept() flashKept { return flashKept{Policy: policy.Defaults()} }

// clone returns a copy that shares nothing that changes.
func (k flashKept) clone() flashKept {
	k.Classes, k.Pins = maps.Clone(k.Classes), slices.Clone(k.Pins)
	return k
}

func (k flashKept) encode() ([]byte, error) {
	p, err := json.Marshal(k.Policy)
	if err != nil {
		return nil, err
	}
	return json.Marshal(keptNote{keptVersion, p, k.Classes, k.Pins, k.Evacuate})
}

func decodeKept(b []byte) (flashKept, error) {
	var n keptNote
	if err := json.Unmarshal(b, &n); err != nil {
		return flashKept{}, fmt.Errorf("%w: %w", err, block.ErrCorrupt)
	}
	if n.Version != keptVersion {
		return flashKept{}, fmt.Errorf("it is of version %d, this program knows %d: %w", n.Version, keptVersion, block.ErrUnsupported)
	}
	p, err := policy.Parse(n.Policy)
	if err != nil {
		return flashKept{}, fmt.Errorf("%w: %w", err, block.ErrCorrupt)
	}
	if len(n.Pins) > maxPins {
		return flashKept{}, fmt.Errorf("%d pins: %w", len(n.Pins), block.ErrCorrupt)
	}
	for _, k := range n.Pins {
		if k.Offset < 0 || k.Length < 0 {
			return flashKept{}, fmt.Errorf("a pin of %d bytes at %d: %w", k.Length, k.Offset, block.ErrCorrupt)
		}
	}
	return flashKept{p, n.Classes, n.Pins, n.Evacuate}, nil
}

// readKept reads what people have said. Whatever is wrong with it costs no data: the
// defaults count then, and somebody hears of it.
func (f *flash) readKept() error {
	f.kept = defaultKept()
	b, err := f.layer.ReadNote(flashmap.NotePolicy)
	if err == nil {
		var k flashKept
		if k, err = decodeKept(b); err == nil {
			f.kept = k
			return nil
		}
	}
	if errors.Is(err, block.ErrNotFound) && !errors.Is(err, block.ErrCorrupt) {
		return nil // none was ever written
	}
	if !errors.Is(err, block.ErrCorrupt) && !errors.Is(err, block.ErrUnsupported) && !errors.Is(err, ondisk.ErrVersion) {
		return err
	}
	f.tell("flash-policy-lost", "policy and pins of pool %s cannot be read, the defaults count: %v", f.p.label.Name, err)
	return nil
}

// store makes what people have said durable, and takes it over.
func (f *flash) store(k flashKept) error {
	b, err := k.encode()
	if err != nil {
		return err
	}
	w, err := f.layer.WriteNote(flashmap.NotePolicy, b)
	for done := false; err == nil && !done; {
		done, err = w.Step()
	}
	if err != nil {
		return err
	}
	f.kept = k
	return nil
}

// historyEntry is what was collected of one device.
type historyEntry struct {
	id    block.DeviceID
	state []byte // as collect.Collector.Save has it
}

// history is what is kept of what was collected.
type history struct {
	wear    policy.Wear
	devices []historyEntry
}

// encode packs what was collected.
func (h *history) encode() []byte {
	le := binary.LittleEndian
	b := le.AppendUint64(nil, uint64(h.wear.Hour))
	for _, n := range h.wear.Bytes {
		b = le.AppendUint64(b, uint64(n))
	}
	all := h.devices
	b = le.AppendUint32(b, uint32(len(all)))
	for _, e := range all {
		b = append(b, e.id[:]...)
		b = binary.LittleEndian.AppendUint32(b, uint32(len(e.state)))
		b = append(b, e.state...)
	}
	return b
}

// historyHead is what precedes the state of a device, and historyFixed what comes before all
// of them, in bytes.
const (
	historyHead  = 16 + 4
	historyFixed = 8 + 25*8 + 4
)

func decodeHistory(b []byte) (h history, err error) {
	d := ondisk.NewDecoder(b)
	h.wear.Hour = int64(d.U64())
	for i := range h.wear.Bytes {
		h.wear.Bytes[i] = int64(d.U64())
	}
	for range d.Count(historyHead) {
		var e historyEntry
		copy(e.id[:], d.Bytes(len(e.id)))
		e.state = d.Bytes(int(d.U32()))
		h.devices = append(h.devices, e)
	}
	if err := d.Err(); err != nil {
		return history{}, fmt.Errorf("what was collected: %w", err)
	}
	return h, nil
}

// recall takes over what a guest before has collected: the note, and of the region what is
// newer. Without it some windows pass before
// anything new comes to flash.
func (f *flash) recall(now time.Time) {
	f.keepAt = now.Add(flashKeep)
	b, err := f.layer.ReadNote(flashmap.NoteAccess)
	var h history
	if err == nil {
		h, err = decodeHistory(b)
	}
	for _, e := range h.devices {
		for _, d := range f.disks {
			if d.id == e.id {
				err = errors.Join(err, d.collector.Load(e.state, f.p.label.Pool, now))
			}
		}
	}
	wear, ok := f.recallUsage(now)
	if !ok || wear.Hour < h.wear.Hour {
		wear = h.wear
	}
	f.engine.AddWear(wear, now)
	if err != nil && !errors.Is(err, block.ErrNotFound) {
		f.tell("flash-history-lost", "what was collected of the devices of pool %s cannot be read whole: %v", f.p.label.Name, err)
	}
}

// keep writes what was collected to the flash device now and then, a step at a time.
func (f *flash) keep(now time.Time) {
	if f.note == nil && !now.Before(f.keepAt) {
		f.keepAt = now.Add(flashKeep)
		f.beginKeep(now)
	}
	if f.note == nil {
		return
	}
	done, err := f.note.Step()
	if err != nil {
		f.mishap(err)
	}
	if done || err != nil {
		f.note = nil
	}
	if done {
		f.count(func(s *FlashStats) { s.Kept = now })
	}
}

// beginKeep begins to write what was collected, unless nothing was.
func (f *flash) beginKeep(now time.Time) {
	counted := uint64(0)
	for _, d := range f.disks {
		counted += d.collector.Status().Counted
	}
	if counted == f.counted {
		return
	}
	h := history{wear: f.engine.Wear()}
	limit := (f.layer.NoteLimit(flashmap.NoteAccess)-historyFixed)/max(1, len(f.disks)) - historyHead
	for _, d := range f.disks {
		if limit < leastHistory {
			break // too small a device
		}
		h.devices = append(h.devices, historyEntry{d.id, d.collector.Save(collect.Identity{Pool: f.p.label.Pool, Epoch: f.p.epoch}, limit, now)})
	}
	w, err := f.layer.WriteNote(flashmap.NoteAccess, h.encode())
	if err != nil {
		return // it is open for reading only, or there is no room at all
	}
	f.note, f.counted = w, counted
}

// leastHistory is how many bytes what was collected of a device needs to be worth anything.
const leastHistory = 4096

// keepAll writes what was collected, before the pool is closed. Where it cannot be written
// what was kept before counts.
func (f *flash) keepAll(now time.Time) {
	if f.layer == nil || !f.recalled {
		return
	}
	if f.note == nil {
		f.beginKeep(now)
	}
	for f.note != nil {
		f.keep(now)
	}
}
