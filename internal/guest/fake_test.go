package guest

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"sync/atomic"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/export/nbd/nbdtest"
	"github.com/pollux-storage/pollux/internal/partner"
	"github.com/pollux-storage/pollux/internal/pool"
	"github.com/pollux-storage/pollux/internal/region"
	"github.com/pollux-storage/pollux/internal/restart"
)

// fakeStorage has pools without volumes' content: a device belongs to a pool
// when it was made one here.
type fakeStorage struct {
	mu     sync.Mutex
	labels map[string]Label // by the device's name
	stores []*fakeStore     // all that were opened
	stuck  bool             // stores cannot be released
}

// leftOutName is in the label of a device whose addition was interrupted.
const leftOutName = "left out"

func newFakeStorage() *fakeStorage { return &fakeStorage{labels: map[string]Label{}} }

func (f *fakeStorage) Label(d hpdi.Device) (Label, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	l, ok := f.labels[d.Info().Name]
	if !ok {
		return l, fmt.Errorf("device %s %w", d.Info().Name, ErrNoPool)
	}
	return l, nil
}

func (f *fakeStorage) Create(_ context.Context, o CreateSpec) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, d := range o.Devices {
		f.labels[d.Info().Name] = Label{Pool: block.PoolID{1, o.Identity[0]}, Name: o.Name, Identity: o.Identity}
	}
	return nil
}

func (f *fakeStorage) Open(_ context.Context, o OpenSpec) (Store, error) {
	s := &fakeStore{tell: o.Tell, opened: o.Without, devs: o.Devices, lost: make(chan error, 1), volumes: map[string]int64{}, thn: map[string]int{}, ids: map[string]block.VolumeID{}}
	l, err := f.Label(o.Devices[0])
	if err == nil {
		s.name = l.Name
		s.region, err = region.Open(o.RegionPath, false)
		if err != nil {
			s.region, err = region.Create(o.RegionPath, region.Options{Pool: l.Pool, Owner: o.Owner, LogBytes: 1 << 16})
		}
	}
	if err != nil {
		closeAll(o.Devices)
		return nil, err
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	s.devs = nil
	for _, d := range slices.Clone(o.Devices) {
		if f.labels[d.Info().Name].Name == leftOutName && o.LeftOut != nil {
			_ = d.Close()
			o.LeftOut(d)
		} else {
			s.devs = append(s.devs, d)
		}
	}
	s.stuck = f.stuck
	f.stores = append(f.stores, s)
	return s, nil
}

func (f *fakeStorage) Adopt(o AdoptSpec) error {
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, d := range o.Devices {
		l := f.labels[d.Info().Name]
		if l.Pool.String() != o.Pool {
			return fmt.Errorf("device %s is of another pool: %w", d.Info().Name, block.ErrInvalid)
		}
		l.Name, l.Identity = o.Name, o.Identity
		f.labels[d.Info().Name] = l
	}
	return nil
}

func (f *fakeStorage) last() *fakeStore {
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.stores) == 0 {
		return nil
	}
	return f.stores[len(f.stores)-1]
}

type fakeStore struct {
	scanned  string // what was asked of a scan last
	surveyed string // and of a survey
	found    *control.VolumeSurvey
	settings control.PoolSettings
	flash    fakeFlash

	opened Opened
	name   string
	devs   []hpdi.Device
	region *region.Region
	lost   chan error
	stuck  bool
	sick   atomic.Bool                   // the probe fails
	idle   atomic.Bool                   // Run does nothing any more
	busy   atomic.Uint64                 // what Run or clients have done
	deaf   atomic.Bool                   // reads of its volumes do not end by themselves
	reads  atomic.Int64                  // that wait so
	refuse atomic.Bool                   // it does nothing that it is asked for
	finish atomic.Pointer[chan struct{}] // Run does not return before it is closed
	ending atomic.Pointer[chan struct{}] // is closed when Run waits for that
	how    atomic.Value
	scrub  atomic.Pointer[control.ScrubStatus]
	tell   func(kind, text string)

	mu      sync.Mutex
	volumes map[string]int64
	thn     map[string]int
	ids     map[string]block.VolumeID
	nextID  block.VolumeID
}

func (s *fakeStore) Name() string { return s.name }
func (s *fakeStore) Region() partner.Region {
	return partner.Region{Path: s.region.Path(), Pool: s.region.Header().Pool, Bytes: 1}
}
func (s *fakeStore) Opened() Opened { return s.opened }

// Restart knows no labels.
func (s *fakeStore) Restart(context.Context) (*restart.Record, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	r := &restart.Record{Pool: s.region.Header().Pool, Identity: s.name, Name: s.name}
	for i, d := range s.devs {
		r.Devices = append(r.Devices, restart.Device{Index: i, Copies: []restart.Copy{{Path: d.Info().Name}}})
	}
	return r, nil
}

func (s *fakeStore) KeepRecord([]byte) error { return nil }

func (s *fakeStore) Steps() []partner.Step { return []partner.Step{{Name: "fake", Took: 1}} }
func (s *fakeStore) Run(ctx context.Context) error {
	select {
	case <-ctx.Done():
		if c := s.ending.Load(); c != nil {
			close(*c)
		}
		if c := s.finish.Load(); c != nil {
			<-*c
		}
		return nil
	case err := <-s.lost:
		return err
	}
}

func (s *fakeStore) Probe(context.Context) error {
	if s.sick.Load() {
		return errors.New("stuck")
	}
	return nil
}
func (s *fakeStore) Progress() (own, anything uint64) {
	if s.idle.Load() {
		return 1, s.busy.Load()
	}
	return s.busy.Add(1), s.busy.Add(1)
}
func (s *fakeStore) Beat()             { s.region.Beat() }
func (s *fakeStore) Heartbeat() uint64 { return s.region.Heartbeat() }
func (s *fakeStore) Volumes() []VolumeInfo {
	s.mu.Lock()
	defer s.mu.Unlock()
	var out []VolumeInfo
	for _, n := range sortedKeys(s.volumes) {
		out = append(out, VolumeInfo{ID: s.ids[n], Name: n, Size: s.volumes[n], THN: s.thn[n], Survey: s.found})
	}
	return out
}
func (s *fakeStore) Volume(name string) (block.Volume, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	size, ok := s.volumes[name]
	if !ok {
		return nil, block.ErrNotFound
	}
	v := nbdtest.New(name, size)
	v.SetID(s.ids[name])
	v.Hook = func(ctx context.Context, op nbdtest.Op, _, _ int64) error {
		if op == nbdtest.OpTryRead {
			return nbdtest.ErrWouldWait
		}
		if s.deaf.Load() && op == nbdtest.OpRead {
			s.reads.Add(1)
			<-ctx.Done()
		}
		return ctx.Err()
	}
	return v, nil
}
func (s *fakeStore) refusal() error {
	if s.refuse.Load() {
		return block.ErrNoSpace
	}
	return nil
}
func (s *fakeStore) CreateVolume(_ context.Context, name string, size int64, thn int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.refusal(); err != nil {
		return err
	}
	s.nextID++
	s.volumes[name], s.thn[name], s.ids[name] = size, thn, s.nextID
	return nil
}
func (s *fakeStore) SetSharing(_ context.Context, name string, thn int) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.refusal(); err != nil {
		return err
	}
	s.thn[name] = thn
	return nil
}
func (s *fakeStore) ResizeVolume(_ context.Context, name string, size int64) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.refusal(); err != nil {
		return err
	}
	s.volumes[name] = size
	return nil
}
func (s *fakeStore) RenameVolume(_ context.Context, old, name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.refusal(); err != nil {
		return err
	}
	s.volumes[name], s.thn[name], s.ids[name] = s.volumes[old], s.thn[old], s.ids[old]
	delete(s.volumes, old)
	delete(s.thn, old)
	delete(s.ids, old)
	return nil
}
func (s *fakeStore) DeleteVolume(_ context.Context, name string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.refusal(); err != nil {
		return err
	}
	delete(s.volumes, name)
	return nil
}
func (s *fakeStore) AddDevice(context.Context, hpdi.Device) error { return block.ErrUnsupported }
func (s *fakeStore) AddMemory(context.Context, hpdi.Device) error { return block.ErrUnsupported }
func (s *fakeStore) RemoveDevice(context.Context, string) error   { return block.ErrUnsupported }
func (s *fakeStore) CancelRemoval(context.Context) error          { return block.ErrUnsupported }
func (s *fakeStore) Checking() (control.CheckProgress, bool) {
	return control.CheckProgress{Phase: "data", Done: 1, Total: 2}, !s.refuse.Load()
}

func (s *fakeStore) Check(context.Context) (control.PoolCheck, error) {
	return control.PoolCheck{}, s.refusal()
}

// Scan remembers what was asked of it last.
func (s *fakeStore) Scan(_ context.Context, name, action string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.refusal(); err != nil {
		return err
	}
	s.scanned = name + " " + action
	return nil
}

func (s *fakeStore) Dedup(context.Context) (control.PoolDedup, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return control.PoolDedup{Saved: 4096, Survey: control.DedupSurvey{State: s.surveyed}}, s.refusal()
}

// Survey finds something at once.
func (s *fakeStore) Survey(_ context.Context, action string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.refusal(); err != nil {
		return err
	}
	s.surveyed, s.found = action, &control.VolumeSurvey{WouldFree: 77}
	return nil
}

// SetSettings keeps the settings.
func (s *fakeStore) SetSettings(_ context.Context, c pool.SettingsChange) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if err := s.refusal(); err != nil {
		return err
	}
	if c.IndexBytes != nil {
		s.settings.DedupIndex = *c.IndexBytes
	}
	if c.Threshold != nil {
		s.settings.LLRRMThreshold = *c.Threshold
	}
	return nil
}

// Scrub goes from state to state and finds a block that is lost.
func (s *fakeStore) Scrub(_ context.Context, action string) error {
	from := map[string][]string{control.ScrubStart: {control.ScrubNever, control.ScrubStopped}, control.ScrubPause: {control.ScrubRunning},
		control.ScrubResume: {control.ScrubPaused}, control.ScrubStop: {control.ScrubRunning, control.ScrubPaused}}[action]
	if !slices.Contains(from, s.Stats().Scrub.State) {
		return &pool.ScrubStateError{Action: action, Pool: s.name}
	}
	now := map[string]string{control.ScrubStart: control.ScrubRunning, control.ScrubPause: control.ScrubPaused,
		control.ScrubResume: control.ScrubRunning, control.ScrubStop: control.ScrubStopped}[action]
	s.tell("scrub-"+action, action+" was asked for")
	s.scrub.Store(&control.ScrubStatus{State: now, Now: control.ScrubResult{Unreadable: 1}})
	return nil
}

func (s *fakeStore) Stats() control.PoolStatus {
	s.mu.Lock()
	st := control.PoolStatus{Name: s.name, Scrub: control.ScrubStatus{State: control.ScrubNever}, Settings: s.settings, Flash: flashStatus(s.flash.stats)}
	s.mu.Unlock()
	if now := s.scrub.Load(); now != nil {
		st.Scrub = *now
	}
	if err := s.refusal(); err != nil {
		st.Error = err.Error()
	}
	return st
}
func (s *fakeStore) end(how string) error {
	if s.stuck {
		return errors.New("requests are still under way")
	}
	s.how.Store(how)
	closeAll(s.devs)
	return s.region.Close()
}
func (s *fakeStore) Close(context.Context) error { return s.end("closed") }
func (s *fakeStore) Export(context.Context) error {
	if err := s.refusal(); err != nil {
		_ = s.end("closed")
		return err
	}
	return errors.Join(s.region.Remove(), s.end("exported"))
}
func (s *fakeStore) Release() error { return s.end("released") }
