package pool

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/region"
	"github.com/pollux-storage/pollux/internal/restart"
)

// RecordError says why a pool cannot be opened by a restart record. Nothing was written then,
// and it may be opened without one.
type RecordError struct{ Why string }

func (e *RecordError) Error() string { return "restart record: " + e.Why }

func differs(format string, args ...any) error { return &RecordError{fmt.Sprintf(format, args...)} }

// each is OpenOptions.Each, or one after the other.
func (o *OpenOptions) each(n int, f func(i int)) {
	if o.Each != nil {
		o.Each(n, f)
		return
	}
	for i := range n {
		f(i)
	}
}

// recall takes the labels of the devices from the restart record. That of the first is read
// and compared, and so are those that are needed at once: of mirrors, whose copies it
// settles, and of all disks that are below a layer of flash, which has requests of its own.
// Of the others op.unproved is what they are compared with before anything is asked of them.
func (op *opener) recall() error {
	r, devs := op.o.Restart, op.o.Devices
	layered := slices.ContainsFunc(r.Devices, func(d restart.Device) bool { return cp.DeviceClass(d.Class) == cp.ClassFlash })
	byPath := map[string]*restart.Device{}
	for i := range r.Devices {
		byPath[r.Devices[i].Copies[0].Path] = &r.Devices[i]
	}
	labels, now := make([]Label, len(devs)), []int{}
	for i, d := range devs {
		_, mirror := d.(hpdi.Copies)
		rec := byPath[d.Info().Name]
		switch {
		case mirror:
			now = append(now, i)
			continue
		case rec == nil:
			return differs("it has no device %s", d.Info().Name)
		}
		l, err := decodeLabel(rec.Label)
		switch {
		case err != nil:
			return differs("its label of device %s: %v", d.Info().Name, err)
		case l.Joining || l.Exported || l.Index != rec.Index || l.Device != rec.ID || l.Pool != r.Pool || l.Identity != r.Identity:
			return differs("its label of device %s does not belong to the pool in use", d.Info().Name)
		}
		if labels[i] = l; l.Index == 0 || layered {
			now = append(now, i)
		}
	}
	errs := make([]error, len(now))
	op.o.each(len(now), func(n int) {
		i := now[n]
		errs[n] = op.recognise(devs[i], &labels[i])
	})
	for _, err := range errs {
		if err != nil {
			return err
		}
	}
	for i := range devs {
		if !slices.Contains(now, i) {
			op.unproved = append(op.unproved, labels[i].Index)
		}
	}
	op.o.Labels = labels
	return nil
}

// recognise reads a device's label and compares it with what it was, or takes it where
// nothing is known.
func (op *opener) recognise(dev hpdi.Device, was *Label) error {
	l, err := ReadLabel(dev)
	if err != nil {
		return differs("%v", err)
	}
	if *was != (Label{}) && l != *was {
		return differs("the label of device %s is another one than before: it is number %d of pool %s", dev.Info().Name, l.Index+1, l.Name)
	}
	if l.Pool != op.o.Restart.Pool || l.Identity != op.o.Restart.Identity {
		return differs("device %s belongs to pool %s of %q", dev.Info().Name, l.Name, l.Identity)
	}
	*was = l
	return nil
}

// agree compares the record with the superblock: it has all devices of the pool, and is not
// older.
func (op *opener) agree() error {
	r, sb := op.o.Restart, op.sb
	if sb.Epoch < r.Epoch || sb.Generation < r.Generation {
		return differs("it is of epoch %d and superblock %d, and the newest that can be read is of %d and %d", r.Epoch, r.Generation, sb.Epoch, sb.Generation)
	}
	next := 0
	for i, root := range sb.Devices {
		if root.State == cp.DeviceGone {
			continue
		}
		if next >= len(r.Devices) || r.Devices[next].Index != i {
			return differs("device number %d has joined the pool since", i+1)
		}
		d := &r.Devices[next]
		next++
		if d.ID != root.ID || d.State != uint8(root.State) || d.Class != uint8(root.Class) || d.Blocks != root.Blocks || d.First != root.First {
			return differs("device number %d is another one than before, or has another size or state", i+1)
		}
	}
	if next < len(r.Devices) {
		return differs("device number %d has left the pool since", r.Devices[next].Index+1)
	}
	return nil
}

// proveLater makes the devices wait whose labels were taken from the record.
func (op *opener) proveLater() {
	for _, i := range op.unproved {
		dev, was := op.set.Device(i), op.labels[i]
		op.set.Prove(i, func() error { return op.recognise(dev, &was) })
	}
}

// proved returns when all devices are proved to be those of the restart record, if there was
// one. Whoever writes to devices calls it before the first time.
func (p *Pool) proved() error {
	if err := p.set.ProveAll(p.opts.each); err != nil {
		return fmt.Errorf("pool %s: %w", p.label.Name, err)
	}
	return nil
}

// proveAfter is how long the proof of devices that nobody has asked for anything yet rests, for
// the sake of those who have: 64 labels take a processor as long as opening the pool has.
const proveAfter = 50 * time.Millisecond

// provedSoon is proved a little later, unless something is to be written.
func (p *Pool) provedSoon(ctx context.Context) error {
	if p.set.Unproved() {
		rest := time.NewTimer(proveAfter)
		defer rest.Stop()
		select {
		case <-ctx.Done():
			return nil
		case <-p.kick:
			p.wake() // it is still to be looked at
		case <-rest.C:
		}
	}
	return p.proved()
}

// Restart returns what a restart record has to say of the pool. Its caller adds what it knows
// of the surroundings, and replaces the one copy of each device, which has no more than the
// device's name.
func (p *Pool) Restart(ctx context.Context) (*restart.Record, error) {
	r := &restart.Record{}
	err := p.do(ctx, func() error {
		sb, header := p.machine.Superblock(), p.region.Header()
		r.Pool, r.Epoch, r.Identity, r.Name = sb.Pool, sb.Epoch, p.label.Identity, p.label.Name
		r.Generation, r.IndexBytes, r.Threshold = sb.Generation, sb.Settings.IndexBytes, sb.Settings.Threshold
		for slot := range uint64(2) {
			at := cp.SuperblockAt(slot)
			r.Superblocks = append(r.Superblocks, at[:]...)
		}
		r.Region = header.ID
		for _, s := range header.Sections {
			r.Sections = append(r.Sections, restart.Section{Kind: uint32(s.Kind), Offset: s.Offset, Length: s.Length})
		}
		for i, root := range sb.Devices {
			if root.State == cp.DeviceGone {
				continue
			}
			if i >= len(p.labels) || p.labels[i].Device != root.ID {
				return fmt.Errorf("restart record: the label of device number %d is not known", i+1)
			}
			r.Devices = append(r.Devices, restart.Device{
				Index: i, ID: root.ID, State: uint8(root.State), Class: uint8(root.Class), Blocks: root.Blocks, First: root.First,
				Label: p.labels[i].stored(), Copies: []restart.Copy{{Path: p.set.Info(i).Name}},
			})
		}
		for _, v := range p.catalogue.List() {
			r.Volumes = append(r.Volumes, restart.Volume{ID: v.ID, Size: v.Size, Run: v.Run, Name: v.Name})
		}
		return nil
	})
	return r, err
}

// UseIn is ReadLastUse by a restart record.
func UseIn(r *restart.Record) LastUse {
	u := LastUse{Epoch: r.Epoch, RegionID: r.Region, BootID: r.BootID, Settings: cp.Settings{IndexBytes: r.IndexBytes, Threshold: r.Threshold}}
	for _, d := range r.Devices {
		u.count(cp.DeviceClass(d.Class), d.Blocks)
		for len(u.Devices) < d.Index {
			u.Devices = append(u.Devices, block.DeviceID{})
		}
		u.Devices = append(u.Devices, d.ID)
	}
	return u
}

// FirstLabel returns the label of a pool's first device by a restart record.
func FirstLabel(r *restart.Record) (Label, error) {
	l, err := decodeLabel(r.Devices[0].Label)
	if err == nil && l.Index > 0 {
		err = fmt.Errorf("restart record: device number %d is the first: %w", l.Index+1, block.ErrCorrupt)
	}
	return l, err
}

// setLabel remembers the label of a device that has joined the pool.
func (p *Pool) setLabel(l Label) {
	for len(p.labels) <= l.Index {
		p.labels = append(p.labels, Label{})
	}
	p.labels[l.Index] = l
}

// kept is where restart records are kept in the region.
type kept struct {
	mu      sync.Mutex // guards what follows
	section region.Section
	slots   *restart.Slots // nil until there is a place
}

// KeepRecord stores an encoded restart record in the region. Where there is no room for it
// that is an error, and the pool goes on without. It must not be called when the pool is
// being closed.
func (p *Pool) KeepRecord(enc []byte) error {
	k := &p.kept
	k.mu.Lock()
	defer k.mu.Unlock()
	if err := p.owned(); err != nil {
		return err
	}
	if k.slots == nil {
		if err := k.adopt(p.region); err != nil {
			return err
		}
	}
	if k.slots != nil {
		err := k.slots.Put(enc)
		if !errors.Is(err, block.ErrNoSpace) {
			return err
		}
		k.slots = nil
		if err := p.region.RemoveSection(k.section); err != nil {
			return err
		}
	}
	s, mem, err := p.region.AddSection(region.SectionRestart, restart.SlotsFor(len(enc)))
	if err != nil {
		return err
	}
	k.section, k.slots = s, restart.OpenSlots(mem)
	return k.slots.Put(enc)
}

// dropRecord gives back what is kept, so that nobody opens the pool by it.
func (p *Pool) dropRecord() {
	k := &p.kept
	k.mu.Lock()
	defer k.mu.Unlock()
	k.slots = nil
	for _, s := range p.region.Sections(region.SectionRestart) {
		_ = p.region.RemoveSection(s) // or whoever reads it finds out again
	}
}

// adopt takes the place that an owner before has left, and gives all others back.
func (k *kept) adopt(r *region.Region) error {
	for _, s := range r.Sections(region.SectionRestart) {
		if k.slots != nil {
			if err := r.RemoveSection(s); err != nil {
				return err
			}
			continue
		}
		mem, err := r.MapSection(s)
		if err != nil {
			return errors.Join(err, r.RemoveSection(s))
		}
		k.section, k.slots = s, restart.OpenSlots(mem)
	}
	return nil
}

// ReadRecord returns the newest restart record in a region, without opening it: its owner may
// have died. ondisk.ErrMagic says that there is none.
func ReadRecord(regionPath string) (r *restart.Record, err error) {
	in, err := region.Inspect(regionPath)
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, in.Close()) }()
	return RecordIn(in)
}

// RecordIn is ReadRecord for a region that is being inspected.
func RecordIn(in *region.Inspection) (newest *restart.Record, err error) {
	err = restart.ErrNone
	for _, s := range in.Header().Sections {
		if s.Kind != region.SectionRestart {
			continue
		}
		r, why := restart.Newest(s.Length, func(p []byte, off int64) int { return in.ReadAt(s, p, off) })
		newest, err = restart.Newer(newest, err, r, why)
	}
	return newest, err
}
