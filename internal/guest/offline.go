package guest

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/pool"
	"github.com/pollux-storage/pollux/internal/region"
)

// checkOffline recounts one pool.
func (p *Pools) checkOffline(ctx context.Context, cfg *config.Config, set *config.Guest) (control.PoolCheck, error) {
	var devs []hpdi.Device
	defer func() { closeAll(devs) }()
	for _, path := range set.Pool.Devices {
		d, err := openLocked(path, time.Now())
		if errors.Is(err, fs.ErrNotExist) && set.Pool.Create {
			return control.PoolCheck{}, fmt.Errorf("%s does not exist and %w", path, ErrNoPool)
		}
		if err != nil {
			return control.PoolCheck{}, err
		}
		devs = append(devs, d)
		if _, err := p.Label(d); err != nil {
			return control.PoolCheck{}, err
		}
	}
	if len(devs) == 0 {
		return control.PoolCheck{}, fmt.Errorf("without devices it %w", ErrNoPool)
	}
	m, err := region.Dir(cfg.RegionDir)
	if err != nil {
		return control.PoolCheck{}, err
	}
	defer func() { _ = region.RemoveDir(cfg.RegionDir) }() // unless a region is left in it
	c := *cfg
	c.RegionDir = m.Path
	path := c.RegionPath(set.Name)
	_, missing := os.Stat(path)
	q, err := pool.Open(ctx, pool.OpenOptions{Devices: devs, RegionPath: path, Cache: p.cache, Owner: "check"})
	if err != nil {
		return control.PoolCheck{}, err
	}
	devs = nil // the pool's now
	run, stop := context.WithCancel(ctx)
	ran := make(chan error, 1)
	go func() { ran <- q.Run(run) }()
	r, err := q.Check(ctx, pool.CheckOptions{Data: true})
	stop()
	err = errors.Join(err, <-ran)
	// A log that was in memory stays there; otherwise nothing is left behind.
	end := q.Release
	if missing != nil {
		end = q.Close
	}
	err = errors.Join(err, end(context.WithoutCancel(ctx)))
	return poolCheck(r), err
}
