package guest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/flashmap/policy"
	"github.com/pollux-storage/pollux/internal/pool"
)

// maxFailuresTold bounds how many failures of moves are told.
const maxFailuresTold = 20

// evacuations are what may be asked of an evacuation.
var evacuations = []string{control.EvacuateStart, control.EvacuateStop}

// flashed returns the store of an open pool that has flash.
func (g *Guest) flashed(name string) (*tenancy, Store, error) {
	t, st, err := g.serving(name)
	if err == nil && st.Flash().Device == "" {
		err = noFlash(name)
	}
	return t, st, err
}

func noFlash(pool string) error {
	return control.NewError(control.KindNotFound, fmt.Sprintf("pool %s has no flash", pool), fmt.Sprintf("add some with `pollux pool add %s DEVICE --class flash`", pool))
}

// flash tells of the flash of a pool.
func (g *Guest) flash(ctx context.Context, name string) (control.PoolFlash, error) {
	t, st, err := g.flashed(name)
	if err != nil {
		return control.PoolFlash{}, err
	}
	return poolFlash(ctx, t, st)
}

func poolFlash(ctx context.Context, t *tenancy, st Store) (control.PoolFlash, error) {
	params, _, err := st.FlashPolicy(ctx)
	if err != nil {
		return control.PoolFlash{}, fmt.Errorf("flash of pool %s: %w", st.Name(), err)
	}
	f := st.Flash()
	out := control.PoolFlash{
		Pool: st.Name(), Guest: t.identity, MigrateBudget: int64(params.Budget.Migrate), WearBudget: int64(params.Budget.Wear), Kept: f.Kept,
		Failures: []control.FlashFailure{}, Pins: []control.FlashPinned{}, Top: []control.FlashSet{},
	}
	if s := flashStatus(f); s != nil {
		out.FlashStatus = *s
	}
	names := map[int]string{}
	for _, p := range f.Primaries {
		names[p.Number] = p.Device
	}
	for _, x := range f.Failures[:min(len(f.Failures), maxFailuresTold)] {
		out.Failures = append(out.Failures, control.FlashFailure{
			Device: cmp.Or(names[x.Device], fmt.Sprintf("device %d", x.Device)), Offset: int64(x.Set) * f.SetBytes, Times: x.Times, Until: x.Until, Reason: x.Reason,
		})
	}
	for _, p := range f.Pins {
		out.Pins = append(out.Pins, flashPinned(p))
	}
	for _, s := range f.Top {
		out.Top = append(out.Top, control.FlashSet{
			Device: s.Device, Offset: s.Offset, OnFlash: s.OnFlash, Pinned: s.Pinned, Reads: s.Reads, Writes: s.Writes, Sequential: s.Runs,
			RequestBytes: s.RequestBytes, Age: control.Duration(s.Age), Benefit: milliseconds(s.Benefit),
		})
	}
	return out, nil
}

func milliseconds(ms float64) control.Duration {
	return control.Duration(ms * float64(time.Millisecond))
}

func flashPinned(p pool.FlashPinned) control.FlashPinned {
	return control.FlashPinned{
		FlashPin: control.FlashPin{Volume: p.Volume, Offset: p.Offset, Length: p.Length}, Sets: p.Sets, On: p.On, Room: p.Room, State: p.State,
	}
}

// flashStatus returns the figures of a pool's flash, nil where it has none.
func flashStatus(f pool.FlashStats) *control.FlashStatus {
	if f.Device == "" {
		return nil
	}
	s := &control.FlashStatus{
		// All that is on flash is what an evacuation has to move back, and that is newer.
		Device: f.Device, State: string(f.State), Why: f.Why, SetBytes: f.SetBytes, Slots: f.Slots, Used: f.Used, Lost: f.Lost, Left: min(f.Left, f.Used), Total: f.Total,
		Promoted: f.Promoted, Demoted: f.Demoted, GivenUp: f.GivenUp, FailedMoves: f.FailedMoves, Queued: f.Queued, Stopped: f.Stopped,
		Worn: f.Worn, WrittenByClients: f.WrittenByClients, WrittenByMoves: f.WrittenByMoves,
		RulesEvaluated: f.RulesEvaluated, RulesBroken: f.RulesBroken, RuleError: f.RuleError, Primaries: []control.FlashPrimary{},
	}
	var hits, all uint64
	for _, p := range f.Primaries {
		n := p.Flash.Reads + p.Flash.Writes
		hits, all = hits+n, all+n+p.Primary.Reads+p.Primary.Writes
		s.Primaries = append(s.Primaries, control.FlashPrimary{
			Device: p.Device, Number: p.Number, Class: p.Class, Given: p.Given, OnFlash: p.OnFlash, Flash: flashTier(p.Flash), Primary: flashTier(p.Primary),
			Collected: control.FlashCollected{Sets: p.Collected.Sets, Most: p.Collected.Most, Evicted: p.Collected.Evicted, Bytes: p.Collected.Bytes,
				Counted: p.Collected.Counted, Lost: p.Collected.Lost},
		})
	}
	if all > 0 {
		s.HitShare = float64(hits) / float64(all)
	}
	for _, p := range f.Pins {
		if flashPinned(p).Short() {
			s.PinsWithoutRoom++
		}
	}
	return s
}

func flashTier(t pool.FlashTier) control.FlashTier {
	return control.FlashTier{Reads: t.Reads, Writes: t.Writes, ReadBytes: t.ReadBytes, WriteBytes: t.WriteBytes,
		ReadLatency: control.Duration(t.ReadLatency), WriteLatency: control.Duration(t.WriteLatency)}
}

// flashAlerts are those of a pool's flash. Numbers would make new ones of them all the time.
func flashAlerts(name string, f *control.FlashStatus) (alerts []string) {
	if f == nil {
		return nil
	}
	see := fmt.Sprintf("`pollux flash status %s`", name)
	if f.State == control.FlashFailed {
		alerts = append(alerts, fmt.Sprintf("flash %s of pool %s has failed, and nothing moves there: %s says why", f.Device, name, see))
	}
	if f.Lost > 0 {
		alerts = append(alerts, fmt.Sprintf("data on flash %s of pool %s is lost, and clients cannot read it: %s counts it", f.Device, name, see))
	}
	if f.PinsWithoutRoom > 0 {
		alerts = append(alerts, fmt.Sprintf("pins of pool %s find no room on flash: `pollux flash pin list %s` names them", name, name))
	}
	if f.RuleError != "" {
		alerts = append(alerts, fmt.Sprintf("a rule of the flash policy of pool %s cannot be evaluated, and counts as one that does not hold: %s says why", name, see))
	}
	return alerts
}

// flashPolicy returns the parameters of a pool's flash.
func (g *Guest) flashPolicy(ctx context.Context, name string) (control.FlashPolicy, error) {
	t, st, err := g.flashed(name)
	if err != nil {
		return control.FlashPolicy{}, err
	}
	return policyOf(ctx, t, st)
}

func policyOf(ctx context.Context, t *tenancy, st Store) (control.FlashPolicy, error) {
	params, _, err := st.FlashPolicy(ctx)
	if err != nil {
		return control.FlashPolicy{}, fmt.Errorf("policy of the flash of pool %s: %w", st.Name(), err)
	}
	out := control.FlashPolicy{Pool: st.Name(), Guest: t.identity, Classes: []control.FlashClass{}}
	for _, p := range params.Parameters() {
		out.Parameters = append(out.Parameters, control.FlashParameter{Name: p.Name, Value: p.Value, Default: p.Default})
	}
	for _, p := range st.Flash().Primaries {
		out.Classes = append(out.Classes, control.FlashClass{Device: p.Device, Class: p.Class, Given: p.Given})
	}
	return out, nil
}

// changeFlashPolicy changes parameters of a pool's flash, and classes of its devices.
func (g *Guest) changeFlashPolicy(ctx context.Context, name string, c control.FlashPolicyChange) (control.FlashPolicy, error) {
	t, st, err := g.flashed(name)
	if err != nil {
		return control.FlashPolicy{}, err
	}
	var changes []control.FlashChange
	var wrong error // with the parameters, which names all that a person needs
	change := pool.FlashChange{Classes: map[string]string{}}
	for path, class := range c.Classes {
		for _, d := range t.disks() {
			if isOneOf(d, []string{path}) { // of a mirror, any copy
				path = d.Info().Name
				break
			}
		}
		change.Classes[path] = class
	}
	if len(c.Set) > 0 || len(c.Reset) > 0 || c.ResetAll {
		change.Params = func(now policy.Params) (policy.Params, error) {
			then, err := changed(now, c)
			changes, wrong = flashChanges(policy.Effect(now, then)), err
			return then, err
		}
	}
	if _, err := st.ChangeFlash(ctx, change); err != nil {
		return control.FlashPolicy{}, cmp.Or(wrong, err)
	}
	p, err := policyOf(ctx, t, st)
	p.Changes = changes
	return p, err
}

func flashChanges(all []policy.Change) []control.FlashChange {
	out := []control.FlashChange{}
	for _, c := range all {
		out = append(out, control.FlashChange{Name: c.Name, Was: c.Old, Now: c.New})
	}
	return out
}

// changed returns parameters after a change, valid ones. An error names the parameter, and
// that of a rule shows where in it something is wrong.
func changed(now policy.Params, c control.FlashPolicyChange) (policy.Params, error) {
	then := now.Clone()
	wrong := func(err error) (policy.Params, error) {
		var bad *policy.RuleError
		if errors.As(err, &bad) {
			if text, ok := then.Get(bad.Name); ok {
				return now, control.NewError(control.KindInvalid, err.Error()+"\n"+bad.Point(text), "")
			}
		}
		return now, control.NewError(control.KindInvalid, err.Error(), "")
	}
	reset := c.Reset
	switch {
	case c.ResetAll && c.Class != "":
		reset = append(slices.Clone(reset), "patterns."+c.Class)
	case c.ResetAll:
		then = policy.Defaults()
	}
	for _, name := range reset {
		name, err := policy.FullName(name, c.Class)
		if err == nil {
			err = then.Reset(name)
		}
		if err != nil {
			return wrong(err)
		}
	}
	given := map[string]string{}
	for _, short := range slices.Sorted(maps.Keys(c.Set)) {
		name, err := policy.FullName(short, c.Class)
		if err == nil && given[name] != "" {
			err = fmt.Errorf("%s: it is given twice, as %s, too", short, given[name])
		}
		if given[name] = short; err == nil {
			err = then.Set(name, c.Set[short])
		}
		if err != nil {
			return wrong(err)
		}
	}
	if err := then.Validate(); err != nil {
		return wrong(err)
	}
	return then, nil
}

// changeFlashPin adds a pin of a volume, or removes some.
func (g *Guest) changeFlashPin(ctx context.Context, volume string, c control.FlashPinChange) (control.PoolFlash, error) {
	t, st, _, err := g.find(volume)
	if err != nil {
		return control.PoolFlash{}, err
	}
	if st.Flash().Device == "" {
		return control.PoolFlash{}, noFlash(st.Name())
	}
	var change pool.FlashChange
	pin := pool.FlashPin{Volume: volume, Offset: c.Offset, Length: c.Length}
	switch {
	case c.Action == control.PinAdd && !c.All:
		change.Pin = []pool.FlashPin{pin}
	case c.Action == control.PinRemove && !c.All:
		change.Unpin = []pool.FlashPin{pin}
	case c.Action == control.PinRemove:
		_, pins, err := st.FlashPolicy(ctx)
		if err != nil {
			return control.PoolFlash{}, err
		}
		change.Unpin = slices.DeleteFunc(slices.Clone(pins), func(p pool.FlashPin) bool { return p.Volume != volume })
		if len(change.Unpin) == 0 {
			return control.PoolFlash{}, control.NewError(control.KindNotFound, fmt.Sprintf("nothing of volume %q is pinned", volume), fmt.Sprintf("see `pollux flash pin list %s`", st.Name()))
		}
	default:
		return control.PoolFlash{}, control.NewError(control.KindInvalid, fmt.Sprintf("a pin cannot be made to %q", c.Action), "")
	}
	if _, err := st.ChangeFlash(ctx, change); err != nil {
		return control.PoolFlash{}, err
	}
	return poolFlash(ctx, t, st)
}

// evacuateFlash begins to move all data back from flash, or lets flash be used again.
func (g *Guest) evacuateFlash(ctx context.Context, name string, e control.FlashEvacuation) (control.PoolFlash, error) {
	t, st, err := g.flashed(name)
	if err != nil {
		return control.PoolFlash{}, err
	}
	if !slices.Contains(evacuations, e.Action) {
		return control.PoolFlash{}, control.NewError(control.KindInvalid, fmt.Sprintf("an evacuation cannot be made to %q", e.Action), "")
	}
	if err := st.EvacuateFlash(ctx, e.Action); err != nil {
		return control.PoolFlash{}, err
	}
	return poolFlash(ctx, t, st)
}

// explainFlash says why a block of a volume is where it is.
func (g *Guest) explainFlash(ctx context.Context, volume string, at control.FlashPlace) (control.FlashExplanation, error) {
	_, st, v, err := g.find(volume)
	switch {
	case err != nil:
		return control.FlashExplanation{}, err
	case st.Flash().Device == "":
		return control.FlashExplanation{}, noFlash(st.Name())
	case at.Offset < 0 || at.Offset >= v.Size:
		return control.FlashExplanation{}, control.NewError(control.KindInvalid, fmt.Sprintf("volume %q has %d bytes, and none at %d", volume, v.Size, at.Offset), "")
	}
	x, err := st.ExplainFlash(ctx, volume, at.Offset)
	if err != nil {
		return control.FlashExplanation{}, fmt.Errorf("explain volume %q at %d: %w", volume, at.Offset, err)
	}
	return explanation(st.Name(), x), nil
}

func explanation(name string, x pool.FlashExplanation) control.FlashExplanation {
	out := control.FlashExplanation{
		Pool: name, Volume: x.Volume, Offset: x.Offset, Where: x.Where, Device: x.Device, At: x.At, OnFlash: x.OnFlash, Movable: x.Movable,
		Class: x.Type, Pattern: x.Pattern, State: x.State, Pinned: x.Pinned, Rule: x.Rule, Holds: x.Holds, RuleError: x.RuleError,
		Benefit: milliseconds(x.Benefit), Rank: x.Rank, Of: x.Of, Slots: x.Slots, Missing: x.Missing, Retry: x.Retry, Failure: x.Failure,
		Summary: x.Summary, Limits: []control.FlashLimit{},
	}
	for _, l := range x.Limits {
		out.Limits = append(out.Limits, control.FlashLimit{Name: l.Name, Value: l.Value, Limit: l.Limit, Holds: l.Holds})
	}
	switch {
	case x.Where == control.PlaceHole:
		out.Summary = "Nothing is stored there."
	case x.Where == control.PlaceLog:
		out.Summary = "It is in the operation log: no consistency point has written it to a device yet."
	case x.Movable != "":
		out.Summary = "It never moves: " + x.Movable + "."
	}
	return out
}

// simulateFlash predicts what another policy, or another size of flash, would come to.
func (g *Guest) simulateFlash(ctx context.Context, name string, trial control.FlashTrial) (control.FlashPrediction, error) {
	_, st, err := g.flashed(name)
	if err != nil {
		return control.FlashPrediction{}, err
	}
	now, _, err := st.FlashPolicy(ctx)
	if err != nil {
		return control.FlashPrediction{}, fmt.Errorf("policy of the flash of pool %s: %w", name, err)
	}
	then, err := changed(now, trial.FlashPolicyChange)
	if err != nil {
		return control.FlashPrediction{}, err
	}
	setBytes, slots := st.Flash().SetBytes, 0
	switch {
	case len(trial.Classes) > 0:
		return control.FlashPrediction{}, control.NewError(control.KindInvalid, "classes of devices cannot be simulated", "")
	case trial.Bytes < 0 || trial.Bytes > 0 && (setBytes <= 0 || trial.Bytes/setBytes < 1 || trial.Bytes/setBytes > maxSlots):
		return control.FlashPrediction{}, control.NewError(control.KindInvalid, fmt.Sprintf("flash for %d bytes cannot be simulated: a data set has %d bytes, and at most %d of them are possible", trial.Bytes, setBytes, maxSlots), "")
	case trial.Bytes > 0:
		slots = int(trial.Bytes / setBytes)
	}
	p, err := st.SimulateFlash(ctx, then, slots)
	if err != nil {
		return control.FlashPrediction{}, fmt.Errorf("simulate the flash of pool %s: %w", name, err)
	}
	return control.FlashPrediction{
		Pool: name, Windows: p.Windows, From: p.From, To: p.To, SetBytes: setBytes, Now: forecast(p.Now), Then: forecast(p.Then),
		Changes: flashChanges(policy.Effect(now, then)),
	}, nil
}

// maxSlots bounds the size of a flash that is simulated.
const maxSlots = 1 << 26

func forecast(f pool.FlashForecast) control.FlashForecast {
	return control.FlashForecast{Slots: f.Slots, HitShare: f.Hits, Mean: control.Duration(f.Mean), Promoted: f.Moves.Promoted, Demoted: f.Moves.Demoted}
}
