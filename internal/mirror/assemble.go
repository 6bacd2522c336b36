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
	for _, d := range devs {
		f, err := readHeader(d)
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
		if _, known := groups[f.id]; !known {
			places[f.id] = len(out)
			order = append(order, f.id)
			out = append(out, nil)
		}
		groups[f.id] = append(groups[f.id], f)
	}
	for _, id := range order {
		m, err := openFound(groups[id], o)
		if err != nil {
			return fail(err)
		}
		out[places[id]] = m
	}
	return out, nil
}
