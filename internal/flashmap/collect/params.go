package collect

import (
	"fmt"
	"slices"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/config"
)

// Params are the collection parameters of a device. [Defaults] are a start.
type Params struct {
	// Operations is what is counted: "all", "reads" or "writes".
	Operations string `yaml:"operations" json:"operations"`
	// Sample counts one access in so many, drawn at random, for all of them. 1 counts each,
	// as long as there are no more than some thousand a second.
	Sample int `yaml:"sample" json:"sample"`
	// Window is the time that counts are means of.
	Window time.Duration `yaml:"window" json:"window"`
	// Decay is what the past keeps of its weight from window to window.
	Decay float64 `yaml:"decay" json:"decay"`
	// Classes are the largest sizes of the classes by which requests are counted, in
	// ascending order; one more class has what is larger.
	Classes []config.Size `yaml:"classes" json:"classes"`
	// Run is how many bytes in sequence are a run.
	Run config.Size `yaml:"run" json:"run"`
	// Pause is how long a run may rest before it has ended.
	Pause time.Duration `yaml:"pause" json:"pause"`
	// Memory bounds the table of data sets, in bytes.
	Memory config.Size `yaml:"memory" json:"memory"`
	// History bounds what is kept of windows that ended, in bytes, and HistoryWindows how
	// many these are: each has the most used sets that find room in its share. 0 windows
	// keep nothing.
	History        config.Size `yaml:"history" json:"history"`
	HistoryWindows int         `yaml:"history_windows" json:"history_windows"`
}

// Limits of parameters.
const (
	minWindow     = time.Second
	maxWindow     = 24 * time.Hour
	minDecay      = 0.05
	maxDecay      = 0.95
	maxSample     = 1 << 12
	maxClasses    = 8
	minRun        = 64 << 10
	maxRun        = 8 << 20 // all of which can be held back
	minPause      = 10 * time.Millisecond
	minMemory     = 64 << 10
	maxMemory     = 1 << 34
	maxHistory    = 1 << 34
	maxHistoryLen = 10_000
)

// Defaults returns the parameters that measurements have led to; docs/performance.md has
// them.
func Defaults() Params {
	return Params{
		Operations: "all", Sample: 1, Window: 10 * time.Minute, Decay: 0.4,
		Classes: []config.Size{4 << 10, 16 << 10, 64 << 10, 256 << 10},
		Run:     1 << 20, Pause: 5 * time.Second,
		Memory: 16 << 20, History: 16 << 20, HistoryWindows: 144,
	}
}

// Validate says what is wrong with the parameters, naming the parameter.
func (p *Params) Validate() error {
	within := func(v, lo, hi time.Duration) bool { return lo <= v && v <= hi }
	switch {
	case p.operations() == 0:
		return fmt.Errorf("operations: %q is not all, reads or writes", p.Operations)
	case p.Sample < 1 || p.Sample > maxSample:
		return fmt.Errorf("sample: one access in %d; 1 to %d are possible", p.Sample, maxSample)
	case !within(p.Window, minWindow, maxWindow):
		return fmt.Errorf("window: %v; %v to %v are possible", p.Window, minWindow, maxWindow)
	case !(p.Decay >= minDecay && p.Decay <= maxDecay): // so that no number is refused, too
		return fmt.Errorf("decay: %v; %v to %v are possible", p.Decay, minDecay, maxDecay)
	case len(p.Classes) > maxClasses:
		return fmt.Errorf("classes: %d sizes; at most %d are possible", len(p.Classes), maxClasses)
	case !slices.IsSorted(p.Classes) || len(slices.Compact(slices.Clone(p.Classes))) < len(p.Classes):
		return fmt.Errorf("classes: sizes must ascend: %v", p.Classes)
	case len(p.Classes) > 0 && p.Classes[0] <= 0:
		return fmt.Errorf("classes: %v is no size of a request", p.Classes[0])
	case p.Run < minRun || p.Run > maxRun:
		return fmt.Errorf("run: %s; %s to %s are possible", p.Run, config.Size(minRun), config.Size(maxRun))
	case !within(p.Pause, minPause, p.Window):
		return fmt.Errorf("pause: %v; %v to the window's %v are possible", p.Pause, minPause, p.Window)
	case p.Memory < minMemory || p.Memory > maxMemory:
		return fmt.Errorf("memory: %s; %s to %s are possible", p.Memory, config.Size(minMemory), config.Size(maxMemory))
	case p.History < 0 || p.History > maxHistory:
		return fmt.Errorf("history: %s; at most %s are possible", p.History, config.Size(maxHistory))
	case p.HistoryWindows < 0 || p.HistoryWindows > maxHistoryLen:
		return fmt.Errorf("history_windows: %d; at most %d are possible", p.HistoryWindows, maxHistoryLen)
	}
	return nil
}

// operations returns a bit for each operation that is counted.
func (p *Params) operations() uint32 {
	switch p.Operations {
	case "all":
		return 1<<hpdi.OpRead | 1<<hpdi.OpWrite
	case "reads":
		return 1 << hpdi.OpRead
	case "writes":
		return 1 << hpdi.OpWrite
	}
	return 0
}

// Geometry is the shape of a primary device.
type Geometry struct {
	Size     int64 // bytes
	SetBytes int64 // of a data set, a power of two
}

// The sizes that data sets may have, in bytes.
const (
	MinSetBytes = 64 << 10
	MaxSetBytes = 1 << 20
)

// Validate says what is wrong with the geometry.
func (g Geometry) Validate() error {
	switch {
	case g.SetBytes < MinSetBytes || g.SetBytes > MaxSetBytes || g.SetBytes&(g.SetBytes-1) != 0:
		return fmt.Errorf("data sets of %d bytes: powers of two from %s to %s are possible",
			g.SetBytes, config.Size(MinSetBytes), config.Size(MaxSetBytes))
	case g.Size <= 0:
		return fmt.Errorf("a device of %d bytes has no data sets", g.Size)
	}
	return nil
}

// Sets returns how many data sets the device has; the last may be cut short.
func (g Geometry) Sets() uint64 { return uint64((g.Size + g.SetBytes - 1) / g.SetBytes) }

// Set is the number of a data set of a device.
type Set uint64
