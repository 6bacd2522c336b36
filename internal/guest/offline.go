package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"os"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/file"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/pool"
	"github.com/pollux-storage/pollux/internal/region"
)

// progressEvery is how often an offline check tells how far it has come.
const progressEvery = 250 * time.Millisecond

// CheckOffline recounts the pools of a pair that does not run. Locks keep it
// from a pool that is open, and that is all it does to devices and regions:
// they are opened for reading only. tell, if not nil, hears now and then how
// far it has come.
func CheckOffline(ctx context.Context, cfg *config.Config, tell func(control.CheckProgress)) (control.CheckReport, error) {
	return offline(ctx, cfg, tell, false)
}

// RepairOffline is CheckOffline that mends what it can. It writes to the devices,
// under the same locks, and not to the regions.
func RepairOffline(ctx context.Context, cfg *config.Config, tell func(control.CheckProgress)) (control.CheckReport, error) {
	return offline(ctx, cfg, tell, true)
}

func offline(ctx context.Context, cfg *config.Config, tell func(control.CheckProgress), repair bool) (control.CheckReport, error) {
	r := control.CheckReport{OK: true, Repair: repair, Pools: []control.PoolCheck{}}
	for i := range cfg.Guests {
		set := &cfg.Guests[i]
		began := time.Now()
		note := func(format string, args ...any) { r.Notes = append(r.Notes, fmt.Sprintf(format, args...)) }
		c, err := checkOffline(ctx, cfg, set, tell, repair, note)
		if errors.Is(err, ErrNoPool) {
			note("guest %s has no pool: %v", set.Name, err)
			continue
		}
		if err != nil && (len(c.Mended) > 0 || r.Mended()) {
			// What was mended must be told.
			c.Pool, c.OK, c.Problems, err = set.Pool.Name, false, append(c.Problems, err.Error()), nil
		}
		if errors.Is(err, hpdi.ErrLocked) && repair {
			return r, control.NewError(control.KindRefused, fmt.Sprintf("pool %s is in use: %v", set.Pool.Name, err), "stop what uses its devices")
		}
		if err != nil {
			return r, fmt.Errorf("check pool %s: %w", set.Pool.Name, err)
		}
		c.Guest, c.Took = set.Name, control.Duration(time.Since(began))
		r.OK = r.OK && c.OK
		r.Pools = append(r.Pools, c)
	}
	return r, nil
}

// checkOffline recounts one pool, and mends it if it is to. What else is to be known
// is told to note.
func checkOffline(ctx context.Context, cfg *config.Config, set *config.Guest, tell func(control.CheckProgress), repair bool, note func(string, ...any)) (control.PoolCheck, error) {
	var devs []hpdi.Device
	var err error
	if repair {
		devs, err = openToRepair(set, cfg.Mirrors(), note)
	} else {
		devs, err = openToRead(set, cfg.Mirrors())
	}
	defer func() { closeAll(devs) }()
	if err != nil {
		return control.PoolCheck{}, err
	}
	c := *cfg
	if c.RegionDir, err = region.FindDir(cfg.RegionDir); err != nil {
		return control.PoolCheck{}, err
	}
	v, err := pool.OpenView(pool.ViewOptions{
		Devices: devs, RegionPath: c.RegionPath(set.Name), BatteryBacked: set.Pool.BatteryBacked,
	})
	if err != nil {
		return control.PoolCheck{}, err
	}
	devs = nil // the view's now
	var p pool.CheckProgress
	stop := watchProgress(&p, func(now control.CheckProgress) {
		if tell != nil {
			now.Pool, now.Guest = v.Label().Name, set.Name
			tell(now)
		}
	})
	do := v.Check
	if repair {
		do = v.Repair
	}
	r, err := do(ctx, pool.CheckOptions{Data: true, Progress: &p})
	stop()
	return poolCheck(r), errors.Join(err, v.Close())
}

// openToRead opens the devices of a pool for reading, under their locks, and
// returns those that it has opened also when it fails.
func openToRead(set *config.Guest, mem config.Mirrors) ([]hpdi.Device, error) {
	return openAlone(set, opening{
		open: func(path string) (hpdi.Device, error) {
			return file.Open(path, file.Options{ReadOnly: true, Lock: true})
		},
		readOnly: true,
		without:  func(string, error) {},
		mirrors:  memory{Mirrors: mem, acceptLoss: set.Pool.AcceptLoss},
	})
}

// openToRepair is openToRead for writing. What is written without a copy of a mirror
// makes that an older one, so it is told to note.
func openToRepair(set *config.Guest, mem config.Mirrors, note func(string, ...any)) ([]hpdi.Device, error) {
	return openAlone(set, opening{
		open: func(path string) (hpdi.Device, error) { return file.Open(path, file.Options{Lock: true}) },
		without: func(path string, why error) {
			note("pool %s was repaired without the copy on %s: %v", set.Pool.Name, path, why)
		},
		mirrors: memory{Mirrors: mem, log: slog.New(slog.NewTextHandler(os.Stderr, nil)), acceptLoss: set.Pool.AcceptLoss},
	})
}

// openAlone opens the devices of a pool that no guest has.
func openAlone(set *config.Guest, o opening) ([]hpdi.Device, error) {
	devs, err := disks(&set.Pool, o)
	if errors.Is(err, fs.ErrNotExist) && set.Pool.Create {
		return nil, fmt.Errorf("%w and %w", err, ErrNoPool)
	}
	if err != nil {
		return nil, err
	}
	for _, d := range devs {
		if _, err := readLabel(d); err != nil {
			return devs, err
		}
	}
	if len(devs) == 0 {
		return nil, fmt.Errorf("without devices it %w", ErrNoPool)
	}
	return devs, nil
}

// watchProgress tells how far p has come until stop is called, and not later.
func watchProgress(p *pool.CheckProgress, tell func(control.CheckProgress)) (stop func()) {
	end, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		tick := time.NewTicker(progressEvery)
		defer tick.Stop()
		for {
			select {
			case <-end:
				return
			case <-tick.C:
				tell(progressOf(p))
			}
		}
	}()
	return func() { close(end); <-ended }
}

func progressOf(p *pool.CheckProgress) control.CheckProgress {
	phase, done, total := p.Load()
	return control.CheckProgress{Phase: phase, Done: done, Total: total}
}
