package sim

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"runtime"
	"runtime/debug"
	"slices"
	"strconv"
	"testing"
	"testing/cryptotest"
	"testing/synctest"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/mirror"
	"github.com/pollux-storage/pollux/internal/partner"
	spool "github.com/pollux-storage/pollux/internal/pool"
)

// Options are what a script does not say.
type Options struct {
	Machine  partner.Config
	Referee  partner.RefereeConfig
	Interval time.Duration
	Cleaner  spool.CleanerOptions
	// Run is THN of all volumes, 0 if they share nothing. With Weak, blocks that differ
	// often have the same fingerprint.
	Run  int
	Weak bool
}

// Sizes of pools unless a script says otherwise.
const (
	logBytes = 1 << 20
	diskSize = 48 << 20
)

// Result is what came of a run.
type Result struct {
	Err      error // the first violation, nil when all was well
	Hash     uint64
	Events   int
	Ops      int64 // counted operations
	Requests int
	Skipped  int    // requests that were not run again because the log had them
	Moves    int64  // blocks that cleaners, scans and removals moved
	Promoted uint64 // data sets that moved to flash
	Demoted  uint64 // and back
	Recalled int    // pools that were opened by their restart records
	Virtual  time.Duration
	Trace    string
}

// Run plays a script. The same script gives the same result.
func Run(t *testing.T, s *Script, keep int) Result {
	t.Helper()
	var res Result
	// One processor and no collection of garbage: then the order in which
	// goroutines that are woken together run is the same each time.
	defer runtime.GOMAXPROCS(runtime.GOMAXPROCS(1))
	defer debug.SetGCPercent(debug.SetGCPercent(-1))
	defer debug.SetMemoryLimit(debug.SetMemoryLimit(2 << 30)) // rather another order than no end
	dir, err := os.MkdirTemp("/dev/shm", "pollux-sim")
	if err != nil {
		dir = t.TempDir()
	}
	defer func() { _ = os.RemoveAll(dir) }()
	seed := s.seed()
	cryptotest.SetGlobalRandom(t, seed)
	synctest.Test(t, func(*testing.T) {
		w := newWorld(seed, dir, keep)
		defer func() {
			// Whoever reads the goroutines learns which run it was.
			if e := recover(); e != nil {
				panic(fmt.Sprintf("seed %d: %v\n%s", seed, e, w.trace.String()))
			}
		}()
		err := w.set(s)
		if err == nil {
			err = w.play(s)
		}
		if err != nil && w.fail == nil {
			w.fail = err
		}
		res = Result{Err: w.fail, Ops: w.ops, Requests: w.requests, Skipped: w.skipped, Recalled: w.recalled, Virtual: w.now()}
		for _, pl := range w.pools {
			res.Moves += pl.moves
			res.Promoted += pl.flashed.Promoted
			res.Demoted += pl.flashed.Demoted
		}
		w.close()
		res.Hash, res.Events, res.Trace = w.trace.hash, w.trace.count, w.trace.String()
	})
	return res
}

// seed returns what the script says, or 1.
func (s *Script) seed() uint64 {
	for _, l := range s.Lines {
		if l.arg(0) == "seed" {
			n, _ := strconv.ParseUint(l.arg(1), 10, 64) // set reports it
			return n
		}
	}
	return 1
}

// wrong says that a line cannot be played.
func (s *Script) wrong(l Line, err error) error {
	return fmt.Errorf("%s:%d: %s: %w (%w)", s.Name, l.Number, l, err, ErrScript)
}

func newWorld(seed uint64, dir string, keep int) *World {
	w := &World{
		rng: rand.New(rand.NewPCG(seed, 0x706f6c6c7578)), marks: rand.New(rand.NewPCG(seed, 0x6d61726b)), start: time.Now(), dir: dir,
		inbox: inbox{poke: make(chan struct{}, 1)}, trace: trace{keep: keep},
		procs: map[string]*proc{}, pools: map[string]*pool{}, cls: map[string]*client{},
		opt: Options{
			Machine: partner.Config{HangTimeout: time.Second, GivebackDelay: 2 * time.Second, LockoutCount: 1 << 30, LockoutWindow: time.Minute},
			Referee: partner.RefereeConfig{RestartDelay: 100 * time.Millisecond, RestartMax: 2 * time.Second, CrashLimit: 1 << 30, CrashWindow: time.Minute, ProvenAfter: -1},
			Cleaner: spool.CleanerOptions{Off: true},
		},
	}
	w.host = host{w: w, names: []string{"a", "b"}, incs: map[string]uint64{}, done: map[uint64]string{}, starts: map[string]starting{}}
	w.opt.Interval = w.between(20*time.Millisecond, 2*time.Second)
	return w
}

// set prepares the pair by the script's settings.
func (w *World) set(s *Script) error {
	type wanted struct {
		disks         int
		copies        int
		size, journal int64
		battery       bool
	}
	pools := map[string]wanted{"a": {disks: 1, copies: 1, size: diskSize}, "b": {disks: 1, copies: 1, size: diskSize}}
	for _, l := range s.Lines {
		var err error
		switch l.arg(0) {
		case "seed":
			_, err = strconv.ParseUint(l.arg(1), 10, 64)
		case "alone":
			w.host.names = []string{"a"}
			delete(pools, "b")
		case "interval":
			w.opt.Interval, err = l.duration(1)
		case "cleaner":
			w.opt.Cleaner = spool.CleanerOptions{LowWater: 90, MinFree: 5, Pause: 20 * time.Millisecond}
		case "resubmits":
			w.resubmits = l.Fields[1:]
		case "sharing":
			w.opt.Run, err = strconv.Atoi(l.arg(1))
			w.opt.Weak = l.has("weak")
		case "restart-first":
			w.opt.Referee.RestartFirst = l.Fields[1:]
		case "restart-limit":
			w.opt.Referee.RestartLimit, err = l.duration(1)
		case "crash-window":
			w.opt.Referee.CrashWindow, err = l.duration(1)
		case "poison":
			w.opt.Referee.ProvenAfter, err = l.duration(1)
		case "giveback-delay":
			if w.opt.Machine.GivebackDelay = -1; l.arg(1) != "never" {
				w.opt.Machine.GivebackDelay, err = l.duration(1)
			}
		case "pool":
			p := pools[l.arg(1)]
			if v, ok := l.option("disks"); ok {
				p.disks, err = strconv.Atoi(v)
			}
			if v, ok := l.option("copies"); ok && err == nil {
				p.copies, err = strconv.Atoi(v)
			}
			if v, ok := l.option("size"); ok && err == nil {
				p.size, err = bytesOf(v)
			}
			if v, ok := l.option("journal"); ok && err == nil {
				p.journal, err = bytesOf(v)
			}
			p.battery = l.has("battery")
			pools[l.arg(1)] = p
		}
		if err != nil {
			return s.wrong(l, err)
		}
	}
	for _, id := range sortedKeys(pools) {
		p := pools[id]
		if err := w.makePool(id, p.disks, p.copies, p.size, p.journal, p.battery); err != nil {
			return err
		}
	}
	return nil
}

func (w *World) makePool(id string, disks, copies int, size, journal int64, battery bool) error {
	if journal == 0 {
		journal = 4 << 20
	}
	pl := &pool{w: w, identity: id, copies: copies, memory: map[mirror.ID]uint64{}, journal: journal, path: filepath.Join(w.dir, "region-"+id), battery: battery,
		volumes: map[string]*volume{}, unsure: map[string]bool{}, pins: map[pinned]bool{}, ids: map[block.VolumeID]*volume{}}
	var devs []hpdi.Device
	for i := range disks * copies {
		d := &disk{w: w, name: fmt.Sprintf("%s%d", id, i), owner: id, slow: 1, use: useDisk,
			medium: blocktest.NewCrashWith(blocktest.CrashOptions{Name: fmt.Sprintf("%s%d", id, i), Size: size, Seed: w.rng.Uint64()})}
		pl.disks = append(pl.disks, d)
		w.disks = append(w.disks, d)
		devs = append(devs, d.medium)
	}
	w.pools[id] = pl
	if copies > 1 {
		made := 0
		for m := range slices.Chunk(devs, copies) {
			id, err := mirror.Create(m)
			if err != nil {
				return err
			}
			for range m {
				pl.disks[made].mirror = id
				made++
			}
		}
		var err error
		if devs, err = mirror.Assemble(devs, mirror.Options{Remember: pl.remember}); err != nil {
			return err
		}
	}
	if _, err := spool.Create(context.Background(), spool.CreateOptions{Name: "pool-" + id, Identity: id, Devices: devs, LogBytes: logBytes, JournalBytes: journal}); err != nil || copies == 1 {
		return err
	}
	for _, m := range devs {
		if err := m.Close(); err != nil {
			return err
		}
	}
	for _, d := range pl.disks {
		d.medium = d.medium.Reopen()
	}
	return nil
}

// play starts the pair, takes the steps, ends all faults and judges.
func (w *World) play(s *Script) error {
	w.startAgent()
	w.until(patience, w.protected)
	if err := w.makeVolumes(s); err != nil {
		return err
	}
	for _, l := range s.Lines {
		if isSetting(l.Fields[0]) {
			continue
		}
		w.log("step: %s", l)
		if err := verbOf(l)(w, l); err != nil {
			return s.wrong(l, err)
		}
		if w.rest(); w.fail != nil {
			return w.fail
		}
	}
	return w.finish()
}

// makeVolumes makes those of the script, or one for each identity.
func (w *World) makeVolumes(s *Script) error {
	made := false
	for _, l := range s.Lines {
		if l.arg(0) != "volume" {
			continue
		}
		size, err := bytesOf(l.arg(4))
		if err != nil {
			return s.wrong(l, err)
		}
		if made = true; w.fail == nil {
			if err := w.create(l.arg(1), l.arg(3), size); err != nil {
				return s.wrong(l, err)
			}
		}
	}
	for _, id := range w.host.names {
		if made || w.fail != nil {
			break
		}
		if err := w.create("v"+id, id, 4<<20); err != nil {
			return err
		}
	}
	return w.fail
}

// finish ends all faults and lets the pair recover; then everything must be
// there, and nothing else.
func (w *World) finish() error {
	w.log("the faults end")
	for _, d := range w.disks {
		d.slow, d.faults, d.gone, d.vanishIn, d.missing = 1, nil, false, 0, false
		d.unstick()
	}
	clear(w.host.starts)
	for _, g := range w.host.names {
		if p := w.procs[g]; p != nil {
			p.killIn, p.line.slow, p.line.repeat = 0, false, 0
			w.thaw(p)
		}
	}
	w.startAgent()
	if !w.until(patience, w.protected) && w.fail == nil {
		w.violate("the pair does not recover: %s", w.waiting())
	}
	steps := []func() error{w.settle, w.mendAll, w.emptied, w.verify, w.atRest, w.settle, w.survive}
	for _, step := range steps {
		if w.fail != nil {
			break
		}
		if err := step(); err != nil {
			return err
		}
	}
	return w.fail
}

// verify reads every block that was ever touched, with its neighbours, and
// compares.
func (w *World) verify() error {
	for _, id := range sortedKeys(w.pools) {
		pl := w.pools[id]
		for _, name := range sortedKeys(pl.volumes) {
			v := pl.volumes[name]
			for _, r := range v.ranges() {
				if w.fail != nil {
					return nil
				}
				w.verifyRange(pl, v, r)
			}
		}
	}
	return nil
}

func (w *World) verifyRange(pl *pool, v *volume, r block.Range) {
	if int64(r.End)*block.Size > v.size && !pl.unsure[v.name] {
		w.violate("verify volume %s: it has %d bytes, and block %d was written", v.name, v.size, r.End-1)
		return
	}
	req := &request{s: &session{name: "verify", volume: v.name}, op: opRead,
		off: int64(r.Start) * block.Size, n: int64(r.End-r.Start) * block.Size}
	data := make([]byte, req.n)
	err := w.ask(pl.identity, "verify", func(ctx context.Context, p *spool.Pool) error {
		vol, err := p.Volume(v.name)
		if err != nil {
			return err
		}
		// Only now: a power cut before may have taken back what was published.
		since := make(chan block.Seq, 1)
		w.post(nil, func() { since <- pl.shadow.seq })
		req.since = <-since
		return vol.Read(ctx, data, req.off)
	})
	switch {
	case errors.Is(err, errNobody):
	case !pl.tolerable(err):
		w.violate("verify volume %s: %v", v.name, err)
	case err == nil:
		pl.judgeRead(v, req, data)
	}
}

// emptied waits until what was to leave a pool has left it. A disk may stay for want of room.
func (w *World) emptied() error {
	for _, id := range sortedKeys(w.pools) {
		pl := w.pools[id]
		if pl.damaged || !slices.ContainsFunc(pl.disks, func(d *disk) bool { return d.leaving }) {
			continue
		}
		var s spool.Stats
		over := w.until(patience, func() bool {
			if _, t := w.serving(id); t != nil {
				s = t.pool.Stats()
				return s.Removal.Device == "" || s.Removal.Stuck != "" && s.Removal.Device != s.Flash.Device
			}
			return false
		})
		if !over {
			w.violate("%s does not leave the pool of %s: %+v", s.Removal.Device, id, s.Removal)
		}
	}
	return nil
}

// atRest checks what holds once nothing is under way: every count, all space,
// no memory of requests kept.
func (w *World) atRest() error {
	for _, id := range sortedKeys(w.pools) {
		pl := w.pools[id]
		if pl.damaged {
			continue // check may find what the devices did
		}
		err := w.ask(id, "at rest", func(ctx context.Context, p *spool.Pool) error {
			if err := pl.check(ctx, p); err != nil {
				return err
			}
			for try := 0; ; try++ {
				if err := p.Fold(ctx); err != nil {
					return err
				}
				if err := pl.check(ctx, p); err != nil {
					return err
				}
				s := p.Stats()
				if s.LogUsedBytes == 0 && s.DirtyBlocks == 0 && s.ReservedBytes <= restReserve {
					break
				}
				if w.opt.Cleaner.Off && !pl.empties && s.Scan.State != spool.ScanRunning && s.Memory.Total == 0 || try == cleanerTries {
					return fmt.Errorf("at rest %d bytes of the log are in use, %d blocks dirty, %d bytes reserved, the cleaner: %s",
						s.LogUsedBytes, s.DirtyBlocks, s.ReservedBytes, s.Cleaner.State)
				}
				time.Sleep(100 * time.Millisecond)
			}
			return nil
		})
		if !pl.tolerable(err) {
			w.violate("%v", err)
		}
	}
	return nil
}

// cleanerTries is how often a pool is looked at until its cleaner, and whoever moves
// references to memory, has nothing to do any more.
const cleanerTries = 100

// restReserve is what may stay reserved in a pool at rest: space that is taken
// ahead of need.
const restReserve = 4 << 20

// close ends all goroutines of the run and frees its memory.
func (w *World) close() {
	w.host.ref = nil
	for _, p := range w.olds {
		w.kill(p, "ends with the run")
	}
	ended := make(chan struct{})
	go func() {
		for _, p := range w.olds {
			p.wg.Wait()
			for _, t := range p.tenants {
				t.wg.Wait()
			}
		}
		close(ended)
	}()
	for over := false; !over; {
		w.rest()
		select {
		case <-ended:
			over = true
		case <-time.After(time.Millisecond):
		}
	}
	for _, p := range w.olds {
		for _, r := range p.watches {
			_ = r.Close()
		}
	}
	for _, pl := range w.pools {
		pl.unmap()
	}
}
