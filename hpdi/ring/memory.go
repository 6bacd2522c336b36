package ring

import (
	"errors"
	"fmt"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	core "github.com/pollux-storage/pollux/internal/ring"
)

// region is memory of the application that the back-end has mapped, too.
type region struct {
	id     uint64 // of the mapping
	number uint16
	mem    []byte
	begin  uintptr
	pins   int  // registrations
	fixed  bool // the data area of the ring
}

// table is all of them. It is never changed, but replaced.
type table struct {
	regions []region
	freed   uint64 // when it was known that all of them are there
}

// maxRegions is how many memories a back-end takes.
const maxRegions = 1<<10 - 1

func begin(mem []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(mem))) }

// find returns where v is for the back-end.
func (t *table) find(v []byte) (addr uint64, ok bool) {
	at := begin(v)
	for i := range t.regions {
		r := &t.regions[i]
		if at >= r.begin && at-r.begin+uintptr(len(v)) <= uintptr(len(r.mem)) {
			return core.Addr(r.number, uint64(at-r.begin)), true
		}
	}
	return 0, false
}

// addrOf returns where v is for the back-end, and hands its memory over where that was not
// done yet.
func (d *device) addrOf(v []byte) (uint64, error) {
	if t := d.table.Load(); t.freed == hpdi.Freed() {
		if addr, ok := t.find(v); ok {
			return addr, nil
		}
	}
	if err := d.share(v, 0); err != nil {
		return 0, err
	}
	addr, ok := d.table.Load().find(v)
	if !ok {
		return 0, hpdi.ErrMemory
	}
	return addr, nil
}

// share makes the table true, with the mapping that v lies in, and adds to its pins.
func (d *device) share(v []byte, pins int) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	if d.closed.Load() {
		return hpdi.ErrClosed
	}
	m, ok := hpdi.MappingOf(v)
	next := &table{freed: hpdi.Freed()}
	var taken [maxRegions + 1]bool
	for _, r := range d.table.Load().regions {
		now, there := hpdi.MappingOf(r.mem)
		if r.fixed {
			next.regions = append(next.regions, r)
			continue
		}
		if !there || now.ID != r.id {
			if err := d.forget(r); err != nil {
				return err
			}
			continue
		}
		if ok && r.id == m.ID {
			r.pins += pins
		}
		taken[r.number] = true
		next.regions = append(next.regions, r)
	}
	var err error
	if _, found := next.find(v); !found {
		if err = hpdi.ErrMemory; ok && d.m.Shape().Bells {
			err = d.handOver(next, taken[:], m, pins)
		}
	}
	d.table.Store(next)
	return err
}

// handOver adds a mapping to the table, and gives it to the back-end that is there.
func (d *device) handOver(next *table, taken []bool, m hpdi.Mapping, pins int) error {
	number := 1
	for number < len(taken) && taken[number] {
		number++
	}
	if number == len(taken) {
		return fmt.Errorf("%d pieces of memory are shared already: allocate fewer and larger ones", maxRegions)
	}
	r := region{id: m.ID, number: uint16(number), mem: m.Mem, begin: begin(m.Mem), pins: pins}
	if d.attached.Load() {
		// When the back-end goes away over it, the next one is given all of the table.
		if err := r.tell(d.link); err != nil {
			select {
			case <-d.link.Gone():
			default:
				return err
			}
		}
	}
	next.regions = append(next.regions, r)
	return nil
}

// tell hands a region over to a back-end.
func (r *region) tell(link *core.Link) error {
	fd, err := hpdi.MappingFile(r.id)
	if err != nil {
		return err
	}
	defer unix.Close(fd)
	return link.Memory(r.number, fd, int64(len(r.mem)))
}

// told is which mapping a back-end has been told of, by its number there.
type told [maxRegions + 1]uint64

// nextLocked returns what a back-end must still be told before it knows the table, nil if
// that is nothing. What the application has freed leaves the table. Whoever calls has mu.
func (d *device) nextLocked(has *told) func(*core.Link) error {
	old := d.table.Load()
	next := &table{freed: old.freed}
	var now told
	for _, r := range old.regions {
		if r.fixed || hpdi.Mapped(r.id) {
			next.regions = append(next.regions, r)
			now[r.number] = r.id
		}
	}
	if len(next.regions) < len(old.regions) {
		d.table.Store(next)
	}
	for number, id := range has {
		if id != 0 && id != now[number] {
			has[number] = 0
			return func(link *core.Link) error { return link.Forget(uint16(number)) }
		}
	}
	for _, r := range next.regions {
		if has[r.number] == r.id {
			continue
		}
		return func(link *core.Link) error {
			err := r.tell(link)
			if errors.Is(err, hpdi.ErrMemory) {
				return nil // it was freed meanwhile
			}
			has[r.number] = r.id
			return err
		}
	}
	return nil
}

// forget takes a mapping back from the back-end that is there.
func (d *device) forget(r region) error {
	if !d.attached.Load() {
		return nil
	}
	if err := d.link.Forget(r.number); err != nil {
		select {
		case <-d.link.Gone():
		default:
			return err
		}
	}
	return nil
}

// Register hands memory over ahead of its first use. It must be from hpdi.Alloc.
func (d *device) Register(mem []byte) error {
	if len(mem) == 0 {
		return nil
	}
	if err := d.share(mem, 1); err != nil {
		return d.wrap(fmt.Errorf("register %d bytes of memory: %w", len(mem), err))
	}
	return nil
}

// Unregister takes the memory back when nobody has registered it any more.
func (d *device) Unregister(mem []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	m, ok := hpdi.MappingOf(mem)
	if d.closed.Load() || !ok || len(mem) == 0 {
		return nil
	}
	old := d.table.Load()
	next := &table{freed: old.freed}
	for _, r := range old.regions {
		if r.id == m.ID && r.pins > 0 {
			if r.pins--; r.pins == 0 {
				if err := d.forget(r); err != nil {
					return d.wrap(fmt.Errorf("unregister %d bytes of memory: %w", len(mem), err))
				}
				continue
			}
		}
		next.regions = append(next.regions, r)
	}
	d.table.Store(next)
	return nil
}
