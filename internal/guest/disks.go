package guest

import (
	"errors"
	"fmt"
	"iter"
	"slices"
	"strings"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/file"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/mirror"
)

// disks opens the devices of a pool by a function and puts copies together.
// Where each block is kept more than once a device may be missing, or hold
// something else: it is told to without, and the pool goes on with the others.
func disks(set *config.Pool, readOnly bool, open func(path string) (hpdi.Device, error), without func(path string, why error)) ([]hpdi.Device, error) {
	var devs []hpdi.Device
	missing := 0
	for _, path := range set.Devices {
		d, err := open(path)
		switch {
		case err == nil:
			devs = append(devs, d)
		case set.Copies > 1 && !errors.Is(err, hpdi.ErrLocked):
			// Locked is not missing: a guest that is not fenced may use it.
			without(path, err)
			missing++
		default:
			closeAll(devs)
			return nil, fmt.Errorf("device %s: %w", path, err)
		}
	}
	if set.Copies <= 1 {
		return devs, nil
	}
	devs, err := mirror.Assemble(devs, mirror.Options{Degraded: true, ReadOnly: readOnly, LeftOut: func(d hpdi.Device, why error) {
		without(d.Info().Name, why)
		missing++
	}})
	if err != nil {
		return nil, err
	}
	if len(mirrors(devs)) == 0 && missing == 0 {
		return devs, nil // yet to be made
	}
	kept := devs[:0]
	for _, d := range devs {
		if _, ok := d.(*mirror.Mirror); ok {
			kept = append(kept, d)
			continue
		}
		without(d.Info().Name, errors.New("it holds no copy of a mirror"))
		_ = d.Close() // nothing was written to it
	}
	if want := len(set.Devices) / set.Copies; len(kept) != want {
		closeAll(kept)
		return nil, fmt.Errorf("%d of %d mirrors have no copy left: %w", want-len(kept), want, block.ErrNotFound)
	}
	return kept, nil
}

// openToLook opens a device, or the mirror that several are copies of, for reading
// and without locks, which its guest may hold. A copy that cannot be had is told to
// without.
func openToLook(paths []string, without func(path string, why error)) (hpdi.Device, error) {
	devs, err := disks(&config.Pool{Devices: paths, Copies: len(paths)}, true, func(path string) (hpdi.Device, error) {
		return file.Open(path, file.Options{ReadOnly: true})
	}, without)
	if err != nil {
		return nil, err
	}
	if len(devs) != 1 {
		closeAll(devs)
		return nil, fmt.Errorf("devices %s %w", strings.Join(paths, ", "), ErrNoPool)
	}
	return devs[0], nil
}

// groups returns the devices of a pool by what the pool sees of them: each by
// itself, or the copies of a mirror together.
func groups(set *config.Pool) iter.Seq[[]string] {
	return slices.Chunk(set.Devices, max(set.Copies, 1))
}

// mirrors returns the mirrors among devices.
func mirrors(devs []hpdi.Device) (ms []*mirror.Mirror) {
	for _, d := range devs {
		if m, ok := d.(*mirror.Mirror); ok {
			ms = append(ms, m)
		}
	}
	return ms
}

// makeMirrors makes mirrors of devices that hold nothing, and opens them. After
// an error the devices are closed.
func makeMirrors(devs []hpdi.Device, copies int) (out []hpdi.Device, err error) {
	if copies <= 1 {
		return devs, nil
	}
	for rest := devs; len(rest) > 0 && err == nil; rest = rest[copies:] {
		_, err = mirror.Create(rest[:copies])
	}
	if err != nil {
		closeAll(devs)
		return nil, err
	}
	return mirror.Assemble(devs, mirror.Options{})
}

func openLocked(path string, deadline time.Time) (hpdi.Device, error) {
	for {
		d, err := file.Open(path, file.Options{Lock: true})
		if !errors.Is(err, hpdi.ErrLocked) || time.Now().After(deadline) {
			return d, err
		}
		time.Sleep(time.Millisecond) // the kernel tells nobody when a lock goes
	}
}
