package config

import "fmt"

// CrashReports bounds what is kept of guests that failed.
type CrashReports struct {
	// Keep is how many reports are kept of each guest, the newest.
	Keep int `yaml:"keep" json:"keep"`
	// Size is the most bytes of one.
	Size Size `yaml:"size" json:"size"`
}

func (c *CrashReports) setDefaults() {
	or(&c.Keep, 8)
	or(&c.Size, 1<<20)
}

func (c *CrashReports) validate() error {
	if c.Keep < 1 || c.Keep > 1000 {
		return fmt.Errorf("crash_reports.keep: %d, from 1 to 1000 are possible", c.Keep)
	}
	if c.Size < 16<<10 || c.Size > 64<<20 {
		return fmt.Errorf("crash_reports.size: %s, from 16KiB to 64MiB are possible", c.Size)
	}
	return nil
}
