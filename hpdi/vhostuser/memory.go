package vhostuser

import (
	"errors"
	"fmt"
	"slices"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/vhost"
)

// baseRegions is how many regions each back-end takes.
const baseRegions = vhost.MaxRegions

// region is memory that the back-end maps. Its address is the same on both sides: for the
// back-end a guest address and a user address, which it has at other places itself.
type region struct {
	begin, end uintptr
	id         uint64 // of the mapping
	fd         int    // a duplicate: the mapping's is closed when it is freed
	registered []registered
}

// registered is a piece that the application has registered.
type registered struct {
	begin, end uintptr
	count      int
}

// memory is a table of regions, which does not change. The first one is the device's own.
type memory struct {
	regions []*region
	freed   uint64 // hpdi.Freed when it was looked through
}

func address(p []byte) uintptr { return uintptr(unsafe.Pointer(unsafe.SliceData(p))) }

// find returns the number of the region that all of p lies in, or -1.
func (m *memory) find(p []byte) int {
	at := address(p)
	for i, r := range m.regions {
		if at >= r.begin && at+uintptr(len(p)) <= r.end {
			return i
		}
	}
	return -1
}

func (r *region) payload() vhost.Region {
	return vhost.Region{Guest: uint64(r.begin), Size: uint64(r.end - r.begin), User: uint64(r.begin)}
}

func (r *region) close() { _ = unix.Close(r.fd) } // of memory there is nothing to lose

// newRegion returns the region of the mapping that mem lies in.
func newRegion(mem []byte) (*region, error) {
	m, ok := hpdi.MappingOf(mem)
	if !ok {
		return nil, hpdi.ErrMemory
	}
	fd, err := unix.FcntlInt(uintptr(m.FD), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("duplicate the descriptor of memory: %w", err)
	}
	return &region{begin: address(m.Mem), end: address(m.Mem) + uintptr(len(m.Mem)), id: m.ID, fd: fd}, nil
}

// known makes sure that the back-end has the memory of a request.
func (d *device) known(r *hpdi.Request) error {
	for _, v := range r.Vec {
		if len(v) > 0 && (d.mem.Load().find(v) < 1 || d.mem.Load().freed != hpdi.Freed()) {
			if err := d.share(v); err != nil {
				return err
			}
		}
	}
	return nil
}

// share gives the back-end the mapping that mem lies in.
func (d *device) share(mem []byte) error {
	d.mu.Lock()
	defer d.mu.Unlock()
	_, err := d.shareLocked(mem)
	return err
}

func (d *device) shareLocked(mem []byte) (*region, error) {
	if d.closed {
		return nil, hpdi.ErrClosed
	}
	if err := d.pruneLocked(); err != nil {
		return nil, err
	}
	old := d.mem.Load()
	switch i := old.find(mem); {
	case i == 0:
		return nil, hpdi.ErrMemory // the queues are nobody's payload
	case i > 0:
		return old.regions[i], nil
	}
	r, err := newRegion(mem)
	if err != nil {
		return nil, err
	}
	if len(old.regions) >= d.slots {
		r.close()
		return nil, fmt.Errorf("%w: %s takes %d pieces of memory, which are all in use: allocate fewer and larger ones", hpdi.ErrMemory, d.path, d.slots-1)
	}
	next := &memory{regions: append(slices.Clone(old.regions), r), freed: old.freed}
	if d.link != nil {
		if err := d.link.add(next, r); err != nil && !errors.Is(err, hpdi.ErrDisconnected) {
			r.close()
			return nil, err
		}
		// A connection that has ended is made again with the new table.
	}
	d.mem.Store(next)
	return r, nil
}

// pruneLocked takes what was freed from the back-end.
func (d *device) pruneLocked() error {
	old, freed := d.mem.Load(), hpdi.Freed()
	if old.freed == freed {
		return nil
	}
	var drop []*region
	for _, r := range old.regions[1:] {
		if !hpdi.Mapped(r.id) {
			drop = append(drop, r)
		}
	}
	return d.dropLocked(freed, drop...)
}

// dropLocked takes regions from the back-end. The table is known to be true as of freed only
// when all of them are gone.
func (d *device) dropLocked(freed uint64, drop ...*region) error {
	for _, r := range drop {
		old := d.mem.Load()
		next := &memory{regions: slices.DeleteFunc(slices.Clone(old.regions), func(o *region) bool { return o == r }), freed: old.freed}
		if d.link != nil {
			if err := d.link.remove(next, r); err != nil && !errors.Is(err, hpdi.ErrDisconnected) {
				return err
			}
		}
		d.mem.Store(next)
		r.close()
	}
	d.mem.Store(&memory{regions: d.mem.Load().regions, freed: freed})
	return nil
}

// add tells the back-end of a region that has come to the table.
func (l *link) add(m *memory, r *region) error {
	if !l.proto.Has(vhost.PConfigureMemSlots) {
		return l.table(m)
	}
	return l.tell(vhost.AddMemReg, vhost.AppendMemRegion(nil, r.payload()), r.fd)
}

// remove tells it of one that has gone.
func (l *link) remove(m *memory, r *region) error {
	if !l.proto.Has(vhost.PConfigureMemSlots) {
		return l.table(m)
	}
	// The descriptor is not demanded by the specification, but by back-ends that are
	// older than that says so.
	return l.tell(vhost.RemMemReg, vhost.AppendMemRegion(nil, r.payload()), r.fd)
}

// table tells it of all regions at once.
func (l *link) table(m *memory) error {
	var table []vhost.Region
	var files []int
	for _, r := range m.regions {
		table, files = append(table, r.payload()), append(files, r.fd)
	}
	return l.tell(vhost.SetMemTable, vhost.AppendMemTable(nil, table), files...)
}

// all gives the back-end the table when a connection begins.
func (l *link) all(m *memory) error {
	if !l.proto.Has(vhost.PConfigureMemSlots) {
		return l.table(m)
	}
	for _, r := range m.regions {
		if err := l.add(m, r); err != nil {
			return err
		}
	}
	return nil
}

// Register gives the back-end the mapping that mem lies in, before a request does.
func (d *device) Register(mem []byte) error {
	if len(mem) == 0 {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	r, err := d.shareLocked(mem)
	if err != nil {
		return fmt.Errorf("%s: register %d bytes: %w", d.path, len(mem), err)
	}
	p := registered{address(mem), address(mem) + uintptr(len(mem)), 1}
	for i, o := range r.registered {
		if o.begin == p.begin && o.end == p.end {
			r.registered[i].count++
			return nil
		}
		if p.begin < o.end && o.begin < p.end {
			return fmt.Errorf("%s: register %d bytes: they overlap %d bytes that are registered already", d.path, len(mem), o.end-o.begin)
		}
	}
	r.registered = append(r.registered, p)
	return nil
}

// Unregister takes the mapping that mem lies in from the back-end when no Register of
// anything in it is left.
func (d *device) Unregister(mem []byte) error {
	if len(mem) == 0 {
		return nil
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	i := d.mem.Load().find(mem)
	if i < 1 {
		return nil
	}
	r := d.mem.Load().regions[i]
	at := slices.IndexFunc(r.registered, func(o registered) bool {
		return o.begin == address(mem) && o.end == o.begin+uintptr(len(mem))
	})
	if at < 0 {
		return nil
	}
	if r.registered[at].count--; r.registered[at].count == 0 {
		r.registered = slices.Delete(r.registered, at, at+1)
	}
	if len(r.registered) > 0 {
		return nil
	}
	if err := d.dropLocked(d.mem.Load().freed, r); err != nil {
		return fmt.Errorf("%s: unregister %d bytes: %w", d.path, len(mem), err)
	}
	return nil
}
