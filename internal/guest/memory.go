package guest

import (
	"fmt"
	"io"
	"math"
	"os"
	"runtime/debug"
	"slices"
	"strings"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/flashmap/policy"
	"github.com/pollux-storage/pollux/internal/oplog"
	"github.com/pollux-storage/pollux/internal/pool"
	"github.com/pollux-storage/pollux/internal/space"
)

// Plan is how a guest divides its memory, with the partner's pool taken over.
// What is not for a purpose of its own is the cache's.
type Plan struct {
	Limit  int64 // the setting; 0 when there is none
	Logs   int64 // regions with the operation logs
	Counts int64 // reference counts, while nothing is shared
	Index  int64 // of fingerprints, where blocks are shared; in the regions, too
	Flash  int64 // what is collected of the use of disks, where a pool has flash
	Kept   int64 // in the regions: what a takeover need not read
	Work   int64 // everything else
	Cache  int64 // clean blocks of all pools, in their regions

	pools   int
	devices int64 // bytes of all devices
}

const (
	// minCache is what the planned cache of a pool has at least: metadata pages
	// pass through it.
	minCache = 16 << 20
	// What a guest takes with no pool, and beside log, counts and cache for
	// each pool: its buffers for reads and metadata pages, the index of its
	// log, a sixteenth of it, and mappings that are not folded, each in two
	// overlays and a fold's lists.
	workBase       = 64 << 20
	workPool       = 32 << 20
	workLogShare   = 16
	workForMapping = 320
)

// poolNeeds is what decides how much memory a pool takes.
type poolNeeds struct {
	blocks []uint64 // of each device
	log    int64    // bytes of payload; 0 while the settings decide
	index  int64    // of fingerprints; 0 as long as the settings decide
	flash  int64    // bytes for its flash, 0 without
	disks  int      // of whose use something is collected
}

// flashSet is the memory for a data set that is on flash.
const flashSet = 16

// PlanMemory divides a guest's memory as the settings and the devices of both
// pools demand. When it does not suffice, the error says what would, and the
// plan is that with the smallest cache.
func PlanMemory(cfg *config.Config) (Plan, error) {
	var pools []poolNeeds
	for i := range cfg.Guests {
		pools = append(pools, needsOf(cfg, &cfg.Guests[i]))
	}
	return plan(cfg, pools)
}

// needsOf looks at the devices of a pool. One that cannot be read is taken for
// what the settings would make of it: opening it will say what is wrong. Of single
// devices after the first of the pool, which says what there is to say, only the sizes
// are asked: every start of a guest waits for this.
func needsOf(cfg *config.Config, set *config.Guest) poolNeeds {
	if r, err := usableRecord(cfg, set); err == nil {
		if n, ok := needsByRecord(r); ok {
			return n
		}
	}
	var n poolNeeds
	var use pool.LastUse
	known := false
	for _, paths := range set.Pool.Groups() {
		if known && len(paths) == 1 {
			n.blocks = append(n.blocks, uint64(smallest(paths, int64(set.Pool.Size)))/block.Size)
			continue
		}
		d, err := openToLook(paths, func(string, error) {})
		if err != nil {
			n.blocks = append(n.blocks, uint64(smallest(paths, int64(set.Pool.Size)))/block.Size)
			continue
		}
		n.blocks = append(n.blocks, uint64(d.Info().Size)/block.Size)
		if l, err := pool.ReadLabel(d); err == nil {
			n.log = l.LogBytes
			if l.Index == 0 {
				known = true
				use, _ = pool.ReadLastUse(d, l.Pool) // if it cannot be read, opening the pool says so
			}
		}
		_ = d.Close() // it was only read
	}
	n.follow(use)
	return n
}

// follow sets what follows from the last use of a pool, whose blocks are known.
func (n *poolNeeds) follow(use pool.LastUse) {
	var blocks uint64
	for _, b := range n.blocks {
		blocks += b
	}
	n.index, n.flash = int64(use.Settings.IndexBytes), flashNeeds(use, blocks)
	if use.Flash {
		n.disks = use.Disks
	}
}

// flashNeeds returns the memory for the flash of a pool, all of whose devices have so many
// blocks: what is collected of each disk, and the table of what is on flash. It goes by the
// default parameters and the usual data set, for which the flash device has not to be read.
func flashNeeds(u pool.LastUse, blocks uint64) int64 {
	if !u.Flash {
		return 0
	}
	c := policy.Defaults().Collect
	flash := int64(max(blocks, u.Blocks)-u.Blocks) * block.Size
	return int64(u.Disks)*int64(c.Memory+c.History) + flash/pool.DefaultSetBytes*flashSet
}

// smallest returns the size of the smallest of some devices, each of which has the
// given size if it cannot be looked at.
func smallest(paths []string, otherwise int64) int64 {
	least := int64(math.MaxInt64)
	for _, path := range paths {
		size := otherwise
		if f, err := os.Open(path); err == nil {
			if end, err := f.Seek(0, io.SeekEnd); err == nil {
				size = end
			}
			_ = f.Close() // it was only looked at
		}
		least = min(least, size)
	}
	return least
}

// plan is PlanMemory for pools that are known.
func plan(cfg *config.Config, pools []poolNeeds) (Plan, error) {
	p := divide(cfg, pools)
	if p.Limit == 0 || p.Sum() <= p.Limit {
		return p, nil
	}
	// Where log and folds follow the memory, more of it means larger ones.
	c, least := *cfg, p
	for least.Sum() > int64(c.Memory) {
		if c.Memory = roundUp(least.Sum()); cfg.Log == config.DefaultLog(cfg.Memory) {
			c.Log = config.DefaultLog(c.Memory)
		}
		if cfg.DedupIndex == config.DefaultDedupIndex(cfg.Memory) {
			c.DedupIndex = config.DefaultDedupIndex(c.Memory)
		}
		if cfg.Points.FoldLimit == cfg.Points.DefaultFoldLimit(cfg.Memory) {
			c.Points.FoldLimit = c.Points.DefaultFoldLimit(c.Memory)
		}
		least = divide(&c, pools)
	}
	var parts []string
	for _, part := range least.parts() {
		parts = append(parts, fmt.Sprintf("%s for %s (%s)", roundUp(part.Planned), part.Name, part.Why))
	}
	return p, fmt.Errorf("memory: %s do not suffice, at least %s: %s; give more, or make logs smaller with `log` before their pools exist",
		cfg.Memory, c.Memory, strings.Join(parts, ", "))
}

func roundUp(n int64) config.Size { return config.Size((n + 1<<20 - 1) &^ (1<<20 - 1)) }

// divide gives each part what it needs and the cache the rest, or the least.
func divide(cfg *config.Config, pools []poolNeeds) Plan {
	p := Plan{Limit: int64(cfg.Memory), Cache: int64(cfg.Cache) * int64(len(pools)), Work: workBase, pools: len(pools)}
	for _, n := range pools {
		log := n.log
		if log == 0 {
			log = int64(cfg.Log)
		}
		p.Logs += oplog.SectionSize(log)
		p.Work += workPool + log/workLogShare + int64(cfg.Points.FoldLimit)*workForMapping
		blocks := int64(0)
		for _, b := range n.blocks {
			p.Counts += space.MemoryFor(b)
			blocks += int64(b)
		}
		index := n.index
		if index == 0 {
			index = int64(cfg.DedupIndex)
		}
		p.Index += pool.IndexMemory(index, blocks)
		p.Flash += n.flash
		p.Kept += pool.JournalMemory(cfg.Points.FoldLimit) + pool.UsageMemory(n.disks, policy.Defaults().Collect) + pool.SessionMemory
		p.devices += blocks * block.Size
	}
	if p.Cache == 0 {
		p.Cache = max(minCache*int64(p.pools), p.Limit-p.Logs-p.Counts-p.Index-p.Flash-p.Kept-p.Work)
	}
	return p
}

// PoolCache returns the bytes of the cache of each pool.
func (p Plan) PoolCache() int64 { return p.Cache / int64(max(1, p.pools)) }

// Sum returns the bytes of all parts.
func (p Plan) Sum() int64 { return p.Logs + p.Counts + p.Index + p.Flash + p.Kept + p.Work + p.Cache }

// Regions returns how much memory the regions of all pools may take at most: a log that is
// replayed after a power cut is larger, and an index of another size is made beside the
// one before.
func (p Plan) Regions() int64 {
	return p.Logs + p.Logs/4 + 2*p.Index + p.Kept + int64(p.pools)*pool.CacheMemory(p.PoolCache())
}

// HeapLimit returns what of Work and Flash the Go heap may take, 0 for any amount: the
// rest is memory outside it.
func (p Plan) HeapLimit() int64 {
	if p.Limit == 0 {
		return 0
	}
	return p.Work + p.Flash - int64(p.pools)*workPool/2
}

// limitHeap tells the garbage collector, unless somebody else has.
func (p Plan) limitHeap() {
	if n := p.HeapLimit(); n > 0 && os.Getenv("GOMEMLIMIT") == "" {
		debug.SetMemoryLimit(n)
	}
}

// The parts of memory by name.
const (
	partLogs   = "operation logs"
	partCounts = "reference counts"
	partIndex  = "deduplication"
	partFlash  = "flash"
	partKept   = "takeover"
	partWork   = "work"
	partCache  = "cache"
)

// parts lists what is planned, and why.
func (p Plan) parts() []control.MemoryPart {
	cache := fmt.Sprintf("clean blocks of each of %d pools, in its region", p.pools)
	if p.Limit > 0 {
		cache += ": what the others leave"
	}
	parts := []control.MemoryPart{
		{Name: partLogs, Planned: p.Logs, Why: fmt.Sprintf("the regions of %d pools, the partner's included", p.pools)},
		{Name: partCounts, Planned: p.Counts, Why: fmt.Sprintf("34 bytes for each MiB of %s of devices, more where blocks are shared", gib(p.devices))},
		{Name: partIndex, Planned: p.Index, Why: fmt.Sprintf("the index of each of %d pools, in its region, taken once a volume of it shares blocks", p.pools)},
		{Name: partKept, Planned: p.Kept, Why: "what whoever takes a pool over need not read, in its region: its unfolded journal, the use of disks where it has flash, and what was carried out for clients that send requests again"},
		{Name: partWork, Planned: p.Work, Why: "index of the logs, mappings before their fold, buffers, heap"},
		{Name: partCache, Planned: p.Cache, Why: cache},
	}
	if p.Flash > 0 {
		why := "what is collected of the use of each disk of pools with flash, by the default parameters"
		parts = slices.Insert(parts, 3, control.MemoryPart{Name: partFlash, Planned: p.Flash, Why: why})
	}
	return parts
}

// flashMemory is what flash takes now.
func flashMemory(f *control.FlashStatus) (n int64) {
	if f == nil {
		return 0
	}
	for _, p := range f.Primaries {
		n += p.Collected.Bytes
	}
	return n + int64(f.Used)*flashSet
}

func gib(n int64) string { return fmt.Sprintf("%.1f GiB", float64(n)/(1<<30)) }

// used returns the parts with what each takes now.
func (p Plan) used(m control.MemoryStatus, pools []control.PoolStatus) []control.MemoryPart {
	parts := p.parts()
	var counts, flash, index, cached int64
	var own, kept int64 // of indexes and caches, those that end with the guest and the others
	ahead := int64(0)   // of what a takeover need not read
	for _, s := range pools {
		ahead += s.RegionKept
		flash += flashMemory(s.Flash)
		counts += s.CountsBytes
		index += s.Dedup.IndexOwn + s.Dedup.IndexKept
		cached += s.Cache.Used
		own += s.Dedup.IndexOwn + min(s.Cache.Own, s.Cache.Used)
		kept += s.Dedup.IndexKept + s.Cache.Bytes - s.Cache.Own
	}
	for i := range parts {
		switch parts[i].Name {
		case partLogs:
			parts[i].Used = max(0, m.Region-kept-ahead)
		case partKept:
			parts[i].Used = ahead
		case partCounts:
			parts[i].Used = counts
		case partIndex:
			parts[i].Used = index
		case partFlash:
			parts[i].Used = flash
		case partWork:
			parts[i].Used = max(0, m.Anonymous-counts-own-flash)
		case partCache:
			parts[i].Used = cached
			for _, s := range pools {
				if s.Cache.Why != "" {
					parts[i].Why += fmt.Sprintf("; that of %s ends with its guest: %s", s.Name, s.Cache.Why)
				}
			}
		}
	}
	return parts
}
