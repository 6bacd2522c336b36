package pool

import (
	"encoding/binary"
	"fmt"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/flashmap/collect"
	"github.com/pollux-storage/pollux/internal/flashmap/policy"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/region"
)

// What was collected lies in a section of the pool's region, too, where it is written every
// few seconds: to the flash device it goes seldom. The section is advisory. What is wrong
// with it costs what was collected since the last note on the flash device.
//
//	| slot | slot | slot | slot | ...
//	  disk 0        disk 1
//
// Of the two slots of a disk the older one is written next, so that a guest that dies over it
// leaves the other. Whoever comes next finds slots by looking at each page.

// kindUsage names a slot.
const kindUsage ondisk.Kind = "PLXusage"

const (
	usageVersion = 1
	// usageHead is what stands before the counts: the header, which device it is, and what
	// was written to flash of late.
	usageHead = ondisk.HeaderSize + len(block.DeviceID{}) + 8 + 25*8
	// usageEvery is how often what was collected of a disk is written to memory at most, and
	// usageRest how many times as long as that took nothing more is written: a thousandth of
	// a processor, for some milliseconds each.
	usageEvery = 5 * time.Second
	usageRest  = 1000
)

// usage is one slot.
type usage struct {
	id         block.DeviceID
	generation uint64
	wear       policy.Wear
	counts     []byte // as collect.Collector.Keep has written them
}

// flashMemory is what flash has in the region. It belongs to Run's goroutine.
type flashMemory struct {
	section    region.Section
	mem        []byte // nil where there is none
	slot       int64
	generation uint64
	written    map[block.DeviceID]usageState
	turn       int // which disk is next
	next       time.Time
	refused    bool // the region has no room, as somebody was told
}

// usageState is what was written of a disk last.
type usageState struct {
	counted uint64 // accesses
	slot    int    // 0 or 1
}

// sealUsage makes p, in which n bytes of counts follow the head, a slot.
func sealUsage(p []byte, u *usage, n int, pool block.PoolID, epoch block.Epoch) {
	b := append(p[:ondisk.HeaderSize], u.id[:]...)
	b = binary.LittleEndian.AppendUint64(b, uint64(u.wear.Hour))
	for _, n := range u.wear.Bytes {
		b = binary.LittleEndian.AppendUint64(b, uint64(n))
	}
	ondisk.Seal(p[:usageHead+n], ondisk.Header{Kind: kindUsage, Version: usageVersion, Length: usageHead + n, Pool: pool, Epoch: epoch, Generation: u.generation})
}

// openUsage reads a slot of a pool, of whatever bytes.
func openUsage(p []byte, pool block.PoolID) (u usage, err error) {
	h, err := ondisk.Open(p, kindUsage, usageVersion)
	if err != nil {
		return u, err
	}
	if h.Pool != pool {
		return u, fmt.Errorf("it is of pool %v: %w", h.Pool, block.ErrCorrupt)
	}
	d := ondisk.NewDecoder(p[ondisk.HeaderSize:h.Length])
	copy(u.id[:], d.Bytes(len(u.id)))
	u.wear.Hour = int64(d.U64())
	for i := range u.wear.Bytes {
		u.wear.Bytes[i] = int64(d.U64())
	}
	u.generation, u.counts = h.Generation, d.Bytes(d.Len())
	return u, d.Err()
}

// findUsage returns the newest slot of each device in memory, and the highest generation.
func findUsage(mem []byte, pool block.PoolID) (found map[block.DeviceID]usage, generation uint64) {
	found = map[block.DeviceID]usage{}
	for at := 0; at < len(mem); at += block.Size {
		u, err := openUsage(mem[at:], pool)
		if err != nil {
			continue // something else, or what a guest died over
		}
		if old, ok := found[u.id]; !ok || u.generation > old.generation {
			found[u.id] = u
		}
		generation = max(generation, u.generation)
	}
	return found, generation
}

// usageSlot returns how many bytes a slot has for any disk of the pool.
func (f *flash) usageSlot() (n int64) {
	for _, d := range f.disks {
		g := collect.Geometry{Size: d.device.Reach(), SetBytes: f.layer.SetBytes()}
		n = max(n, slotBytes(f.kept.Policy.Collect, g))
	}
	return n
}

// slotBytes returns how many bytes a slot has for a disk.
func slotBytes(p collect.Params, g collect.Geometry) int64 {
	return (int64(usageHead) + collect.KeptBytes(p, g) + block.Size - 1) &^ (block.Size - 1)
}

// UsageMemory returns how much of its region what is collected of so many disks takes at
// most, by parameters.
func UsageMemory(disks int, p collect.Params) int64 {
	if disks == 0 {
		return 0
	}
	g := collect.Geometry{Size: block.MaxDeviceBlocks * block.Size, SetBytes: DefaultSetBytes}
	return region.SectionMemory(2 * int64(disks) * slotBytes(p, g))
}

// recallUsage takes over what a guest before has left in the region of each device of which
// it has counted more than is known. It reports whether there was any.
func (f *flash) recallUsage(now time.Time) (wear policy.Wear, ok bool) {
	m := &f.memory
	*m = flashMemory{written: map[block.DeviceID]usageState{}}
	newest := uint64(0)
	for _, s := range f.p.region.Sections(region.SectionHistory) {
		mem, err := f.p.region.MapSection(s)
		if err != nil {
			continue // makeUsage gives it back
		}
		found, generation := findUsage(mem, f.p.label.Pool)
		m.generation = max(m.generation, generation)
		for _, d := range f.disks {
			u, there := found[d.id]
			if !there {
				continue
			}
			if err := d.recall(u.counts, f.p.label.Pool, now); err != nil {
				f.tell("flash-history-lost", "what the region has of the use of device %s of pool %s is of no use, the last note on flash counts: %v", d.name, f.p.label.Name, err)
				continue
			}
			if u.generation > newest {
				newest, wear, ok = u.generation, u.wear, true
			}
		}
	}
	return wear, ok
}

// recall takes over counts unless more is known already.
func (d *flashDisk) recall(counts []byte, pool block.PoolID, now time.Time) error {
	n, err := collect.Counted(counts)
	if err == nil && n < d.collector.Status().Counted {
		return nil
	}
	if err == nil {
		err = d.collector.Recall(counts, pool, now)
	}
	return err
}

// makeUsage makes the section what the disks need. It reports whether there is one: a large
// one comes some time after it was asked for.
func (f *flash) makeUsage() bool {
	m, r := &f.memory, f.p.region
	slot := f.usageSlot()
	length := 2 * slot * int64(max(1, len(f.disks)))
	want := r.SectionLength(length)
	if m.mem != nil && m.slot == slot && int64(len(m.mem)) == want {
		return true
	}
	defer f.p.countKept()
	if !f.usageComing.underWay() {
		var others []region.Section
		for _, s := range r.Sections(region.SectionHistory) {
			if m.mem == nil && s.Length == want {
				if mem, err := r.MapSection(s); err == nil {
					m.section, m.mem, m.slot = s, mem, slot
					continue
				}
			}
			if s == m.section {
				m.mem, m.section = nil, region.Section{}
			}
			others = append(others, s)
		}
		if m.mem != nil {
			for _, s := range others {
				_ = r.RemoveSection(s) // or the next owner does
			}
			return true
		}
		clear(m.written)
		f.usageComing.begin(r, region.SectionHistory, length, others)
	}
	a, ok := f.usageComing.take()
	if !ok {
		return false
	}
	if a.err != nil {
		if !m.refused {
			f.p.tell(TellKept, "what is collected of the devices of pool %s since the last note on flash will not outlive this guest: %v", f.p.label.Name, a.err)
		}
		m.refused = true
		return false
	}
	if a.section.Length != want { // there are other disks since it was begun
		_ = r.RemoveSection(a.section) // or the next owner does
		return false
	}
	m.section, m.mem, m.slot, m.refused = a.section, a.mem, slot, false
	return true
}

// keepUsage writes what was collected of one disk to memory, if that is due.
func (f *flash) keepUsage(now time.Time) {
	m := &f.memory
	if len(f.disks) == 0 || now.Before(m.next) {
		return
	}
	m.next = now.Add(usageEvery / time.Duration(len(f.disks)))
	m.turn = (m.turn + 1) % len(f.disks)
	d := f.disks[m.turn]
	counted := d.collector.Status().Counted
	if counted == m.written[d.id].counted && m.mem != nil || !f.makeUsage() {
		return
	}
	begun := time.Now()
	m.generation++
	slot := m.older(d.id)
	p := m.mem[m.slot*int64(2*m.turn+slot):][:m.slot]
	clear(p[:ondisk.HeaderSize]) // until it is whole it is none
	n := d.collector.Keep(p[usageHead:], collect.Identity{Pool: f.p.label.Pool, Epoch: f.p.epoch, Generation: m.generation}, now)
	sealUsage(p, &usage{id: d.id, generation: m.generation, wear: f.engine.Wear()}, n, f.p.label.Pool, f.p.epoch)
	m.written[d.id] = usageState{counted, slot}
	if rest := begun.Add(usageRest * time.Since(begun)); rest.After(m.next) {
		m.next = rest
	}
}

// older returns which slot of the disk whose turn it is does not hold its newest state.
func (m *flashMemory) older(id block.DeviceID) int {
	if s, ok := m.written[id]; ok {
		return 1 - s.slot
	}
	generation := func(i int) uint64 {
		h, err := ondisk.Open(m.mem[m.slot*int64(2*m.turn+i):][:m.slot], kindUsage, usageVersion)
		if err != nil {
			return 0
		}
		return h.Generation
	}
	if generation(0) > generation(1) {
		return 1
	}
	return 0
}

// dropUsage gives the section back when the pool has no flash any more.
func (f *flash) dropUsage() {
	_ = f.usageComing.cancel(f.p.region) // or the next owner gives it back
	for _, s := range f.p.region.Sections(region.SectionHistory) {
		_ = f.p.region.RemoveSection(s) // or the next owner does
	}
	f.memory = flashMemory{}
	f.p.countKept()
}
