package blocktest

import (
	"github.com/pollux-storage/pollux/hpdi"
)

// Carried is a request that a Crash has carried out and whose completion its
// submitter has not seen yet. It is for drivers of virtual time, which decide
// by themselves when a request reaches the medium and when it completes.
type Carried struct {
	m *medium
	c *change
}

// Carry carries out a read, write, discard or write-zeroes now, whatever
// handle it came through, and sets r.Err.
func (d *Crash) Carry(r *hpdi.Request) Carried { return Carried{d.m, d.run(r)} }

// CarryTorn lets only some sectors of a write reach the medium, by seed: the
// last request of somebody who died while it was under way.
func (d *Crash) CarryTorn(r *hpdi.Request, seed uint64) Carried {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	if r.Op != hpdi.OpWrite || r.Check(d.Info()) != nil {
		return Carried{}
	}
	return Carried{d.m, d.m.addLocked(r, seed|1)}
}

// Complete says that the submitter was told of the request's end: a barrier
// that is taken from now on covers it, and a Durable write needs none.
func (c Carried) Complete() {
	if c.c != nil {
		c.m.mu.Lock()
		defer c.m.mu.Unlock()
		c.m.reapLocked(c.c)
	}
}

// Barrier is a set of changes that a flush has to make durable.
type Barrier struct {
	changes map[*change]bool
}

// Barrier returns what a flush covers that is submitted now.
func (d *Crash) Barrier() Barrier {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	b := Barrier{map[*change]bool{}}
	for _, c := range d.m.pending {
		if c.reaped {
			b.changes[c] = true
		}
	}
	return b
}

// FlushTo makes durable what the barrier covers, and as much else as keeps
// reads true: where changes overlap, an older one never outlives a newer one.
func (d *Crash) FlushTo(b Barrier) error {
	d.m.mu.Lock()
	defer d.m.mu.Unlock()
	if err := d.usable(); err != nil {
		return err
	}
	d.m.flushLocked(func(c *change) bool { return b.changes[c] })
	return nil
}
