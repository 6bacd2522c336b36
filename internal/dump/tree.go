package dump

import (
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/catalogue"
	"github.com/pollux-storage/pollux/internal/pool"
)

// Map is the map of a volume.
type Map struct {
	Found
	Pool    string   `json:"pool"`
	Volumes []Volume `json:"volumes"`
	Pages   []Page   `json:"pages"` // of the volume that was asked for
	// Unfolded is how many mappings of all volumes only the journal has: they
	// are newer than the trees.
	Unfolded int    `json:"unfolded"`
	Block    *Block `json:"block,omitempty"` // that was asked for
}

// Volume is an entry of the catalogue.
type Volume struct {
	ID      uint32  `json:"id"`
	Name    string  `json:"name"` // empty: deleted, and not freed yet
	Size    int64   `json:"size"`
	Used    int64   `json:"used_blocks"` // by its tree
	Root    string  `json:"root"`
	Pending []Range `json:"pending,omitempty"` // trimmed, not freed yet
}

// Range is a range of blocks whose entries up to a consistency point are dead.
type Range struct {
	Start uint64 `json:"start"`
	End   uint64 `json:"end"`
	Limit uint64 `json:"limit"`
}

// Page is a page of a tree.
type Page struct {
	Level   int    `json:"level"` // 0 is a leaf
	First   uint64 `json:"first"` // block that it is about
	Place   string `json:"place"`
	Twin    string `json:"twin,omitempty"` // where it lies once more
	Birth   uint64 `json:"birth"`
	Sum     string `json:"sum"`
	Entries int    `json:"entries"`
	OK      bool   `json:"ok"`
	Why     string `json:"why,omitempty"`
}

// Block is where a block of a volume is stored.
type Block struct {
	LBA    uint64 `json:"lba"`
	InTree string `json:"in_tree"`
	Dead   bool   `json:"dead,omitempty"` // what is in the tree was trimmed
	Now    string `json:"now"`            // what a read gets, the log aside
	From   string `json:"from"`           // "tree", "journal", "hole"
	Sum    string `json:"sum,omitempty"`
	OK     bool   `json:"ok"`
	Why    string `json:"why,omitempty"`
}

// ReadMap walks the tree of a volume of a pool, all of whose devices are
// given, and verifies its pages. Without a name it only lists the volumes.
// With a block it shows the way to that one.
func ReadMap(paths []string, volume string, lba *uint64, o Options) (*Map, error) {
	v, err := o.openPool(paths)
	if err != nil {
		return nil, err
	}
	r := &Map{Found: o.found(), Pool: v.Label().Name, Volumes: []Volume{}, Pages: []Page{}, Unfolded: v.Unfolded()}
	for _, c := range v.Volumes() {
		if volume == "" || c.Name == volume {
			r.Volumes = append(r.Volumes, volumeOf(c))
		}
	}
	if volume != "" {
		err = r.walk(v, volume, lba)
	}
	if err = errors.Join(err, v.Close()); err != nil {
		return nil, err
	}
	return r, nil
}

func volumeOf(c catalogue.Volume) Volume {
	v := Volume{ID: uint32(c.ID), Name: c.Name, Size: c.Size, Used: c.Used, Root: c.Root.String()}
	for _, p := range c.Pending {
		v.Pending = append(v.Pending, Range{uint64(p.Start), uint64(p.End), uint64(p.Limit)})
	}
	return v
}

func (r *Map) walk(v *pool.View, name string, lba *uint64) error {
	c, err := v.Volume(name)
	if err != nil {
		return err
	}
	if lba == nil {
		return v.MapPages(c.ID, func(p pool.TreePage) error {
			if page := r.page(p, blockmap.LeafBlocks); r.row() {
				r.Pages = append(r.Pages, page)
			}
			return nil
		})
	}
	if *lba >= uint64(c.Size/block.Size) {
		return fmt.Errorf("block %d of volume %s, which has %d: %w", *lba, name, c.Size/block.Size, block.ErrInvalid)
	}
	l := v.Locate(c.ID, block.Logical(*lba))
	for _, p := range l.Path {
		r.Pages = append(r.Pages, r.page(p, blockmap.LeafBlocks))
	}
	b := &Block{LBA: *lba, InTree: l.InTree.String(), Dead: l.Dead, Now: l.Now.String(), From: "tree", OK: l.Err == nil, Why: text(l.Err)}
	switch {
	case l.Journal:
		b.From = "journal"
	case l.Now.IsHole():
		b.From = "hole"
	}
	if !l.Now.IsHole() {
		b.Sum = hex(l.Now.Sum)
	}
	if l.Err != nil {
		r.bad("block %d: %v", *lba, l.Err)
	}
	r.Block = b
	return nil
}

// page describes a page whose leaves have so many entries, and notes if it
// cannot be read.
func (f *Found) page(p pool.TreePage, perLeaf uint64) Page {
	out := Page{
		Level: p.Level, First: p.Leaf * perLeaf, Place: p.Ptr.Phys.String(), Birth: uint64(p.Ptr.Birth), Sum: hex(p.Ptr.Sum),
		Entries: p.Entries, Twin: twin(p.Ptr),
	}
	err := p.Err
	if err == nil && p.FirstErr != nil {
		err = fmt.Errorf("read from its twin: %w", p.FirstErr)
	} else if err == nil && p.TwinErr != nil {
		err = fmt.Errorf("its twin: %w", p.TwinErr)
	}
	if out.OK, out.Why = err == nil, text(err); err != nil {
		f.bad("metadata page of level %d from block %d on: %v", p.Level, out.First, err)
	}
	return out
}

// twin returns where the twin of a page lies, nothing if it has none.
func twin(p block.Pointer) string {
	if p.Twin == 0 {
		return ""
	}
	return p.Second().Phys.String()
}

// openPool looks at a whole pool, without its region.
func (o Options) openPool(paths []string) (*pool.View, error) {
	devs, err := o.open(paths)
	if err != nil {
		return nil, err
	}
	v, err := pool.OpenView(pool.ViewOptions{Devices: devs})
	if err != nil {
		closeAll(devs)
		return nil, err
	}
	return v, nil
}

// Counts are the reference counts of a pool, as the trees of counts have them.
type Counts struct {
	Found
	Pool     string      `json:"pool"`
	Unfolded int         `json:"unfolded"` // mappings that are not counted here yet
	Blocks   []CountOf   `json:"blocks"`   // how many blocks have each count but 0
	Runs     []CountRun  `json:"runs"`
	Bad      []Page      `json:"bad_pages,omitempty"`
	by       [256]uint64 // blocks by their count
}

// CountOf is how many blocks have a count.
type CountOf struct {
	Count  int    `json:"count"`
	Blocks uint64 `json:"blocks"`
}

// CountRun is a run of blocks of one device with the same count.
type CountRun struct {
	Device int    `json:"device"` // number in the pool, from 0 as in addresses
	First  uint64 `json:"first"`
	Blocks uint64 `json:"blocks"`
	Count  int    `json:"count"`
}

// ReadCounts shows the reference counts of a pool, all of whose devices are
// given. Blocks with count 0 are free and are left out.
func ReadCounts(paths []string, o Options) (*Counts, error) {
	v, err := o.openPool(paths)
	if err != nil {
		return nil, err
	}
	r := &Counts{Found: o.found(), Pool: v.Label().Name, Blocks: []CountOf{}, Runs: []CountRun{}, Unfolded: v.Unfolded()}
	for dev := range v.Superblock().Devices {
		err = errors.Join(err, r.device(v, dev))
	}
	for n, blocks := range r.by {
		if n > 0 && blocks > 0 {
			r.Blocks = append(r.Blocks, CountOf{n, blocks})
		}
	}
	if err = errors.Join(err, v.Close()); err != nil {
		return nil, err
	}
	return r, nil
}

func (r *Counts) device(v *pool.View, dev int) error {
	var run CountRun
	end := func() {
		if run.Count > 0 && r.row() {
			r.Runs = append(r.Runs, run)
		}
		run = CountRun{}
	}
	err := v.CountPages(dev, func(p pool.TreePage, first uint64, counts []byte) error {
		if page := r.page(p, block.Size); !page.OK {
			r.Bad = append(r.Bad, page)
		}
		for i, n := range counts {
			r.by[n]++
			at := first + uint64(i)
			if run.Count != int(n) || run.First+run.Blocks != at {
				end()
				run = CountRun{Device: dev, First: at, Count: int(n)}
			}
			run.Blocks++
		}
		return nil
	})
	end()
	return err
}
