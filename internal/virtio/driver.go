package virtio

import (
	"fmt"
	"math"
)

// Buffer is a piece of memory in a chain.
type Buffer struct {
	Addr  uint64 // in the driver's address space
	Len   uint32 // bytes
	Write bool   // the device writes to it
}

// Driver is the driver's side of a virtqueue. It is for one goroutine at a time, and does
// not allocate.
type Driver interface {
	// Next returns the number that the next chain gets, below the queue's size, and false
	// while no descriptor is free.
	Next() (id int, ok bool)
	// Fits reports whether Add has room for a chain of n buffers now.
	Fits(n int) bool
	// Add puts a chain of at most Longest buffers into the queue, those that the device
	// writes to last. It reports false when there is no room for it now, or the queue is
	// broken. The device sees nothing of it before Publish.
	Add(chain []Buffer) bool
	// Longest is how many buffers a chain can have.
	Longest() int
	// Publish makes the chains that were added available to the device, and reports
	// whether it wants to be notified.
	Publish() (notify bool)
	// Pop returns the number of a chain that the device has used and that is free then,
	// with how many bytes it says to have written. It reports false while there is none.
	// An error wraps ErrBroken, and comes again at each call.
	Pop() (id int, written uint32, ok bool, err error)
	// Ready reports whether Pop would return a chain or an error.
	Ready() bool
	// Arm asks the device for a notice when it has used n more chains than Pop has
	// returned, or earlier. It reports false if there are so many already, or the queue is
	// broken: then there may be no notice.
	Arm(n int) bool
	// Disarm says that no notice is wanted. One may come all the same.
	Disarm()
	// InFlight returns how many chains were added and not popped.
	InFlight() int
	// Base returns the queue's state for a device that begins with it: for a split queue
	// the number of the next available entry after all that are used, for a packed one
	// place and wrap counter of the next used descriptor, in both halves of the word.
	Base() uint32
	// Reset empties the queue, whatever was in it. No device may have it then.
	Reset()
}

// DriverOptions are what a driver's side works with. The three areas have the sizes that
// SplitBytes or PackedBytes return, and are aligned as these say.
type DriverOptions struct {
	Size     int      // descriptors
	Features Features // as negotiated: FRingPacked, FEventIdx and FIndirectDesc count
	Desc     []byte   // the descriptor area
	Driver   []byte   // the driver area: available ring, or events that it wants
	Device   []byte   // the device area: used ring, or events that the device wants
	// Tables has room for an indirect table of Chain descriptors for each descriptor; it
	// begins at TablesAddr for the device. They count with FIndirectDesc.
	Tables     []byte
	TablesAddr uint64
	Chain      int
}

// NewDriver returns the driver's side of an empty queue.
func NewDriver(o DriverOptions) (Driver, error) {
	packed := o.Features.Has(FRingPacked)
	if err := CheckSize(o.Size, packed); err != nil {
		return nil, err
	}
	desc, driver, device := SplitBytes(o.Size)
	if packed {
		var event int
		desc, event = PackedBytes(o.Size)
		driver, device = event, event
	}
	if len(o.Desc) < desc || len(o.Driver) < driver || len(o.Device) < device {
		return nil, fmt.Errorf("areas of %d, %d and %d bytes for a queue of %d descriptors, it takes %d, %d and %d",
			len(o.Desc), len(o.Driver), len(o.Device), o.Size, desc, driver, device)
	}
	if !aligned(o.Desc, DescBytes) || !aligned(o.Driver, 4) || !aligned(o.Device, 4) {
		return nil, fmt.Errorf("areas of a queue are not aligned to %d, 4 and 4 bytes", DescBytes)
	}
	o.Desc, o.Driver, o.Device = o.Desc[:desc], o.Driver[:driver], o.Device[:device]
	if !o.Features.Has(FIndirectDesc) {
		o.Tables, o.Chain = nil, 0
	} else if o.Chain < 1 || o.Chain > math.MaxUint16 || len(o.Tables) < o.Size*o.Chain*DescBytes {
		return nil, fmt.Errorf("%d bytes for %d indirect tables of %d descriptors", len(o.Tables), o.Size, o.Chain)
	}
	c := chains{o: o, event: o.Features.Has(FEventIdx), count: make([]uint16, o.Size), room: make([]uint64, o.Size)}
	var d Driver
	if packed {
		d = &packedDriver{chains: c, ids: make([]uint16, o.Size)}
	} else {
		d = &splitDriver{chains: c, next: make([]uint16, o.Size), mask: uint16(o.Size - 1)}
	}
	d.Reset()
	return d, nil
}

// chains is what both layouts know, in their own memory, of chains and descriptors.
type chains struct {
	o      DriverOptions
	event  bool
	free   int      // descriptors
	flying int      // chains
	count  []uint16 // descriptors of the chain with that number, 0 if it is not in flight
	room   []uint64 // bytes of that chain that the device may write
	broken error
}

func (c *chains) reset() {
	c.free, c.flying, c.broken = c.o.Size, 0, nil
	clear(c.count)
	clear(c.o.Desc)
	clear(c.o.Driver)
	clear(c.o.Device)
}

// InFlight returns how many chains are in the queue.
func (c *chains) InFlight() int { return c.flying }

// Longest returns how many buffers a chain can have. By the specification an indirect
// table, too, is no longer than the queue.
func (c *chains) Longest() int {
	if c.o.Chain > 0 {
		return min(c.o.Chain, c.o.Size)
	}
	return c.o.Size
}

// Fits reports whether a chain of n buffers has room. Where a descriptor is free there is
// a number for the chain, too.
func (c *chains) Fits(n int) bool {
	if c.broken != nil || n < 1 || n > c.Longest() {
		return false
	}
	if c.indirectly(n) {
		n = 1
	}
	return n <= c.free
}

// indirectly reports whether a chain of n is to be in a table of its own. A short one is
// quicker without, as long as there is plenty of room.
func (c *chains) indirectly(n int) bool {
	return c.o.Chain > 0 && n > 1 && (n > 4 || n > c.free/2)
}

// table returns the table of the chain with that number, and its address.
func (c *chains) table(id uint16) ([]byte, uint64) {
	at := int(id) * c.o.Chain * DescBytes
	return c.o.Tables[at : at+c.o.Chain*DescBytes], c.o.TablesAddr + uint64(at)
}

// begin notes a chain that takes that many descriptors.
func (c *chains) begin(id uint16, descriptors int, chain []Buffer) {
	var room uint64
	for i := range chain {
		if chain[i].Write {
			room += uint64(chain[i].Len)
		}
	}
	c.count[id], c.room[id] = uint16(descriptors), room
	c.free -= descriptors
	c.flying++
}

// end checks what the device says of a chain, and returns how many descriptors it had.
func (c *chains) end(id, written uint32) (int, error) {
	if id >= uint32(len(c.count)) {
		return 0, c.breaks("chain %d was used, there are %d", id, len(c.count))
	}
	n := int(c.count[id])
	if n == 0 {
		return 0, c.breaks("chain %d was used, which is not in flight", id)
	}
	if uint64(written) > c.room[id] {
		return 0, c.breaks("%d bytes were written to chain %d, which has room for %d", written, id, c.room[id])
	}
	c.count[id] = 0
	c.free += n
	c.flying--
	return n, nil
}

func (c *chains) breaks(format string, args ...any) error {
	c.broken = fmt.Errorf("%w: "+format, append([]any{ErrBroken}, args...)...)
	return c.broken
}

func writes(b Buffer) uint16 {
	if b.Write {
		return DescWrite
	}
	return 0
}
