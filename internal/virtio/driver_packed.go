package virtio

// packedDriver is the driver's side of a packed virtqueue (2.8).
type packedDriver struct {
	chains
	ids   []uint16 // numbers of chains that are free, in the first idle ones
	idle  int
	avail PackedPosition
	used  PackedPosition
	steps uint16 // descriptors that were written since Publish
	gate  int    // place of the first of them, whose flags are stored last
	id    uint16 // its id and flags
	flags uint16
	asked bool // the event structure may ask for notices
}

func (d *packedDriver) Reset() {
	d.reset()
	for i := range d.ids {
		d.ids[i] = uint16(len(d.ids) - 1 - i)
	}
	d.idle, d.steps, d.asked = len(d.ids), 0, true
	d.avail, d.used = PackedPosition{Wrap: true}, PackedPosition{Wrap: true}
}

func (d *packedDriver) Next() (int, bool) {
	if d.idle == 0 {
		return 0, false
	}
	return int(d.ids[d.idle-1]), d.free > 0
}

func (d *packedDriver) Add(chain []Buffer) bool {
	n := len(chain)
	if !d.Fits(n) {
		return false
	}
	id := d.ids[d.idle-1]
	if d.indirectly(n) {
		table, addr := d.table(id)
		for i, b := range chain {
			// In a table nothing counts but the flag to write, and there is no id (2.8.7).
			PutPackedBuffer(table, i, b.Addr, b.Len)
			StorePackedWord(table, i, 0, writes(b))
		}
		d.put(addr, uint32(n*DescBytes), id, DescIndirect, true)
		d.begin(id, 1, chain)
	} else {
		for i, b := range chain {
			flags := writes(b)
			if i < n-1 {
				flags |= DescNext
			}
			d.put(b.Addr, b.Len, id, flags, i == 0)
		}
		d.begin(id, n, chain)
	}
	d.idle--
	return true
}

// put writes a descriptor at the next place. The flags of the first one of those that are
// not published yet are kept: the device comes to no other before it.
func (d *packedDriver) put(addr uint64, n uint32, id, flags uint16, head bool) {
	at := int(d.avail.Index)
	PutPackedBuffer(d.o.Desc, at, addr, n)
	flags |= PackedAvailFlags(d.avail.Wrap)
	if head && d.steps == 0 {
		d.gate, d.id, d.flags = at, id, flags
	} else {
		StorePackedWord(d.o.Desc, at, id, flags)
	}
	d.avail = d.avail.Forward(1, d.o.Size)
	d.steps++
}

func (d *packedDriver) Publish() bool {
	if d.steps == 0 {
		return false
	}
	StorePackedWord(d.o.Desc, d.gate, d.id, d.flags)
	steps := d.steps
	d.steps = 0
	e := LoadPackedEvent(d.o.Device)
	if !d.event && e.Flags == EventDesc {
		e.Flags = EventEnable
	}
	return PackedNeedEvent(e, d.o.Size, d.avail.Index, steps, d.avail.Wrap)
}

func (d *packedDriver) Ready() bool {
	_, flags := LoadPackedWord(d.o.Desc, int(d.used.Index))
	return PackedUsed(flags, d.used.Wrap) || d.broken != nil
}

func (d *packedDriver) Pop() (int, uint32, bool, error) {
	if d.broken != nil {
		return 0, 0, false, d.broken
	}
	at := int(d.used.Index)
	id, flags := LoadPackedWord(d.o.Desc, at)
	if !PackedUsed(flags, d.used.Wrap) {
		return 0, 0, false, nil
	}
	_, written := ReadPackedBuffer(d.o.Desc, at)
	if flags&DescWrite == 0 {
		written = 0 // the length says nothing (2.8.5)
	}
	n, err := d.end(uint32(id), written)
	if err != nil {
		return 0, 0, false, err
	}
	d.used = d.used.Forward(n, d.o.Size)
	d.ids[d.idle] = id
	d.idle++
	return int(id), written, true, nil
}

// Arm asks for a notice at the next chain, whatever n is: how many descriptors lie before
// the one after the next depends on the order in which the device uses chains.
func (d *packedDriver) Arm(int) bool {
	e := PackedEvent{Flags: EventEnable}
	if d.event {
		e = PackedEvent{Off: d.used.Index, Wrap: d.used.Wrap, Flags: EventDesc}
	}
	if d.event || !d.asked {
		StorePackedEvent(d.o.Driver, e)
		d.asked = true
	}
	return !d.Ready()
}

// Disarm stores only after an Arm: a store makes the device load the word anew.
func (d *packedDriver) Disarm() {
	if d.asked {
		StorePackedEvent(d.o.Driver, PackedEvent{Flags: EventDisable})
		d.asked = false
	}
}

func (d *packedDriver) Base() uint32 {
	w := d.used.Bits()
	return w | w<<16
}
