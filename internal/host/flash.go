package host

import (
	"cmp"
	"context"
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
)

func (a *agent) flash(ctx context.Context, name string) (control.PoolFlash, error) {
	_, _, cl, err := a.poolHolder(ctx, name)
	if err != nil {
		return control.PoolFlash{}, err
	}
	return cl.Flash(ctx, name)
}

func (a *agent) flashPolicy(ctx context.Context, name string) (control.FlashPolicy, error) {
	_, _, cl, err := a.poolHolder(ctx, name)
	if err != nil {
		return control.FlashPolicy{}, err
	}
	return cl.FlashPolicy(ctx, name)
}

// changeFlashPolicy changes parameters of a pool's flash, and classes of its devices. Each
// that is another one then is an event, whoever asked.
func (a *agent) changeFlashPolicy(ctx context.Context, name string, c control.FlashPolicyChange) (control.FlashPolicy, error) {
	if err := a.beginChange(); err != nil {
		return control.FlashPolicy{}, err
	}
	defer a.change.Unlock()
	p, _, cl, err := a.poolHolder(ctx, name)
	if err != nil {
		return control.FlashPolicy{}, err
	}
	was, err := cl.FlashPolicy(ctx, name)
	if err != nil {
		return was, err
	}
	classes := map[string]string{}
	for d, class := range c.Classes {
		if !slices.ContainsFunc(was.Classes, func(f control.FlashClass) bool { return f.Device == d }) {
			d = a.absolute(d) // it is no name that the pool tells, so a path
		}
		classes[d] = class
	}
	c.Classes = classes
	now, err := cl.ChangeFlashPolicy(ctx, name, c)
	if err != nil {
		return now, err
	}
	for _, x := range now.Changes {
		fields := map[string]string{"pool": name, "parameter": x.Name, "was": x.Was, "now": x.Now}
		a.event(p.Guest, "flash-policy-changed", fields, "%s of the flash of pool %s is %s now; it was %s", x.Name, name, orNone(x.Now), orNone(x.Was))
	}
	before := map[string]string{}
	for _, d := range was.Classes {
		before[d.Device] = classWords(d)
	}
	for _, d := range now.Classes {
		if w, n := before[d.Device], classWords(d); w != n {
			fields := map[string]string{"pool": name, "device": d.Device, "was": w, "now": n}
			a.event(p.Guest, "flash-class-changed", fields, "the class of device %s of pool %s is %s now; it was %s", d.Device, name, n, w)
		}
	}
	return now, nil
}

func orNone(text string) string { return cmp.Or(text, "nothing") }

// classWords says the class of a device, and whether somebody has given it.
func classWords(c control.FlashClass) string {
	if c.Given {
		return c.Class
	}
	return c.Class + " by default"
}

// changeFlashPin adds or removes pins of a volume.
func (a *agent) changeFlashPin(ctx context.Context, volume string, c control.FlashPinChange) (control.PoolFlash, error) {
	if err := a.beginChange(); err != nil {
		return control.PoolFlash{}, err
	}
	defer a.change.Unlock()
	cl, err := a.volumeHolder(ctx, volume)
	if err != nil {
		return control.PoolFlash{}, err
	}
	p, err := cl.ChangeFlashPin(ctx, volume, c)
	if err != nil {
		return p, err
	}
	kind, what := "flash-pin-added", "is"
	if c.Action == control.PinRemove {
		kind, what = "flash-pin-removed", "is no longer"
	}
	fields := map[string]string{"pool": p.Pool, "volume": volume}
	text := "volume " + volume
	if !c.All && (c.Offset != 0 || c.Length != 0) {
		fields["offset"], fields["length"] = fmt.Sprint(c.Offset), fmt.Sprint(c.Length)
		to := "its end"
		if c.Length > 0 {
			to = config.Size(c.Offset + c.Length).String()
		}
		text = fmt.Sprintf("volume %s from %s to %s", volume, config.Size(c.Offset), to)
	}
	a.event(p.Guest, kind, fields, "%s %s pinned to the flash of pool %s", text, what, p.Pool)
	return p, nil
}

// volumeHolder returns the way to the guest that serves a volume.
func (a *agent) volumeHolder(ctx context.Context, name string) (*control.Client, error) {
	v, err := a.volume(ctx, name)
	if err != nil {
		return nil, err
	}
	return a.holder(ctx, v.Guest)
}

// evacuateFlash begins to move all data back from flash, or lets flash be used again.
func (a *agent) evacuateFlash(ctx context.Context, name string, e control.FlashEvacuation) (control.PoolFlash, error) {
	if err := a.beginChange(); err != nil {
		return control.PoolFlash{}, err
	}
	defer a.change.Unlock()
	p, _, cl, err := a.poolHolder(ctx, name)
	if err != nil {
		return control.PoolFlash{}, err
	}
	f, err := cl.EvacuateFlash(ctx, name, e)
	if err != nil {
		return f, err
	}
	fields := map[string]string{"pool": name, "device": f.Device}
	if e.Action == control.EvacuateStart {
		a.event(p.Guest, "flash-evacuation-start", fields, "all data on flash %s of pool %s, %d sets, moves back to its devices", f.Device, name, f.Left)
	} else {
		a.event(p.Guest, "flash-evacuation-stop", fields, "flash %s of pool %s is used again", f.Device, name)
	}
	return f, nil
}

func (a *agent) explainFlash(ctx context.Context, volume string, at control.FlashPlace) (control.FlashExplanation, error) {
	cl, err := a.volumeHolder(ctx, volume)
	if err != nil {
		return control.FlashExplanation{}, err
	}
	return cl.ExplainFlash(ctx, volume, at)
}

func (a *agent) simulateFlash(ctx context.Context, name string, t control.FlashTrial) (control.FlashPrediction, error) {
	_, _, cl, err := a.poolHolder(ctx, name)
	if err != nil {
		return control.FlashPrediction{}, err
	}
	return cl.SimulateFlash(ctx, name, t)
}
