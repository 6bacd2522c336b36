package pool

import (
	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/devices"
)

// Stats describes a pool at a moment.
type Stats struct {
	Bytes, FreeBytes, ReservedBytes int64
	LogBytes, LogUsedBytes          int64
	DirtyBlocks                     int
	CP                              uint64 // consistency points since the pool was opened
	Folds                           uint64
	BlocksWritten                   uint64
	Unfolded                        int // mappings not yet in the trees
	// Mended is how many pages of metadata were bad, and were written again from
	// their twins.
	Mended      uint64
	Devices     []DeviceStats
	CountsBytes int64 // of memory
	Loading     bool  // counts are not in memory yet
	// RegionKept are bytes of the region that keep the unfolded journal, what was collected
	// of disks, and sessions.
	RegionKept int64
	// LastError is why the newest consistency point or fold failed, empty
	// when it did not: as long as it stays, the devices fall behind.
	LastError string
	Sharing   SharingCounts
	Cleaner   CleanerStats
	Scrub     ScrubStats
	Removal   RemovalStats
	Scan      ScanStats
	Memory    TransferStats
	Flash     FlashStats
	Cache     CacheStats
}

// SharingCounts tell what a pool has shared since it was opened, and what that is worth.
type SharingCounts struct {
	Written uint64 // blocks of data, those that were moved too
	Shared  uint64 // blocks that were stored already
	Zeros   uint64 // blocks of zeroes that became holes
	Unequal uint64 // series that seemed to be stored already and were not
	// Saved is how many bytes the pool would need beyond what it has in use if nothing
	// were shared.
	Saved                    int64
	IndexBytes, IndexEntries int64 // 0 as long as no volume has shared blocks
	// IndexOwn are bytes of that in memory that does not outlive the guest, IndexKept those
	// of the region that the rest takes.
	IndexOwn, IndexKept int64
}

// DeviceStats describes a device of an open pool.
type DeviceStats struct {
	hpdi.Info
	Errors devices.Errors // since it was opened
	Class  cp.DeviceClass
}

// classOf returns the class of a device.
func (p *Pool) classOf(i int) cp.DeviceClass {
	switch {
	case p.space.IsApart(i):
		return cp.ClassMemory
	case p.flash.isNow(i):
		return cp.ClassFlash
	}
	return cp.ClassDisk
}

// Stats returns the pool's statistics.
func (p *Pool) Stats() Stats {
	u, d, m := p.space.Usage(), p.dirty.Usage(), p.machine.Stats()
	unfolded, _ := p.bmap.Overlays()
	s := Stats{
		Bytes: u.Total * block.Size, FreeBytes: max(0, u.Spare()) * block.Size, ReservedBytes: u.Reserved * block.Size,
		LogBytes: d.Permits * block.Size, LogUsedBytes: (d.Active + d.Frozen) * block.Size, DirtyBlocks: d.Blocks,
		CP: m.Commits, Folds: m.Folds, BlocksWritten: m.Blocks, Unfolded: unfolded, Mended: p.set.Mended(),
		CountsBytes: p.space.Memory(), Loading: !p.loaded.Load(), RegionKept: p.regionKept.Load(),
		Sharing: SharingCounts{
			Written: m.Blocks, Shared: m.Shared, Zeros: m.Zeros, Unequal: m.Unequal, Saved: u.More * block.Size,
			IndexBytes: p.index.bytes.Load(), IndexEntries: p.index.entries.Load(), IndexOwn: p.index.own.Load(), IndexKept: p.index.kept.Load(),
		},
		Cleaner: p.cleaner.Stats(), Scrub: p.scrub.Stats(), Removal: p.remover.Stats(), Scan: p.scan.Stats(), Memory: p.transfer.Stats(), Flash: p.flash.Stats(), Cache: p.cache.stats(),
	}
	for i := range p.set.Len() {
		if d := p.set.Device(i); d != nil { // it may be removed just now
			s.Devices = append(s.Devices, DeviceStats{d.Info(), p.set.Errors(i), p.classOf(i)})
		}
	}
	if err := p.lastError.Load(); err != nil {
		s.LastError = (*err).Error()
	}
	return s
}
