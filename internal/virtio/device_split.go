package virtio

import (
	"encoding/binary"
	"fmt"
)

// DeviceSplit is the device's side of a split virtqueue (2.7).
type DeviceSplit struct {
	mem     *Memory
	desc    []byte
	avail   []byte
	used    []byte
	size    int
	mask    uint16
	event   bool // FEventIdx
	indir   bool // FIndirectDesc
	next    uint16
	put     uint16 // index of the used ring behind the batch
	usedIdx uint16 // what the driver sees
	flags   uint16 // of the used ring

	noticed uint16 // usedIdx when NeedNotice was asked last
	asked   bool
	busy    []bool // head descriptors of requests that the device has
}

// NewDeviceSplit returns the device's side of a queue of size descriptors whose parts are
// at these user addresses, of which avail is that of the next available index. The index
// of the used ring is read from memory.
func NewDeviceSplit(m *Memory, size int, features Features, desc, avail, used uint64, next uint16) (*DeviceSplit, error) {
	if err := CheckSize(size, false); err != nil {
		return nil, err
	}
	d := &DeviceSplit{
		mem: m, size: size, mask: uint16(size - 1), next: next,
		event: features.Has(FEventIdx), indir: features.Has(FIndirectDesc), busy: make([]bool, size),
	}
	descN, availN, usedN := SplitBytes(size)
	for _, p := range []struct {
		name  string
		part  *[]byte
		addr  uint64
		n     int
		align uint64
	}{
		{"descriptor table", &d.desc, desc, descN, 16},
		{"available ring", &d.avail, avail, availN, 4},
		{"used ring", &d.used, used, usedN, 4},
	} {
		if p.addr%p.align != 0 {
			return nil, fmt.Errorf("%w: a %s at %#x is not aligned to %d bytes", ErrBroken, p.name, p.addr, p.align)
		}
		var err error
		if *p.part, err = m.User(p.addr, uint64(p.n)); err != nil {
			return nil, fmt.Errorf("%w: %s: %w", ErrBroken, p.name, err)
		}
		if !aligned(*p.part, int(p.align)) {
			return nil, fmt.Errorf("%w: a %s at %#x is not aligned in memory", ErrBroken, p.name, p.addr)
		}
	}
	d.usedIdx = uint16(Load(d.used, 0) >> 16)
	d.put = d.usedIdx
	return d, nil
}

// UsedIndex returns the index of the used ring.
func (d *DeviceSplit) UsedIndex() uint16 { return d.usedIdx }

// Resume says that the device has taken requests before, which Load will bring: then the next available one
// is behind them.
func (d *DeviceSplit) Resume(taken int) { d.next = d.usedIdx + uint16(taken) }

func (d *DeviceSplit) availIdx() uint16 { return uint16(Load(d.avail, 0) >> 16) }

// Ready implements Device.
func (d *DeviceSplit) Ready() bool { return d.availIdx() != d.next }

// Next implements Device.
func (d *DeviceSplit) Next(c *Chain) (bool, error) {
	idx := d.availIdx()
	if idx == d.next {
		return false, nil
	}
	if ahead := idx - d.next; int(ahead) > d.size {
		return false, fmt.Errorf("%w: the index of available requests is %d, %d ahead of %d in a queue of %d", ErrBroken, idx, ahead, d.next, d.size)
	}
	head := binary.LittleEndian.Uint16(d.avail[4+2*int(d.next&d.mask):])
	if err := d.load(c, head); err != nil {
		return false, err
	}
	d.next++
	return true, nil
}

// Load implements Device.
func (d *DeviceSplit) Load(c *Chain, head uint16, _ []PackedDesc) error {
	return d.load(c, head)
}

func (d *DeviceSplit) load(c *Chain, head uint16) error {
	c.reset()
	c.Head = head
	if int(head) >= d.size {
		return fmt.Errorf("%w: a request begins with descriptor %d of %d", ErrBroken, head, d.size)
	}
	if d.busy[head] {
		return fmt.Errorf("%w: a request begins with descriptor %d, with which one that is not done begins", ErrBroken, head)
	}
	if err := d.walk(c, head); err != nil {
		return err
	}
	d.busy[head] = true
	return nil
}

// walk follows the descriptors of a request.
func (d *DeviceSplit) walk(c *Chain, head uint16) error {
	for at, steps := head, 0; ; steps++ {
		if steps == d.size {
			return fmt.Errorf("%w: a loop in the request that begins with descriptor %d", ErrBroken, head)
		}
		x := ReadSplitDesc(d.desc, int(at))
		if x.Flags&DescIndirect != 0 {
			return d.table(c, head, at, x)
		}
		if err := c.add(d.mem, x.Addr, x.Len, x.Flags&DescWrite != 0); err != nil {
			return fmt.Errorf("request with head %d, descriptor %d: %w", head, at, err)
		}
		if x.Flags&DescNext == 0 {
			return nil
		}
		if int(x.Next) >= d.size {
			return fmt.Errorf("%w: request with head %d: descriptor %d leads to %d of %d", ErrBroken, head, at, x.Next, d.size)
		}
		at = x.Next
	}
}

// table follows a descriptor that refers to an indirect table, which ends a request.
func (d *DeviceSplit) table(c *Chain, head, at uint16, x Desc) error {
	var err error
	switch {
	case !d.indir:
		err = fmt.Errorf("%w: an indirect table, which was not negotiated", ErrBroken)
	case x.Flags&DescNext != 0:
		err = fmt.Errorf("%w: a descriptor that is indirect and leads to another", ErrBroken)
	default:
		err = c.indirect(d.mem, x.Addr, x.Len, true)
	}
	if err != nil {
		return fmt.Errorf("request with head %d, descriptor %d: %w", head, at, err)
	}
	return nil
}

// Put implements Device.
func (d *DeviceSplit) Put(c *Chain, written uint32) {
	at := 4 + 8*int(d.put&d.mask)
	binary.LittleEndian.PutUint32(d.used[at:], uint32(c.Head))
	binary.LittleEndian.PutUint32(d.used[at+4:], written)
	d.put++
	d.busy[c.Head] = false
}

// Publish implements Device.
func (d *DeviceSplit) Publish() {
	d.usedIdx = d.put
	d.head()
}

func (d *DeviceSplit) head() { Store(d.used, 0, uint32(d.flags)|uint32(d.usedIdx)<<16) }

// NeedNotice implements Device.
func (d *DeviceSplit) NeedNotice() bool {
	old, asked := d.noticed, d.asked
	d.noticed, d.asked = d.usedIdx, true
	if asked && old == d.usedIdx {
		return false
	}
	if !d.event {
		return uint16(Load(d.avail, 0))&AvailNoInterrupt == 0
	}
	event := uint16(Load(d.avail, 4+2*d.size))
	return !asked || NeedEvent(event, d.usedIdx, old)
}

// WantNotice implements Device.
func (d *DeviceSplit) WantNotice(want bool) bool {
	switch {
	case d.event && want:
		Store(d.used, 4+8*d.size, uint32(d.next))
	case d.event:
		return false // the event stays behind, where the driver does not come again soon
	case want:
		d.flags &^= UsedNoNotify
		d.head()
	default:
		d.flags |= UsedNoNotify
		d.head()
		return false
	}
	return d.Ready()
}

// Base implements Device.
func (d *DeviceSplit) Base() uint32 { return uint32(d.next) }

// SetMemory implements [Device].
func (d *DeviceSplit) SetMemory(m *Memory) { d.mem = m }
