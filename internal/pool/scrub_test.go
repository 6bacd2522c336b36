package pool

import (
	"context"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/mirror"
)

// scrubStep makes the scrub take its next step and does what it waits for, as Run
// does.
func (r *rig) scrubStep() error {
	return r.do(context.Background(), func() error {
		s := r.Pool.scrub
		s.next = time.Time{}
		s.work(time.Now())
		if u := r.dirty.Usage(); u.Active+u.Frozen >= u.Permits/4 {
			return r.commitAll()
		}
		if s.wantsFold() || r.machine.Folding() {
			_, err := r.machine.Fold()
			return err
		}
		return nil
	})
}

// level makes the copies of a mirror equal, as its guest does in the background.
func level(t *testing.T, m *mirror.Mirror) {
	t.Helper()
	for done := false; !done; {
		var err error
		if done, err = m.Resync(64); err != nil {
			t.Fatal(err)
		}
	}
}

// scrubAll starts a scrub and lets it go through.
func (r *rig) scrubAll() ScrubStats {
	r.t.Helper()
	if err := r.Scrub(context.Background(), ScrubStart); err != nil {
		r.t.Fatal(err)
	}
	return r.scrubRest()
}

func (r *rig) scrubRest() ScrubStats {
	r.t.Helper()
	for range 100_000 {
		if err := r.scrubStep(); err != nil {
			r.t.Fatal(err)
		}
		if s := r.Pool.scrub.Stats(); s.State != ScrubRunning {
			return s
		}
	}
	r.t.Fatalf("the scrub does not come to an end: %+v", r.Pool.scrub.Stats())
	return ScrubStats{}
}

// fillBlocks writes n blocks of a volume, each with another content, and folds.
func fillBlocks(r *rig, v block.Volume, n int) {
	r.t.Helper()
	for i := range n {
		if err := write(v, int64(i)*block.Size, pattern(byte(i))); err != nil {
			r.t.Fatal(err)
		}
		if i%128 == 127 { // the log holds no more
			if err := r.Pool.Commit(context.Background()); err != nil {
				r.t.Fatal(err)
			}
		}
	}
	if err := r.Fold(context.Background()); err != nil {
		r.t.Fatal(err)
	}
}

// blocksOf returns one block of each kind that a scrub reads, and the twins of pages.
func blocksOf(r *rig, v block.Volume) map[string]block.Physical {
	r.t.Helper()
	var at map[string]block.Physical
	err := r.do(context.Background(), func() error {
		sb := r.machine.Superblock()
		var data [1]block.Pointer
		if err := r.bmap.Lookup(v.Info().ID, 7, data[:]); err != nil {
			return err
		}
		at = map[string]block.Physical{
			"data": data[0].Phys, "label": block.At(0, labelBlocks[1]), "superblock": block.At(0, cp.SuperblockAt(sb.Generation)[0]),
		}
		for name, root := range map[string]block.Pointer{"map": r.bmap.Trees()[v.Info().ID].Root, "counts": sb.Devices[0].Counts, "catalogue": sb.Catalogue} {
			if err := blockmap.Walk(r.reader, root, func(p block.Pointer, level int, _ uint64) (bool, error) {
				what := map[int]string{0: " leaf", blockmap.Top - 1: " page", blockmap.Top: " root"}[level]
				if what == "" {
					return true, nil
				}
				if at[name+what] = p.Phys; p.Twin != 0 {
					at[name+what+" twin"] = p.Second().Phys
				}
				return true, nil
			}); err != nil {
				return err
			}
		}
		return nil
	})
	if err != nil {
		r.t.Fatal(err)
	}
	return at
}

// rot changes one bit of a block of a copy.
func (r *rig) rot(copy int, at block.Physical) {
	base := uint64(0)
	if r.gather != nil {
		base = block.TrackBlocks
	}
	r.devs[copy].Corrupt(int64(base+at.Block())*block.Size+100, 0x10)
}

// A block of each kind rots on one copy: it is found and counted once, and mended,
// so that a second scrub finds nothing and either copy by itself is whole.
func TestScrubMendsOneCopy(t *testing.T) {
	for victim := range 2 {
		r, m := newMirroredRig(t, 2)
		r.mustOpen()
		level(t, m())
		v := r.volume("v", 8<<20)
		fillBlocks(r, v, 700)
		if s := r.scrubAll(); s.Now.Repaired != 0 || s.Now.Unreadable != 0 || s.Now.Blocks < 700 || s.Now.Bytes != 2*block.Size*s.Now.Blocks {
			t.Fatalf("a sound pool: %+v", s)
		}
		places := blocksOf(r, v)
		if len(places) != 12 {
			t.Fatalf("%d places: %v", len(places), places)
		}
		for name, at := range places {
			r.rot(victim, at)
			if s := r.scrubAll(); s.Now.Repaired != 1 || s.Now.Unreadable != 0 {
				t.Errorf("copy %d, %s: %+v", victim, name, s.Now)
			}
		}
		for _, at := range places {
			r.rot(victim, at)
		}
		if s := r.scrubAll(); s.Now.Repaired != uint64(len(places)) || s.Now.Unreadable != 0 {
			t.Errorf("copy %d, all: %+v", victim, s.Now)
		}
		if s := r.scrubAll(); s.Now.Repaired != 0 || s.Now.Unreadable != 0 {
			t.Errorf("copy %d, afterwards: %+v", victim, s.Now)
		}
		r.shut()
		r.reopenDevices()
		r.devs = r.devs[victim:][:1]
		r.mustOpen()
		level(t, m())
		r.shut()
	}
}

// What is bad everywhere is named, and nothing is written in its place.
func TestScrubNamesWhatIsLost(t *testing.T) {
	for _, copies := range []int{1, 2, 3} {
		var r *rig
		var m func() *mirror.Mirror
		if copies == 1 {
			r = newRig(t, 1, testSize)
		} else {
			r, m = newMirroredRig(t, copies)
		}
		var told []ScrubEvent
		r.scrubbing.Tell = func(e ScrubEvent) { told = append(told, e) }
		r.mustOpen()
		if copies > 1 {
			level(t, m())
		}
		v := r.volume("precious", 8<<20)
		fillBlocks(r, v, 300)
		places := blocksOf(r, v)
		rot := func() {
			for _, name := range []string{"data", "map leaf", "catalogue leaf", "label"} {
				for i := range copies {
					r.rot(i, places[name])
				}
				if second := places[name+" twin"]; second != block.None {
					r.rot(0, second)
				}
			}
		}
		rot()
		s := r.scrubAll()
		// The leaf hides the data below it when it is the one of block 7.
		text := ""
		for _, f := range s.Now.Findings {
			text += f.Text + "\n"
		}
		if s.Now.Repaired != 0 || s.Now.Unreadable != 4 || len(s.Now.Findings) != 4 || s.Last.Unreadable != 4 ||
			!strings.Contains(text, `block 7 of volume "precious"`) || !strings.Contains(text, `map of volume "precious" for block 256`) {
			t.Errorf("%d copies: %+v", copies, s)
		}
		if len(told) != 6 || told[0].Kind != "scrub-begin" || told[1].Kind != "scrub-unreadable" || told[5].Kind != "scrub-end" {
			t.Errorf("%d copies: told %+v", copies, told)
		}
		rot() // back
		if s := r.scrubAll(); s.Now.Repaired != 0 || s.Now.Unreadable != 0 {
			t.Errorf("%d copies: what was there was written over: %+v", copies, s.Now)
		}
		r.shut()
	}
}
