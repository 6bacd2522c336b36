package mirror

import (
	"errors"
	"fmt"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

// Assemble replaces devices that are copies by their mirrors, each in the place
// of its first one, and leaves the others as they are. The mirrors are opened
// with o, whose Devices do not matter. After an error all devices are closed.
func Assemble(devs []hpdi.Device, o Options) ([]hpdi.Device, error) {
	var out []hpdi.Device
	var order []ID // so that the same devices make the same requests
	places := map[ID]int{}
	groups := map[ID][]*found{}
	fail := func(err error) ([]hpdi.Device, error) {
		for _, group := range groups {
			for _, f := range group {
				_ = f.disk.queues.Release() // nothing is under way
			}
		}
		for _, d := range append(out, devs...) {
			if d != nil {
				_ = d.Close() // those that are closed already do not mind
			}
		}
		return nil, err
	}
	founds, errs := make([]*found, len(devs)), make([]error, len(devs))
	o.each(len(devs), func(i int) { founds[i], errs[i] = readHeader(devs[i]) })
	for _, f := range founds {
		if f != nil { // all of them, so that also a failure knows them
			groups[f.id] = append(groups[f.id], f)
		}
	}
	for i, d := range devs {
		switch err := errs[i]; {
		case errors.Is(err, ondisk.ErrMagic):
			out = append(out, d)
			continue
		case err != nil && o.LeftOut != nil:
			_ = d.Close()
			o.LeftOut(d, err)
			continue
		case err != nil:
			return fail(fmt.Errorf("look for a copy of a mirror: %w", err))
		}
		if _, known := places[founds[i].id]; !known {
			places[founds[i].id] = len(out)
			order = append(order, founds[i].id)
			out = append(out, nil)
		}
	}
	opened, failed := make([]opening, len(order)), make([]error, len(order))
	o.each(len(order), func(i int) { opened[i], failed[i] = openFound(groups[order[i]], o) })
	for i, id := range order {
		if failed[i] == nil {
			out[places[id]] = opened[i].mirror
		}
	}
	for i := range order {
		if failed[i] != nil {
			return fail(failed[i])
		}
	}
	for _, m := range opened {
		m.leaveOut(o)
	}
	return out, nil
}
