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
	places := map[ID]int{}
	groups := map[ID][]hpdi.Device{}
	fail := func(err error) ([]hpdi.Device, error) {
		for _, d := range append(out, devs...) {
			if d != nil {
				_ = d.Close() // those that are closed already do not mind
			}
		}
		return nil, err
	}
	for _, d := range devs {
		id, err := Belongs(d)
		switch {
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
		if _, known := groups[id]; !known {
			places[id] = len(out)
			out = append(out, nil)
		}
		groups[id] = append(groups[id], d)
	}
	for id, group := range groups {
		o.Devices = group
		m, err := Open(o)
		if err != nil {
			return fail(err)
		}
		out[places[id]] = m
	}
	return out, nil
}
