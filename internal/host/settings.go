package host

import (
	"context"
	"strconv"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
)

// changePool changes the settings that are kept with a pool.
func (a *agent) changePool(ctx context.Context, name string, c control.PoolChange) (control.Pool, error) {
	if err := a.beginChange(); err != nil {
		return control.Pool{}, err
	}
	defer a.change.Unlock()
	was, _, cl, err := a.poolHolder(ctx, name)
	if err != nil {
		return was, err
	}
	p, err := cl.ChangePool(ctx, name, c)
	if err != nil {
		return p, err
	}
	tell := func(setting, was, now string) {
		if now != was {
			fields := map[string]string{"pool": name, "setting": setting, "was": was, "now": now}
			a.event(p.Guest, "pool-changed", fields, "%s of pool %s is %s now; it was %s", setting, name, now, was)
		}
	}
	tell("dedup-index", indexWords(was), indexWords(p))
	tell("llrrm-threshold", thresholdWords(was), thresholdWords(p))
	return p, nil
}

// The words are those that `pollux pool set` takes.
const defaultWord = "default"

func indexWords(p control.Pool) string {
	if n := p.Stats.Settings.DedupIndex; n != 0 {
		return config.Size(n).String()
	}
	return defaultWord
}

func thresholdWords(p control.Pool) string {
	if n := p.Stats.Settings.LLRRMThreshold; n != 0 {
		return strconv.Itoa(n)
	}
	return defaultWord
}
