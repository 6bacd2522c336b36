package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
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
	r := control.CheckReport{OK: true, Pools: []control.PoolCheck{}}
	for i := range cfg.Guests {
		set := &cfg.Guests[i]
		began := time.Now()
		c, err := checkOffline(ctx, cfg, set, tell)
		if errors.Is(err, ErrNoPool) {
			r.Notes = append(r.Notes, fmt.Sprintf("guest %s has no pool: %v", set.Name, err))
			continue
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

// checkOffline recounts one pool.
func checkOffline(ctx context.Context, cfg *config.Config, set *config.Guest, tell func(control.CheckProgress)) (control.PoolCheck, error) {
	devs, err := openToRead(set, cfg.Mirrors())
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
	r, err := v.Check(ctx, pool.CheckOptions{Data: true, Progress: &p})
	stop()
	return poolCheck(r), errors.Join(err, v.Close())
}

// openToRead opens the devices of a pool for reading, under their locks, and
// returns those that it has opened also when it fails.
func openToRead(set *config.Guest, mem config.Mirrors) ([]hpdi.Device, error) {
	devs, err := disks(&set.Pool, opening{
		open: func(path string) (hpdi.Device, error) {
			return file.Open(path, file.Options{ReadOnly: true, Lock: true})
		},
		readOnly: true,
		without:  func(string, error) {},
		mirrors:  memory{Mirrors: mem, acceptLoss: set.Pool.AcceptLoss},
	})
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
