package config

import (
	"fmt"
	"time"
)

// Scrub are the settings by which everything that a pool has in use is read and
// proved in the background, from every copy.
type Scrub struct {
	// Off says that no scrub begins by itself.
	Off bool `yaml:"off" json:"off,omitempty"`
	// Every is the time from the end of a scrub to the next.
	Every time.Duration `yaml:"every" json:"every"`
	// Rate is how many bytes it reads in a second, from all copies together.
	Rate Size `yaml:"rate" json:"rate"`
}

const (
	minScrubRate  = Size(1 << 20)
	minScrubEvery = time.Hour
)

func (s *Scrub) setDefaults() {
	or(&s.Every, 30*24*time.Hour)
	or(&s.Rate, 64<<20)
}

func (s *Scrub) validate() error {
	switch {
	case s.Rate != 0 && s.Rate < minScrubRate:
		return fmt.Errorf("scrub.rate: %s a second is too little, at least %s; `off: true` ends it", s.Rate, minScrubRate)
	case s.Every != 0 && s.Every < minScrubEvery:
		return fmt.Errorf("scrub.every: %v is too short, at least %v; `off: true` ends it", s.Every, minScrubEvery)
	}
	return nil
}
