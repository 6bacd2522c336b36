package virtio

import "encoding/binary"

// splitDriver is the driver's side of a split virtqueue (2.7).
type splitDriver struct {
	chains
	mask  uint16
	next  []uint16 // the descriptor after each one, in its chain or among the free ones
	head  uint16   // of the free ones
	avail uint16   // index of the next entry of the available ring
	shown uint16   // that the device has been shown
	used  uint16   // index of the next entry of the used ring
	quiet bool     // the flag that no notice is wanted is set; only without events
}

func (d *splitDriver) Reset() {
	d.reset()
	for i := range d.next {
		d.next[i] = uint16(i + 1)
	}
	d.head, d.avail, d.shown, d.used, d.quiet = 0, 0, 0, 0, false
}

func (d *splitDriver) Next() (int, bool) { return int(d.head), d.free > 0 }

func (d *splitDriver) Add(chain []Buffer) bool {
	n, head := len(chain), d.head
	if !d.Fits(n) {
		return false
	}
	if d.indirectly(n) {
		table, addr := d.table(head)
		for i, b := range chain {
			flags := writes(b)
			if i < n-1 {
				flags |= DescNext
			}
			PutSplitDesc(table, i, Desc{Addr: b.Addr, Len: b.Len, Flags: flags, Next: uint16(i + 1)})
		}
		PutSplitDesc(d.o.Desc, int(head), Desc{Addr: addr, Len: uint32(n * DescBytes), Flags: DescIndirect})
		d.head = d.next[head]
		d.begin(head, 1, chain)
	} else {
		at := head
		for i, b := range chain {
			flags := writes(b)
			if i < n-1 {
				flags |= DescNext
			}
			PutSplitDesc(d.o.Desc, int(at), Desc{Addr: b.Addr, Len: b.Len, Flags: flags, Next: d.next[at]})
			if i == n-1 {
				d.head = d.next[at]
			}
			at = d.next[at]
		}
		d.begin(head, n, chain)
	}
	binary.LittleEndian.PutUint16(d.o.Driver[4+2*int(d.avail&d.mask):], head)
	d.avail++
	return true
}

func (d *splitDriver) Publish() bool {
	if d.avail == d.shown {
		return false
	}
	old := d.shown
	d.shown = d.avail
	d.show()
	if d.event {
		return NeedEvent(uint16(Load(d.o.Device, 4+8*d.o.Size)), d.avail, old)
	}
	return uint16(Load(d.o.Device, 0))&UsedNoNotify == 0
}

// show stores flags and index of the available ring.
func (d *splitDriver) show() {
	w := uint32(d.shown) << 16
	if d.quiet {
		w |= uint32(AvailNoInterrupt)
	}
	Store(d.o.Driver, 0, w)
}

// index loads the index of the used ring.
func (d *splitDriver) index() uint16 { return uint16(Load(d.o.Device, 0) >> 16) }

func (d *splitDriver) Ready() bool { return d.index() != d.used || d.broken != nil }

func (d *splitDriver) Pop() (int, uint32, bool, error) {
	if d.broken != nil {
		return 0, 0, false, d.broken
	}
	index := d.index()
	if index == d.used {
		return 0, 0, false, nil
	}
	if ahead := index - d.used; int(ahead) > d.flying {
		return 0, 0, false, d.breaks("index of the used ring went from %d to %d with %d chains in flight", d.used, index, d.flying)
	}
	entry := d.o.Device[4+8*int(d.used&d.mask):][:8]
	id, written := binary.LittleEndian.Uint32(entry), binary.LittleEndian.Uint32(entry[4:])
	n, err := d.end(id, written)
	if err != nil {
		return 0, 0, false, err
	}
	d.used++
	// Its descriptors are the first ones to be used again: they are in a cache.
	last := uint16(id)
	for range n - 1 {
		last = d.next[last]
	}
	d.next[last] = d.head
	d.head = uint16(id)
	return int(id), written, true, nil
}

func (d *splitDriver) Arm(n int) bool {
	if d.event {
		Store(d.o.Driver, 4+2*d.o.Size, uint32(d.used+uint16(max(n, 1))-1))
		return int(d.index()-d.used) < max(n, 1) && d.broken == nil
	}
	if d.quiet {
		d.quiet = false
		d.show()
	}
	return !d.Ready()
}

// Disarm does nothing with events: one that has passed does not come again before the
// index has gone around.
func (d *splitDriver) Disarm() {
	if !d.event && !d.quiet {
		d.quiet = true
		d.show()
	}
}

func (d *splitDriver) Base() uint32 { return uint32(d.index()) }
