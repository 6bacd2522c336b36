package cp

import (
	"fmt"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/catalogue"
	"github.com/pollux-storage/pollux/internal/planted"
)

// installBlocks is about how many mappings are installed at a time: look-ups
// wait so long, some 20 µs. A run is at most a track.
const installBlocks = 256

// install puts a durable consistency point into catalogue and map. dropped is
// called for each mapping that no overlay holds any more.
func (m *Machine) install(c *commit, dropped func(block.Pointer)) {
	for _, ch := range c.Catalogue {
		m.applyChange(ch, dropped)
	}
	// References are dropped when the map's lock is released: look-ups need not
	// wait for that.
	old := m.replaced[:0]
	later := func(p block.Pointer) { old = append(old, p) }
	release := func() {
		for _, p := range old {
			dropped(p)
		}
		old = old[:0]
	}
	for _, h := range c.Holes {
		if !m.known(h.Volume) {
			continue
		}
		m.Map.Update(func(o *blockmap.Overlay) { punch(o, h, later) })
		release()
	}
	var volume block.VolumeID // of the run before
	known := false
	for runs := c.Runs; len(runs) > 0; {
		m.Map.Update(func(o *blockmap.Overlay) {
			n, blocks := 0, 0
			for ; n < len(runs) && blocks < installBlocks; n++ {
				blocks += len(runs[n].Sums)
			}
			touch(o, runs[:n])
			for i := range runs[:n] {
				r := &runs[i]
				if r.Volume != volume {
					volume, known = r.Volume, m.known(r.Volume)
				}
				if known {
					setRun(o, r, c.CP, later)
				}
			}
			runs = runs[n:]
		})
		release()
	}
	if planted.Has(planted.HolesAfterRuns) {
		for _, h := range c.Holes {
			m.Map.Update(func(o *blockmap.Overlay) { punch(o, h, dropped) })
		}
	}
	m.replaced = old
	m.journalled += c.entries()
	m.last = commit{CP: c.CP, Log: c.Log, Flush: c.Flush}
}

// touch prepares the overlay for runs. What follows the first block of a run lies
// beside it.
func touch(o *blockmap.Overlay, runs []mapRun) {
	var keys [installBlocks]uint64
	for i := range runs {
		keys[i] = block.Key(runs[i].Volume, runs[i].LBA)
	}
	o.Touch(keys[:len(runs)])
}

func setRun(o *blockmap.Overlay, r *mapRun, birth block.CP, dropped func(block.Pointer)) {
	for i, sum := range r.Sums {
		p := block.Pointer{Phys: r.At + block.Physical(i), Birth: birth, Sum: sum, Shared: r.Shared}
		if old := o.Set(r.Volume, r.LBA+block.Logical(i), p); !old.IsHole() {
			dropped(old)
		}
	}
}

func (m *Machine) known(id block.VolumeID) bool {
	_, ok := m.Catalogue.Get(id)
	return ok
}

func punch(o *blockmap.Overlay, h volumeRange, dropped func(block.Pointer)) {
	if h.End-h.Start > smallHole {
		o.Punch(h.Volume, h.Range, dropped)
		return
	}
	for lba := h.Start; lba < h.End; lba++ {
		if old := o.Set(h.Volume, lba, block.Pointer{}); !old.IsHole() {
			dropped(old)
		}
	}
}

func (m *Machine) applyChange(ch catalogue.Change, dropped func(block.Pointer)) {
	if ch.Put == nil {
		if m.known(ch.Delete) {
			m.Map.DeleteVolume(ch.Delete, dropped)
		}
	} else if !m.known(ch.Put.ID) {
		m.Map.AddVolume(ch.Put.ID, blockmap.Tree{})
	}
	m.Catalogue.Apply(ch)
}

// loadCatalogue makes the list of volumes that the superblock names the pool's.
func (m *Machine) loadCatalogue() error {
	list, err := m.readCatalogue()
	if err != nil {
		return err
	}
	for _, v := range list.All() {
		m.Map.AddVolume(v.ID, blockmap.Tree{Root: v.Root, Used: v.Used, Deleted: v.Deleted, Pending: v.Pending})
	}
	m.Catalogue.Replace(list)
	return nil
}

// readCatalogue reads the list of volumes from its tree.
func (m *Machine) readCatalogue() (*catalogue.Set, error) {
	var enc []byte
	for leaf := uint64(0); len(enc) < int(m.sb.CatBytes); leaf++ {
		p, err := blockmap.FindLeaf(m.Reader, m.sb.Catalogue, leaf)
		if err == nil && p.IsHole() {
			err = &block.CorruptError{What: "catalogue", Where: fmt.Sprintf("page %d", leaf), Why: "the page is missing"}
		}
		if err == nil {
			err = m.Reader.View(p, func(page []byte) { enc = append(enc, page...) })
		}
		if err != nil {
			return nil, fmt.Errorf("read the catalogue: %w", err)
		}
	}
	if m.sb.CatBytes == 0 {
		return catalogue.New(), nil
	}
	return catalogue.Decode(enc[:m.sb.CatBytes])
}
