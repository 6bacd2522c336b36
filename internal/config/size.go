package config

import (
	"strings"

	"github.com/pollux-storage/pollux/internal/units"
)

// Size is a number of bytes that is written as people write it.
type Size int64

// ParseSize reads "64GiB", "64G" (the same), "1.5T", "500MB" or a number of
// bytes.
func ParseSize(s string) (Size, error) {
	n, err := units.Parse(s)
	return Size(n), err
}

// UnmarshalYAML reads a size.
func (s *Size) UnmarshalYAML(p []byte) error {
	v, err := ParseSize(strings.Trim(string(p), " \t\n\"'"))
	if err != nil {
		return err
	}
	*s = v
	return nil
}

// String writes the largest binary unit that divides the size.
func (s Size) String() string { return units.Format(int64(s)) }
