package pool

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/blockio"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/catalogue"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/dedup"
	"github.com/pollux-storage/pollux/internal/dirty"
	"github.com/pollux-storage/pollux/internal/oplog"
	"github.com/pollux-storage/pollux/internal/planted"
	"github.com/pollux-storage/pollux/internal/region"
	"github.com/pollux-storage/pollux/internal/restart"
	"github.com/pollux-storage/pollux/internal/space"
	"github.com/pollux-storage/pollux/internal/volume"
)

// OpenOptions says which pool to open, and how.
type OpenOptions struct {
	// Devices are all devices of the pool, in any order, opened under their
	// locks. The pool closes them; after an error they are the caller's.
	Devices []hpdi.Device
	// Labels are those of Devices, in the same order, of a caller that has read them
	// under the locks. Nil makes Open read them, one after the other.
	Labels []Label
	// Restart, if set, is a restart record that has all of Devices. It saves reading most of
	// their labels before the pool serves. The error is a *RecordError when it is found out
	// that the record is not true; devices are closed by nobody then, and Open may be called
	// again without it. Not to be used with AcceptLoss.
	Restart *restart.Record
	// Each, if set, calls f with 0 to n-1, for several at once, and returns when all calls
	// have returned. One after the other if nil.
	Each func(n int, f func(i int))
	// RegionPath is where the pool's region is, or will be.
	RegionPath string
	Owner      string // the guest that takes ownership
	// CacheBytes is the memory of the pool's cache of clean blocks; DefaultCacheBytes
	// if 0.
	CacheBytes int64
	// Tell, if set, is told of what lies in the region beside the log, by one of the kinds
	// TellCache and so on: that what a guest before has left is of no use, or that there is
	// no place where it would outlive the guest, and why. No write is lost by that.
	Tell func(kind, text string)
	// AcceptLoss opens a pool whose region is lost or damaged: what was
	// acknowledged but not flushed is given up.
	AcceptLoss bool
	// BatteryBacked says that regions survive a power cut of the host. A
	// flush then does nothing, for what was acknowledged is safe already.
	BatteryBacked bool
	// Interval is the longest time between a write and the consistency point
	// that takes it to the devices. DefaultInterval if 0.
	Interval time.Duration
	// PointBytes is how much acknowledged data begins a consistency point
	// before that time is over; a quarter of the log if 0.
	PointBytes int64
	// FoldEntries and FoldLimit are how many mappings begin a fold, as cp.Config
	// has them.
	FoldEntries, FoldLimit int
	// IndexBytes is how much memory the index of fingerprints may take, once a volume
	// of the pool shares blocks; DefaultIndexBytes if 0. With less than 16 bytes a block
	// it has only one block in some of a track.
	IndexBytes int64
	// Fingerprint is what equal blocks are found by; nil for a hash with the pool's
	// secret.
	Fingerprint func(data []byte) dedup.Fingerprint
	Cleaner     CleanerOptions
	Scrub       ScrubOptions
	Removal     RemovalOptions
	Scan        ScanOptions
	Transfer    TransferOptions
	Flash       FlashOptions
	// BootID identifies the boot of the host, which decides whether a region
	// can still exist. region.BootID() if empty.
	BootID string
	// Host is the name of this host, which labels keep for people. Empty leaves
	// them as they are.
	Host string
	// LeftOut, if set, is told of a device that was about to join the pool
	// when AddDevice was interrupted, and is no part of it. Open has closed it;
	// AddDevice takes it the next time.
	LeftOut func(hpdi.Device)
	// Grown, if set, is told of a device that has become larger since the pool was
	// opened last, and by how many bytes. They are used from now on.
	Grown func(dev hpdi.Device, bytes int64)
}

// Kinds of OpenOptions.Tell, which are those of events too.
const (
	TellCache = "cache"       // the cache of clean blocks: what is wrong costs reads from devices
	TellIndex = "dedup-index" // the index of fingerprints: it costs savings
	TellKept  = "region-kept" // anything else: it costs time at the next takeover, or what the text says
)

// tell tells OpenOptions.Tell.
func (p *Pool) tell(kind, format string, args ...any) {
	if p.opts.Tell != nil {
		p.opts.Tell(kind, fmt.Sprintf(format, args...))
	}
}

// DefaultInterval is the Interval of pools that do not ask for another.
const DefaultInterval = time.Second

// Step is a part of opening a pool, and how long it took.
type Step struct {
	Name string
	Took time.Duration
}

// ErrRegionLost says that the pool's region, with acknowledged writes, should
// exist and does not. AcceptLoss opens the pool all the same.
var ErrRegionLost = errors.New("the pool's region is lost; " + acceptLoss)

// acceptLoss says what a person can do whose region is of no use.
const acceptLoss = "writes that no flush covered are lost with it: set accept_loss for the pool to go on without them"

// opener is a pool being opened.
type opener struct {
	*Pool
	o      OpenOptions
	sb     *cp.Superblock
	labels []Label
	extra  []hpdi.Device // given, but no part of the pool
	gone   []hpdi.Device // given, and no part of the pool any more
	boot   string
	begun  time.Time
	// replayed says that the log's content came from the flush log.
	replayed bool
	payload  int64 // bytes of a new log's arena
	unproved []int // indices of devices whose labels come from the restart record
}

// Open takes ownership of a pool and makes it ready to serve: the map is as of
// the last consistency point and everything acknowledged since is in the dirty
// index. [Pool.Run] must be started then. The previous owner must be fenced,
// which the locks of the devices prove.
func Open(ctx context.Context, o OpenOptions) (*Pool, error) {
	if o.Interval == 0 {
		o.Interval = DefaultInterval
	}
	if o.CacheBytes == 0 {
		o.CacheBytes = DefaultCacheBytes
	}
	p := &Pool{opts: o, kick: make(chan struct{}, 1), jobs: make(chan job), volumes: map[string]*volume.Volume{}, stopped: make(chan struct{})}
	p.flash = newFlash(p, o.Flash)
	op := &opener{Pool: p, o: o, begun: time.Now()}
	if err := op.open(ctx); err != nil {
		return nil, errors.Join(err, op.undo())
	}
	op.leaveOut()
	return p, nil
}

func (op *opener) step(name string) {
	now := time.Now()
	op.steps = append(op.steps, Step{name, now.Sub(op.begun)})
	op.begun = now
}

func (op *opener) open(ctx context.Context) error {
	if err := op.findDevices(); err != nil {
		return err
	}
	op.grow()
	op.step("superblock")
	if err := op.openFlash(true); err != nil {
		return err
	}
	op.step("flash")
	op.findRegion()
	if err := op.openCache(op.region); err != nil {
		return err
	}
	op.step("cache")
	if err := op.buildLayers(); err != nil {
		return err
	}
	op.step("journal")
	if err := op.openRegion(); err != nil {
		return err
	}
	op.step("region")
	if err := op.attachLog(); err != nil {
		return err
	}
	op.step("log")
	if err := op.takeOwnership(); err != nil {
		return err
	}
	op.step("ownership")
	return op.start(ctx)
}

// buildLayers makes everything that does not need the log.
func (op *opener) buildLayers() (err error) {
	if op.reader, err = blockio.New(op.set, op.cache.Cache); err != nil {
		return err
	}
	op.space = space.New()
	for i, d := range op.sb.Devices {
		if d.State == cp.DeviceGone {
			op.space.AddGone()
			continue
		}
		free, err := newSpace(d)
		if err != nil {
			return err
		}
		op.space.Attach(free)
		op.space.SetLeaving(i, d.State == cp.DeviceLeaving)
	}
	op.bmap = blockmap.NewMap(op.reader)
	op.catalogue = catalogue.New()
	op.machine, err = cp.Recover(cp.Config{
		Devices: op.set, Reader: op.reader, Space: op.space, Map: op.bmap, Catalogue: op.catalogue,
		JournalStart: op.label.Layout.Journal, JournalBlock: op.label.Layout.JournalBlocks,
		FoldEntries: op.o.FoldEntries, FoldLimit: op.o.FoldLimit, Hash: op.o.Fingerprint, Kept: op.recallJournal(),
	}, op.sb)
	if err != nil {
		return fmt.Errorf("open pool %s: %w", op.label.Name, err)
	}
	// Until the counts are loaded, the estimate is what is in use.
	op.estimate = op.machine.EstimatedUse()
	op.space.ForceReserve(op.estimate)
	return nil
}

// newSpace returns the space of a device, all of it free.
func newSpace(d cp.DeviceRoot) (*space.Device, error) {
	free, err := space.NewDevice(d.Blocks, d.First)
	if err == nil && d.Class == cp.ClassMemory {
		free.SetApart()
	}
	return free, err
}

// regionExists reports whether the superblock names a region that must exist. Memory
// does not outlive a boot of the host, unless it has a battery.
func (op *opener) regionExists() bool {
	return op.sb.RegionID != "" && (op.sb.BootID == op.boot || op.o.BatteryBacked)
}

// findRegion opens the pool's region if it is there and the one that the superblock names:
// the journal may be in it. Everything else is left to openRegion.
func (op *opener) findRegion() {
	r, err := region.Open(op.o.RegionPath, false)
	if err != nil {
		return
	}
	if h := r.Header(); h.Pool == op.sb.Pool && h.ID == op.sb.RegionID && op.regionExists() {
		op.region = r
		return
	}
	_ = r.Close() // nothing was written to it
}

// openRegion adopts the pool's region when it is the one that the superblock
// names, and otherwise makes a new one if nothing can be lost by it.
func (op *opener) openRegion() error {
	if op.region != nil {
		return nil // findRegion has
	}
	sb, exists := op.sb, op.regionExists()
	r, err := region.Open(op.o.RegionPath, false)
	if err == nil {
		h := r.Header()
		if h.Pool != sb.Pool {
			return errors.Join(fmt.Errorf("region %s belongs to pool %v, not to %s (%v): %w",
				op.o.RegionPath, h.Pool, op.label.Name, sb.Pool, block.ErrInvalid), r.Close())
		}
		if h.ID != sb.RegionID && h.Epoch > sb.Epoch && !op.o.AcceptLoss {
			// A region comes into use after the superblock that names it. The
			// next that adopts it may have raised its epoch alone.
			return errors.Join(&block.CorruptError{What: "superblock", Where: "pool " + op.label.Name,
				Why: fmt.Sprintf("the newest that can be read is of epoch %d, but region %s was in use in epoch %d", sb.Epoch, op.o.RegionPath, h.Epoch)}, r.Close())
		}
		// It was made but never came into use, or is of another boot.
		if err := errors.Join(r.Remove(), r.Close()); err != nil {
			return err
		}
	} else if !errors.Is(err, fs.ErrNotExist) && !op.o.AcceptLoss {
		return fmt.Errorf("region of pool %s: %w; %s", op.label.Name, err, acceptLoss)
	}
	if exists && !op.o.AcceptLoss {
		return fmt.Errorf("open pool %s, region %s at %s: %w", op.label.Name, sb.RegionID, op.o.RegionPath, ErrRegionLost)
	}
	return op.newRegion()
}

func (op *opener) newRegion() (err error) {
	if err := os.Remove(op.o.RegionPath); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove a region that is of no use: %w", err)
	}
	op.payload = op.label.LogBytes
	if op.replayed = op.sb.RegionID != ""; op.replayed {
		// Records keep their positions and so cannot be split where the
		// arena's free extents are: some more of them leave room for that.
		op.payload += op.payload/8 + 1<<20
	}
	op.region, err = region.Create(op.o.RegionPath, region.Options{
		Pool: op.sb.Pool, Owner: op.o.Owner, Epoch: op.sb.Epoch, LogBytes: oplog.SectionSize(op.payload),
	})
	return err
}

// attachLog opens the log in an adopted region, or fills that of a new one
// from the flush log.
func (op *opener) attachLog() (err error) {
	adopted := op.region.Header().ID == op.sb.RegionID
	if planted.Has(planted.RegionReplaced) && op.region.Header().Owner != op.o.Owner {
		adopted, op.payload = false, op.label.LogBytes
	}
	if adopted {
		if err = op.attachRegion(); err == nil || !op.o.AcceptLoss {
			return err
		}
		// The flushed prefix is what remains.
		op.machine.LeaveJournal()
		if err := errors.Join(op.leaveRegion(), op.region.Remove(), op.region.Close()); err != nil {
			return err
		}
		if err := op.newRegion(); err != nil {
			return err
		}
	}
	if err := op.machine.CheckJournalEnd(); err != nil {
		return fmt.Errorf("open pool %s: %w", op.label.Name, err)
	}
	op.log, err = oplog.Format(op.region.Log(), oplog.Config{
		PayloadBytes: op.payload, Pool: op.sb.Pool, Epoch: op.sb.Epoch, Start: op.machine.Committed(),
	})
	if err != nil || !op.replayed {
		return err
	}
	return op.replayFlushLog()
}

// attachRegion opens the log in an adopted region, which must go on where the journal ends.
func (op *opener) attachRegion() error {
	var behind error
	if id, _ := op.region.Committed(); id > op.machine.CP() {
		behind = op.lost(&block.CorruptError{What: "metadata journal", Where: "pool " + op.label.Name,
			Why: fmt.Sprintf("it ends at consistency point %d although %d was made", op.machine.CP(), id)})
		if !op.o.AcceptLoss {
			return behind
		}
	}
	log, err := oplog.Attach(op.region.Log())
	if err != nil {
		return op.lost(err)
	}
	if behind != nil && log.Tail() > op.machine.Committed() {
		return behind // what the missing points had is in the log no more
	}
	op.log = log
	return nil
}

// lost says where the region is that is of no use, and what a person can do.
func (op *opener) lost(err error) error {
	return fmt.Errorf("region %s of pool %s: %w; %s", op.o.RegionPath, op.label.Name, err, acceptLoss)
}

// replayFlushLog publishes again what flushes had made durable when the host
// lost its memory.
func (op *opener) replayFlushLog() error {
	if op.machine.FlushPos() == (oplog.DiskPos{}) {
		return nil // flushes append to it only after a first consistency point
	}
	q, err := op.set.Queue(0)
	if err != nil {
		return err
	}
	defer func() { _ = q.Close() }()
	committed := op.machine.Committed()
	_, err = oplog.Scan(q, op.label.flushArea(op.set.Device(0)), op.machine.FlushPos(), func(rec oplog.Record, payload [][]byte) error {
		if rec.Seq <= committed {
			return nil
		}
		if next := op.log.Head() + 1; rec.Seq != next {
			return &block.CorruptError{What: "flush log", Where: fmt.Sprintf("position %d", next), Why: fmt.Sprintf("position %d follows", rec.Seq)}
		}
		return op.publishAgain(rec, payload)
	})
	if err != nil && !(op.o.AcceptLoss && errors.Is(err, block.ErrCorrupt)) {
		return fmt.Errorf("flush log of pool %s: %w", op.label.Name, err)
	}
	return nil
}

// publishAgain appends a record, at its old position, with its payload.
func (op *opener) publishAgain(rec oplog.Record, payload [][]byte) error {
	if rec.Kind == oplog.KindWrite {
		first, ok := op.allocRun(int(rec.Count))
		if !ok {
			return &block.CorruptError{What: "flush log", Where: fmt.Sprintf("position %d", rec.Seq),
				Why: fmt.Sprintf("it holds more than the operation log of %d bytes", op.label.LogBytes)}
		}
		rec.First = first
		for i, p := range payload {
			// A block without payload was damaged in memory; its checksum
			// makes it read as an error for ever.
			copy(op.log.Payload(first+oplog.Extent(i), 1), p)
		}
	}
	if _, ok := op.log.Publish([]oplog.Record{rec}); !ok {
		return fmt.Errorf("flush log holds more records than the operation log: %w", block.ErrCorrupt)
	}
	return nil
}

// allocRun returns the first of n consecutive extents.
func (op *opener) allocRun(n int) (first oplog.Extent, ok bool) {
	var passed [][]oplog.Extent
	defer func() {
		for _, ext := range passed {
			op.log.Free(ext)
		}
	}()
	for {
		ext, ok := op.log.Alloc(n, nil)
		if !ok {
			return 0, false
		}
		if ext[n-1] == ext[0]+oplog.Extent(n-1) && slices.IsSorted(ext) {
			return ext[0], true
		}
		passed = append(passed, ext)
	}
}

// takeOwnership raises the epoch in superblock and region: whoever had the
// pool before stops at its next step, which looks at the region.
//
// A region comes into use after the superblock that names it. When a region is
// adopted there is one already; then the superblock with the new epoch may wait
// until clients are served, and they need not wait until the device has synced what
// a dead guest gave it. Until it is durable nothing else is written to a device, so
// that nothing durable carries the new epoch when a power cut takes the region and
// the epoch with it.
//
// It may not wait where something outside the devices relies on what was found on
// them and may not be durable: a region that survives a power cut, from which
// records are released that a consistency point covers, and the labels of devices
// that the superblock names.
func (op *opener) takeOwnership() error {
	op.epoch = max(op.sb.Epoch, op.region.LastEpoch()) + 1
	if planted.Has(planted.EpochNotRaised) {
		op.epoch--
	}
	epoch, region := op.epoch, op.region.Header().ID
	op.machine.Claim(func(sb *cp.Superblock) { sb.Epoch, sb.RegionID, sb.BootID = epoch, region, op.boot })
	named := op.sb.RegionID == region && op.sb.BootID == op.boot
	joining := slices.ContainsFunc(op.labels, func(l Label) bool { return l.Joining })
	written := !named || op.o.BatteryBacked || joining
	if written {
		if err := op.proved(); err != nil {
			return err
		}
		if err := op.machine.Rewrite(func(*cp.Superblock) {}); err != nil {
			return fmt.Errorf("open pool %s: %w", op.label.Name, err)
		}
	}
	op.log.SetEpoch(op.epoch)
	if err := op.region.SetOwner(op.o.Owner, op.epoch); err != nil {
		return err
	}
	_ = op.region.Tidy() // what it cannot give back is given back another time
	return op.completeLabels(written)
}

// completeLabels makes members of devices that the superblock names but whose
// labels an interrupted AddDevice has left, and takes back that the pool was
// exported. Where the former fails the next Open tries it again: the superblock is
// what counts. The name of the host changes only when the superblock was written,
// too: labels are nothing that a takeover should wait for.
func (op *opener) completeLabels(written bool) error {
	for i, old := range op.labels {
		if !op.set.Has(i) {
			continue
		}
		l := &op.labels[i]
		l.Joining, l.Exported = false, false
		if written && op.o.Host != "" {
			l.Host = op.o.Host
		}
		if *l == old {
			continue
		}
		if err := writeLabel(op.set.Device(i), *l); err != nil && old.Exported {
			return fmt.Errorf("open pool %s, which was exported: %w", l.Name, err)
		}
	}
	op.Pool.label, op.Pool.labels = op.labels[0], op.labels
	return nil
}

// start assembles what serves requests.
func (op *opener) start(ctx context.Context) error {
	p := op.Pool
	op.adoptSessions()
	p.dirty = dirty.New(dirty.Options{Log: p.log, Space: p.space, Tags: p.sessions, Permits: int(p.label.LogBytes / block.Size), Due: int(p.opts.PointBytes / block.Size), Owned: p.owned, Full: p.wake})
	if err := p.dirty.Restore(p.machine.Committed()); err != nil {
		return fmt.Errorf("open pool %s: %w", p.label.Name, err)
	}
	op.step("dirty index")
	var err error
	if p.flushQueue, err = p.flash.queueBelow(0); err != nil {
		return err
	}
	area := p.label.FlushArea()
	area.DurableWrites = p.set.Info(0).Durable
	p.flusher = cp.NewFlusher(p.log, oplog.NewDisk(p.flushQueue, area), p.machine.FlushPos(), p.Commit)
	p.machine.Start(p.dirty, p.log, p.flusher)
	flush := p.flusher.Flush
	if p.opts.BatteryBacked {
		flush = func(context.Context) error { return p.owned() }
	}
	p.store = &volume.Store{Dirty: p.dirty, Map: p.bmap, Reader: p.reader, Sessions: p.sessions, Gate: &p.gate, Flush: flush, Relieve: p.relieve}
	p.refreshVolumes()
	p.cleaner = newCleaner(p, p.opts.Cleaner)
	p.scrub = newScrub(p, p.opts.Scrub)
	p.remover = newRemover(p, p.opts.Removal)
	p.scan = newScan(p, p.opts.Scan)
	p.transfer = newTransfer(p, p.opts.Transfer)
	p.survey = newSurvey(p)
	p.indexer = newIndexer(p)
	settings := op.sb.Settings
	p.settings.Store(&settings)
	for _, d := range op.gone {
		p.remover.add(d, op.sb.Generation)
	}
	p.flash.serve()
	p.region.SetState(region.StateServing)
	if err := ctx.Err(); err != nil {
		return err
	}
	p.placeCache()
	return nil
}

// undo gives back what a failed Open took. The devices stay open.
func (op *opener) undo() error {
	var errs []error
	if op.flushQueue != nil {
		errs = append(errs, op.flushQueue.Close())
	}
	if op.set != nil {
		errs = append(errs, op.set.ReleaseQueues(), op.flash.close())
	}
	errs = append(errs, op.cache.close())
	if op.sessions != nil {
		op.sessions.Shut()
	}
	if op.region != nil {
		errs = append(errs, op.region.Close())
	}
	if op.reader != nil {
		errs = append(errs, op.reader.Close())
	}
	if op.space != nil {
		op.space.Close()
	}
	return errors.Join(errs...)
}
