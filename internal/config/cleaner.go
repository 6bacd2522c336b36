package config

import "fmt"

// Cleaner are the settings by which fragmented pools are cleaned: blocks of
// mostly free tracks are moved so that whole tracks become free.
type Cleaner struct {
	Off bool `yaml:"off" json:"off,omitempty"`
	// Rate is how many bytes it reads and writes in a second. 0 stands for the
	// pool's default.
	Rate Size `yaml:"rate" json:"rate"`
	// LowWater is the share of tracks, in percent, that should be wholly free;
	// it cleans while fewer are. 0 stands for the pool's default.
	LowWater int `yaml:"low_water" json:"low_water"`
}

const minCleanerRate = Size(256 << 10)

func (c *Cleaner) setDefaults() {
	or(&c.Rate, 16<<20)
	or(&c.LowWater, 10)
}

func (c *Cleaner) validate() error {
	switch {
	case c.Rate != 0 && c.Rate < minCleanerRate:
		return fmt.Errorf("cleaner.rate: %s a second is too little, at least %s; `off: true` ends it", c.Rate, minCleanerRate)
	case c.LowWater < 0 || c.LowWater > 90:
		return fmt.Errorf("cleaner.low_water: %d %% of the tracks; 1 to 90 are possible", c.LowWater)
	}
	return nil
}
