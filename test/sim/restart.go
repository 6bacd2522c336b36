package sim

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"
	"strings"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	spool "github.com/pollux-storage/pollux/internal/pool"
	"github.com/pollux-storage/pollux/internal/region"
	"github.com/pollux-storage/pollux/internal/restart"
)

// Guests keep restart records of their pools, in the region and in what stands for a file of
// the pair's directory, after opening them and after each command; and they open pools by
// what they find, or without it when that is not true.

// openPool opens a pool by its record, if it has one that may be true.
func (p *proc) openPool(ctx context.Context, pl *pool, o spool.OpenOptions) (*spool.Pool, error) {
	rec, why := p.recall(pl, o.Devices)
	if why == nil {
		o.Restart = rec
		q, err := spool.Open(ctx, o)
		if err == nil {
			p.w.post(nil, func() { p.w.recalled++ })
			return q, nil
		}
		o.Restart, why = nil, err
	}
	p.w.post(nil, func() { p.w.log("%s#%d opens %s without a record: %v", p.name, p.inc, pl.identity, why) })
	return spool.Open(ctx, o)
}

// recall returns the record of a pool, or why there is none.
func (p *proc) recall(pl *pool, devs []hpdi.Device) (*restart.Record, error) {
	pl.memoryMu.Lock()
	file := slices.Clone(pl.record)
	pl.memoryMu.Unlock()
	r, err := spool.ReadRecord(pl.path)
	if errors.Is(err, fs.ErrNotExist) {
		err = restart.ErrNone // the folder has another name in each run
	}
	if err != nil {
		f, errF := restart.Decode(file)
		if r, err = restart.Newer(r, err, f, errF); err != nil {
			return nil, err
		}
	}
	files := map[string]restart.File{}
	for _, dev := range devs {
		for path, f := range pl.filesOf(dev) {
			files[path] = f
		}
	}
	now := restart.Now{BootID: fmt.Sprint("boot", p.w.boot), Identity: pl.identity, Paths: sortedKeys(files)}
	why := r.Differs(now)
	if why == "" {
		why = r.Replaced(files)
	}
	if why != "" {
		return nil, errors.New(why)
	}
	return r, nil
}

// filesOf returns the disks of a device as records have them.
func (pl *pool) filesOf(dev hpdi.Device) map[string]restart.File {
	files := map[string]restart.File{}
	for _, d := range pl.disksOf(dev) {
		files[d.name] = restart.File{Born: d.born + 1, Size: d.medium.Info().Size, BlockSize: block.Size}
	}
	return files
}

// keepRecord stores a record of an open pool.
func (p *proc) keepRecord(ctx context.Context, pl *pool, q *spool.Pool, devs []hpdi.Device) {
	r, err := q.Restart(ctx)
	if err != nil || ctx.Err() != nil {
		return // it ends
	}
	r.BootID, r.Written = fmt.Sprint("boot", p.w.boot), time.Now()
	for i := range r.Devices {
		c := &r.Devices[i].Copies
		at := slices.IndexFunc(devs, func(d hpdi.Device) bool { return d.Info().Name == (*c)[0].Path })
		if at < 0 {
			return // it has joined by a command, and is known when the pool is opened next
		}
		*c = nil
		for path, f := range pl.filesOf(devs[at]) {
			*c = append(*c, restart.Copy{Path: path, File: f})
		}
		slices.SortFunc(*c, func(a, b restart.Copy) int { return strings.Compare(a.Path, b.Path) })
	}
	pl.memoryMu.Lock()
	defer pl.memoryMu.Unlock()
	pl.records++
	r.Number = pl.records
	enc, err := r.Encode()
	if err != nil {
		p.w.post(nil, func() { p.w.violate("restart record of %s: %v", pl.identity, err) })
		return
	}
	_ = q.KeepRecord(enc) // it has lost the pool, or there is no room
	pl.record = enc
}

// smear damages the restart record that a dead guest has left, anywhere in it.
func (w *World) smear(id string) {
	pl := w.pools[id]
	if w.marks.IntN(3) > 0 || slices.ContainsFunc(pl.acting, func(p *proc) bool { return !p.dead.Load() }) {
		return
	}
	r, err := region.Open(pl.path, false)
	if err != nil {
		return // it is being removed
	}
	defer func() { _ = r.Close() }()
	for _, s := range r.Sections(region.SectionRestart) {
		mem, err := r.MapSection(s)
		if err != nil {
			return // somebody else's
		}
		for _, slot := range [][]byte{mem, mem[len(mem)/2:]} {
			if w.marks.IntN(3) > 0 {
				slot[w.marks.IntN(min(2<<10, len(slot)))] ^= 1 << w.marks.IntN(8)
			}
		}
		w.log("the restart record of %s is damaged", id)
	}
	if w.marks.IntN(2) == 0 {
		pl.memoryMu.Lock()
		defer pl.memoryMu.Unlock()
		pl.record = nil
	}
}
