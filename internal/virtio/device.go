package virtio

import "fmt"

// MaxChain is the most pieces of memory that a request may have, those of an indirect table
// among them: twice what devices here offer, for where a piece lies in two slots.
const MaxChain = 256

// Device is the device's side of a virtqueue. It is of one goroutine.
//
// Completions are given in batches: Put for each, then Publish, by which the driver sees
// all of them at once. What a device takes and gives back is bounded by the size of the
// queue: Next is an error when the driver makes more available.
type Device interface {
	// Next takes the next available request into c, with descriptors that were copied
	// once and checked, and returns false when there is none. An error wraps ErrBroken;
	// the queue is not to be used any more.
	Next(c *Chain) (bool, error)
	// Load makes c of a request that another device had taken before: the head descriptor
	// of a split queue, or copies of its descriptors in the ring of a packed one.
	Load(c *Chain, head uint16, ring []PackedDesc) error
	// Put adds a completion to the batch, with the number of bytes that were written to
	// the request's memory. The driver does not see it.
	Put(c *Chain, written uint32)
	// Publish shows the batch to the driver.
	Publish()
	// NeedNotice reports whether the driver is to be notified of what was published since
	// it was asked last.
	NeedNotice() bool
	// WantNotice says whether the driver shall notify the device of requests. When it
	// shall, WantNotice reports whether there are some already, of which no notice comes.
	WantNotice(want bool) (ready bool)
	// Ready reports whether Next would return a request, or an error.
	Ready() bool
	// SetMemory has the device find requests taken from now on in m, which has all that
	// the memory before it had, at the same addresses.
	SetMemory(m *Memory)
	// Base returns the places of the next available and the next used descriptor, in the
	// form in which vhost-user has them: of a split queue its index of available requests,
	// of a packed one both with their wrap counters.
	Base() uint32
}

// PackedDesc is a descriptor as a packed ring has it.
type PackedDesc struct {
	Addr  uint64
	Len   uint32
	ID    uint16
	Flags uint16
}

// Chain is a request: its memory in order, first what the device reads and then what it
// writes.
type Chain struct {
	Head     uint16       // number of the head descriptor in a split queue, the buffer's id in a packed one
	Ring     []PackedDesc // copies of its descriptors in a packed ring
	Out, In  [][]byte     // in the driver's memory
	OutBytes int64
	InBytes  int64
	in       []uint64 // guest addresses of In
}

// InAddr returns the guest address of In[i].
func (c *Chain) InAddr(i int) uint64 { return c.in[i] }

// Slots returns how many descriptors of a packed ring the request takes.
func (c *Chain) Slots() int { return len(c.Ring) }

func (c *Chain) reset() {
	c.Ring, c.Out, c.In, c.in = c.Ring[:0], c.Out[:0], c.In[:0], c.in[:0]
	c.OutBytes, c.InBytes = 0, 0
}

// Forget drops what the request refers to, so that its memory can be unmapped.
func (c *Chain) Forget() {
	clear(c.Out[:cap(c.Out)])
	clear(c.In[:cap(c.In)])
	c.reset()
}

// add adds the memory of a descriptor. Memory that is one piece for the driver may be in
// several slots here.
func (c *Chain) add(m *Memory, addr uint64, n uint32, write bool) error {
	if !write && len(c.In) > 0 {
		return fmt.Errorf("%w: memory to be read, at %#x, behind memory to be written", ErrBroken, addr)
	}
	for left := uint64(n); left > 0; {
		b := m.Guest(addr, left)
		if len(b) == 0 {
			return fmt.Errorf("%w: %d of %d bytes of a descriptor at %#x are not in the driver's memory", ErrBroken, left, n, addr)
		}
		if len(c.Out)+len(c.In) >= MaxChain {
			return fmt.Errorf("%w: a request in more than %d pieces of memory", ErrBroken, MaxChain)
		}
		if write {
			c.In, c.in = append(c.In, b), append(c.in, addr)
			c.InBytes += int64(len(b))
		} else {
			c.Out = append(c.Out, b)
			c.OutBytes += int64(len(b))
		}
		left -= uint64(len(b))
		addr += uint64(len(b))
	}
	return nil
}

// indirect adds the descriptors of an indirect table: linked ones of a split queue, or all
// in order of a packed one.
func (c *Chain) indirect(m *Memory, addr uint64, n uint32, linked bool) error {
	if n == 0 || n%DescBytes != 0 || n/DescBytes > MaxChain {
		return fmt.Errorf("%w: an indirect table of %d bytes", ErrBroken, n)
	}
	table := m.Guest(addr, uint64(n))
	if len(table) != int(n) {
		return fmt.Errorf("%w: an indirect table of %d bytes at %#x is not in one piece of the driver's memory", ErrBroken, n, addr)
	}
	if !aligned(table, 4) {
		return fmt.Errorf("%w: an indirect table at %#x, which is not aligned", ErrBroken, addr)
	}
	count := int(n) / DescBytes
	for i, steps := 0, 0; ; steps++ {
		if steps == count {
			return fmt.Errorf("%w: a loop in an indirect table of %d descriptors", ErrBroken, count)
		}
		var d Desc
		if linked {
			d = ReadSplitDesc(table, i)
		} else {
			d.Addr, d.Len = ReadPackedBuffer(table, i)
			_, d.Flags = LoadPackedWord(table, i)
		}
		if d.Flags&DescIndirect != 0 {
			return fmt.Errorf("%w: descriptor %d of an indirect table refers to another table", ErrBroken, i)
		}
		if err := c.add(m, d.Addr, d.Len, d.Flags&DescWrite != 0); err != nil {
			return fmt.Errorf("descriptor %d of an indirect table: %w", i, err)
		}
		switch {
		case !linked:
			if i++; i == count {
				return nil
			}
		case d.Flags&DescNext == 0:
			return nil
		case int(d.Next) >= count:
			return fmt.Errorf("%w: descriptor %d of an indirect table of %d leads to %d", ErrBroken, i, count, d.Next)
		default:
			i = int(d.Next)
		}
	}
}
