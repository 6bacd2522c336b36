package pool

import (
	"context"
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/blockio"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/catalogue"
	"github.com/pollux-storage/pollux/internal/space"
)

// CheckOptions says how thorough a check is.
type CheckOptions struct {
	// Data reads every block that a volume refers to and verifies it.
	Data bool
}

// CheckReport is what a check found.
type CheckReport struct {
	Pool        string
	Volumes     int
	DataBlocks  int64 // references to data blocks
	Pages       int64 // metadata pages
	BlocksRead  int64 // data blocks read and verified
	LogRecords  int64 // acknowledged records that are not on the devices yet
	Problems    []string
	MoreProblem int // problems beyond those listed
}

// maxProblems bounds the list of a report.
const maxProblems = 100

func (r *CheckReport) problem(format string, args ...any) {
	if len(r.Problems) == maxProblems {
		r.MoreProblem++
		return
	}
	r.Problems = append(r.Problems, fmt.Sprintf(format, args...))
}

// Check counts all references anew and compares them with the counts in use,
// reads every metadata page, and verifies the payload of the log. It does that
// between two consistency points: requests are served meanwhile, from room
// that the log has. Data is read afterwards, beside everything else.
func (p *Pool) Check(ctx context.Context, o CheckOptions) (CheckReport, error) {
	var report CheckReport
	err := p.do(ctx, func() (err error) {
		report, err = p.check(ctx)
		return err
	})
	if err == nil && o.Data {
		err = p.checkData(ctx, &report)
	}
	return report, err
}

// CheckOffline opens a pool that nobody serves, checks it and releases it: the
// operation log, if there is one, stays as it was.
func CheckOffline(ctx context.Context, open OpenOptions, o CheckOptions) (CheckReport, error) {
	p, err := Open(ctx, open)
	if err != nil {
		return CheckReport{}, err
	}
	report, err := CheckReport{}, p.load()
	if err == nil {
		report, err = p.check(ctx)
	}
	if err == nil && o.Data {
		err = p.checkData(ctx, &report)
	}
	if e := p.Release(ctx); err == nil {
		err = e
	}
	return report, err
}

// check does the part that needs everything to stand still.
func (p *Pool) check(ctx context.Context) (CheckReport, error) {
	r := CheckReport{Pool: p.label.Name, Volumes: len(p.catalogue.List())}
	if p.machine.Folding() {
		if err := p.foldAll(); p.machine.Broken() != nil {
			return r, err
		} else if err != nil {
			// It has given back what it took, so all can be counted.
			r.problem("%v", err)
		}
	}
	if err := p.checkCopies(&r); err != nil {
		return r, err
	}
	recount := space.New()
	defer recount.Close()
	sb := p.machine.Superblock()
	for _, d := range sb.Devices {
		if err := recount.AddDevice(d.Blocks, d.First); err != nil {
			return r, err
		}
	}
	count := func(ptr block.Pointer, page bool) error {
		if page {
			r.Pages++
		} else {
			r.DataBlocks++
		}
		if err := recount.Inc(space.Run{At: ptr.Phys, N: 1}); err != nil {
			r.problem("reference to block %v: %v", ptr, err)
			return ctx.Err()
		}
		return ctx.Err()
	}
	// A page that cannot be read hides what is below it, so the recount
	// would only repeat that.
	readable := true
	if err := p.bmap.Pointers(p.bmap.Roots(), count); err != nil {
		readable = false
		r.problem("%v", err)
	}
	roots := []block.Pointer{sb.Catalogue}
	for _, d := range sb.Devices {
		roots = append(roots, d.Counts)
	}
	for _, root := range roots {
		err := blockmap.Walk(p.reader, root, func(ptr block.Pointer, level int, _ uint64) (bool, error) {
			if level == 0 {
				// Leaves are not read by Walk, so their content is proved here.
				if err := p.reader.View(ptr, func([]byte) {}); err != nil {
					r.problem("%v", err)
				}
			}
			return true, count(ptr, true)
		})
		if err != nil {
			readable = false
			r.problem("%v", err)
		}
	}
	if err := ctx.Err(); err != nil {
		return r, err
	}
	if readable {
		err := p.space.Compare(recount, func(at block.Physical, have, want int) {
			r.problem("block %v has reference count %d, %d references were found", at, have, want)
		})
		if err != nil {
			r.problem("%v", err)
		}
	}
	return r, p.checkLog(&r)
}

// checkLog verifies the records and payload that are not committed.
func (p *Pool) checkLog(r *CheckReport) error {
	for seq := p.machine.Committed() + 1; seq <= p.log.Head(); seq++ {
		rec, err := p.log.Get(seq)
		if err != nil {
			r.problem("operation log: %v", err)
			return nil
		}
		r.LogRecords++
		for _, i := range p.log.VerifyPayload(&rec) {
			r.problem("operation log, position %d: payload of block %d of volume %d is damaged", seq, rec.LBA+block.Logical(i), rec.Volume)
		}
	}
	return nil
}

// checkData reads every block that a volume refers to, from the devices
// whatever the cache holds.
func (p *Pool) checkData(ctx context.Context, r *CheckReport) error {
	if !p.gate.Enter() {
		return fmt.Errorf("pool %s: %w", p.label.Name, block.ErrClosed)
	}
	defer p.gate.Exit()
	for _, v := range p.catalogue.List() {
		leaves, err := p.bmap.MappedLeaves(v.ID)
		if err != nil {
			r.problem("volume %q: %v", v.Name, err)
		}
		for _, leaf := range leaves {
			if err := ctx.Err(); err != nil {
				return err
			}
			p.checkLeaf(r, v, block.Logical(leaf*blockmap.LeafBlocks))
		}
	}
	return nil
}

// checkLeaf verifies the blocks that one leaf maps.
func (p *Pool) checkLeaf(r *CheckReport, v catalogue.Volume, first block.Logical) {
	var ptrs [blockmap.LeafBlocks]block.Pointer
	var now [1]block.Pointer
	if err := p.bmap.Lookup(v.ID, first, ptrs[:]); err != nil {
		r.problem("volume %q from block %d on: %v", v.Name, first, err)
		return
	}
	fetches, lbas := p.fetches(ptrs[:], first)
	r.BlocksRead += int64(len(fetches))
	if p.reader.ReadAll(fetches) == nil {
		return
	}
	for i := range fetches {
		err := p.reader.ReadAll(fetches[i : i+1])
		if err == nil {
			continue
		}
		// What was overwritten before it was read may have been reused, so
		// the map is asked after the read.
		if e := p.bmap.Lookup(v.ID, lbas[i], now[:1]); e != nil || now[0] == fetches[i].Ptr {
			r.problem("block %d of volume %q: %v", lbas[i], v.Name, errors.Join(err, e))
		}
	}
}

func (p *Pool) fetches(ptrs []block.Pointer, first block.Logical) (fetches []blockio.Fetch, lbas []block.Logical) {
	for i, ptr := range ptrs {
		if !ptr.IsHole() {
			fetches = append(fetches, blockio.Fetch{Ptr: ptr})
			lbas = append(lbas, first+block.Logical(i))
		}
	}
	return fetches, lbas
}
