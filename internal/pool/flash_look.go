package pool

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/flashmap"
	"github.com/pollux-storage/pollux/internal/flashmap/collect"
	"github.com/pollux-storage/pollux/internal/flashmap/policy"
)

// Flash tells of the flash layer. It waits for no device.
func (p *Pool) Flash() FlashStats { return p.flash.Stats() }

// topSets is how many data sets FlashStats.Top has.
const topSets = 20

// Stats may be called at any time.
func (f *flash) Stats() FlashStats {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.layer == nil {
		return FlashStats{}
	}
	s := f.stats
	s.Primaries = slices.Clone(s.Primaries)
	for _, u := range f.layer.Use() {
		s.WrittenByClients += u.Flash.Writes.Bytes
		s.WrittenByMoves += u.Moved
		for i := range s.Primaries {
			if x := &s.Primaries[i]; x.Number == u.Number {
				x.Flash, x.Primary = tierOf(u.Flash), tierOf(u.Primary)
			}
		}
	}
	return s
}

// look makes Stats tell of now.
func (f *flash) look(in policy.Input) {
	l, e := f.layer.Status(), f.engine.Status()
	pins := f.pinned(in)
	top := f.top(in)
	var primaries []FlashPrimary
	for i, d := range f.disks {
		_, given := f.kept.Classes[d.id.String()]
		primaries = append(primaries, FlashPrimary{
			Device: d.name, Number: d.dev, Class: f.class(d), Given: given, OnFlash: len(in.Devices[i].On), Collected: d.collector.Status(),
		})
	}
	f.count(func(s *FlashStats) {
		s.Device, s.SetBytes, s.Slots, s.Used, s.Lost = l.Info.Name, l.SetBytes, l.Slots, l.Used, l.Lost
		s.Primaries, s.Pins, s.Top = primaries, pins, top
		s.Queued, s.Stopped, s.Worn, s.Failures = len(f.queue), e.Stopped, e.Worn, e.Failures
		s.RulesEvaluated, s.RulesBroken, s.RuleError = e.Evaluated, e.Broken, e.RuleError
		s.State, s.Why = f.state(l.LostPages)
	})
}

// state says what the flash device does, and what is wrong.
func (f *flash) state(lostPages int) (FlashState, string) {
	switch {
	case f.failed != nil:
		return FlashFailed, f.failed.Error()
	case lostPages > 0:
		return FlashFailed, fmt.Sprintf("%d pages of its table cannot be read, and nothing more moves to it", lostPages)
	case f.evacuated:
		return FlashEvacuated, ""
	case f.evacuation != nil && f.stuck != nil:
		return FlashEvacuating, f.stuck.Error()
	case f.evacuation != nil:
		return FlashEvacuating, ""
	}
	return FlashInUse, ""
}

// top returns the data sets that save most time on flash, or would.
func (f *flash) top(in policy.Input) (top []FlashSet) {
	params := &f.kept.Policy
	least := func() float64 { return top[len(top)-1].Benefit }
	for i := range in.Devices {
		d, disk := &in.Devices[i], f.disks[i]
		for k := range d.Snapshot.Stats {
			st := &d.Snapshot.Stats[k]
			benefit := params.Benefit(d.Type, st)
			if benefit <= 0 || len(top) == topSets && benefit <= least() {
				continue
			}
			_, on := slices.BinarySearch(d.On, st.Set)
			x := FlashSet{
				Device: disk.name, Offset: int64(st.Set) * in.SetBytes, OnFlash: on,
				Reads: float64(st.Reads), Writes: float64(st.Writes), Runs: float64(st.Runs), RequestBytes: float64(st.Size), Age: st.Age, Benefit: benefit,
			}
			at, _ := slices.BinarySearchFunc(top, x, func(a, b FlashSet) int { return cmp.Compare(b.Benefit, a.Benefit) })
			top = slices.Insert(top, at, x)
			top = top[:min(len(top), topSets)]
		}
	}
	for i := range top {
		x := &top[i]
		x.Pinned = slices.ContainsFunc(in.Pins, func(p policy.Pin) bool {
			d := f.disk(p.Device)
			return d != nil && d.name == x.Device && x.Offset >= p.Offset && x.Offset < p.Offset+p.Length
		})
	}
	return top
}

// ExplainFlash says why a block of a volume is where it is.
func (p *Pool) ExplainFlash(ctx context.Context, volume string, offset int64) (x FlashExplanation, err error) {
	err = p.doFlash(ctx, func(f *flash) error {
		x, err = f.explain(volume, offset)
		return err
	})
	return x, err
}

func (f *flash) explain(volume string, offset int64) (x FlashExplanation, err error) {
	p := f.p
	v, ok := p.catalogue.ByName(volume)
	switch {
	case !ok:
		return x, p.unknown(volume)
	case offset < 0 || uint64(offset) >= uint64(v.Size):
		return x, fmt.Errorf("byte %d of volume %s, which has %d: %w", offset, volume, v.Size, block.ErrInvalid)
	}
	lba := block.Logical(offset / block.Size)
	x.Volume, x.Offset, x.Where = volume, offset, "device"
	if p.dirty.Read(v.ID, lba, 1, func(int, []byte, uint32) {}) > 0 {
		x.Where = "log"
		return x, nil
	}
	var ptr [1]block.Pointer
	if err := p.bmap.Lookup(v.ID, lba, ptr[:]); err != nil {
		return x, err
	}
	if ptr[0].IsHole() {
		x.Where = "hole"
		return x, nil
	}
	at := ptr[0].Phys
	x.Device, x.At = p.set.Info(at.Device()).Name, int64(at.Block())*block.Size
	d := f.disk(at.Device())
	if d == nil {
		x.Movable = "it lies in low-latency memory, where no seek is needed"
		return x, nil
	}
	x.OnFlash, _ = d.device.OnFlash(x.At)
	if x.At < d.fixed {
		x.Movable = "it lies among labels, superblocks and logs"
		return x, nil
	}
	x.Explanation, err = f.engine.Explain(f.input(time.Now(), true), d.dev, f.setOf(at))
	return x, err
}

// SimulateFlash replays the history that was collected against parameters and a number of
// slots, 0 for those that there are, and predicts what they would come to, beside those that
// count. It moves nothing.
func (p *Pool) SimulateFlash(ctx context.Context, params policy.Params, slots int) (out FlashPrediction, err error) {
	if err := params.Validate(); err != nil {
		return out, err
	}
	var now policy.Trial
	err = p.doFlash(ctx, func(f *flash) error {
		now = f.trial()
		return nil
	})
	if err != nil {
		return out, err
	}
	for _, d := range now.Devices {
		if n := len(d.Windows); n > 0 {
			out.Windows = max(out.Windows, n)
			if out.From.IsZero() || d.Windows[0].Start.Before(out.From) {
				out.From = d.Windows[0].Start
			}
			if to := d.Windows[n-1].Start.Add(d.Windows[n-1].Length); to.After(out.To) {
				out.To = to
			}
		}
	}
	then := now
	then.Params = params
	if slots > 0 {
		then.Slots = slots
	}
	// Both are replayed by whoever asks, not by Run's goroutine.
	if out.Now, err = forecast(now); err == nil {
		out.Then, err = forecast(then)
	}
	return out, err
}

func forecast(t policy.Trial) (FlashForecast, error) {
	p, err := policy.Simulate(t)
	if err != nil {
		return FlashForecast{}, err
	}
	x := FlashForecast{Slots: t.Slots, Moves: p.Moves}
	x.Hits, x.Mean = p.Over(len(p.Windows) / 2)
	return x, nil
}

// trial is the history that was collected, and what counts.
func (f *flash) trial() policy.Trial {
	t := policy.Trial{Params: f.kept.Policy, Slots: f.layer.Status().Slots, SetBytes: f.layer.SetBytes(), Pins: slices.Clone(f.pins.found), Latencies: f.latencies()}
	for _, d := range f.disks {
		t.Devices = append(t.Devices, policy.Past{
			Number: d.dev, Type: f.class(d), Geometry: collect.Geometry{Size: d.raw.Info().Size, SetBytes: t.SetBytes},
			Windows: d.collector.History(), On: d.on(t.SetBytes), Attributes: func(set collect.Set) policy.Attributes { return f.attributes(d, set) },
		})
	}
	return t
}

// latencies are what accesses take: as measured, or, while too little was, what a pattern
// says that flash saves.
func (f *flash) latencies() policy.Latencies {
	l := policy.Latencies{Primary: f.kept.Policy.Patterns[policy.AnyType].Saves, Flash: 200 * time.Microsecond}
	var slow, fast mean
	for _, u := range f.layer.Use() {
		slow.add(tierOf(u.Primary))
		fast.add(tierOf(u.Flash))
	}
	if d := fast.value(); d > 0 {
		l.Flash = d
	}
	if d := slow.value(); d > 0 {
		l.Primary = d
	}
	// What is read in sequence needs no seek: about as long as flash takes.
	l.Run = min(l.Primary, 2*l.Flash)
	return l
}

func tierOf(t flashmap.TierUse) FlashTier {
	return FlashTier{
		Reads: t.Reads.Requests, Writes: t.Writes.Requests, ReadBytes: t.Reads.Bytes, WriteBytes: t.Writes.Bytes,
		ReadLatency: t.Reads.Latency, WriteLatency: t.Writes.Latency,
	}
}

// mean is a mean time of requests.
type mean struct{ n, sum float64 }

func (m *mean) add(t FlashTier) {
	m.n += float64(t.Reads + t.Writes)
	m.sum += float64(t.Reads)*float64(t.ReadLatency) + float64(t.Writes)*float64(t.WriteLatency)
}

func (m *mean) value() time.Duration {
	if m.n == 0 {
		return 0
	}
	return time.Duration(m.sum / m.n)
}
