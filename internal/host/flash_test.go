package host

import (
	"context"
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/control"
)

// flashGuest answers for the flash of pool-b as a guest would.
type flashGuest struct {
	asked   []string
	changes []control.FlashChange // of the next change
	classes []control.FlashClass  // that the next change leaves
	now     []control.FlashClass
	err     error
}

func (f *flashGuest) note(format string, args ...any) error {
	f.asked = append(f.asked, fmt.Sprintf(format, args...))
	return f.err
}

func (f *flashGuest) handlers() control.Handlers {
	flash := control.PoolFlash{Pool: "pool-b", Guest: "b", FlashStatus: control.FlashStatus{Device: "/nvme", Left: 7, State: control.FlashEvacuating}}
	return control.Handlers{
		Volumes: func(context.Context) ([]control.Volume, error) {
			return []control.Volume{{Name: "v", Pool: "pool-b", Guest: "b"}}, nil
		},
		Pools: func(context.Context) ([]control.Pool, error) {
			return []control.Pool{{Name: "pool-b", Guest: "b", State: "open", Stats: control.PoolStatus{Flash: &flash.FlashStatus}}}, nil
		},
		Flash: func(_ context.Context, p string) (control.PoolFlash, error) { return flash, f.note("status %s", p) },
		FlashPolicy: func(_ context.Context, p string) (control.FlashPolicy, error) {
			return control.FlashPolicy{Pool: p, Guest: "b", Classes: f.now}, f.note("policy %s", p)
		},
		ChangeFlashPolicy: func(_ context.Context, p string, c control.FlashPolicyChange) (control.FlashPolicy, error) {
			if f.classes != nil {
				f.now = f.classes
			}
			return control.FlashPolicy{Pool: p, Guest: "b", Classes: f.now, Changes: f.changes}, f.note("change %s %v %v", p, c.Set, c.Classes)
		},
		ChangeFlashPin: func(_ context.Context, v string, c control.FlashPinChange) (control.PoolFlash, error) {
			return flash, f.note("pin %s %+v", v, c)
		},
		EvacuateFlash: func(_ context.Context, p string, e control.FlashEvacuation) (control.PoolFlash, error) {
			return flash, f.note("evacuate %s %s", p, e.Action)
		},
		ExplainFlash: func(_ context.Context, v string, at control.FlashPlace) (control.FlashExplanation, error) {
			return control.FlashExplanation{Volume: v}, f.note("explain %s %d", v, at.Offset)
		},
		SimulateFlash: func(_ context.Context, p string, _ control.FlashTrial) (control.FlashPrediction, error) {
			return control.FlashPrediction{Pool: p}, f.note("simulate %s", p)
		},
	}
}

// Commands about flash reach the guest that serves the pool or the volume, and what they
// change is told as events, each change by itself.
func TestFlashCommands(t *testing.T) {
	g := &flashGuest{now: []control.FlashClass{{Device: "/sdb", Class: "disk"}, {Device: "mirror 1", Class: "disk"}}}
	a := answering(t, g.handlers())
	ctx := t.Context()
	seen, _ := a.events.since(0)
	from := len(seen)
	did := func(what string, err error, asked ...string) {
		t.Helper()
		if err != nil || !slices.Equal(g.asked, asked) {
			t.Errorf("%s: %v, asked %q", what, err, g.asked)
		}
		g.asked = nil
	}
	told := func(want ...control.Event) {
		t.Helper()
		all, _ := a.events.since(0)
		got := all[from:]
		from = len(all)
		if len(got) != len(want) {
			t.Fatalf("%d events: %+v", len(got), got)
		}
		for i, w := range want {
			if e := got[i]; e.Guest != "b" || e.Kind != w.Kind || e.Message != w.Message || !maps.Equal(e.Fields, w.Fields) {
				t.Errorf("%+v\nwant %+v", e, w)
			}
		}
	}
	_, err := a.flash(ctx, "pool-b")
	did("status", err, "status pool-b")
	_, err = a.flashPolicy(ctx, "pool-b")
	did("policy", err, "policy pool-b")
	_, err = a.explainFlash(ctx, "v", control.FlashPlace{Offset: 5})
	did("explain", err, "explain v 5")
	_, err = a.simulateFlash(ctx, "pool-b", control.FlashTrial{})
	did("simulate", err, "simulate pool-b")
	told()

	g.changes = []control.FlashChange{{Name: "budget.migrate", Was: "32MiB", Now: "64MiB"}, {Name: "patterns.sata.promote", Was: "", Now: "reads > 1.0"}}
	_, err = a.changeFlashPolicy(ctx, "pool-b", control.FlashPolicyChange{Set: map[string]string{"x": "1"}})
	did("change", err, "policy pool-b", "change pool-b map[x:1] map[]")
	told(control.Event{Kind: "flash-policy-changed", Message: "budget.migrate of the flash of pool pool-b is 64MiB now; it was 32MiB",
		Fields: map[string]string{"pool": "pool-b", "parameter": "budget.migrate", "was": "32MiB", "now": "64MiB"}},
		control.Event{Kind: "flash-policy-changed", Message: "patterns.sata.promote of the flash of pool pool-b is reads > 1.0 now; it was nothing",
			Fields: map[string]string{"pool": "pool-b", "parameter": "patterns.sata.promote", "was": "", "now": "reads > 1.0"}})

	// A device is known by the pool's name for it, or by its whole path.
	g.changes, g.classes = nil, []control.FlashClass{{Device: "/sdb", Class: "disk"}, {Device: "mirror 1", Class: "sata", Given: true}}
	_, err = a.changeFlashPolicy(ctx, "pool-b", control.FlashPolicyChange{Classes: map[string]string{"mirror 1": "sata", "x.img": ""}})
	did("class", err, "policy pool-b", fmt.Sprintf("change pool-b map[] map[%s: mirror 1:sata]", filepath.Join(a.cfg.Dir, "x.img")))
	told(control.Event{Kind: "flash-class-changed", Message: "the class of device mirror 1 of pool pool-b is sata now; it was disk by default",
		Fields: map[string]string{"pool": "pool-b", "device": "mirror 1", "was": "disk by default", "now": "sata"}})

	_, err = a.changeFlashPin(ctx, "v", control.FlashPinChange{Action: control.PinAdd})
	did("pin", err, "pin v {Action:add Offset:0 Length:0 All:false}")
	_, err = a.changeFlashPin(ctx, "v", control.FlashPinChange{Action: control.PinAdd, Offset: 1 << 20, Length: 1 << 20})
	did("pin", err, "pin v {Action:add Offset:1048576 Length:1048576 All:false}")
	_, err = a.changeFlashPin(ctx, "v", control.FlashPinChange{Action: control.PinRemove, Offset: 1 << 20})
	did("unpin", err, "pin v {Action:remove Offset:1048576 Length:0 All:false}")
	_, err = a.changeFlashPin(ctx, "v", control.FlashPinChange{Action: control.PinRemove, All: true})
	did("unpin all", err, "pin v {Action:remove Offset:0 Length:0 All:true}")
	fields := func(volume string, more ...string) map[string]string {
		f := map[string]string{"pool": "pool-b", "volume": volume}
		for i := 0; i < len(more); i += 2 {
			f[more[i]] = more[i+1]
		}
		return f
	}
	told(control.Event{Kind: "flash-pin-added", Message: "volume v is pinned to the flash of pool pool-b", Fields: fields("v")},
		control.Event{Kind: "flash-pin-added", Message: "volume v from 1MiB to 2MiB is pinned to the flash of pool pool-b", Fields: fields("v", "offset", "1048576", "length", "1048576")},
		control.Event{Kind: "flash-pin-removed", Message: "volume v from 1MiB to its end is no longer pinned to the flash of pool pool-b", Fields: fields("v", "offset", "1048576", "length", "0")},
		control.Event{Kind: "flash-pin-removed", Message: "volume v is no longer pinned to the flash of pool pool-b", Fields: fields("v")})

	_, err = a.evacuateFlash(ctx, "pool-b", control.FlashEvacuation{Action: control.EvacuateStart})
	did("evacuate", err, "evacuate pool-b start")
	_, err = a.evacuateFlash(ctx, "pool-b", control.FlashEvacuation{Action: control.EvacuateStop})
	did("stop", err, "evacuate pool-b stop")
	device := map[string]string{"pool": "pool-b", "device": "/nvme"}
	told(control.Event{Kind: "flash-evacuation-start", Message: "all data on flash /nvme of pool pool-b, 7 sets, moves back to its devices", Fields: device},
		control.Event{Kind: "flash-evacuation-stop", Message: "flash /nvme of pool pool-b is used again", Fields: device})

	// What is refused is no event.
	all := map[string]func(pool, volume string) error{
		"status": func(p, _ string) error { _, err := a.flash(ctx, p); return err },
		"policy": func(p, _ string) error { _, err := a.flashPolicy(ctx, p); return err },
		"change": func(p, _ string) error {
			_, err := a.changeFlashPolicy(ctx, p, control.FlashPolicyChange{})
			return err
		},
		"pin": func(_, v string) error {
			_, err := a.changeFlashPin(ctx, v, control.FlashPinChange{Action: control.PinAdd})
			return err
		},
		"unpin": func(_, v string) error {
			_, err := a.changeFlashPin(ctx, v, control.FlashPinChange{Action: control.PinRemove})
			return err
		},
		"evacuate": func(p, _ string) error { _, err := a.evacuateFlash(ctx, p, control.FlashEvacuation{}); return err },
		"explain":  func(_, v string) error { _, err := a.explainFlash(ctx, v, control.FlashPlace{}); return err },
		"simulate": func(p, _ string) error { _, err := a.simulateFlash(ctx, p, control.FlashTrial{}); return err },
	}
	g.err = block.ErrNoSpace
	for what, do := range all {
		refused(t, what, do("pool-b", "v"), control.KindNoSpace)
		refused(t, what+" of nothing", do("pool-x", "x"), control.KindNotFound)
	}
	told()
}

// A single flash device is a risk that is stated, in a pool of mirrors only with force.
func TestAddFlash(t *testing.T) {
	var asked []control.PoolAdd
	g := &flashGuest{}
	h := g.handlers()
	h.AddDevice = func(_ context.Context, _ string, c control.PoolAdd) (control.Pool, error) {
		asked = append(asked, c)
		return control.Pool{Name: "pool-b"}, nil
	}
	a := answering(t, h)
	ctx := t.Context()
	in := func(name string) string { return filepath.Join(a.cfg.Dir, name) }
	for _, c := range []struct {
		add  control.PoolAdd
		kind control.Kind
		says string
	}{
		{control.PoolAdd{Device: "x", Class: "tape"}, control.KindInvalid, "use one of disk, llrrm, flash"},
		{control.PoolAdd{Device: "x", SetBytes: 65536}, control.KindInvalid, "only a device of class flash has data sets"},
		{control.PoolAdd{Device: "x", Class: control.ClassFlash, SetBytes: 65536}, "", "device " + in("x") + " is part of pool pool-b as flash, by itself: whatever is on it is lost with it"},
		{control.PoolAdd{Device: "y", Copies: []string{"z"}, Class: control.ClassFlash}, "", "the mirror of " + in("y") + ", " + in("z") + " is part of pool pool-b as flash"},
	} {
		_, err := a.addDevice(ctx, "pool-b", c.add)
		if c.kind != "" {
			refused(t, c.says, err, c.kind)
			if err != nil && !strings.Contains(err.Error(), c.says) {
				t.Errorf("%v, not %q", err, c.says)
			}
			continue
		}
		events, _ := a.events.since(0)
		if err != nil || len(events) == 0 {
			t.Fatalf("%v, %+v", err, events)
		}
		if last := events[len(events)-1]; last.Message != c.says || last.Fields["class"] != control.ClassFlash || last.Kind != "device-added" {
			t.Errorf("%+v", last)
		}
	}
	if len(asked) != 2 || asked[0].SetBytes != 65536 || asked[0].Class != control.ClassFlash || len(asked[1].Copies) != 1 {
		t.Errorf("%+v", asked)
	}
	if err := mayAdd("p", &a.cfg.Guest("b").Pool, []string{"/new"}, false); err != nil {
		t.Error(err)
	}
}
