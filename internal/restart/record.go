package restart

import (
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
)

// Record is what was found out about a pool, and by whom.
type Record struct {
	Number  uint64 // rises with each record of a pool
	Pool    block.PoolID
	Epoch   block.Epoch // of the newest superblock when it was written
	Written time.Time

	Program  string // the executable that wrote it, as the host knows it
	BootID   string // of the host
	Identity string // of the guest that the pool belongs to
	Settings string // JSON of those that matter to the pool

	Name       string // of the pool
	IndexBytes uint64 // settings that are kept with the pool
	Threshold  uint8
	// Superblocks are the blocks of the first device in which superblocks lie, and Generation is
	// that of the newest one.
	Superblocks []uint64
	Generation  uint64

	Region   string // id of the region with the pool's log
	Sections []Section
	Devices  []Device // of the pool, in their order, without those that were removed
	Volumes  []Volume // in the order of their ids
}

// Section is where something lies in the region.
type Section struct {
	Kind           uint32
	Offset, Length int64 // bytes
}

// Device is a device of the pool, which may be a mirror.
type Device struct {
	Index         int // in the pool
	ID            block.DeviceID
	State, Class  uint8  // as in the superblock
	Blocks, First uint64 // as in the superblock
	Label         []byte // as it is on the device, without the zeroes behind it
	Copies        []Copy // one, or those of a mirror that were there
}

// Copy is a file or block device.
type Copy struct {
	Path string
	File File
}

// File is what tells a file from another one, and what it can do. See package hpdi/file.
type File struct {
	Block               bool
	Device, Inode, Born uint64
	Size                int64 // bytes

	Driver                                    string
	BlockSize                                 int
	Direct, Discard, Zeroes, Durable, Rotates bool
	Note                                      string // why no faster way was taken
}

// Volume is a volume of the pool, and its export.
type Volume struct {
	ID       block.VolumeID
	Size     int64 // bytes
	Run      int   // THN, 0 if it shares no blocks
	ReadOnly bool  // its export
	Name     string
}

// Now is what is so when somebody wants to use a record.
type Now struct {
	Pool     block.PoolID // zero if it is not known yet
	Program  string
	BootID   string
	Identity string
	Settings string
	Paths    []string // of the pool's devices and copies
}

// Differs says what is not as it was when the record was written, as far as that can be told
// without opening a device; nothing if all is the same.
func (r *Record) Differs(n Now) string {
	var paths []string
	for _, d := range r.Devices {
		for _, c := range d.Copies {
			paths = append(paths, c.Path)
		}
	}
	switch {
	case n.Pool != (block.PoolID{}) && r.Pool != n.Pool:
		return fmt.Sprintf("the record is of pool %v", r.Pool)
	case r.Identity != n.Identity:
		return fmt.Sprintf("the record is of identity %s", r.Identity)
	case r.Program != n.Program:
		return "another program wrote the record"
	case r.BootID != n.BootID:
		return "the host was booted since"
	case r.Settings != n.Settings:
		return "settings have changed: " + strings.Join(changedSettings(r.Settings, n.Settings), ", ")
	}
	for _, p := range n.Paths {
		if !slices.Contains(paths, p) {
			return fmt.Sprintf("the record has no device %s", p)
		}
	}
	for _, p := range paths {
		if !slices.Contains(n.Paths, p) {
			return fmt.Sprintf("device %s of the record is not in the settings", p)
		}
	}
	return ""
}

// changedSettings names the settings that differ between two JSON objects.
func changedSettings(a, b string) []string {
	var x, y map[string]json.RawMessage
	if json.Unmarshal([]byte(a), &x) != nil || json.Unmarshal([]byte(b), &y) != nil {
		return []string{"all of them"}
	}
	var names []string
	for name, v := range x {
		if string(y[name]) != string(v) {
			names = append(names, name)
		}
	}
	for name := range y {
		if _, ok := x[name]; !ok {
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// Files returns the files and block devices of the record by their paths.
func (r *Record) Files() map[string]File {
	files := map[string]File{}
	for _, d := range r.Devices {
		for _, c := range d.Copies {
			files[c.Path] = c.File
		}
	}
	return files
}

// Replaced says what is not as it was of the files that were opened now; nothing if each is
// the one of the record.
func (r *Record) Replaced(now map[string]File) string {
	then := r.Files()
	for _, path := range slices.Sorted(maps.Keys(then)) {
		was := then[path]
		switch is, ok := now[path]; {
		case !ok:
			return fmt.Sprintf("device %s is missing", path)
		case is.Born == 0 || is.Block != was.Block || is.Device != was.Device || is.Inode != was.Inode || is.Born != was.Born:
			return fmt.Sprintf("device %s is another one than before", path)
		case is.Size != was.Size:
			return fmt.Sprintf("device %s has %d bytes and had %d", path, is.Size, was.Size)
		}
	}
	return ""
}

// Same reports whether two records say the same, whoever wrote them and when.
func (r *Record) Same(other *Record) bool {
	if other == nil {
		return false
	}
	a, b := *r, *other
	a.Number, a.Written, a.Epoch, a.Generation = b.Number, b.Written, b.Epoch, b.Generation
	x, err := a.Encode()
	if err != nil {
		return false
	}
	y, err := b.Encode()
	return err == nil && string(x) == string(y)
}
