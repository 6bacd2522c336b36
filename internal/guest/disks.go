package guest

import (
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/file"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/mirror"
)

// opening is how the devices of a pool are opened.
type opening struct {
	open     func(path string) (hpdi.Device, error) // called for several at once
	readOnly bool
	// without is told of a device that a copy should be on, and why it is not.
	without func(path string, why error)
	mirrors memory
	// removed gets a device that was removed from the pool, as far as its label tells,
	// and closes it. If nil it is only closed.
	removed func(hpdi.Device)
}

// memory is what the pair remembers of mirrors, see mirror.Options.
type memory struct {
	config.Mirrors
	log *slog.Logger
	// acceptLoss uses copies although newer ones are known.
	acceptLoss bool
}

// memory returns that of the guest's pair, for a pool.
func (g *Guest) memory(set *config.Pool) memory {
	return memory{g.cfg.Mirrors(), g.log, set.AcceptLoss || set.Import != nil && set.Import.AcceptLoss}
}

// apply makes the options of a mirror use the memory.
func (m memory) apply(o mirror.Options) mirror.Options {
	if !m.acceptLoss {
		o.Known = func(id mirror.ID) (uint64, error) { return m.Generation(id.String()) }
	}
	o.Remember = func(id mirror.ID, generation uint64) {
		if err := m.Remember(id.String(), generation); err != nil {
			// The copies themselves know; what is lost is the protection from
			// opening an old one alone.
			m.log.Error("the state of a mirror is not remembered outside of its copies", "error", err)
		}
	}
	return o
}

// disks opens the devices of a pool and puts copies together. Where each block
// is kept more than once a device may be missing, or hold something else: the pool
// goes on with the others. A mirror that is being added may be none yet.
func disks(set *config.Pool, o opening) ([]hpdi.Device, error) {
	var singles, copies []hpdi.Device
	missing, want := 0, 0
	candidate := set.Candidate()
	tried := openAll(set.Groups(), o.open)
	for _, group := range set.Groups() {
		mirrored := len(group) > 1
		if mirrored && !slices.Equal(group, candidate) && !slices.Contains(set.Removing, group[0]) {
			want++
		}
		for _, path := range group {
			d, err := tried[0].dev, tried[0].err
			tried = tried[1:]
			switch {
			case err == nil && mirrored:
				copies = append(copies, d)
			case err == nil:
				singles = append(singles, d)
			case slices.Contains(set.Removing, path) && !errors.Is(err, hpdi.ErrLocked):
				missing++ // whether the pool still has it, it will say
			case mirrored && !errors.Is(err, hpdi.ErrLocked):
				// Locked is not missing: a guest that is not fenced may use it.
				o.without(path, err)
				missing++
			default:
				for _, t := range tried {
					if t.err == nil {
						_ = t.dev.Close() // nothing was written through it
					}
				}
				closeAll(append(singles, copies...))
				return nil, fmt.Errorf("device %s: %w", path, err)
			}
		}
	}
	removed := o.removed
	if removed == nil {
		removed = func(d hpdi.Device) { _ = d.Close() }
	}
	if len(copies) == 0 && want == 0 {
		return withoutRemoved(set, singles, removed)
	}
	devs, err := mirror.Assemble(copies, o.mirrors.apply(mirror.Options{Degraded: true, ReadOnly: o.readOnly, Each: atOnce, LeftOut: func(d hpdi.Device, why error) {
		o.without(d.Info().Name, why)
		missing++
	}}))
	if err != nil {
		closeAll(singles)
		return nil, err
	}
	if len(mirrors(devs)) == 0 && missing == 0 && want > 0 {
		return append(devs, singles...), nil // yet to be made
	}
	kept := devs[:0]
	for _, d := range devs {
		if _, ok := d.(*mirror.Mirror); ok {
			kept = append(kept, d)
			continue
		}
		if !slices.Contains(set.Removing, d.Info().Name) {
			o.without(d.Info().Name, errors.New("it holds no copy of a mirror"))
		}
		_ = d.Close() // nothing was written to it
	}
	if len(kept) < want {
		closeAll(append(kept, singles...))
		return nil, fmt.Errorf("%d of %d mirrors have no copy left: %w", want-len(kept), want, block.ErrNotFound)
	}
	return withoutRemoved(set, append(kept, singles...), removed)
}

// attempt is a device that was opened, or why it was not.
type attempt struct {
	dev hpdi.Device
	err error
}

// openAll opens the devices of all groups, in their order.
func openAll(groups [][]string, open func(path string) (hpdi.Device, error)) []attempt {
	paths := slices.Concat(groups...)
	all := make([]attempt, len(paths))
	atOnce(len(paths), func(i int) { all[i].dev, all[i].err = open(paths[i]) })
	return all
}

// manyAtOnce is how many devices are opened, or their labels read, at once. A pool of
// many disks would take that many times the latency of one to come back otherwise.
const manyAtOnce = 32

// atOnce calls f with 0 to n-1, for several at once, and returns when all have returned.
func atOnce(n int, f func(i int)) {
	var next atomic.Int64
	var wg sync.WaitGroup
	for range min(n, manyAtOnce) {
		wg.Go(func() {
			for i := int(next.Add(1)) - 1; i < n; i = int(next.Add(1)) - 1 {
				f(i)
			}
		})
	}
	wg.Wait()
}

// openToLook opens a device, or the mirror that several are copies of, for reading
// and without locks, which its guest may hold. A copy that cannot be had is told to
// without.
func openToLook(paths []string, without func(path string, why error)) (hpdi.Device, error) {
	devs, err := disks(&config.Pool{Devices: paths, Copies: len(paths)}, opening{readOnly: true, without: without,
		open: func(path string) (hpdi.Device, error) { return file.Open(path, file.Options{ReadOnly: true}) }})
	if err != nil {
		return nil, err
	}
	if len(devs) != 1 {
		closeAll(devs)
		return nil, fmt.Errorf("devices %s %w", strings.Join(paths, ", "), ErrNoPool)
	}
	return devs[0], nil
}

// mirrors returns the mirrors among devices.
func mirrors(devs []hpdi.Device) (ms []*mirror.Mirror) {
	for _, d := range devs {
		if m, ok := d.(*mirror.Mirror); ok {
			ms = append(ms, m)
		}
	}
	return ms
}

// makeMirrors makes mirrors of devices that hold nothing, and opens them. After
// an error the devices are closed.
func makeMirrors(devs []hpdi.Device, copies int, mem memory) (out []hpdi.Device, err error) {
	if copies <= 1 {
		return devs, nil
	}
	for rest := devs; len(rest) > 0 && err == nil; rest = rest[copies:] {
		_, err = mirror.Create(rest[:copies])
	}
	if err != nil {
		closeAll(devs)
		return nil, err
	}
	return mirror.Assemble(devs, mem.apply(mirror.Options{}))
}

// openOne opens a device under its lock, and knows its requests from then on.
// known is what it can do if it is the one that it was, or nil.
func (g *Guest) openOne(path string, deadline time.Time, known *file.Known) (hpdi.Device, error) {
	d, err := openLocked(path, deadline, known)
	if err != nil {
		return nil, err
	}
	return g.under.watch(d), nil
}

func openLocked(path string, deadline time.Time, known *file.Known) (hpdi.Device, error) {
	for {
		d, err := file.Open(path, file.Options{Lock: true, Known: known})
		if !errors.Is(err, hpdi.ErrLocked) || time.Now().After(deadline) {
			return d, err
		}
		time.Sleep(time.Millisecond) // the kernel tells nobody when a lock goes
	}
}
