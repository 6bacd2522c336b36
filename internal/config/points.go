package config

import (
	"fmt"
	"time"
)

// Points are the limits at which consistency points and folds begin. Frequent
// points keep the devices close to what was acknowledged; rare ones write
// blocks that are overwritten again and again less often.
type Points struct {
	// Interval is the longest time between a write and the consistency point
	// that takes it to the devices.
	Interval time.Duration `yaml:"interval" json:"interval"`
	// Size is how much acknowledged data begins a consistency point before
	// the interval is over. 0 stands for a quarter of the log; more than three
	// quarters of the pool's log count as that.
	Size Size `yaml:"size" json:"size,omitempty"`
	// FoldAfter is how many mappings of blocks, in memory and journal, begin a
	// fold that writes few pages for them. A takeover replays them: 0.12 to 0.2 ms
	// for a thousand that are scattered.
	FoldAfter int `yaml:"fold_after" json:"fold_after"`
	// FoldLimit is how many begin a fold whatever it writes. A third more may come
	// together while it runs; then clients wait for it.
	FoldLimit int `yaml:"fold_limit" json:"fold_limit"`
}

const (
	minInterval  = 10 * time.Millisecond
	maxInterval  = time.Minute
	minPointSize = Size(1 << 20)
	minFoldAfter = 1 << 10
	maxFoldAfter = 1 << 20
	maxFoldLimit = 8 << 20
)

// bytesForMapping is how much of a guest's memory setting there is for each mapping
// of FoldLimit at least.
const bytesForMapping = 8 << 10

// setDefaults fills in what is missing. memory is the setting of that name, 0 when
// there is none.
func (p *Points) setDefaults(memory Size) {
	or(&p.Interval, time.Second)
	or(&p.FoldAfter, 48<<10)
	or(&p.FoldLimit, p.DefaultFoldLimit(memory))
}

// DefaultFoldLimit returns FoldLimit for the setting of memory, 0 when there is none.
func (p *Points) DefaultFoldLimit(memory Size) int {
	limit := 2176 << 10
	if memory > 0 {
		limit = min(limit, int(memory/bytesForMapping))
	}
	return max(limit, p.FoldAfter)
}

func (p *Points) validate(log Size) error {
	switch {
	case p.Interval < minInterval || p.Interval > maxInterval:
		return fmt.Errorf("consistency_points.interval: %s must lie between %s and %s", p.Interval, minInterval, maxInterval)
	case p.Size != 0 && (p.Size < minPointSize || p.Size > log/4*3):
		return fmt.Errorf("consistency_points.size: %s must lie between %s and three quarters of the log of %s", p.Size, minPointSize, log)
	case p.FoldAfter < minFoldAfter || p.FoldAfter > maxFoldAfter:
		return fmt.Errorf("consistency_points.fold_after: %d must lie between %d and %d mappings", p.FoldAfter, minFoldAfter, maxFoldAfter)
	case p.FoldLimit < p.FoldAfter || p.FoldLimit > maxFoldLimit:
		return fmt.Errorf("consistency_points.fold_limit: %d must lie between fold_after, %d, and %d mappings", p.FoldLimit, p.FoldAfter, maxFoldLimit)
	}
	return nil
}
