package pool

import (
	"cmp"
	"context"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/catalogue"
	"github.com/pollux-storage/pollux/internal/dedup"
)

// ScanOptions say how fast volumes are scanned.
type ScanOptions struct {
	// Rate is how many bytes a scan reads and writes in a second. DefaultScanRate if
	// 0.
	Rate int64
	// Tell, if set, hears of begin and end. It is called by Run and must not block.
	Tell func(kind, message string)
}

// DefaultScanRate is the Rate of pools that do not ask for another.
const DefaultScanRate = 64 << 20

// ScanState says what the scan of a pool does.
type ScanState string

// The states of a scan.
const (
	ScanNever   ScanState = "never" // none was begun, as far as is known
	ScanRunning ScanState = "running"
	ScanPaused  ScanState = "paused"
	ScanStopped ScanState = "stopped"
	ScanDone    ScanState = "done"
)

// ScanStats tells of the newest scan of a pool.
type ScanStats struct {
	State  ScanState
	Volume string
	Undo   bool
	// Done of Total blocks that the volume referred to when the scan began were looked
	// at. What is written meanwhile may not be among them.
	Done, Total int64
	// Moved blocks are shared now, or not any more. Raced are those that a client has
	// changed in time, and Failed those that could not be read.
	Moved, Raced, Failed uint64
	// Why says what the scan waits for, or why it has ended.
	Why string
}

// scan deduplicates what a volume had before it shared blocks, or makes copies again of
// what it shares. It is a machine of Run's goroutine, but for Stats, and writes through
// the log as the cleaner does: a block is written once more, on the condition that nobody
// has changed it, and the next consistency point finds that it is stored elsewhere, or,
// where the volume shares nothing any more, stores it anew. So a scan may end anywhere.
// Where it is stands in a record, an advice, and whoever owns the pool next goes on from
// there: it says nothing is done that no consistency point has.
//
// A leaf of the map is a step, 1 MiB of the volume: its blocks are read, their
// fingerprints noted, and what matches a series elsewhere is moved and committed before
// the next. A series that leaves cut is found in two parts, each of which must be long
// enough.
type scan struct {
	p     *Pool
	o     ScanOptions
	timer *time.Timer
	next  time.Time // no step before

	known bool   // the record was looked for
	frame []byte // for the record
	rec   scanRecord
	saved time.Time

	id      block.VolumeID
	undo    bool
	wait    foldWait // before the walk: it looks at trees
	walks   bool
	run     int
	mover   mover
	matcher dedup.Matcher
	own     map[block.Physical]bool // where the blocks of a step are
	prints  []dedup.Fingerprint
	places  []int // of prints, in the leaf
	matches []dedup.Match

	mu    sync.Mutex // guards stats
	stats ScanStats
}

// scanSave is the time between two records of a scan that goes on.
const scanSave = 10 * time.Second

func newScan(p *Pool, o ScanOptions) *scan {
	if o.Rate <= 0 {
		o.Rate = DefaultScanRate
	}
	s := &scan{p: p, o: o, timer: time.NewTimer(0), own: map[block.Physical]bool{}}
	s.timer.Stop()
	s.stats.State = ScanNever
	s.mover = mover{p: p, note: func(moved, raced, failed int) {
		s.count(func(st *ScanStats) {
			st.Moved += uint64(moved)
			st.Raced += uint64(raced)
			st.Failed += uint64(failed)
		})
	}}
	return s
}

// Stats may be called at any time.
func (s *scan) Stats() ScanStats {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.stats
}

func (s *scan) count(fn func(st *ScanStats)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	fn(&s.stats)
}

// The things that can be asked of a scan.
const (
	ScanStart  = "start"
	ScanUndo   = "undo"
	ScanPause  = "pause"
	ScanResume = "resume"
	ScanStop   = "stop"
)

// Scan begins to deduplicate what a volume has stored before, in the background, or with
// ScanUndo to give it copies of its own of all that it shares; or it pauses, resumes or
// stops that. A volume that is deduplicated must share blocks, and one that is not any
// more must not. One volume of a pool is scanned at a time.
func (p *Pool) Scan(ctx context.Context, name, action string) error {
	return p.do(ctx, func() error {
		v, ok := p.catalogue.ByName(name)
		if err := p.scan.know(); err != nil {
			return err
		}
		switch {
		case !ok:
			return p.unknown(name)
		case action == ScanStart || action == ScanUndo:
			return p.scan.start(v, action == ScanUndo)
		case !p.scan.active() || p.scan.id != v.ID:
			return fmt.Errorf("volume %q is not being scanned: %w", name, block.ErrInvalid)
		}
		return p.scan.control(action)
	})
}

func (s *scan) start(v catalogue.Volume, undo bool) error {
	switch {
	case s.active():
		return fmt.Errorf("volume %q of pool %s is being scanned: stop that first, or wait: %w", s.stats.Volume, s.p.label.Name, block.ErrInvalid)
	case !undo && v.Run == 0:
		return fmt.Errorf("volume %q shares no blocks: switch deduplication on first: %w", v.Name, block.ErrInvalid)
	case undo && v.Run > 0:
		return fmt.Errorf("volume %q would share its blocks again: switch deduplication off first: %w", v.Name, block.ErrInvalid)
	}
	s.id, s.undo, s.next, s.walks, s.rec.leaf = v.ID, undo, time.Time{}, false, 0
	s.wait.begin(s.p)
	s.count(func(st *ScanStats) {
		*st = ScanStats{State: ScanRunning, Volume: v.Name, Undo: undo, Why: "it waits for a fold"}
	})
	s.tell("dedup-scan-begin", fmt.Sprintf("volume %s is %s", v.Name, s.what()))
	s.keep()
	return nil
}

// know looks for the record, once, and goes on with the scan that it tells of.
func (s *scan) know() error {
	if s.known {
		return nil
	}
	if s.frame == nil {
		frame, err := hpdi.AllocPrivate(block.Size)
		if err != nil {
			return err
		}
		s.frame = frame
	}
	s.known = true
	r, ok := recall(s.p, scanBlocks, s.frame, decodeScan)
	if !ok {
		return nil
	}
	s.rec = *r
	v, _ := s.p.catalogue.Get(s.rec.id)
	s.id, s.undo = s.rec.id, s.rec.stats.Undo
	s.count(func(st *ScanStats) {
		*st = s.rec.stats
		st.Volume = v.Name
	})
	if s.active() {
		s.wait.begin(s.p)
		s.tell("dedup-scan-begin", fmt.Sprintf("volume %s is still %s, from block %d on", v.Name, s.what(), s.rec.leaf*blockmap.LeafBlocks))
	}
	return nil
}

// prove looks whether the volume is still one that can be scanned.
func (s *scan) prove() error {
	v, ok := s.p.catalogue.Get(s.id)
	switch {
	case !ok:
		return fmt.Errorf("the volume was deleted: %w", block.ErrNotFound)
	case s.undo == (v.Run > 0):
		return fmt.Errorf("deduplication of the volume was switched on or off: %w", block.ErrInvalid)
	}
	s.run = v.Run
	return nil
}

// keep writes the record, durably, when somebody has said what the scan shall do.
func (s *scan) keep() {
	s.save()
	_ = s.p.set.Sync() // without it the next owner may have to be told again
}

// save writes the record.
func (s *scan) save() {
	s.rec.generation++
	s.rec.id, s.rec.stats = s.id, s.stats
	s.p.advise(scanBlocks, s.frame, &s.rec)
}

// what says what is done to the volume.
func (s *scan) what() string {
	if s.undo {
		return "given copies of its own of what it shares"
	}
	return "searched for what is stored elsewhere, too"
}

func (s *scan) tell(kind, message string) {
	if s.o.Tell != nil {
		s.o.Tell(kind, message)
	}
}

// begin begins the walk, when the trees have what was committed.
func (s *scan) begin() error {
	if s.p.machine.Folding() || !s.wait.over() {
		return nil
	}
	if err := s.mover.begin(); err != nil {
		return err
	}
	s.walks = true
	s.mover.walk.volumes, s.mover.walk.first = []block.VolumeID{s.id}, s.rec.leaf
	if s.saved = time.Now(); s.rec.leaf == 0 {
		v, _ := s.p.catalogue.Get(s.id)
		s.count(func(st *ScanStats) { st.Done, st.Total = 0, v.Used })
	}
	return nil
}

// wantsFold reports whether a fold is what the scan waits for.
func (s *scan) wantsFold() bool {
	return s.stats.State == ScanRunning && !s.walks && s.wait.wants()
}

func (s *scan) active() bool { return s.stats.State == ScanRunning || s.stats.State == ScanPaused }

func (s *scan) control(action string) error {
	was := s.stats.State
	switch {
	case action == ScanPause && was == ScanRunning:
		s.count(func(st *ScanStats) { st.State, st.Why = ScanPaused, "" })
		s.keep()
	case action == ScanResume && was == ScanPaused:
		s.count(func(st *ScanStats) { st.State = ScanRunning })
		s.keep()
	case action == ScanStop:
		s.end(ScanStopped, "somebody has stopped it")
	default:
		return fmt.Errorf("cannot %s the scan of volume %q: its state is %q: %w", action, s.stats.Volume, was, block.ErrInvalid)
	}
	return nil
}

// end ends a scan; what was moved is a write like others.
func (s *scan) end(state ScanState, why string) {
	s.count(func(st *ScanStats) { st.State, st.Why = state, why })
	s.leave()
	s.keep()
	st := s.stats
	if why != "" {
		why = ", " + why
	}
	s.tell("dedup-scan-end", fmt.Sprintf("volume %s was %s: %s%s; %d of %d blocks were looked at, %d moved", st.Volume, s.what(), state, why, st.Done, st.Total, st.Moved))
}

// leave gives up what a scan has taken.
func (s *scan) leave() {
	s.mover.close()
	s.p.machine.Avoid(nil)
	clear(s.own)
}

// close ends the work. Where a scan has come to is in its record.
func (s *scan) close() {
	s.timer.Stop()
	s.leave()
	if s.frame != nil {
		_ = hpdi.Free(s.frame)
		s.frame = nil
	}
}

// arm makes the timer wake Run when the next step is due, and not otherwise.
func (s *scan) arm() {
	if s.stats.State != ScanRunning {
		s.timer.Stop()
		return
	}
	s.p.wakeAt(s.timer, s.next)
}

// work does the next step if it is due.
func (s *scan) work(now time.Time) {
	if s.know() != nil {
		return
	}
	if s.stats.State != ScanRunning || now.Before(s.next) {
		return
	}
	if spare := s.p.space.Usage().Spare(); s.p.pressed() || spare < 4*blockmap.LeafBlocks {
		s.count(func(st *ScanStats) { st.Why = "it waits for room in the log or the pool" })
		s.next = now.Add(s.p.soon())
		return
	}
	if !s.walks {
		if err := s.begin(); err != nil {
			s.end(ScanStopped, err.Error())
		}
		s.next = now.Add(s.p.soon() / 4) // folds go on by themselves
		return
	}
	blocks, more, err := s.step()
	if keep := now.Sub(s.saved) >= scanSave; err == nil && (keep || !more) {
		if err = s.p.commitAll(); err == nil && keep && more { // what is done is on the devices
			s.saved = now
			s.save()
		}
	}
	s.next = now.Add(pace(int64(blocks)*block.Size, s.o.Rate))
	switch {
	case err != nil:
		s.end(ScanStopped, err.Error())
	case !more:
		s.end(ScanDone, "")
	default:
		s.count(func(st *ScanStats) { st.Why = "" })
	}
}

// step looks at a leaf of the map, and moves what is to be moved. It returns how many
// blocks it has read and written, and whether there are more leaves.
func (s *scan) step() (blocks int, more bool, err error) {
	if err := s.prove(); err != nil {
		return 0, false, err
	}
	group, err := s.mover.walk.group(s.p.bmap.Trees())
	if err != nil || len(group) == 0 {
		return 0, false, err
	}
	group = group[:1]
	first := block.Logical(group[0].leaf * blockmap.LeafBlocks)
	var ptrs [blockmap.LeafBlocks]block.Pointer
	if err := s.p.bmap.Lookup(s.id, first, ptrs[:]); err != nil {
		return 0, false, err
	}
	n := 1
	if s.undo {
		s.shared(first, &ptrs)
	} else if n, err = s.matched(first, &ptrs); err != nil {
		return 0, false, err
	}
	moved := len(s.mover.queue)
	if err := s.move(); err != nil {
		return 0, false, err
	}
	s.mover.walk.pass(group)
	s.rec.leaf = group[0].leaf + 1
	s.count(func(st *ScanStats) {
		for _, p := range ptrs {
			if !p.IsHole() {
				st.Done++
			}
		}
	})
	return n + moved, true, nil
}

// shared queues the blocks that others refer to as well.
func (s *scan) shared(first block.Logical, ptrs *[blockmap.LeafBlocks]block.Pointer) {
	for i, p := range ptrs {
		if !p.IsHole() && s.p.space.Count(p.Phys) > 1 {
			s.mover.queue = append(s.mover.queue, mapped{p, first + block.Logical(i)})
		}
	}
}

// matched queues the blocks that are stored elsewhere, too, in series that are long
// enough. It returns how many blocks it has read.
func (s *scan) matched(first block.Logical, ptrs *[blockmap.LeafBlocks]block.Pointer) (blocks int, err error) {
	m := s.p.machine
	var have []int
	for i, p := range ptrs {
		if !p.IsHole() {
			have = append(have, i)
		}
	}
	// The blocks themselves are no match, and shall not be one when they are written.
	clear(s.own)
	s.prints = append(s.prints[:0], make([]dedup.Fingerprint, blockmap.LeafBlocks)...)
	err = s.mover.bulk.read(context.Background(), len(have), func(k int) block.Pointer { return ptrs[have[k]] }, func(k int, frame []byte, err error) {
		if err == nil { // who wants what cannot be read will say so
			s.prints[have[k]] = m.Print(frame)
		}
	})
	if err != nil {
		return 0, err
	}
	for _, i := range have {
		if s.own[ptrs[i].Phys] = true; s.prints[i] != dedup.None {
			m.Learn(ptrs[i].Phys, s.prints[i])
		}
	}
	m.Avoid(func(p block.Physical) bool { return s.own[p] })
	queue := func(i int) { s.mover.queue = append(s.mover.queue, mapped{ptrs[i], first + block.Logical(i)}) }
	// What memory has is taken from there, and parts no series.
	s.places = s.places[:0]
	for i, p := range ptrs {
		here, elsewhere := m.InMemory(p.Phys, s.prints[i])
		if elsewhere {
			queue(i)
		}
		if !here && !elsewhere {
			s.prints[len(s.places)] = s.prints[i]
			s.places = append(s.places, i)
		}
	}
	s.matcher.Run = s.run
	series := dedup.Series{Prints: s.prints[:len(s.places)]}
	s.matches = s.matcher.Space(s.matcher.Matches(series, 0, len(s.places), m, s.matches[:0]), 0)
	for _, match := range s.matches {
		for k := range match.N {
			queue(s.places[match.First+k])
		}
	}
	slices.SortFunc(s.mover.queue, func(a, b mapped) int { return cmp.Compare(a.lba, b.lba) })
	return len(have), nil
}

// move moves what is queued, all of it in one consistency point: a series that a point
// cuts may be too short on both sides.
func (s *scan) move() error {
	if len(s.mover.queue) == 0 {
		return nil
	}
	if err := s.p.commitAll(); err != nil { // so that the log has room
		return err
	}
	for len(s.mover.queue) > 0 {
		before := len(s.mover.queue)
		if _, err := s.mover.moveSome(); err != nil {
			return err
		}
		if len(s.mover.queue) == before {
			// Clients have taken the room. What is left is found by another scan.
			s.mover.note(0, before, 0)
			s.mover.queue = s.mover.queue[:0]
		}
	}
	if s.undo {
		return nil
	}
	return s.p.commitAll()
}
