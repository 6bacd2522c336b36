package pool

import (
	"context"
	"errors"
	"fmt"
	"io/fs"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/cache"
	"github.com/pollux-storage/pollux/internal/catalogue"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/oplog"
	"github.com/pollux-storage/pollux/internal/region"
)

// viewCache is what a view keeps of metadata pages.
const viewCache = 16 << 20

// View is a pool that nobody serves, as somebody sees it who only looks: the
// journal is replayed in memory, the region mapped read-only. Nothing is
// written to the devices, which may be opened for reading only, but by Repair, or
// to the region, and no ownership is taken. Whoever opens it holds the locks of the
// devices, or what it shows may change while it looks.
type View struct {
	p      *Pool
	region *region.Region // nil when the log is not in memory
	log    *oplog.View
	// lost says why the log that should be in the region is not to be had.
	lost error
	// behind says that the region knows of something newer than the devices have.
	behind error
	mem    []byte // of the cache
}

// ViewOptions says which pool to look at.
type ViewOptions struct {
	// Devices are all devices of the pool, in any order. The view closes
	// them; after an error they are the caller's.
	Devices []hpdi.Device
	// RegionPath is where the pool's region would be; without one only what
	// is on the devices is looked at.
	RegionPath    string
	BatteryBacked bool   // as OpenOptions has it
	BootID        string // region.BootID() if empty
}

// OpenView looks at a pool.
func OpenView(o ViewOptions) (*View, error) {
	mem, err := hpdi.AllocPrivate(viewCache)
	if err != nil {
		return nil, err
	}
	v := &View{p: &Pool{}, mem: mem}
	v.p.flash = newFlash(v.p, FlashOptions{})
	op := &opener{Pool: v.p, o: OpenOptions{
		Devices: o.Devices, RegionPath: o.RegionPath, BootID: o.BootID, BatteryBacked: o.BatteryBacked,
	}}
	v.p.cache.Cache = cache.New(mem)
	if err = op.findDevices(); err == nil {
		op.set.LookOnly(true)
		if err = op.openFlash(false); err == nil {
			err = op.buildLayers()
		}
	}
	if err == nil {
		err = v.openLog(op)
	}
	if err != nil {
		return nil, errors.Join(err, op.undo(), hpdi.Free(mem))
	}
	op.extra = append(op.extra, op.gone...)
	op.leaveOut()
	return v, nil
}

// openLog maps the region that the superblock names. That it is missing or
// damaged is kept for who asks; the devices can be looked at all the same.
func (v *View) openLog(op *opener) error {
	if op.o.RegionPath == "" {
		return nil
	}
	sb, name := op.sb, op.label.Name
	expected := sb.RegionID != "" && (sb.BootID == op.boot || op.o.BatteryBacked)
	r, err := region.Open(op.o.RegionPath, true)
	switch {
	case !expected && err != nil:
		return nil // whatever is there came never into use
	case !expected:
		if h := r.Header(); h.Pool == sb.Pool && h.ID != sb.RegionID && h.Epoch > sb.Epoch {
			v.lost = newerRegion(op, h.Epoch)
			v.behind = v.lost
		}
		return r.Close()
	case errors.Is(err, fs.ErrNotExist):
		v.lost = fmt.Errorf("pool %s, region %s at %s: %w", name, sb.RegionID, op.o.RegionPath, ErrRegionLost)
		return nil
	case errors.Is(err, block.ErrCorrupt), errors.Is(err, ondisk.ErrMagic):
		v.lost = err
		return nil
	case err != nil:
		return err
	}
	if h := r.Header(); h.Pool != sb.Pool || h.ID != sb.RegionID {
		v.lost = fmt.Errorf("region %s is %s of pool %v; pool %s (%v) has its log in %s: %w",
			op.o.RegionPath, h.ID, h.Pool, name, sb.Pool, sb.RegionID, ErrRegionLost)
		return r.Close()
	}
	if id, _ := r.Committed(); id > op.machine.CP() {
		v.lost = &block.CorruptError{What: "metadata journal", Where: "pool " + name,
			Why: fmt.Sprintf("it ends at consistency point %d although %d was made", op.machine.CP(), id)}
		v.behind = v.lost
	}
	v.region = r
	if v.log, err = oplog.OpenView(r.Log()); err != nil {
		v.lost = errors.Join(v.lost, err)
		return nil
	}
	if _, err := v.log.Damage(); err != nil {
		v.lost = errors.Join(v.lost, err)
	}
	return nil
}

// newerRegion says that a region knows of an owner whom no superblock names.
func newerRegion(op *opener, epoch block.Epoch) error {
	return &block.CorruptError{What: "superblock", Where: "pool " + op.label.Name,
		Why: fmt.Sprintf("the newest that can be read is of epoch %d, but region %s was in use in epoch %d", op.sb.Epoch, op.o.RegionPath, epoch)}
}

// Close closes the devices and unmaps the region.
func (v *View) Close() error {
	p := v.p
	errs := []error{p.machine.Close(), p.flash.close(), p.set.Close(), p.reader.Close()}
	if v.region != nil {
		errs = append(errs, v.region.Close())
	}
	p.space.Close()
	return errors.Join(append(errs, hpdi.Free(v.mem))...)
}

// Label returns the label of the pool's first device.
func (v *View) Label() Label { return v.p.label }

// Superblock returns the newest superblock.
func (v *View) Superblock() cp.Superblock { return v.p.machine.Superblock() }

// Volumes returns the list of volumes, those that are being deleted included.
func (v *View) Volumes() []catalogue.Volume { return v.p.catalogue.All() }

// Check is [Pool.Check] of a pool that nobody serves. A log that should be in
// memory and is not whole is a problem like others.
func (v *View) Check(ctx context.Context, o CheckOptions) (CheckReport, error) {
	c, err := v.newChecker(o)
	if err != nil {
		return CheckReport{}, err
	}
	defer c.bulk.close()
	err = v.still(ctx, c)
	if err == nil && o.Data {
		err = c.data(ctx)
	}
	return c.report, err
}

func (v *View) newChecker(o CheckOptions) (*checker, error) {
	c, err := v.p.newChecker(o)
	if err != nil {
		return nil, err
	}
	c.loadCounts = c.countsStored
	c.pass = func(fn func() error) error { return fn() }
	c.lookSessions = v.lookSessions
	if v.log != nil {
		c.log = v.log
	}
	return c, nil
}

// still checks everything but data.
func (v *View) still(ctx context.Context, c *checker) error {
	if v.lost != nil {
		c.problem("%v", v.lost)
	}
	err := c.still(ctx)
	if err == nil && v.log == nil {
		err = v.flushed(c)
	}
	return err
}

// flushed proves the flush log, which holds what is not on the devices when
// there is no region, and that the journal does not go on after its end.
func (v *View) flushed(c *checker) error {
	p := v.p
	if err := p.machine.CheckJournalEnd(); isDevice(err) {
		return err
	} else if err != nil {
		v.behind = err
		c.problem("%v", err)
	}
	if p.machine.Superblock().RegionID == "" || p.machine.FlushPos() == (oplog.DiskPos{}) {
		return nil
	}
	q, err := p.set.Queue(0)
	if err != nil {
		return err
	}
	next := p.machine.Committed() + 1
	_, err = oplog.Scan(q, p.label.flushArea(p.set.Device(0)), p.machine.FlushPos(), func(rec oplog.Record, payload [][]byte) error {
		if rec.Seq < next {
			return nil
		}
		if rec.Seq != next {
			return &block.CorruptError{What: "flush log", Where: fmt.Sprintf("position %d", next), Why: fmt.Sprintf("position %d follows", rec.Seq)}
		}
		next++
		c.report.LogRecords++
		for i, b := range payload {
			if b == nil {
				c.problem("flush log, position %d: payload of block %d of volume %d is damaged", rec.Seq, rec.LBA+block.Logical(i), rec.Volume)
			}
		}
		return nil
	})
	if errors.Is(err, block.ErrCorrupt) {
		c.problem("%v", err)
		err = nil
	}
	return errors.Join(err, q.Close())
}
