package pool

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/flashmap"
	"github.com/pollux-storage/pollux/internal/flashmap/collect"
	"github.com/pollux-storage/pollux/internal/flashmap/policy"
	"github.com/pollux-storage/pollux/internal/planted"
)

// A flash device is one of the pool's, with a label and a root in the superblock, so that a
// pool does not open without it. To everything else it is a device without any blocks but
// those of its label: what it holds belongs to the devices that the layer is over.

// flashBlocks is how many blocks the pool itself has of a flash device.
const flashBlocks = block.TrackBlocks

// openFlash puts the layer over the devices of a pool that is being opened. Collectors are
// for who serves it.
func (op *opener) openFlash(collects bool) error {
	dev, ok := op.sb.Flash()
	if !ok {
		return nil
	}
	if err := op.flash.open(dev, op.sb.Devices, collects); err != nil {
		return fmt.Errorf("open pool %s: %w", op.label.Name, err)
	}
	return nil
}

// open opens the flash device and puts the layer over the others.
func (f *flash) open(dev int, roots []cp.DeviceRoot, collects bool) error {
	layer, err := flashmap.Open(f.p.set.Device(dev))
	if err != nil {
		return err
	}
	f.setLayer(layer, dev)
	if err := f.readKept(); err != nil {
		return err
	}
	if f.engine, err = policy.New(f.kept.Policy); err != nil {
		return err
	}
	if err := f.overAll(roots, collects); err != nil {
		return err
	}
	f.cover()
	return nil
}

// overAll makes the devices of the layer, which nobody uses yet.
func (f *flash) overAll(roots []cp.DeviceRoot, collects bool) error {
	for i, root := range roots {
		if root.Class != cp.ClassDisk || root.State == cp.DeviceGone {
			continue
		}
		if err := f.over(f.p.set.Device(i), i, root, collects); err != nil {
			return err
		}
	}
	return nil
}

// over makes a device of the pool one whose data sets may be on flash.
func (f *flash) over(dev hpdi.Device, i int, root cp.DeviceRoot, collects bool) error {
	info := dev.Info()
	d := &flashDisk{dev: i, id: root.ID, name: info.Name, rotates: info.Rotates, fixed: int64(root.First) * block.Size, raw: dev}
	o := flashmap.Primary{
		Number: i, ID: root.ID, Fixed: []flashmap.Range{{Offset: 0, Length: d.fixed}},
		Unused: func(off, n int64) bool { return f.p.unused(i, off, n) },
	}
	if collects { // queues are opened later, when there is a collector
		o.Observe = func() flashmap.Observer { return &observer{d.collector.NewRecorder(), d.fixed} }
	}
	var err error
	if d.device, err = f.layer.Over(dev, o); err != nil {
		return err
	}
	if collects {
		// What has to stay where it is is not worth counting.
		g := collect.Geometry{Size: d.device.Reach(), SetBytes: f.layer.SetBytes()}
		if d.collector, err = collect.New(g, f.kept.Policy.Collect, time.Now()); err != nil {
			_, e := d.device.Detach()
			return errors.Join(fmt.Errorf("device %s: %w", info.Name, err), e)
		}
	}
	f.disks = append(f.disks, d)
	slices.SortFunc(f.disks, func(x, y *flashDisk) int { return x.dev - y.dev })
	return nil
}

// unused reports whether nobody needs what a range of a device holds, as far as is known.
func (p *Pool) unused(dev int, off, n int64) bool {
	return p.loaded.Load() && p.space.Unused(dev, uint64(off)/block.Size, int(n/block.Size))
}

// cover puts the layer over the devices of the set, which others may use. Nothing may move
// before.
func (f *flash) cover() {
	for _, d := range f.disks {
		_ = f.p.set.Exchange(d.dev, d.device) // queues of the old one that do not close are in nobody's way
	}
}

// uncover takes the layer off the devices, on which others may go on, and leaves all open.
// Nothing may be on flash, unless nobody uses the pool any more.
func (f *flash) uncover() error {
	for _, d := range f.disks {
		_ = f.p.set.Exchange(d.dev, d.raw)
	}
	return f.detach()
}

// close takes the layer off devices that nobody uses any more.
func (f *flash) close() error {
	if f.layer == nil {
		return nil
	}
	return errors.Join(f.p.set.ReleaseQueues(), f.uncover())
}

// detach ends the layer, whose devices nobody uses, and leaves the others open.
func (f *flash) detach() error {
	var errs []error
	if f.now != nil {
		_ = f.now.move.Cancel() // what is in doubt is settled when the flash device is opened
	}
	for _, d := range f.disks {
		_, err := d.device.Detach()
		errs = append(errs, err)
	}
	layer := f.layer
	f.setLayer(nil, -1)
	f.disks, f.now, f.queue, f.evacuation, f.note = nil, nil, nil, nil, nil
	return errors.Join(append(errs, layer.Detach())...)
}

// setLayer changes the layer, at which others look.
func (f *flash) setLayer(l *flashmap.Flash, dev int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.layer, f.dev = l, dev
}

// AddFlash makes a device the flash of the pool: hot data sets of the others move there. There
// may be one, which may be a mirror; without a mirror whatever is on it is lost with it.
// setBytes is the size of a data set, 0 for DefaultSetBytes. Kinds of error: block.ErrExists
// for a second one, block.ErrInvalid for a device that is too small.
func (p *Pool) AddFlash(ctx context.Context, dev hpdi.Device, setBytes int64) error {
	if setBytes == 0 {
		setBytes = DefaultSetBytes
	}
	return p.do(ctx, func() error {
		sb := p.machine.Superblock()
		if has, ok := sb.Flash(); ok {
			return fmt.Errorf("pool %s has a flash device already, %s; make that larger, or a mirror: %w", p.label.Name, p.set.Info(has).Name, block.ErrExists)
		}
		return p.addDevice(dev, cp.ClassFlash, func() error { return p.flash.make(dev, setBytes, sb.Devices) })
	})
}

// DefaultSetBytes is the size of data sets unless another one is asked for.
const DefaultSetBytes = 256 << 10

// reach is how many bytes of disks a flash device has a map for, beyond which nothing moves:
// all that the pool has and as much again, or what is usual for a flash device of the size.
func reach(size int64, roots []cp.DeviceRoot) int64 {
	var disks int64
	for _, r := range roots {
		if r.Class == cp.ClassDisk && r.State != cp.DeviceGone {
			disks += int64(r.Blocks) * block.Size
		}
	}
	return max(64*size, 2*disks)
}

// make makes the layer of a device that is about to become the flash of the pool.
func (f *flash) make(dev hpdi.Device, setBytes int64, roots []cp.DeviceRoot) error {
	if _, err := flashmap.Create(dev, flashmap.CreateOptions{SetBytes: setBytes, Reach: reach(dev.Info().Size, roots)}); err != nil {
		return err
	}
	layer, err := flashmap.Open(dev)
	if err != nil {
		return err
	}
	f.kept, f.pins, f.evacuated, f.failed, f.shunned = defaultKept(), pinWalk{f: f}, false, nil, time.Time{}
	f.setLayer(layer, -1) // it has no number yet
	if f.engine, err = policy.New(f.kept.Policy); err == nil {
		err = f.overAll(roots, true)
	}
	if err != nil {
		return errors.Join(err, f.detach())
	}
	return nil
}

// serve begins the work when the layer is over the devices.
func (f *flash) serve() {
	if f.layer == nil {
		return
	}
	if f.layer.Status().Grown > 0 {
		if n, err := f.layer.Grow(); err != nil {
			f.mishap(err)
		} else {
			f.tell("flash-grown", "flash device %s of pool %s has room for %d MiB more", f.name(), f.p.label.Name, int64(n)*f.layer.SetBytes()>>20)
		}
	}
	f.layer.OnMoved(f.moved)
	f.pace = policy.Pace{}
	f.pace.Use(f.kept.Policy.Budget)
	f.recalled, f.tickAt, f.decideAt = false, time.Time{}, time.Time{}
	f.look(f.input(time.Now(), false))
}

// tellCheap tells space what is on flash, before anything is allocated. Clients do not wait
// for it.
func (f *flash) tellCheap() {
	for _, d := range f.disks {
		for start, end := range d.ranges() {
			f.p.space.SetCheap(d.dev, uint64(start/block.Size), uint64((end-start)/block.Size), true)
		}
	}
}

// join puts the layer over a device that is about to become part of the pool, and returns
// what is to take its place.
func (f *flash) join(dev hpdi.Device, i int, root cp.DeviceRoot) (hpdi.Device, error) {
	if f.layer == nil || root.Class != cp.ClassDisk || planted.Has(planted.FlashNotOverAdded) {
		return dev, nil
	}
	if err := f.over(dev, i, root, true); err != nil {
		return nil, err
	}
	return f.disk(i).device, nil
}

// refuse takes back what was made for a device that does not become part of the pool.
func (f *flash) refuse(i int, class cp.DeviceClass) error {
	if class == cp.ClassFlash {
		return f.detach()
	}
	if f.disk(i) == nil {
		return nil
	}
	_, err := f.part(nil, i)
	return err
}

// settle ends what moves on a device that is about to leave the pool.
func (f *flash) settle(dev int) error {
	if f.now == nil || f.now.disk.dev != dev {
		return nil
	}
	if err := f.now.move.Cancel(); err != nil {
		return err // it goes on until its table can be written
	}
	f.engine.Withdraw(f.now.Move, f.layer.SetBytes())
	f.now = nil
	return nil
}

// part takes the layer off a device that is no part of the pool any more, on which nothing
// is in use, and returns what it was over.
func (f *flash) part(dev hpdi.Device, i int) (hpdi.Device, error) {
	d := f.disk(i)
	if d == nil {
		return dev, nil
	}
	f.disks = slices.DeleteFunc(f.disks, func(x *flashDisk) bool { return x == d })
	if _, err := d.device.Detach(); err != nil {
		return d.raw, err
	}
	// Until its number is another device's nobody asks for what it has on flash.
	return d.raw, f.layer.Drop(i)
}
