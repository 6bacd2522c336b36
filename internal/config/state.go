package config

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
)

// State is what a pair remembers from one run to the next, by guest.
type State struct {
	Guests map[string]GuestState `json:"guests"`
}

// GuestState is what is remembered of one guest.
type GuestState struct {
	// Port was chosen when the settings said 0.
	Port int `json:"port,omitempty"`
	// Created says that the pool has been seen.
	Created bool `json:"created,omitempty"`
	// Pool and Devices were given by commands and replace the settings'.
	Pool    string   `json:"pool,omitempty"`
	Devices []string `json:"devices,omitempty"`
	// Copies goes with Devices: how many of them keep the same.
	Copies int `json:"copies,omitempty"`
	// Widths goes with Devices, as Pool.Widths does.
	Widths []int `json:"widths,omitempty"`
	// Adding is a device whose addition was begun; it belongs to the pool
	// only if its label says so. AddingCopies are the others of a mirror.
	Adding       string   `json:"adding,omitempty"`
	AddingCopies []string `json:"adding_copies,omitempty"`
	// Import is that of a pool that was imported and has not been seen open.
	Import *Import `json:"import,omitempty"`
	// Exported is the name of the pool that the guest had last, and that was
	// exported: what the settings name is elsewhere now.
	Exported string `json:"exported,omitempty"`
	// Removing are devices whose removal was begun, of Devices.
	Removing []string `json:"removing,omitempty"`
}

func statePath(dir string) string { return filepath.Join(dir, "state.json") }

// ReadState returns what the pair in dir remembers.
func ReadState(dir string) (State, error) {
	st := State{Guests: map[string]GuestState{}}
	p, err := os.ReadFile(statePath(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return st, nil
	}
	if err != nil {
		return st, fmt.Errorf("read what the pair remembers: %w", err)
	}
	if err := json.Unmarshal(p, &st); err != nil {
		return st, fmt.Errorf("%s is damaged (%w): remove it; devices that were added by command must then be named in config.yaml", statePath(dir), err)
	}
	if st.Guests == nil {
		st.Guests = map[string]GuestState{}
	}
	return st, nil
}

// Write stores the state durably.
func (s State) Write(dir string) error {
	return WriteJSON(statePath(dir), s)
}

func (s State) apply(c *Config) {
	for i := range c.Guests {
		g := &c.Guests[i]
		st := s.Guests[g.Name]
		if *g.Port == 0 {
			p := st.Port
			g.Port = &p
		}
		if st.Exported != "" {
			g.Pool.Devices, g.Pool.Manual = nil, true
		}
		if st.Pool != "" {
			g.Pool.Name = st.Pool
			g.Pool.Manual = false
		}
		if len(st.Devices) > 0 {
			g.Pool.Devices, g.Pool.Widths = st.Devices, st.Widths
		}
		g.Pool.Import = st.Import
		if st.Copies > 0 {
			g.Pool.Copies = st.Copies
		}
		g.Pool.Removing = st.Removing
		if st.Adding != "" {
			g.Pool.Devices = append(append(slices.Clone(g.Pool.Devices), st.Adding), st.AddingCopies...)
			g.Pool.Adding = 1 + len(st.AddingCopies)
		}
		g.Pool.Create = !g.Pool.Manual && !st.Created
	}
}

// WriteJSON replaces a file with v in one step that survives a crash of the
// host.
func WriteJSON(path string, v any) error { return writeJSON(path, v, true) }

// WriteRunJSON is WriteJSON for what means nothing after a crash of the host,
// such as what runs: it does not wait for the disk.
func WriteRunJSON(path string, v any) error { return writeJSON(path, v, false) }

func writeJSON(path string, v any, durable bool) error {
	p, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	return replace(path, append(p, '\n'), durable)
}

// Replace replaces a file with p in one step that survives a crash of the host.
func Replace(path string, p []byte) error { return replace(path, p, true) }

func replace(path string, p []byte, durable bool) error {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	_, err = f.Write(p)
	if err == nil && durable {
		err = f.Sync()
	}
	err = errors.Join(err, f.Close())
	if err == nil {
		err = os.Rename(f.Name(), path)
	}
	if err == nil && durable {
		err = syncDir(filepath.Dir(path))
	}
	if err != nil {
		_ = os.Remove(f.Name())
		return fmt.Errorf("write %s: %w", path, err)
	}
	return nil
}

// syncDir makes durable what files a directory has.
func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// RunVersion is that of the files by which agent and guests of one run, and the next
// run, understand each other: the settings that hold, what the pair remembers, and what
// runs. It is raised by what an older program would misread; new fields are no such.
const RunVersion = 1

// EffectivePath is where the agent leaves the settings that hold.
func EffectivePath(dir string) string { return filepath.Join(dir, "run", "effective.json") }

// ReadEffective returns the settings that the running pair uses.
func ReadEffective(dir string) (*Config, error) {
	p, err := os.ReadFile(EffectivePath(dir))
	if err != nil {
		return nil, fmt.Errorf("read the running pair's settings: %w", err)
	}
	c := &Config{}
	if err := json.Unmarshal(p, c); err != nil {
		return nil, fmt.Errorf("%s: %w", EffectivePath(dir), err)
	}
	c.setPartDefaults() // who wrote it may be older than some of them
	return c, c.Validate()
}

// WriteEffective leaves the settings for the guests.
func (c *Config) WriteEffective() error { return WriteRunJSON(EffectivePath(c.Dir), c) }
