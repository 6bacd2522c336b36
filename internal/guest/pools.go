package guest

import (
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"slices"
	"sync/atomic"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/partner"
	"github.com/pollux-storage/pollux/internal/pool"
)

// Pools is the real Storage: package pool.
type Pools struct {
	cleaner pool.CleanerOptions
	scrub   pool.ScrubOptions
	removal pool.RemovalOptions
	cache   int64 // bytes of each pool's cache
	limit   config.Points
	index   int64  // bytes of each pool's index of fingerprints
	host    string // this one's name
}

// NewPools returns a storage whose pools have caches of that size.
func NewPools(cfg *config.Config, cacheBytes int64) *Pools {
	p := &Pools{cache: cacheBytes, limit: cfg.Points, index: int64(cfg.DedupIndex)}
	p.host, _ = os.Hostname() // it is only for people
	p.cleaner = pool.CleanerOptions{Off: cfg.Cleaner.Off, Rate: int64(cfg.Cleaner.Rate), LowWater: cfg.Cleaner.LowWater}
	p.removal = pool.RemovalOptions{Rate: int64(cfg.Resilver.Rate)}
	p.scrub = pool.ScrubOptions{Off: cfg.Scrub.Off, Every: cfg.Scrub.Every, Rate: int64(cfg.Scrub.Rate)}
	return p
}

// Label returns what a device says about its pool.
func (p *Pools) Label(dev hpdi.Device) (Label, error) { return readLabel(dev) }

func readLabel(dev hpdi.Device) (Label, error) {
	l, err := wholeLabel(dev)
	return Label{Pool: l.Pool, Name: l.Name, Identity: l.Identity}, err
}

// wholeLabel is readLabel with all that the label says.
func wholeLabel(dev hpdi.Device) (pool.Label, error) {
	l, err := pool.ReadLabel(dev)
	if errors.Is(err, ondisk.ErrMagic) {
		err = fmt.Errorf("device %s %w", dev.Info().Name, ErrNoPool)
	}
	return l, err
}

// readLabels reads the labels of all devices of a pool, and checks whose it is.
func readLabels(devs []hpdi.Device, identity string) ([]pool.Label, error) {
	labels, errs := make([]pool.Label, len(devs)), make([]error, len(devs))
	atOnce(len(devs), func(i int) { labels[i], errs[i] = wholeLabel(devs[i]) })
	for i, l := range labels {
		if errs[i] != nil {
			return nil, errs[i]
		}
		if l.Identity != identity {
			return nil, fmt.Errorf("device %s belongs to pool %s of %q, not of %q: correct the settings", devs[i].Info().Name, l.Name, l.Identity, identity)
		}
	}
	return labels, nil
}

// Create makes a pool.
func (p *Pools) Create(ctx context.Context, o CreateSpec) error {
	_, err := pool.Create(ctx, pool.CreateOptions{Name: o.Name, Identity: o.Identity, Devices: o.Devices, LogBytes: o.LogBytes, FillFlushArea: true, Host: p.host})
	return err
}

// Adopt labels a pool for an identity.
func (p *Pools) Adopt(o AdoptSpec) error {
	var id block.PoolID
	if b, err := hex.DecodeString(o.Pool); err != nil || copy(id[:], b) != len(b) || len(b) != len(id) {
		return fmt.Errorf("pool id %q: %w", o.Pool, block.ErrInvalid)
	}
	return pool.Adopt(o.Devices, pool.AdoptOptions{Pool: id, Name: o.Name, Identity: o.Identity, Epoch: o.Epoch})
}

// Open opens a pool of the identity.
func (p *Pools) Open(ctx context.Context, o OpenSpec) (Store, error) {
	s, err := p.open(ctx, o)
	if err != nil {
		closeAll(o.Devices)
		return nil, err
	}
	return s, nil
}

func (p *Pools) open(ctx context.Context, o OpenSpec) (*store, error) {
	scrub, removal, scan, flash := p.scrub, p.removal, pool.ScanOptions{}, pool.FlashOptions{}
	removal.Removed = o.Removed
	var grown func(hpdi.Device, int64)
	if o.Tell != nil {
		grown = func(d hpdi.Device, bytes int64) {
			o.Tell("device-grown", fmt.Sprintf("device %s has grown by %s, which its pool uses from now on", d.Info().Name, config.Size(bytes)))
		}
		scrub.Tell = func(e pool.ScrubEvent) { o.Tell(e.Kind, e.Message) }
		scan.Tell = o.Tell
		removal.Tell = func(e pool.RemovalEvent) { o.Tell(e.Kind, e.Message) }
		flash.Tell = func(e pool.FlashEvent) { o.Tell(e.Kind, e.Message) }
	}
	opts := pool.OpenOptions{
		Devices: o.Devices, Each: atOnce, RegionPath: o.RegionPath, CacheBytes: p.cache,
		Owner: o.Owner, AcceptLoss: o.AcceptLoss, BatteryBacked: o.BatteryBacked, LeftOut: o.LeftOut,
		Interval: p.limit.Interval, PointBytes: int64(p.limit.Size), FoldEntries: p.limit.FoldAfter, FoldLimit: p.limit.FoldLimit, IndexBytes: p.index,
		Cleaner: p.cleaner, Scrub: scrub, Removal: removal, Scan: scan, Flash: flash, Grown: grown, Host: p.host,
		Tell: o.Tell,
	}
	s := &store{opened: o.Without}
	if o.Restart != nil {
		opts.Restart = o.Restart
		q, err := pool.Open(ctx, opts)
		if err == nil {
			s.Pool, s.opened.Number = q, o.Restart.Number
			return s, nil
		}
		// Whatever it was, it is told by the conventional way if it is so.
		opts.Restart, s.opened.Why = nil, err.Error()
		if untrue := (*pool.RecordError)(nil); errors.As(err, &untrue) {
			s.opened.Why = untrue.Why
		}
	}
	begun := time.Now()
	var err error
	if opts.Labels, err = readLabels(o.Devices, o.Identity); err != nil {
		return nil, err
	}
	s.labels = time.Since(begun)
	if s.Pool, err = pool.Open(ctx, opts); err != nil {
		return nil, err
	}
	return s, nil
}

// store is an open pool.
type store struct {
	*pool.Pool
	opened   Opened
	labels   time.Duration                      // that reading them took, before the pool was opened
	checking atomic.Pointer[pool.CheckProgress] // of the newest check under way
}

// releaseLimit bounds the wait for requests in flight, which were cut already.
const releaseLimit = 3 * time.Second

func (s *store) Region() partner.Region {
	r := s.Pool.Region()
	return partner.Region{Path: r.Path(), Pool: s.ID(), Bytes: int64(r.Header().Size)}
}

// Opened says how the pool was opened.
func (s *store) Opened() Opened { return s.opened }

func (s *store) Steps() []partner.Step {
	var out []partner.Step
	if s.labels > 0 {
		out = append(out, partner.Step{Name: "labels", Took: s.labels})
	}
	for _, st := range s.OpenSteps() {
		out = append(out, partner.Step{Name: st.Name, Took: st.Took})
	}
	return out
}

func (s *store) Beat()             { s.Pool.Region().Beat() }
func (s *store) Heartbeat() uint64 { return s.Pool.Region().Heartbeat() }

func (s *store) Volumes() []VolumeInfo {
	var out []VolumeInfo
	found := s.Surveyed()
	for _, v := range s.Pool.Volumes() {
		out = append(out, VolumeInfo{ID: v.ID, Name: v.Name, Size: v.Size, Created: v.Created, Used: v.Used, THN: v.Run, Survey: volumeSurvey(found, v.ID)})
	}
	return out
}

func (s *store) CreateVolume(ctx context.Context, name string, size int64, thn int) error {
	_, err := s.CreateSharing(ctx, name, size, thn)
	return err
}

func (s *store) Check(ctx context.Context) (control.PoolCheck, error) {
	p := &pool.CheckProgress{}
	s.checking.Store(p)
	defer s.checking.CompareAndSwap(p, nil)
	r, err := s.Pool.Check(ctx, pool.CheckOptions{Data: true, Progress: p})
	return poolCheck(r), err
}

func (s *store) Checking() (control.CheckProgress, bool) {
	p := s.checking.Load()
	if p == nil {
		return control.CheckProgress{}, false
	}
	return progressOf(p), true
}

func poolCheck(r pool.CheckReport) control.PoolCheck {
	c := control.PoolCheck{Pool: r.Pool, Volumes: r.Volumes, Blocks: r.DataBlocks + r.Pages, Problems: append([]string{}, r.Problems...)}
	if r.MoreProblem > 0 {
		c.Problems = append(c.Problems, fmt.Sprintf("and %d more", r.MoreProblem))
	}
	if c.Mended = r.Mended; r.MoreMended > 0 {
		c.Mended = append(slices.Clone(c.Mended), fmt.Sprintf("and %d more", r.MoreMended))
	}
	c.OK = len(c.Problems) == 0
	return c
}

func (s *store) Stats() control.PoolStatus {
	st := s.Pool.Stats()
	faults := map[string]control.DeviceErrors{}
	for _, d := range st.Devices {
		if e := d.Errors; e != (devices.Errors{}) {
			faults[d.Name] = control.DeviceErrors{ReadErrors: e.Reads, WriteErrors: e.Writes, Corrupt: e.Corrupt}
		}
	}
	return control.PoolStatus{
		Restart: restartStatus(s.opened),
		LLRRM:   llrrmStatus(st), Flash: flashStatus(st.Flash),
		Name: s.Name(), Identity: s.Identity(), Epoch: uint64(s.Epoch()), CP: st.CP, Capacity: st.Bytes, Free: st.FreeBytes,
		LogBytes: st.LogBytes, LogUsed: st.LogUsedBytes, Dirty: int64(st.DirtyBlocks) * block.Size, Error: st.LastError,
		Faults: faults, CountsBytes: st.CountsBytes, RegionKept: st.RegionKept, Loading: st.Loading, PagesMended: st.Mended,
		Dedup: control.DedupStatus{
			DedupCounts: control.DedupCounts{Shared: st.Sharing.Shared, Written: st.Sharing.Written, Zeros: st.Sharing.Zeros},
			Unequal:     st.Sharing.Unequal, Saved: st.Sharing.Saved,
			IndexBytes: st.Sharing.IndexBytes, IndexEntries: st.Sharing.IndexEntries,
			IndexOwn: st.Sharing.IndexOwn, IndexKept: st.Sharing.IndexKept,
			MeanExtent: s.Surveyed().MeanExtent(),
		},
		Cleaner: control.CleanerStatus{
			State: st.Cleaner.State, Tracks: st.Cleaner.Tracks, Whole: st.Cleaner.Whole, Passes: st.Cleaner.Passes,
			Freed: st.Cleaner.Freed, Moved: st.Cleaner.Moved, Failed: st.Cleaner.Failed,
		},
		Cache: control.CacheStatus{
			Bytes: st.Cache.Bytes, Used: int64(st.Cache.Used) * block.Size, Own: st.Cache.Own, Why: st.Cache.Why, Adopted: int64(st.Cache.Adopted),
			Hits: st.Cache.Hits, Misses: st.Cache.Misses, Evictions: st.Cache.Evictions, Damaged: st.Cache.Damaged,
		},
		Scrub: scrubStatus(st.Scrub), Removal: removalStatus(st.Removal), Settings: poolSettings(s.Settings()),
	}
}

func (s *store) Release() error {
	ctx, cancel := context.WithTimeout(context.Background(), releaseLimit)
	defer cancel()
	return s.Pool.Release(ctx)
}

// llrrmStatus tells of low-latency memory, nil where a pool has none.
func llrrmStatus(st pool.Stats) *control.LLRRMStatus {
	var names []string
	for _, d := range st.Devices {
		if d.Class == cp.ClassMemory {
			names = append(names, d.Name)
		}
	}
	if len(names) == 0 {
		return nil
	}
	m := st.Memory
	return &control.LLRRMStatus{Devices: names, Bytes: m.Total, Used: m.Total - m.Free, Threshold: m.Threshold,
		Written: m.Written, Moved: m.Moved, Waiting: m.Waiting, Failed: m.Failed}
}
