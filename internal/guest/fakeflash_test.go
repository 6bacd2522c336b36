package guest

import (
	"context"
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/flashmap/policy"
	"github.com/pollux-storage/pollux/internal/pool"
)

// fakeFlash is the flash of a fakeStore, which has none while the device of stats has no
// name. It keeps what it is told.
type fakeFlash struct {
	stats    pool.FlashStats
	params   policy.Params
	pins     []pool.FlashPin
	setBytes int64 // of the newest addition
	slots    int   // of the newest simulation
	place    pool.FlashExplanation
}

func (s *fakeStore) AddFlash(_ context.Context, d hpdi.Device, setBytes int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.refusal(); err != nil {
		return err
	}
	s.flash.stats.Device, s.flash.setBytes, s.flash.params = d.Info().Name, setBytes, policy.Defaults()
	s.devs = append(s.devs, d)
	return nil
}

func (s *fakeStore) Flash() pool.FlashStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.flash.stats
}

func (s *fakeStore) FlashPolicy(context.Context) (policy.Params, []pool.FlashPin, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.flash.params, slices.Clone(s.flash.pins), s.refusal()
}

func (s *fakeStore) ChangeFlash(_ context.Context, c pool.FlashChange) ([]policy.Change, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f := &s.flash
	if err := s.refusal(); err != nil {
		return nil, err
	}
	then := f.params
	if c.Params != nil {
		var err error
		if then, err = c.Params(f.params); err != nil {
			return nil, err
		}
	}
	primaries := slices.Clone(f.stats.Primaries)
	for name, class := range c.Classes {
		i := slices.IndexFunc(primaries, func(p pool.FlashPrimary) bool { return p.Device == name })
		if i < 0 {
			return nil, fmt.Errorf("device %s: %w", name, block.ErrNotFound)
		}
		if primaries[i].Class, primaries[i].Given = class, class != ""; class == "" {
			primaries[i].Class = "disk"
		}
	}
	for _, p := range c.Pin {
		if slices.Contains(f.pins, p) {
			return nil, fmt.Errorf("pin of %s: %w", p.Volume, block.ErrExists)
		}
	}
	for _, p := range c.Unpin {
		if !slices.Contains(f.pins, p) {
			return nil, fmt.Errorf("pin of %s: %w", p.Volume, block.ErrNotFound)
		}
	}
	f.pins = slices.DeleteFunc(append(f.pins, c.Pin...), func(p pool.FlashPin) bool { return slices.Contains(c.Unpin, p) })
	f.stats.Pins = nil
	for _, p := range f.pins {
		f.stats.Pins = append(f.stats.Pins, pool.FlashPinned{FlashPin: p, Sets: 4, On: 1, Room: 2, State: "partly"})
	}
	changes := policy.Diff(f.params, then)
	f.params, f.stats.Primaries = then, primaries
	return changes, nil
}

func (s *fakeStore) EvacuateFlash(_ context.Context, action string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.refusal(); err != nil {
		return err
	}
	s.flash.stats.State = map[string]pool.FlashState{pool.EvacuateStart: pool.FlashEvacuating, pool.EvacuateStop: pool.FlashInUse}[action]
	return nil
}

func (s *fakeStore) ExplainFlash(_ context.Context, volume string, offset int64) (pool.FlashExplanation, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	x := s.flash.place
	x.Volume, x.Offset = volume, offset
	return x, s.refusal()
}

func (s *fakeStore) SimulateFlash(_ context.Context, params policy.Params, slots int) (pool.FlashPrediction, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.flash.slots = slots
	return pool.FlashPrediction{Windows: 7, Now: pool.FlashForecast{Slots: 16, Hits: 0.5}, Then: pool.FlashForecast{Slots: slots, Hits: params.Hysteresis.Keep}}, s.refusal()
}
