package virtio

import (
	"cmp"
	"fmt"
	"math"
	"slices"
)

// Slot is a piece of the driver's memory as this process has mapped it.
type Slot struct {
	Guest uint64 // address of its first byte as descriptors name it
	User  uint64 // the same as the addresses of rings name it
	Mem   []byte
}

// Memory is the driver's memory: slots of which no two share an address. It does not
// change; it may be used concurrently.
type Memory struct {
	guest []Slot // ascending by Guest
	user  []Slot // ascending by User
}

// NewMemory returns the memory made of these slots.
func NewMemory(slots []Slot) (*Memory, error) {
	m := &Memory{guest: slices.Clone(slots), user: slices.Clone(slots)}
	for _, kind := range []struct {
		name  string
		slots []Slot
		addr  func(Slot) uint64
	}{
		{"guest", m.guest, func(s Slot) uint64 { return s.Guest }},
		{"user", m.user, func(s Slot) uint64 { return s.User }},
	} {
		slices.SortFunc(kind.slots, func(x, y Slot) int { return cmp.Compare(kind.addr(x), kind.addr(y)) })
		for i, s := range kind.slots {
			at, n := kind.addr(s), uint64(len(s.Mem))
			switch {
			case n == 0:
				return nil, fmt.Errorf("memory at %s address %#x has no bytes", kind.name, at)
			case at > math.MaxUint64-n:
				return nil, fmt.Errorf("memory of %d bytes at %s address %#x reaches past the end of all addresses", n, kind.name, at)
			case i > 0 && at-kind.addr(kind.slots[i-1]) < uint64(len(kind.slots[i-1].Mem)):
				return nil, fmt.Errorf("memory at %s address %#x and memory of %d bytes at %#x overlap", kind.name, at, len(kind.slots[i-1].Mem), kind.addr(kind.slots[i-1]))
			}
		}
	}
	return m, nil
}

// Slots returns the slots in the order of their guest addresses.
func (m *Memory) Slots() []Slot { return m.guest }

// Guest returns the bytes from a guest address on, at most n, fewer where a slot ends, and
// none where there is no memory.
func (m *Memory) Guest(addr, n uint64) []byte {
	for i := range m.guest { // few, and the first is nearly always the one
		s := &m.guest[i]
		if off := addr - s.Guest; addr >= s.Guest && off < uint64(len(s.Mem)) {
			end := off + min(n, uint64(len(s.Mem))-off)
			return s.Mem[off:end:end]
		}
	}
	return nil
}

// ToGuest returns the guest address of the byte at a user address, and false where there is
// no memory.
func (m *Memory) ToGuest(user uint64) (uint64, bool) {
	for i := range m.user {
		s := &m.user[i]
		if off := user - s.User; user >= s.User && off < uint64(len(s.Mem)) {
			return s.Guest + off, true
		}
	}
	return 0, false
}

// User returns the n bytes at a user address, which must lie in one slot.
func (m *Memory) User(addr, n uint64) ([]byte, error) {
	for i := range m.user {
		s := &m.user[i]
		if off := addr - s.User; addr >= s.User && off < uint64(len(s.Mem)) {
			if n > uint64(len(s.Mem))-off {
				return nil, fmt.Errorf("%d bytes at user address %#x reach %d bytes past their memory", n, addr, n-(uint64(len(s.Mem))-off))
			}
			return s.Mem[off : off+n : off+n], nil
		}
	}
	return nil, fmt.Errorf("no memory at user address %#x", addr)
}
