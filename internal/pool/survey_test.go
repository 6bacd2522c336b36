package pool

import (
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/blockmap"
)

// surveyStep makes a survey take a step, as Run does.
func (r *rig) surveyStep() {
	r.t.Helper()
	err := r.do(context.Background(), func() error {
		s := r.Pool.survey
		s.next = time.Time{}
		for s.work(time.Now()); s.wantsFold(); s.work(time.Now()) {
			if err := r.foldAll(); err != nil {
				return err
			}
			s.next = time.Time{}
		}
		return nil
	})
	if err != nil {
		r.t.Fatal(err)
	}
}

// surveyAll brings a survey to its end.
func (r *rig) surveyAll() SurveyStats {
	r.t.Helper()
	if err := r.Survey(context.Background(), SurveyStart); err != nil {
		r.t.Fatal(err)
	}
	for n := 0; r.Surveyed().State == SurveyRunning; n++ {
		if r.surveyStep(); n > 10_000 {
			r.t.Fatalf("the survey does not come to an end: %+v", r.Surveyed())
		}
	}
	return r.Surveyed()
}

// idOf returns the identity of a volume.
func (r *rig) idOf(name string) block.VolumeID {
	r.t.Helper()
	for _, v := range r.Volumes() {
		if v.Name == name {
			return v.ID
		}
	}
	r.t.Fatalf("no volume %s", name)
	return 0
}

// surveyOf is what a survey has found of a volume, without its time.
func (r *rig) surveyOf(st SurveyStats, name string) VolumeSurvey {
	r.t.Helper()
	v, ok := st.Volumes[r.idOf(name)]
	if !ok || v.At.IsZero() {
		r.t.Errorf("nothing is known of volume %s: %+v", name, st)
	}
	v.At = time.Time{}
	return v
}

// storedBytes returns how many bytes of data the pool has stored.
func (r *rig) storedBytes() int64 {
	r.t.Helper()
	s, err := r.Sharing(context.Background())
	if err != nil {
		r.t.Fatal(err)
	}
	return s.Stored
}

// What a survey tells of volumes whose blocks are known one by one: those that one volume
// refers to once, several times, and that others refer to as well.
func TestSurvey(t *testing.T) {
	ctx := context.Background()
	r, v := sharingRig(t, 8)
	w := r.sharingVolume("w", 64<<20, 8)
	empty := r.surveyAll()
	if empty.State != SurveyDone || empty.MeanExtent() != 0 || r.surveyOf(empty, "v") != (VolumeSurvey{Exact: true}) {
		t.Errorf("%+v", empty)
	}
	own, twice, both := content(1, 40), content(2, 30), content(3, 50)
	r.put(v, 0, own)      // 40 of one piece, only of v
	r.put(v, 100, twice)  // 30
	r.put(v, 2000, twice) // and once more, of v
	r.put(v, 5000, both)  // 50
	r.put(w, 7, both)     // which w shares
	r.put(w, 900, both)   // twice
	r.put(w, 3000, content(4, 20))
	// The middle of a piece is written anew: three pieces of what was one.
	r.put(v, 10, content(5, 3))
	st := r.surveyAll()
	if st.State != SurveyDone || st.Done != 150+120 || st.Total != st.Done || st.Why != "" {
		t.Errorf("%+v", st)
	}
	if got, want := r.surveyOf(st, "v"), (VolumeSurvey{Exact: true, Frees: 70 * block.Size, Blocks: 150, Pieces: 3 + 1 + 1 + 1}); got != want || got.MeanExtent() != 25 {
		t.Errorf("%+v instead of %+v", got, want)
	}
	if got, want := r.surveyOf(st, "w"), (VolumeSurvey{Exact: true, Frees: 20 * block.Size, Blocks: 120, Pieces: 3}); got != want || got.MeanExtent() != 40 {
		t.Errorf("%+v instead of %+v", got, want)
	}
	if st.MeanExtent() != 270.0/9 {
		t.Errorf("the mean extent of the pool is %v", st.MeanExtent())
	}

	// What was found stays until it is found anew; what w alone has is more without v.
	stored := r.storedBytes()
	if err := r.DeleteVolume(ctx, "v"); err != nil {
		t.Fatal(err)
	}
	r.fold()
	if freed := stored - r.storedBytes(); freed != 70*block.Size {
		t.Errorf("%d bytes were freed", freed)
	}
	if st = r.Surveyed(); len(st.Volumes) != 1 || r.surveyOf(st, "w").Frees != 20*block.Size {
		t.Errorf("%+v", st)
	}
	if st = r.surveyAll(); r.surveyOf(st, "w").Frees != 70*block.Size {
		t.Errorf("%+v", st)
	}
	r.shut()
}

// What is walked several times, for a window of the pool each, and in one, is the same as
// what a recount of all maps says, and deleting frees that much, after any mixture of
// writes, what was written before, trims and deletes.
func TestSurveyRecount(t *testing.T) {
	long(t)
	several := false
	for seed := range uint64(few(8)) {
		rng := rand.New(rand.NewPCG(seed, 77))
		what := fmt.Sprintf("seed %d", seed)
		r := newRigWithLog(t, 1+rng.IntN(3), testSize, 16<<20)
		r.mustOpen()
		volumes := map[string]block.Volume{}
		names := []string{"a", "b", "c", "d"}
		for _, name := range names {
			volumes[name] = r.sharingVolume(name, 64<<20, 1+rng.IntN(4))
		}
		var pieces [][]byte
		for i := range uint64(6) {
			pieces = append(pieces, content(seed<<8+i, 64))
		}
		draw := func(ops int) {
			for range ops {
				v, lba := volumes[names[rng.IntN(len(names))]], rng.Int64N(1500)
				switch k := rng.IntN(10); {
				case k < 6:
					from := rng.IntN(60)
					n := 1 + rng.IntN(64-from)
					r.put(v, lba, pieces[rng.IntN(len(pieces))][from*block.Size:][:n*block.Size])
				case k < 8:
					r.put(v, lba, content(rng.Uint64(), 1+rng.IntN(20)))
				default:
					if err := v.Trim(context.Background(), lba*block.Size, (1+rng.Int64N(300))*block.Size, block.Tag{}); err != nil {
						t.Fatal(err)
					}
				}
			}
		}
		for len(names) > 0 {
			draw(60)
			if err := r.Pool.Commit(context.Background()); err != nil { // the last trims, too
				t.Fatal(err)
			}
			var st SurveyStats
			want, once := r.recountSurvey(), int64(0)
			for _, window := range []uint64{surveyWindow, 4096, 777} {
				r.Pool.survey.window = window
				if st = r.surveyAll(); st.State != SurveyDone || st.Done != st.Total {
					t.Fatalf("%s: %+v", what, st)
				}
				if window == surveyWindow {
					once = st.Total
				}
				several = several || st.Total > once
				for _, name := range names {
					if got := r.surveyOf(st, name); got != *want[name] {
						t.Fatalf("%s, window %d: volume %s: %+v instead of %+v", what, window, name, got, want[name])
					}
				}
			}
			i := rng.IntN(len(names))
			frees, stored := r.surveyOf(st, names[i]).Frees, r.storedBytes()
			if err := r.DeleteVolume(context.Background(), names[i]); err != nil {
				t.Fatal(err)
			}
			if err := r.do(context.Background(), r.freeEverything); err != nil {
				t.Fatal(err)
			}
			if freed := stored - r.storedBytes(); freed != frees {
				t.Fatalf("%s: deleting %s freed %d bytes instead of %d", what, names[i], freed, frees)
			}
			names = append(names[:i], names[i+1:]...)
		}
		r.shut()
	}
	if !several {
		t.Error("no volume was walked more than once")
	}
}

// recountSurvey says what a survey should have found of each volume in a pool at rest,
// from what can be looked up of all of them.
func (r *rig) recountSurvey() map[string]*VolumeSurvey {
	r.t.Helper()
	const several = ""
	owner := map[block.Physical]string{}
	want := map[string]*VolumeSurvey{}
	for _, v := range r.Volumes() {
		ptrs := make([]block.Pointer, v.Size/block.Size)
		if err := r.bmap.Lookup(v.ID, 0, ptrs); err != nil {
			r.t.Fatal(err)
		}
		w := &VolumeSurvey{Exact: true}
		want[v.Name] = w
		for i, p := range ptrs {
			if p.IsHole() {
				continue
			}
			if o, ok := owner[p.Phys]; !ok || o == v.Name {
				owner[p.Phys] = v.Name
			} else {
				owner[p.Phys] = several
			}
			if w.Blocks++; i == 0 || ptrs[i-1].IsHole() || ptrs[i-1].Phys+1 != p.Phys {
				w.Pieces++
			}
		}
	}
	for _, name := range owner {
		if name != several {
			want[name].Frees += block.Size
		}
	}
	return want
}

// A survey of which others change what it looks at says that it is not exact, goes on
// without a volume that is deleted, and can be stopped.
func TestSurveyMeanwhile(t *testing.T) {
	ctx := context.Background()
	r, v := sharingRig(t, 8)
	for i := range int64(70) { // more leaves than a step looks at
		r.put(v, i*blockmap.LeafBlocks%(63<<8), content(uint64(i), 2))
	}
	big := r.volume("big", 1<<30)
	for i := range int64(70) {
		r.put(big, i*blockmap.LeafBlocks, content(uint64(1000+i), 2))
	}
	for _, bad := range []string{SurveyStop, "sing"} {
		if err := r.Survey(ctx, bad); !errors.Is(err, block.ErrInvalid) || !strings.Contains(err.Error(), string(SurveyNever)) {
			t.Errorf("%s: %v", bad, err)
		}
	}
	begin := func() {
		t.Helper()
		if err := r.Survey(ctx, SurveyStart); err != nil {
			t.Fatal(err)
		}
		if err := r.Survey(ctx, SurveyStart); !errors.Is(err, block.ErrInvalid) || !strings.Contains(err.Error(), string(SurveyRunning)) {
			t.Errorf("two at once: %v", err)
		}
		for len(r.Surveyed().Volumes) == 0 { // until big's turn
			r.surveyStep()
		}
		r.surveyStep()
	}
	begin()
	r.put(big, 7, content(7777, 1))
	for r.Surveyed().State == SurveyRunning {
		r.surveyStep()
	}
	st := r.Surveyed()
	if !r.surveyOf(st, "v").Exact || r.surveyOf(st, "big") != (VolumeSurvey{Blocks: 140, Pieces: 70, Frees: 140 * block.Size}) {
		t.Errorf("%+v", st)
	}
	// A second one begins with what is there: what was found before stays until then.
	if err := r.Survey(ctx, SurveyStart); err != nil {
		t.Fatal(err)
	}
	r.surveyStep()
	if now := r.Surveyed(); now.Done != 0 || now.Volumes[r.idOf("big")] != st.Volumes[r.idOf("big")] {
		t.Errorf("%+v", now)
	}
	if err := r.Survey(ctx, SurveyStop); err != nil {
		t.Fatal(err)
	}
	if now := r.Surveyed(); now.State != SurveyStopped || now.Why != "somebody has stopped it" || len(now.Volumes) != 2 {
		t.Errorf("%+v", now)
	}

	r.die()
	r.mustOpen()
	if now := r.Surveyed(); now.State != SurveyNever || len(now.Volumes) != 0 {
		t.Errorf("a pool that was opened anew: %+v", now)
	}
	begin()
	if err := r.DeleteVolume(ctx, "big"); err != nil {
		t.Fatal(err)
	}
	for r.Surveyed().State == SurveyRunning {
		r.surveyStep()
	}
	if now := r.Surveyed(); now.State != SurveyDone || len(now.Volumes) != 1 {
		t.Errorf("%+v", now)
	}
	r.shut()
}

// Of a volume whose map cannot be read nothing is told but that; others are surveyed. A
// survey ends with its pool.
func TestSurveyUnreadable(t *testing.T) {
	ctx := context.Background()
	r := newRigWithLog(t, 1, testSize, 16<<20)
	faults := r.faulty()
	r.mustOpen()
	v, w := r.volume("v", 64<<20), r.volume("w", 64<<20)
	r.put(v, 0, content(1, 20))
	r.put(w, 0, content(2, 30))
	r.fold()
	leaf, err := blockmap.FindLeaf(r.reader, r.bmap.Trees()[r.idOf("v")].Root, 0)
	if err != nil {
		t.Fatal(err)
	}
	r.die()
	r.mustOpen()
	root := r.bmap.Trees()[r.idOf("v")].Root
	for _, page := range []block.Pointer{leaf, root} {
		for _, p := range []block.Pointer{page, page.Second()} {
			faults[0].Add(blocktest.Rule{Op: hpdi.OpRead, Offset: int64(p.Phys.Block()) * block.Size, Length: block.Size, Err: errMedium})
		}
		st := r.surveyAll()
		if _, ok := st.Volumes[r.idOf("v")]; ok || st.State != SurveyDone || !strings.Contains(st.Why, "map of volume v cannot be read") || r.surveyOf(st, "w").Frees != 30*block.Size {
			t.Errorf("%+v", st)
		}
		faults[0].Clear()
	}
	st := r.surveyAll()
	if st.Why != "" || r.surveyOf(st, "v").Frees != 20*block.Size {
		t.Errorf("%+v", st)
	}
	if err := r.Survey(ctx, SurveyStart); err != nil {
		t.Fatal(err)
	}
	r.surveyStep()
	if err := r.do(ctx, func() error { r.Pool.survey.close(); return nil }); err != nil {
		t.Fatal(err)
	}
	if st = r.Surveyed(); st.State != SurveyStopped || st.Why != "the pool was closed" {
		t.Errorf("%+v", st)
	}
	r.shut()
}
