package config

import "fmt"

// Resilver are the settings by which a copy that was away, or is new, is filled.
type Resilver struct {
	// Rate is how many bytes are copied to it in a second at most.
	Rate Size `yaml:"rate" json:"rate"`
}

const minResilverRate = Size(4 << 20)

func (r *Resilver) setDefaults() { or(&r.Rate, 128<<20) }

func (r *Resilver) validate() error {
	if r.Rate < minResilverRate {
		return fmt.Errorf("resilver.rate: %s a second is too little, at least %s", r.Rate, minResilverRate)
	}
	return nil
}
