package guest

import (
	"context"
	"fmt"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/pool"
)

// changePool changes the settings that are kept with a pool.
func (g *Guest) changePool(ctx context.Context, name string, c control.PoolChange) (control.Pool, error) {
	t, st, err := g.serving(name)
	if err != nil {
		return control.Pool{}, err
	}
	if c.DedupIndex != nil {
		if err := g.roomForIndex(t.identity, st.Stats(), *c.DedupIndex); err != nil {
			return control.Pool{}, err
		}
	}
	if err := st.SetSettings(ctx, pool.SettingsChange{IndexBytes: c.DedupIndex, Threshold: c.LLRRMThreshold}); err != nil {
		return control.Pool{}, fmt.Errorf("change the settings of %w", err)
	}
	return g.poolOf(ctx, t.identity)
}

// roomForIndex refuses a pool's index, 0 for one as the settings say, for which the
// settings plan too little memory, or the host has too little now. The kernel would give
// it, and end the guest as soon as it is filled.
func (g *Guest) roomForIndex(identity string, now control.PoolStatus, bytes int64) error {
	cfg, err := config.ReadEffective(g.cfg.Dir) // devices may have come and gone
	if err != nil {
		cfg = g.cfg
	}
	var pools []poolNeeds
	for i := range cfg.Guests {
		pools = append(pools, needsOf(cfg, &cfg.Guests[i]))
	}
	was := divide(cfg, pools)
	for i := range pools {
		if cfg.Guests[i].Name == identity {
			pools[i].index = bytes
		}
	}
	planned, err := plan(cfg, pools)
	if planned.Index > was.Index && err != nil {
		return control.NewError(control.KindRefused, fmt.Sprintf("pool %s cannot have that index: %v", now.Name, err), "choose a smaller one with --dedup-index")
	}
	if bytes == 0 {
		bytes = int64(cfg.DedupIndex)
	}
	need := pool.IndexBytes(bytes, now.Capacity/block.Size)
	free, from := available()
	if need > free && now.Dedup.IndexBytes > 0 {
		return control.NewError(control.KindRefused,
			fmt.Sprintf("pool %s cannot have that index: it needs %s while there is the one before, too, and %s are available (%s)", now.Name, config.Size(need), roundMiB(free), from),
			"choose a smaller one with --dedup-index")
	}
	return nil
}

func poolSettings(s cp.Settings) control.PoolSettings {
	return control.PoolSettings{DedupIndex: int64(s.IndexBytes), LLRRMThreshold: int(s.Threshold)}
}
