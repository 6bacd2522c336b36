package virtio

import (
	"encoding/binary"
	"fmt"
)

// PackedPosition is a place in a packed ring: a number of a descriptor and the wrap counter
// there (2.8.1).
type PackedPosition struct {
	Index uint16
	Wrap  bool
}

// Forward returns the place n descriptors on in a ring of size descriptors, n at most size.
func (p PackedPosition) Forward(n, size int) PackedPosition {
	i := int(p.Index) + n
	if i >= size {
		i -= size
		p.Wrap = !p.Wrap
	}
	p.Index = uint16(i)
	return p
}

// Bits returns the place as vhost-user and event structures have it: the wrap counter in
// bit 15.
func (p PackedPosition) Bits() uint32 {
	if p.Wrap {
		return uint32(p.Index) | 1<<15
	}
	return uint32(p.Index)
}

// PositionOf is the reverse of Bits.
func PositionOf(bits uint16) PackedPosition { return PackedPosition{bits & 0x7fff, bits>>15 != 0} }

// DevicePacked is the device's side of a packed virtqueue (2.8).
type DevicePacked struct {
	mem    *Memory
	ring   []byte
	driver []byte // its event structure
	device []byte // ours
	size   int
	event  bool
	indir  bool

	avail PackedPosition
	used  PackedPosition // where the batch begins
	put   PackedPosition // behind the batch
	first struct {       // completion that Publish shows
		any   bool
		id    uint16
		flags uint16
		at    PackedPosition
	}

	steps int // descriptors since NeedNotice was asked last
	asked bool
	taken int // descriptors that the device has
}

// NewDevicePacked returns the device's side of a queue of size descriptors whose ring and
// event structures are at these user addresses, and which is at base (see Device.Base).
func NewDevicePacked(m *Memory, size int, features Features, ring, driver, device uint64, base uint32) (*DevicePacked, error) {
	if err := CheckSize(size, true); err != nil {
		return nil, err
	}
	d := &DevicePacked{
		mem: m, size: size, event: features.Has(FEventIdx), indir: features.Has(FIndirectDesc),
		avail: PositionOf(uint16(base)), used: PositionOf(uint16(base >> 16)),
	}
	d.put = d.used
	if int(d.avail.Index) >= size || int(d.used.Index) >= size {
		return nil, fmt.Errorf("%w: a packed queue of %d descriptors at available descriptor %d and used descriptor %d", ErrBroken, size, d.avail.Index, d.used.Index)
	}
	ringN, eventN := PackedBytes(size)
	for _, p := range []struct {
		name  string
		part  *[]byte
		addr  uint64
		n     int
		align uint64
	}{
		{"descriptor ring", &d.ring, ring, ringN, 16},
		{"driver's event structure", &d.driver, driver, eventN, 4},
		{"device's event structure", &d.device, device, eventN, 4},
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
	return d, nil
}

// Resume says where the queue is, when the device has taken requests before that Load will
// bring.
func (d *DevicePacked) Resume(avail, used PackedPosition) {
	d.avail, d.used = avail, used
	d.put = d.used
}

// Available reports whether the descriptor there is as the driver has made it available.
func (d *DevicePacked) Available(at PackedPosition) bool {
	_, flags := LoadPackedWord(d.ring, int(at.Index))
	return PackedAvailable(flags, at.Wrap)
}

// Unuse makes the descriptor there look like one that is available, which the device has
// taken already.
func (d *DevicePacked) Unuse(at PackedPosition) {
	id, _ := LoadPackedWord(d.ring, int(at.Index))
	StorePackedWord(d.ring, int(at.Index), id, PackedAvailFlags(at.Wrap))
}

// Ready implements Device.
func (d *DevicePacked) Ready() bool { return d.Available(d.avail) }

// Next implements Device.
func (d *DevicePacked) Next(c *Chain) (bool, error) {
	at := d.avail
	id, flags := LoadPackedWord(d.ring, int(at.Index))
	if !PackedAvailable(flags, at.Wrap) {
		return false, nil
	}
	c.reset()
	for {
		if d.taken+len(c.Ring) >= d.size {
			return false, fmt.Errorf("%w: the request at descriptor %d needs more than the queue's %d descriptors, of which %d are taken", ErrBroken, d.avail.Index, d.size, d.taken)
		}
		addr, n := ReadPackedBuffer(d.ring, int(at.Index))
		c.Ring = append(c.Ring, PackedDesc{Addr: addr, Len: n, ID: id, Flags: flags})
		at = at.Forward(1, d.size)
		if flags&DescNext == 0 {
			break
		}
		if id, flags = LoadPackedWord(d.ring, int(at.Index)); !PackedAvailable(flags, at.Wrap) {
			return false, fmt.Errorf("%w: the request at descriptor %d goes on at %d, which is not available", ErrBroken, d.avail.Index, at.Index)
		}
	}
	if err := d.follow(c); err != nil {
		return false, fmt.Errorf("request at descriptor %d: %w", d.avail.Index, err)
	}
	d.avail = at
	d.taken += len(c.Ring)
	return true, nil
}

// Load implements Device.
func (d *DevicePacked) Load(c *Chain, _ uint16, ring []PackedDesc) error {
	c.reset()
	if len(ring) == 0 || d.taken+len(ring) > d.size {
		return fmt.Errorf("%w: a request of %d descriptors in a queue of %d, of which %d are taken", ErrBroken, len(ring), d.size, d.taken)
	}
	c.Ring = append(c.Ring, ring...)
	if err := d.follow(c); err != nil {
		return err
	}
	d.taken += len(ring)
	return nil
}

// follow finds the memory of the descriptors in c.Ring. The id is that of the last one.
func (d *DevicePacked) follow(c *Chain) error {
	last := len(c.Ring) - 1
	c.Head = c.Ring[last].ID
	for i, x := range c.Ring {
		var err error
		switch {
		case x.Flags&DescIndirect == 0:
			err = c.add(d.mem, x.Addr, x.Len, x.Flags&DescWrite != 0)
		case !d.indir:
			err = fmt.Errorf("%w: an indirect table, which was not negotiated", ErrBroken)
		case i != last:
			err = fmt.Errorf("%w: a descriptor that is indirect and is not the last", ErrBroken)
		default:
			err = c.indirect(d.mem, x.Addr, x.Len, false)
		}
		if err != nil {
			return fmt.Errorf("its descriptor %d: %w", i, err)
		}
	}
	return nil
}

// Put implements Device. All descriptors of a batch but the first are in the ring when it
// returns; the driver looks at none of them before the first.
func (d *DevicePacked) Put(c *Chain, written uint32) {
	at := d.put
	binary.LittleEndian.PutUint32(d.ring[int(at.Index)*DescBytes+8:], written)
	flags := PackedUsedFlags(at.Wrap)
	if written > 0 {
		flags |= DescWrite
	}
	if f := &d.first; f.any {
		StorePackedWord(d.ring, int(at.Index), c.Head, flags)
	} else {
		f.any, f.id, f.flags, f.at = true, c.Head, flags, at
	}
	d.put = d.put.Forward(len(c.Ring), d.size)
	d.taken -= len(c.Ring)
	d.steps = min(d.steps+len(c.Ring), d.size+1)
}

// Publish implements Device.
func (d *DevicePacked) Publish() {
	if f := &d.first; f.any {
		StorePackedWord(d.ring, int(f.at.Index), f.id, f.flags)
		f.any = false
	}
	d.used = d.put
}

// NeedNotice implements Device.
func (d *DevicePacked) NeedNotice() bool {
	steps, asked := d.steps, d.asked
	d.steps, d.asked = 0, true
	if asked && steps == 0 {
		return false
	}
	e := LoadPackedEvent(d.driver)
	if e.Flags == EventDisable {
		return false
	}
	if !d.event || !asked || steps > d.size {
		return true
	}
	return PackedNeedEvent(e, d.size, d.used.Index, uint16(steps), d.used.Wrap)
}

// WantNotice implements Device.
func (d *DevicePacked) WantNotice(want bool) bool {
	switch {
	case !want:
		StorePackedEvent(d.device, PackedEvent{Flags: EventDisable})
		return false
	case d.event:
		StorePackedEvent(d.device, PackedEvent{Off: d.avail.Index, Wrap: d.avail.Wrap, Flags: EventDesc})
	default:
		StorePackedEvent(d.device, PackedEvent{Flags: EventEnable})
	}
	return d.Ready()
}

// Base implements Device.
func (d *DevicePacked) Base() uint32 { return d.avail.Bits() | d.used.Bits()<<16 }

// SetMemory implements [Device].
func (d *DevicePacked) SetMemory(m *Memory) { d.mem = m }
