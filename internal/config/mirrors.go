package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// Mirrors is what a pair remembers of the mirrors that its pools are made of,
// beside their copies: a file for each in DIR/mirrors, which both guests use. The
// zero value knows nothing and remembers nothing.
type Mirrors struct{ dir string }

// Mirrors returns the pair's.
func (c *Config) Mirrors() Mirrors { return Mirrors{filepath.Join(c.Dir, "mirrors")} }

// mirrorMemory is the content of a file.
type mirrorMemory struct {
	Generation uint64 `json:"generation"`
}

func (m Mirrors) path(id string) string { return filepath.Join(m.dir, id+".json") }

// Generation returns the newest generation that Remember was told of a mirror,
// 0 if there is none.
func (m Mirrors) Generation(id string) (uint64, error) {
	if m.dir == "" {
		return 0, nil
	}
	p, err := os.ReadFile(m.path(id))
	if errors.Is(err, fs.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("read what is remembered of a mirror: %w", err)
	}
	var mem mirrorMemory
	if err := json.Unmarshal(p, &mem); err != nil {
		return 0, fmt.Errorf("%s is damaged (%w): give all copies of the mirror, or remove it if no other copy is newer than those that are given", m.path(id), err)
	}
	return mem.Generation, nil
}

// Remember stores the generation of a mirror durably.
func (m Mirrors) Remember(id string, generation uint64) error {
	if m.dir == "" {
		return nil
	}
	err := os.Mkdir(m.dir, 0o700)
	if err == nil {
		err = syncDir(filepath.Dir(m.dir))
	}
	if err != nil && !errors.Is(err, fs.ErrExist) {
		return fmt.Errorf("remember the generation of a mirror: %w", err)
	}
	return WriteJSON(m.path(id), mirrorMemory{generation})
}
