package guest

import (
	"os"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/flashmap/policy"
	"github.com/pollux-storage/pollux/internal/pool"
)

// flashed returns a guest whose pool has a volume "v" of 1 MiB and a file as flash.
func flashed(t *testing.T) (*bench, *control.Client, *fakeStore) {
	t.Helper()
	b, c := served(t)
	ctx := t.Context()
	if _, err := c.CreateVolume(ctx, control.VolumeCreate{Name: "v", Size: 1 << 20, Guest: "a"}); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(b.cfg.Dir, "flash")
	if err := os.WriteFile(path, make([]byte, 1<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	p, err := c.AddDevice(ctx, "pool-a", control.PoolAdd{Device: path, Class: control.ClassFlash, SetBytes: 64 << 10})
	if err != nil {
		t.Fatal(err)
	}
	s := b.storage.last()
	if last := p.Devices[len(p.Devices)-1]; last.Path != path || last.Class != control.ClassFlash || p.Devices[0].Class != "" || s.flash.setBytes != 64<<10 {
		t.Errorf("%+v, sets of %d bytes", p.Devices, s.flash.setBytes)
	}
	s.mu.Lock()
	s.flash.stats.State, s.flash.stats.SetBytes, s.flash.stats.Slots = pool.FlashInUse, 64<<10, 16
	s.flash.stats.Primaries = []pool.FlashPrimary{
		{Device: b.cfg.Guests[0].Pool.Devices[0], Class: "disk", OnFlash: 3, Flash: pool.FlashTier{Reads: 5, Writes: 2, ReadLatency: time.Millisecond}, Primary: pool.FlashTier{Reads: 1}},
		{Device: "other", Number: 1, Class: "disk"},
	}
	s.mu.Unlock()
	return b, c, s
}

// Pools without flash, and those that are not here, cannot be asked about it.
func TestNoFlash(t *testing.T) {
	_, c := served(t)
	ctx := t.Context()
	if _, err := c.CreateVolume(ctx, control.VolumeCreate{Name: "v", Size: 1 << 20, Guest: "a"}); err != nil {
		t.Fatal(err)
	}
	for _, x := range []struct {
		name string
		do   func(pool, volume string) error
	}{
		{"status", func(p, _ string) error { _, err := c.Flash(ctx, p); return err }},
		{"policy", func(p, _ string) error { _, err := c.FlashPolicy(ctx, p); return err }},
		{"change", func(p, _ string) error {
			_, err := c.ChangeFlashPolicy(ctx, p, control.FlashPolicyChange{})
			return err
		}},
		{"evacuate", func(p, _ string) error {
			_, err := c.EvacuateFlash(ctx, p, control.FlashEvacuation{Action: control.EvacuateStart})
			return err
		}},
		{"simulate", func(p, _ string) error { _, err := c.SimulateFlash(ctx, p, control.FlashTrial{}); return err }},
		{"explain", func(_, v string) error { _, err := c.ExplainFlash(ctx, v, control.FlashPlace{}); return err }},
		{"pin", func(_, v string) error {
			_, err := c.ChangeFlashPin(ctx, v, control.FlashPinChange{Action: control.PinAdd})
			return err
		}},
		{"unpin", func(_, v string) error {
			_, err := c.ChangeFlashPin(ctx, v, control.FlashPinChange{Action: control.PinRemove, All: true})
			return err
		}},
	} {
		if err := x.do("pool-a", "v"); kindOf(err) != control.KindNotFound || !strings.Contains(err.Error(), "pool pool-a has no flash") {
			t.Errorf("%s: %v", x.name, err)
		}
		if err := x.do("nobody", "nothing"); kindOf(err) != control.KindNotFound || strings.Contains(err.Error(), "has no flash") {
			t.Errorf("%s of what is not there: %v", x.name, err)
		}
	}
	if p, err := c.Pools(ctx); err != nil || p[0].Stats.Flash != nil {
		t.Errorf("%+v, %v", p, err)
	}
}

// What the pool tells of its flash is told, whole.
func TestFlashStatus(t *testing.T) {
	_, c, s := flashed(t)
	at := time.Date(2026, 11, 1, 4, 0, 0, 0, time.UTC)
	s.mu.Lock()
	f := &s.flash.stats
	f.Why, f.Used, f.Left, f.Total = "it waits", 1, 4, 4 // what is left is as of a while ago
	f.Promoted, f.Demoted, f.GivenUp, f.FailedMoves, f.Queued, f.Stopped = 1, 2, 3, 4, 5, "budget.wear"
	f.Worn, f.WrittenByClients, f.WrittenByMoves, f.RulesEvaluated = 6, 7, 8, 9
	f.Kept = at
	for i := range 30 {
		f.Failures = append(f.Failures, policy.Failure{Device: i % 3, Set: 2, Times: i, Until: at, Reason: "bad"})
	}
	f.Top = []pool.FlashSet{{Device: "d", Offset: 1, OnFlash: true, Pinned: true, Reads: 2, Writes: 3, Runs: 4, RequestBytes: 5, Age: time.Second, Benefit: 1.5}}
	f.Pins = []pool.FlashPinned{{FlashPin: pool.FlashPin{Volume: "v", Offset: 1, Length: 2}, Sets: 3, On: 2, Room: 1, State: "partly"}}
	s.flash.params.Budget = policy.Budget{Migrate: 10, Wear: 11}
	disk := f.Primaries[0].Device
	device := f.Device
	s.mu.Unlock()
	got, err := c.Flash(t.Context(), "pool-a")
	if err != nil {
		t.Fatal(err)
	}
	if len(got.Failures) != maxFailuresTold || got.Failures[2].Device != "device 2" || got.Failures[1].Device != "other" {
		t.Errorf("%+v", got.Failures)
	}
	got.Failures = got.Failures[:1]
	want := control.PoolFlash{
		Pool: "pool-a", Guest: "a", MigrateBudget: 10, WearBudget: 11, Kept: at,
		FlashStatus: control.FlashStatus{
			Device: device, State: control.FlashInUse, Why: "it waits", SetBytes: 64 << 10, Slots: 16, Used: 1, Left: 1, Total: 4, HitShare: 0.875,
			Promoted: 1, Demoted: 2, GivenUp: 3, FailedMoves: 4, Queued: 5, Stopped: "budget.wear", Worn: 6, WrittenByClients: 7, WrittenByMoves: 8, RulesEvaluated: 9,
			Primaries: []control.FlashPrimary{
				{Device: disk, Class: "disk", OnFlash: 3, Flash: control.FlashTier{Reads: 5, Writes: 2, ReadLatency: control.Duration(time.Millisecond)}, Primary: control.FlashTier{Reads: 1}},
				{Device: "other", Number: 1, Class: "disk"},
			},
		},
		Failures: []control.FlashFailure{{Device: disk, Offset: 128 << 10, Until: at, Reason: "bad"}},
		Pins:     []control.FlashPinned{{FlashPin: control.FlashPin{Volume: "v", Offset: 1, Length: 2}, Sets: 3, On: 2, Room: 1, State: control.PinPartly}},
		Top: []control.FlashSet{{Device: "d", Offset: 1, OnFlash: true, Pinned: true, Reads: 2, Writes: 3, Sequential: 4, RequestBytes: 5,
			Age: control.Duration(time.Second), Benefit: control.Duration(1500 * time.Microsecond)}},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("%+v\nwant %+v", got, want)
	}
	s.refuse.Store(true)
	if _, err := c.Flash(t.Context(), "pool-a"); kindOf(err) != control.KindNoSpace {
		t.Error(err)
	}
}

// What a person must look at is an alert, and goes when it is over.
func TestFlashAlerts(t *testing.T) {
	_, c, s := flashed(t)
	alerts := func() string {
		t.Helper()
		st, err := c.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		return strings.Join(st.AllAlerts(), "\n")
	}
	for text, set := range map[string]func(*pool.FlashStats){
		"has failed, and nothing moves there": func(f *pool.FlashStats) { f.State = pool.FlashFailed },
		"is lost, and clients cannot read it": func(f *pool.FlashStats) { f.Lost = 1 },
		"find no room on flash":               func(f *pool.FlashStats) { f.Pins = []pool.FlashPinned{{Sets: 4, On: 1, Room: 2}} },
		"cannot be evaluated":                 func(f *pool.FlashStats) { f.RuleError = "it divides by zero" },
	} {
		if now := alerts(); strings.Contains(now, text) {
			t.Errorf("%q from the start: %s", text, now)
		}
		s.mu.Lock()
		before := s.flash.stats
		set(&s.flash.stats)
		s.mu.Unlock()
		if now := alerts(); strings.Count(now, text) != 1 || !strings.Contains(now, "pool-a") {
			t.Errorf("no alert says %q: %s", text, now)
		}
		s.mu.Lock()
		s.flash.stats = before
		s.flash.stats.Pins = []pool.FlashPinned{{Sets: 4, On: 1, Room: 3}} // it waits for its turn
		s.mu.Unlock()
	}
}

// Parameters change all or none, and only what has another value is a change.
func TestChangeFlashPolicy(t *testing.T) {
	_, c, s := flashed(t)
	ctx := t.Context()
	now, err := c.FlashPolicy(ctx, "pool-a")
	start := policy.Defaults()
	if err != nil || len(now.Parameters) != len(start.Parameters()) || now.Guest != "a" || len(now.Classes) != 2 {
		t.Fatalf("%+v, %v", now, err)
	}
	change := func(ch control.FlashPolicyChange, want ...control.FlashChange) {
		t.Helper()
		p, err := c.ChangeFlashPolicy(ctx, "pool-a", ch)
		if err != nil || !slices.Equal(p.Changes, want) {
			t.Errorf("%+v: %v, %+v", ch, err, p.Changes)
		}
	}
	set := func(class string, words ...string) control.FlashPolicyChange {
		ch := control.FlashPolicyChange{Class: class, Set: map[string]string{}}
		for _, w := range words {
			name, value, _ := strings.Cut(w, "=")
			ch.Set[name] = value
		}
		return ch
	}
	change(set("sata", "min_accesses=8", "patterns.sata.promote=reads > 20.0 && references > 1"),
		control.FlashChange{Name: "patterns.sata.min_accesses", Was: "4", Now: "8"},
		control.FlashChange{Name: "patterns.sata.promote", Now: "reads > 20.0 && references > 1"})
	change(set("", "budget.migrate=64M", "interval=15s"), control.FlashChange{Name: "budget.migrate", Was: "32MiB", Now: "64MiB"})
	both := set("", "collect.window=5s", "interval=5s") // neither is possible with what is there
	both.Set["collect.pause"] = "1s"
	both.Reset = []string{"budget"}
	change(both, control.FlashChange{Name: "budget.migrate", Was: "64MiB", Now: "32MiB"}, control.FlashChange{Name: "collect.pause", Was: "5s", Now: "1s"},
		control.FlashChange{Name: "collect.window", Was: "10m0s", Now: "5s"}, control.FlashChange{Name: "interval", Was: "15s", Now: "5s"})
	before := s.flash.params.Clone()
	for want, ch := range map[string]control.FlashPolicyChange{
		"patterns.default.promote: line 1, column 16: undeclared reference to 'speed'": set("", "promote=reads > 1.0 && speed < 2.0", "budget.migrate=1M"),
		"interval: 1m0s; 100ms to the window's 5s are possible":                        set("", "interval=1m"),
		`interval: "soon" is not a time`:                                               set("", "interval=soon"),
		"nonsense: there is no such parameter":                                         set("", "nonsense=1"),
		"budget.migrate: it is no parameter of the class":                              set("sata", "budget.migrate=1M"),
		"saves: it is given twice, as patterns.default.saves, too":                     set("", "saves=1ms", "patterns.default.saves=2ms"),
		"the class of devices \"nvme\" has no pattern":                                 {Class: "nvme", ResetAll: true},
		"nothing: there is no such parameter":                                          {Reset: []string{"nothing"}},
		"patterns.default.saves: it is no parameter":                                   {Class: "sata", Reset: []string{"patterns.default.saves"}},
	} {
		_, err := c.ChangeFlashPolicy(ctx, "pool-a", ch)
		if kindOf(err) != control.KindInvalid || !strings.Contains(err.Error(), want) {
			t.Errorf("not %q: %v", want, err)
		}
		if len(ch.Set) > 1 && ch.Set["promote"] != "" && !strings.Contains(err.Error(), "\nreads > 1.0 && speed < 2.0\n               ^") {
			t.Errorf("it is not pointed at: %v", err)
		}
	}
	if !reflect.DeepEqual(s.flash.params, before) {
		t.Errorf("what was refused has changed something: %+v", policy.Diff(before, s.flash.params))
	}
	change(control.FlashPolicyChange{Class: "sata", ResetAll: true}, control.FlashChange{Name: "patterns.sata.min_accesses", Was: "8", Now: "4"},
		control.FlashChange{Name: "patterns.sata.promote", Was: "reads > 20.0 && references > 1"})
	change(control.FlashPolicyChange{ResetAll: true}, control.FlashChange{Name: "collect.pause", Was: "1s", Now: "5s"},
		control.FlashChange{Name: "collect.window", Was: "5s", Now: "10m0s"}, control.FlashChange{Name: "interval", Was: "5s", Now: "15s"})
	if !reflect.DeepEqual(s.flash.params, policy.Defaults()) {
		t.Errorf("%+v", s.flash.params)
	}

	// Classes of devices.
	disk := s.flash.stats.Primaries[0].Device
	p, err := c.ChangeFlashPolicy(ctx, "pool-a", control.FlashPolicyChange{Classes: map[string]string{disk: "sata"}})
	if err != nil || p.Classes[0] != (control.FlashClass{Device: disk, Class: "sata", Given: true}) || len(p.Changes) > 0 {
		t.Errorf("%+v, %v", p, err)
	}
	if p, err = c.ChangeFlashPolicy(ctx, "pool-a", control.FlashPolicyChange{Classes: map[string]string{disk: ""}}); err != nil || p.Classes[0].Given {
		t.Errorf("%+v, %v", p, err)
	}
	if _, err = c.ChangeFlashPolicy(ctx, "pool-a", control.FlashPolicyChange{Classes: map[string]string{"/nothing": "sata"}}); kindOf(err) != control.KindNotFound {
		t.Error(err)
	}
	s.refuse.Store(true)
	if _, err = c.ChangeFlashPolicy(ctx, "pool-a", set("", "interval=2s")); kindOf(err) != control.KindNoSpace {
		t.Error(err)
	}
	if _, err = c.FlashPolicy(ctx, "pool-a"); kindOf(err) != control.KindNoSpace {
		t.Error(err)
	}
}

// Pins come and go.
func TestFlashPins(t *testing.T) {
	_, c, s := flashed(t)
	ctx := t.Context()
	change := func(volume string, ch control.FlashPinChange, kind control.Kind, want ...control.FlashPin) {
		t.Helper()
		p, err := c.ChangeFlashPin(ctx, volume, ch)
		var got []control.FlashPin
		for _, pin := range p.Pins {
			got = append(got, pin.FlashPin)
		}
		if kindOf(err) != kind || err == nil && !slices.Equal(got, want) {
			t.Errorf("%s, %+v: %v, %+v", volume, ch, err, got)
		}
	}
	whole, part := control.FlashPin{Volume: "v"}, control.FlashPin{Volume: "v", Offset: 4096, Length: 8192}
	add, remove := control.FlashPinChange{Action: control.PinAdd}, control.FlashPinChange{Action: control.PinRemove}
	change("v", add, "", whole)
	change("v", add, control.KindExists)
	addPart, removePart := add, remove
	addPart.Offset, addPart.Length = part.Offset, part.Length
	removePart.Offset, removePart.Length = part.Offset, part.Length
	change("v", addPart, "", whole, part)
	change("v", remove, "", part)
	change("v", remove, control.KindNotFound)
	change("v", control.FlashPinChange{Action: "hold"}, control.KindInvalid)
	change("v", control.FlashPinChange{Action: control.PinAdd, All: true}, control.KindInvalid)
	change("nobody", add, control.KindNotFound)
	change("nobody", remove, control.KindNotFound)
	change("v", removePart, "")
	change("v", addPart, "", part)
	change("v", add, "", part, whole)
	change("v", control.FlashPinChange{Action: control.PinRemove, All: true}, "")
	change("v", control.FlashPinChange{Action: control.PinRemove, All: true}, control.KindNotFound)
	s.refuse.Store(true)
	change("v", add, control.KindNoSpace)
	change("v", control.FlashPinChange{Action: control.PinRemove, All: true}, control.KindNoSpace)
}

// An evacuation begins and ends as asked.
func TestEvacuateFlash(t *testing.T) {
	_, c, s := flashed(t)
	for _, x := range []struct {
		action, state string
		kind          control.Kind
	}{
		{control.EvacuateStart, control.FlashEvacuating, ""}, {"sing", "", control.KindInvalid}, {control.EvacuateStop, control.FlashInUse, ""},
	} {
		p, err := c.EvacuateFlash(t.Context(), "pool-a", control.FlashEvacuation{Action: x.action})
		if kindOf(err) != x.kind || err == nil && p.State != x.state {
			t.Errorf("%s: %+v, %v", x.action, p, err)
		}
	}
	s.refuse.Store(true)
	if _, err := c.EvacuateFlash(t.Context(), "pool-a", control.FlashEvacuation{Action: control.EvacuateStart}); kindOf(err) != control.KindNoSpace {
		t.Error(err)
	}
}

// The pool's explanation is told whole, and what has none is told in a sentence, too.
func TestExplainFlash(t *testing.T) {
	_, c, s := flashed(t)
	ctx := t.Context()
	s.flash.place = pool.FlashExplanation{Where: control.PlaceDevice, Device: "d", At: 5, OnFlash: true}
	s.flash.place.Type, s.flash.place.Pattern, s.flash.place.State, s.flash.place.Rank, s.flash.place.Of, s.flash.place.Slots = "sata", "default", "on flash", 2, 3, 4
	s.flash.place.Limits = []policy.Limit{{Name: "min_accesses", Value: "9", Limit: "at least 4", Holds: true}}
	s.flash.place.Benefit, s.flash.place.Summary, s.flash.place.Missing = 2, "It is on flash.", []string{"max_age"}
	x, err := c.ExplainFlash(ctx, "v", control.FlashPlace{Offset: 8192})
	want := control.FlashExplanation{
		Pool: "pool-a", Volume: "v", Offset: 8192, Where: control.PlaceDevice, Device: "d", At: 5, OnFlash: true, Class: "sata", Pattern: "default", State: "on flash",
		Rank: 2, Of: 3, Slots: 4, Limits: []control.FlashLimit{{Name: "min_accesses", Value: "9", Limit: "at least 4", Holds: true}},
		Benefit: control.Duration(2 * time.Millisecond), Summary: "It is on flash.", Missing: []string{"max_age"},
	}
	if err != nil || !reflect.DeepEqual(x, want) {
		t.Errorf("%v, %+v", err, x)
	}
	for _, p := range []pool.FlashExplanation{{Where: control.PlaceHole}, {Where: control.PlaceLog}, {Where: control.PlaceDevice, Movable: "it is the pool's label"}} {
		s.flash.place = p
		x, err := c.ExplainFlash(ctx, "v", control.FlashPlace{})
		words := map[string]string{control.PlaceHole: "Nothing is stored", control.PlaceLog: "operation log", control.PlaceDevice: "It never moves: it is the pool's label."}
		if err != nil || !strings.Contains(x.Summary, words[p.Where]) || x.Limits == nil {
			t.Errorf("%v, %+v", err, x)
		}
	}
	for _, offset := range []int64{-1, 1 << 20} {
		if _, err := c.ExplainFlash(ctx, "v", control.FlashPlace{Offset: offset}); kindOf(err) != control.KindInvalid {
			t.Errorf("%d: %v", offset, err)
		}
	}
	s.refuse.Store(true)
	if _, err := c.ExplainFlash(ctx, "v", control.FlashPlace{}); kindOf(err) != control.KindNoSpace {
		t.Error(err)
	}
}

// A simulation is told the parameters as they would be, changes none, and sizes as sets.
func TestSimulateFlash(t *testing.T) {
	_, c, s := flashed(t)
	ctx := t.Context()
	trial := control.FlashTrial{FlashPolicyChange: control.FlashPolicyChange{Set: map[string]string{"hysteresis.keep": "0.75"}}, Bytes: 2<<20 + 1}
	p, err := c.SimulateFlash(ctx, "pool-a", trial)
	want := control.FlashPrediction{
		Pool: "pool-a", Windows: 7, SetBytes: 64 << 10, Now: control.FlashForecast{Slots: 16, HitShare: 0.5}, Then: control.FlashForecast{Slots: 32, HitShare: 0.75},
		Changes: []control.FlashChange{{Name: "hysteresis.keep", Was: "0.25", Now: "0.75"}},
	}
	if err != nil || !reflect.DeepEqual(p, want) || !reflect.DeepEqual(s.flash.params, policy.Defaults()) {
		t.Errorf("%v, %+v", err, p)
	}
	if _, err := c.SimulateFlash(ctx, "pool-a", control.FlashTrial{}); err != nil || s.flash.slots != 0 {
		t.Errorf("%d slots, %v", s.flash.slots, err)
	}
	for _, bad := range []control.FlashTrial{
		{Bytes: 1}, {Bytes: -1}, {Bytes: 1 << 62}, {FlashPolicyChange: control.FlashPolicyChange{Set: map[string]string{"interval": "soon"}}},
		{FlashPolicyChange: control.FlashPolicyChange{Classes: map[string]string{"d": "sata"}}},
	} {
		if _, err := c.SimulateFlash(ctx, "pool-a", bad); kindOf(err) != control.KindInvalid {
			t.Errorf("%+v: %v", bad, err)
		}
	}
	s.refuse.Store(true)
	if _, err := c.SimulateFlash(ctx, "pool-a", trial); kindOf(err) != control.KindNoSpace {
		t.Error(err)
	}
}
