// Package dump looks at what a pool has stored, on devices that nobody serves
// and in regions, and says what it finds: for people who want to know why a
// pool does what it does, and for programs that compare.
//
// It never writes, takes no ownership, and shows damage instead of failing on
// it: what can be decoded is part of a result, and what is wrong is in its
// Damage, each with its place. An error means that there is nothing to show.
//
// The formats are decoded by the packages that own them; this one opens files,
// puts the parts together and bounds the output. Results are plain data with
// names for JSON. Checksums are in hexadecimal, as in messages.
package dump

import (
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/file"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/mirror"
	"github.com/pollux-storage/pollux/internal/pool"
)

// Options says how to look.
type Options struct {
	// Live looks at devices although a guest may have them locked. What
	// changes meanwhile may seem damaged.
	Live bool
	// Limit is how many rows a result has at most; none if it is 0.
	Limit int
}

// Found is what all results have.
type Found struct {
	Live   bool     `json:"live,omitempty"` // devices were not locked
	Damage []string `json:"damage"`         // what is wrong, and where
	Notes  []string `json:"notes,omitempty"`
	More   int      `json:"more"` // rows beyond the limit

	limit, rows int
}

func (o Options) found() Found { return Found{Live: o.Live, Damage: []string{}, limit: o.Limit} }

// maxDamage bounds the list of what is wrong.
const maxDamage = 100

func (f *Found) bad(format string, args ...any) {
	switch n := len(f.Damage); {
	case n < maxDamage:
		f.Damage = append(f.Damage, fmt.Sprintf(format, args...))
	case n == maxDamage:
		f.Damage = append(f.Damage, "and more")
	}
}

// row says whether one more row is to be shown, and counts it.
func (f *Found) row() bool {
	if f.rows++; f.rows > f.limit {
		f.More++
		return false
	}
	return true
}

// open opens devices for reading. hpdi.ErrLocked: a guest has one of them.
func (o Options) open(paths []string) (devs []hpdi.Device, err error) {
	for _, p := range paths {
		d, err := file.Open(p, file.Options{ReadOnly: true, Lock: !o.Live})
		if err != nil {
			closeAll(devs)
			return nil, err
		}
		devs = append(devs, d)
	}
	return mirror.Assemble(devs, mirror.Options{Degraded: true, ReadOnly: true})
}

func closeAll(devs []hpdi.Device) {
	for _, d := range devs {
		_ = d.Close() // nothing was written through it
	}
}

// first is device 0 of a pool: what leads to everything else.
type first struct {
	dev   hpdi.Device
	set   *devices.Set
	label pool.Label
	sb    *cp.Superblock // the one that counts
}

// openFirst opens device 0 of a pool with a label and a superblock.
func (o Options) openFirst(path string, what string) (*first, error) {
	devs, err := o.open([]string{path})
	if err != nil {
		return nil, err
	}
	f := &first{dev: devs[0], set: devices.NewSet(devs)}
	if f.label, err = pool.ReadLabel(f.dev); err == nil && f.label.Index != 0 {
		err = fmt.Errorf("device %s is number %d of pool %s; the %s is on the first: %w",
			path, f.label.Index+1, f.label.Name, what, block.ErrInvalid)
	}
	if err == nil {
		f.sb, err = cp.ReadSuperblock(f.set, f.label.Pool)
	}
	if err != nil {
		return nil, errors.Join(err, f.set.Close())
	}
	return f, nil
}

func hex(sum uint32) string { return fmt.Sprintf("%08x", sum) }

// text is an error's message, empty for none.
func text(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}
