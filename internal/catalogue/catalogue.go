// Package catalogue holds the list of a pool's volumes: its form in memory, its
// encoding, and the changes by which consistency points commit it.
//
// A change becomes visible here only after the consistency point that carries
// it is durable. The whole list is stored by each fold; between folds the
// journal holds the changes.
package catalogue

import (
	"cmp"
	"encoding/binary"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/planted"
)

// Limits of a pool's volumes.
const (
	MaxVolumes = 4096
	MaxName    = 255
	// MaxSize is the size of the largest volume in bytes: 16 TiB, what the
	// four levels of a block map reach.
	MaxSize = 16 << 40
	// MaxBytes bounds the encoding of a whole list.
	MaxBytes = 8 + MaxVolumes*(entryMin+MaxName+MaxPending*pendingSize+2)
)

// Volume is one entry.
type Volume struct {
	ID      block.VolumeID
	Name    string
	Size    int64 // bytes, a multiple of block.Size
	Created time.Time
	Root    block.Pointer // of the volume's map, as of the last fold
	Used    int64         // blocks that the map refers to, as of the last fold
	// Deleted volumes have no name any more; they are listed until folds have
	// freed all that their tree refers to.
	Deleted bool
	Pending []Pending
	// Run is THN: how many blocks that follow each other are shared with such as are
	// stored already, 0 if none ever are.
	Run int
}

// MaxRun is the largest Run: the blocks of a track.
const MaxRun = block.TrackBlocks

// Pending is a range that was trimmed and whose blocks the tree still refers
// to: entries in it that were written up to Limit are dead.
type Pending struct {
	block.Range
	Limit block.CP
}

// MaxPending is the number of pending ranges that a volume can have.
const MaxPending = 64

const pendingSize = 24

// Dead reports whether an entry of the tree is in one of the ranges.
func Dead(pending []Pending, lba block.Logical, birth block.CP) bool {
	for _, p := range pending {
		if lba >= p.Start && lba < p.End && (birth <= p.Limit || planted.Has(planted.PendingWithoutBirth)) {
			return true
		}
	}
	return false
}

// entryMin is the size of an encoded Volume with an empty name.
const entryMin = 4 + 8 + 8 + block.PointerSize + 8 + 1 + 4 + 2

// Flags of an encoded Volume.
const (
	flagDeleted = 1 << iota
	flagRun     // its Run follows the name
)

// Append appends the encoding of v to b.
func (v Volume) Append(b []byte) []byte {
	le := binary.LittleEndian
	b = le.AppendUint32(b, uint32(v.ID))
	b = le.AppendUint64(b, uint64(v.Size))
	b = le.AppendUint64(b, uint64(v.Created.UnixNano()))
	b = ondisk.AppendPointer(b, v.Root)
	b = le.AppendUint64(b, uint64(v.Used))
	var flags byte
	if v.Deleted {
		flags |= flagDeleted
	}
	if v.Run > 0 {
		flags |= flagRun
	}
	b = append(b, flags)
	b = le.AppendUint32(b, uint32(len(v.Pending)))
	for _, p := range v.Pending {
		b = le.AppendUint64(b, uint64(p.Start))
		b = le.AppendUint64(b, uint64(p.End))
		b = le.AppendUint64(b, uint64(p.Limit))
	}
	if b = ondisk.AppendString(b, v.Name); v.Run > 0 {
		b = le.AppendUint16(b, uint16(v.Run))
	}
	return b
}

// DecodeVolume takes one volume off d.
func DecodeVolume(d *ondisk.Decoder) Volume {
	v := Volume{
		ID:      block.VolumeID(d.U32()),
		Size:    int64(d.U64()),
		Created: time.Unix(0, int64(d.U64())).UTC(),
		Root:    d.Pointer(),
		Used:    int64(d.U64()),
	}
	var flags byte
	if b := d.Bytes(1); b != nil {
		flags = b[0]
	}
	if v.Deleted = flags&flagDeleted != 0; flags > flagDeleted|flagRun {
		d.Fail("volume %d has flags %#x", v.ID, flags)
	}
	for range d.Count(pendingSize) {
		v.Pending = append(v.Pending, Pending{block.Range{Start: block.Logical(d.U64()), End: block.Logical(d.U64())}, block.CP(d.U64())})
	}
	if v.Name = d.String(); flags&flagRun != 0 {
		if v.Run = int(d.U16()); v.Run == 0 || v.Run > MaxRun {
			d.Fail("volume %d shares runs of %d blocks", v.ID, v.Run)
		}
	}
	if d.Err() == nil && (v.ID == 0 || v.Size <= 0 || v.Size%block.Size != 0 || v.Size > MaxSize || v.Deleted != (v.Name == "") || len(v.Pending) > MaxPending) {
		d.Fail("volume %d %q of %d bytes", v.ID, v.Name, v.Size)
	}
	return v
}

// Change is one committed change: a volume created or altered, or one deleted.
type Change struct {
	Put    *Volume // what folds keep of it is not part of the change
	Delete block.VolumeID
}

// Set is the list in memory. Its methods may be called concurrently.
type Set struct {
	mu     sync.RWMutex
	byID   map[block.VolumeID]Volume
	byName map[string]block.VolumeID
	next   block.VolumeID
}

// New returns an empty list.
func New() *Set {
	return &Set{byID: map[block.VolumeID]Volume{}, byName: map[string]block.VolumeID{}, next: 1}
}

// Apply carries out a committed change.
func (s *Set) Apply(c Change) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if c.Put == nil {
		if v, ok := s.byID[c.Delete]; ok {
			delete(s.byName, v.Name)
			v.Name, v.Deleted = "", true
			s.byID[v.ID] = v
		}
		return
	}
	v := *c.Put
	if old, ok := s.byID[v.ID]; ok {
		v.Root, v.Used, v.Pending = old.Root, old.Used, old.Pending
		delete(s.byName, old.Name)
	}
	s.putLocked(v)
}

func (s *Set) putLocked(v Volume) {
	s.byID[v.ID] = v
	if !v.Deleted {
		s.byName[v.Name] = v.ID
	}
	s.next = max(s.next, v.ID+1)
}

// Replace makes s the same list as other, which must not be used any more.
func (s *Set) Replace(other *Set) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.byID, s.byName, s.next = other.byID, other.byName, other.next
}

// SetTree records what a fold has made of a volume's tree.
func (s *Set) SetTree(id block.VolumeID, root block.Pointer, used int64, pending []Pending) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if v, ok := s.byID[id]; ok {
		v.Root, v.Used, v.Pending = root, used, pending
		s.byID[id] = v
	}
}

// Forget removes a deleted volume of which nothing is left.
func (s *Set) Forget(id block.VolumeID) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.byID, id)
}

// NextID returns an identity that no volume of the pool ever had.
func (s *Set) NextID() block.VolumeID {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.next
}

// Get returns a volume by identity, unless it was deleted.
func (s *Set) Get(id block.VolumeID) (Volume, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	v, ok := s.byID[id]
	return v, ok && !v.Deleted
}

// ByName returns a volume by name.
func (s *Set) ByName(name string) (Volume, bool) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	v, ok := s.byID[s.byName[name]]
	return v, ok
}

// List returns the volumes in the order of their identities.
func (s *Set) List() []Volume {
	return slices.DeleteFunc(s.All(), func(v Volume) bool { return v.Deleted })
}

// All is List with the deleted volumes that are not yet freed.
func (s *Set) All() []Volume {
	s.mu.RLock()
	defer s.mu.RUnlock()
	list := make([]Volume, 0, len(s.byID))
	for _, v := range s.byID {
		list = append(list, v)
	}
	slices.SortFunc(list, func(a, b Volume) int { return cmp.Compare(a.ID, b.ID) })
	return list
}

// Encode returns the encoding of a list: the next free identity, a count and
// the volumes.
func Encode(list []Volume, next block.VolumeID) []byte {
	b := binary.LittleEndian.AppendUint32(nil, uint32(next))
	b = binary.LittleEndian.AppendUint32(b, uint32(len(list)))
	for _, v := range list {
		b = v.Append(b)
	}
	return b
}

// Decode returns the list that b encodes.
func Decode(b []byte) (*Set, error) {
	s := New()
	d := ondisk.NewDecoder(b)
	next := block.VolumeID(d.U32())
	for range d.Count(entryMin) {
		v := DecodeVolume(d)
		if err := d.Err(); err != nil {
			return nil, fmt.Errorf("catalogue: %w", err)
		}
		if _, dup := s.byID[v.ID]; dup {
			return nil, fmt.Errorf("catalogue: volume %d twice: %w", v.ID, block.ErrCorrupt)
		}
		if _, dup := s.byName[v.Name]; dup && !v.Deleted {
			return nil, fmt.Errorf("catalogue: volume %q twice: %w", v.Name, block.ErrCorrupt)
		}
		s.putLocked(v) // nobody else has s yet
	}
	s.next = max(s.next, next)
	if err := d.Err(); err != nil {
		return nil, fmt.Errorf("catalogue: %w", err)
	}
	return s, nil
}
