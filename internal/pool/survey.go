package pool

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"sync"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/catalogue"
)

// SurveyState says what the survey of a pool does.
type SurveyState string

// The states of a survey.
const (
	SurveyNever   SurveyState = "never" // none was begun since the pool was opened
	SurveyRunning SurveyState = "running"
	SurveyStopped SurveyState = "stopped"
	SurveyDone    SurveyState = "done"
)

// SurveyStats tells of the newest survey since the pool was opened, and what surveys
// have found.
type SurveyStats struct {
	State SurveyState
	// Done of Total entries of maps were looked at. A volume that needs another walk adds
	// to Total what that will look at.
	Done, Total int64
	// Why says what the survey waits for, or what it could not do.
	Why string
	// Volumes are those that were surveyed and are there.
	Volumes map[block.VolumeID]VolumeSurvey
}

// VolumeSurvey is what a survey has found of a volume.
type VolumeSurvey struct {
	At time.Time // when it was found
	// Exact says that it was so at that time: what was committed was in the maps when
	// the volume's turn began, nothing was still to be freed, and nothing was committed
	// until its end. Else blocks that changed meanwhile may be counted as they were or as
	// they are, and those that are still to be freed are referred to.
	Exact bool
	// Frees is how many bytes of data nothing but this volume refers to, however often
	// it does: what deleting it frees. What it has overwritten or trimmed and what is
	// not freed yet is part of it, pages of its map are not.
	Frees int64
	// Blocks are those that can be read, and Pieces in how many pieces they lie: a block
	// belongs to the piece of the one before it in the volume if it lies right behind
	// that on the same device. So a hole ends a piece, and a reader that goes through the
	// volume jumps at most once for each.
	Blocks, Pieces int64
}

// MeanExtent returns the mean length of a piece in blocks, 0 without any.
func (v VolumeSurvey) MeanExtent() float64 {
	if v.Pieces == 0 {
		return 0
	}
	return float64(v.Blocks) / float64(v.Pieces)
}

// MeanExtent returns the mean length in blocks of the pieces of all volumes that were
// surveyed, 0 without any.
func (s SurveyStats) MeanExtent() float64 {
	var all VolumeSurvey
	for _, v := range s.Volumes {
		all.Blocks, all.Pieces = all.Blocks+v.Blocks, all.Pieces+v.Pieces
	}
	return all.MeanExtent()
}

const (
	// surveyWindow is how many of the pool's blocks a walk has counters for, of a byte
	// each: 64 MiB for 256 GiB, touched only where the volume shares blocks.
	surveyWindow = 64 << 20
	// surveyRest is how many times as long as a step took a survey rests after it.
	surveyRest = 3
)

// survey finds what only one volume refers to. It is a machine of Run's goroutine, but
// for Stats.
//
// A block is freed with a volume if all references that its count tells of come from that
// volume. Where the count is 1 a look at the map is enough. Of others the references are
// counted, a volume at a time, and the block is one that is freed when as many were met as
// it has. The counters are for a window of the pool's blocks, the first one that is
// needed: the walk notes in which others the volume shares blocks, and comes by again for
// each of these. So memory is bounded whatever the size of pool and volume, and most
// volumes are walked once. To look for the owner of each block in one walk of all maps
// would need more memory for each block, and there would be no figures before the end.
//
// It reads leaves past the cache, in steps, rests after each, and lets clients go first.
// It holds nothing between two steps, and what changes meanwhile makes the figure
// inexact, which is told; to keep everything still for that long would stop clients. The
// figures are not stored and end with the guest.
type survey struct {
	p      *Pool
	window uint64 // blocks that have a counter at once
	timer  *time.Timer
	next   time.Time // no step before

	wait    foldWait // before the first volume: it looks at trees
	walks   bool
	bulk    *bulk
	pages   [][block.Size]byte
	volumes []block.VolumeID // still to be surveyed; the first is under way if begun
	begun   bool
	again   bool // the volume was walked before
	walk    walk
	refs    *window         // counters of this walk; nil before a shared block was met
	others  map[uint64]bool // windows, by their numbers, that need a walk of their own
	now     VolumeSurvey
	behind  block.Physical // where a block would have to lie that goes on with a piece
	at      block.Logical  // and its place in the volume
	entries int64          // of the volume's map, all of them
	bad     int            // pages that cannot be read
	since   surveyMoment

	mu    sync.Mutex // guards stats
	stats SurveyStats
}

// surveyMoment tells whether anything has changed: two that are equal say no.
type surveyMoment struct {
	commits, folds uint64
	unfolded       int
	unfinished     bool // what was deleted or trimmed is still being freed
}

func newSurvey(p *Pool) *survey {
	s := &survey{p: p, window: surveyWindow, timer: time.NewTimer(0)}
	s.timer.Stop()
	s.stats = SurveyStats{State: SurveyNever, Volumes: map[block.VolumeID]VolumeSurvey{}}
	return s
}

// Stats may be called at any time.
func (s *survey) Stats() SurveyStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	st := s.stats
	st.Volumes = maps.Clone(st.Volumes)
	for id := range st.Volumes {
		if _, ok := s.p.catalogue.Get(id); !ok {
			delete(st.Volumes, id)
		}
	}
	return st
}

func (s *survey) count(fn func(st *SurveyStats)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fn(&s.stats)
}

// What can be asked of a survey.
const (
	SurveyStart = "start"
	SurveyStop  = "stop"
)

// Survey begins to find what deleting each volume would free and in which pieces volumes
// lie, in the background, or ends that. What an earlier survey has found of a volume stays
// until this one has come to it. It walks the map of each volume once, 16 bytes for each
// block, and once more for each further 256 GiB of the pool in which the volume shares
// blocks, with 64 MiB of memory at most.
func (p *Pool) Survey(ctx context.Context, action string) error {
	return p.do(ctx, func() error {
		running := p.survey.running()
		switch {
		case action == SurveyStart && !running:
			p.survey.start()
		case action == SurveyStop && running:
			p.survey.end(SurveyStopped, "somebody has stopped it")
		default:
			return fmt.Errorf("cannot %s the survey of pool %s: its state is %q: %w", action, p.label.Name, p.survey.stats.State, block.ErrInvalid)
		}
		return nil
	})
}

// Surveyed tells of the newest survey, and what surveys have found.
func (p *Pool) Surveyed() SurveyStats { return p.survey.Stats() }

func (s *survey) running() bool { return s.stats.State == SurveyRunning }

func (s *survey) start() {
	s.walks, s.begun, s.next = false, false, time.Time{}
	s.wait.begin(s.p)
	s.count(func(st *SurveyStats) {
		st.State, st.Done, st.Total, st.Why = SurveyRunning, 0, 0, "it waits for a fold"
		maps.DeleteFunc(st.Volumes, func(id block.VolumeID, _ VolumeSurvey) bool {
			_, ok := s.p.catalogue.Get(id)
			return !ok
		})
	})
}

// end ends a survey. What it has found stays.
func (s *survey) end(state SurveyState, why string) {
	s.count(func(st *SurveyStats) { st.State, st.Why = state, why })
	s.forget()
	if s.bulk != nil {
		s.bulk.close()
	}
	s.bulk, s.pages, s.volumes, s.begun = nil, nil, nil, false
}

// close ends the work.
func (s *survey) close() {
	s.timer.Stop()
	if s.running() {
		s.end(SurveyStopped, "the pool was closed")
	}
}

// wantsFold reports whether a fold is what the survey waits for.
func (s *survey) wantsFold() bool { return s.running() && !s.walks && s.wait.wants() }

// arm makes the timer wake Run when the next step is due, and not otherwise.
func (s *survey) arm() {
	if !s.running() {
		s.timer.Stop()
		return
	}
	s.p.wakeAt(s.timer, s.next)
}

// work does the next step if it is due, unless clients need what it would take.
func (s *survey) work(now time.Time) {
	if !s.running() || now.Before(s.next) {
		return
	}
	if s.p.pressed() {
		s.next = now.Add(s.p.soon())
		return
	}
	if !s.walks {
		if err := s.begin(); err != nil {
			s.end(SurveyStopped, err.Error())
		}
		s.next = now.Add(s.p.soon() / 4) // folds go on by themselves
		return
	}
	begun := time.Now() // now may lie before other work of this round
	if err := s.step(); err != nil {
		s.end(SurveyStopped, err.Error())
		return
	}
	end := time.Now()
	s.next = end.Add(surveyRest * end.Sub(begun))
}

// begin begins with the first volume, when the trees have what was committed.
func (s *survey) begin() error {
	if s.p.machine.Folding() || !s.wait.over() {
		return nil
	}
	b, err := newBulk(s.p.set)
	if err != nil {
		return err
	}
	s.bulk, s.pages, s.walks = b, make([][block.Size]byte, scanLeaves), true
	total := int64(0)
	for _, v := range s.p.catalogue.List() {
		s.volumes = append(s.volumes, v.ID)
		total += v.Used
	}
	s.count(func(st *SurveyStats) { st.Total, st.Why = total, "" })
	return nil
}

// step looks at some leaves of a volume's map.
func (s *survey) step() error {
	if len(s.volumes) == 0 {
		s.end(SurveyDone, s.stats.Why) // which names a volume that could not be surveyed
		return nil
	}
	id := s.volumes[0]
	v, ok := s.p.catalogue.Get(id)
	if !ok { // it was deleted meanwhile
		s.through()
		return nil
	}
	if !s.begun {
		s.begun, s.again, s.now, s.entries, s.bad = true, false, VolumeSurvey{}, 0, 0
		s.others, s.since, s.behind = map[uint64]bool{}, s.moment(), block.None
		s.rewind(id)
	}
	group, err := s.walk.group(s.p.bmap.Trees())
	switch {
	case err != nil:
		s.bad++
	case len(group) > 0:
		return s.look(id, group)
	case s.bad == 0 && len(s.others) > 0:
		return s.another(id)
	}
	s.found(id, v.Name)
	return nil
}

// moment returns what changes when anything does.
func (s *survey) moment() surveyMoment {
	m := s.p.machine.Stats()
	n, _ := s.p.bmap.Overlays()
	return surveyMoment{m.Commits, m.Folds, n, s.p.bmap.Unfinished()}
}

// rewind goes to the first leaf of a volume.
func (s *survey) rewind(id block.VolumeID) {
	s.walk = walk{pages: &uncached{s.p.reader, s.bulk}, volumes: []block.VolumeID{id}}
}

// another begins a walk for the next of the windows that were left out.
func (s *survey) another(id block.VolumeID) error {
	s.forget()
	n := slices.Min(slices.Collect(maps.Keys(s.others)))
	delete(s.others, n)
	s.again = true
	s.rewind(id)
	s.count(func(st *SurveyStats) { st.Total += s.entries })
	if err := s.open(); err != nil {
		return err
	}
	s.moveTo(n)
	return nil
}

// open gives the walk counters.
func (s *survey) open() error {
	var devs []uint64
	for _, d := range s.p.machine.Superblock().Devices {
		devs = append(devs, d.Blocks)
	}
	w, err := newWindow(devs, s.window)
	if err != nil {
		return err
	}
	s.refs = w
	return nil
}

// moveTo makes the counters those of window number n.
func (s *survey) moveTo(n uint64) {
	s.refs.lo = n * s.window
	s.refs.hi = min(s.refs.lo+s.window, s.refs.end())
}

// forget frees the counters.
func (s *survey) forget() {
	if s.refs != nil {
		s.refs.free()
	}
	s.refs = nil
}

// look reads leaves and looks at what they refer to, in the order of the volume.
func (s *survey) look(id block.VolumeID, group []node) error {
	var errs [scanLeaves]error // of different workers: no two write the same
	err := s.bulk.read(context.Background(), len(group), func(i int) block.Pointer { return group[i].ptr }, func(i int, page []byte, err error) {
		if errs[i] = err; err == nil {
			copy(s.pages[i][:], page)
		}
	})
	if err != nil {
		return err
	}
	pending := s.p.bmap.Trees()[id].Pending
	looked := int64(0)
	for i, n := range group {
		if errs[i] != nil {
			s.bad++
			continue
		}
		for k := range blockmap.LeafBlocks {
			p := block.DecodePointer(s.pages[i][k*block.PointerSize:])
			if p.IsHole() {
				continue
			}
			looked++
			if lba := block.Logical(n.leaf*blockmap.LeafBlocks + uint64(k)); !s.again && !catalogue.Dead(pending, lba, p.Birth) {
				s.piece(lba, p.Phys)
			}
			if err := s.refer(p.Phys); err != nil {
				return err
			}
		}
	}
	if !s.again {
		s.entries += looked
	}
	s.walk.pass(group)
	s.count(func(st *SurveyStats) { st.Done += looked })
	return nil
}

// piece notes a block that can be read.
func (s *survey) piece(lba block.Logical, at block.Physical) {
	if s.now.Blocks++; lba != s.at || at != s.behind {
		s.now.Pieces++
	}
	s.at, s.behind = lba+1, at+1
	if s.behind.Device() != at.Device() {
		s.behind = block.None
	}
}

// refer notes a reference of the volume.
func (s *survey) refer(at block.Physical) error {
	if s.again {
		if _, ok := s.refs.at(at); !ok {
			return nil
		}
	}
	count := s.p.space.Count(at)
	if count <= 1 {
		if !s.again && count == 1 {
			s.now.Frees += block.Size
		}
		return nil
	}
	if s.refs == nil {
		if err := s.open(); err != nil {
			return err
		}
		if place, ok := s.refs.place(at); ok {
			s.moveTo(place / s.window)
		}
	}
	if i, ok := s.refs.at(at); ok {
		if s.refs.want[i]++; int(s.refs.want[i]) == count {
			s.now.Frees += block.Size
		}
	} else if place, ok := s.refs.place(at); ok { // else it is on a device that has just come
		s.others[place/s.window] = true
	}
	return nil
}

// found keeps what was found of a volume, unless it could not be read.
func (s *survey) found(id block.VolumeID, name string) {
	s.now.At = time.Now()
	s.now.Exact = s.since == s.moment() && s.since.unfolded == 0 && !s.since.unfinished
	now, bad := s.now, s.bad
	s.count(func(st *SurveyStats) {
		if bad > 0 {
			delete(st.Volumes, id)
			st.Why = fmt.Sprintf("the map of volume %s cannot be read: `pollux check` says more", name)
			return
		}
		st.Volumes[id] = now
	})
	s.through()
}

// through goes on with the next volume.
func (s *survey) through() {
	s.forget()
	s.volumes, s.begun = s.volumes[1:], false
}
