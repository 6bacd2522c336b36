package guest

import (
	"context"
	"fmt"
	"slices"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/pool"
	"github.com/pollux-storage/pollux/internal/space"
)

// scanActions are what may be asked of a scan.
var scanActions = []string{control.ScanStart, control.ScanUndo, control.ScanPause, control.ScanResume, control.ScanStop}

// surveyActions are what may be asked of a survey.
var surveyActions = []string{control.SurveyStart, control.SurveyStop}

// dedup tells what the pools that this guest serves share, and of a pool that cannot say
// it why not.
func (g *Guest) dedup(ctx context.Context) ([]control.PoolDedup, error) {
	all := []control.PoolDedup{}
	for _, t := range g.all() {
		st := t.open()
		if st == nil {
			continue
		}
		p, err := st.Dedup(ctx)
		if err != nil {
			p = control.PoolDedup{Error: err.Error(), References: []control.DedupReferences{}, Volumes: []control.VolumeDedup{}}
		}
		p.Pool, p.Guest = st.Name(), t.identity
		all = append(all, p)
	}
	return all, nil
}

func (s *store) Dedup(ctx context.Context) (control.PoolDedup, error) {
	f, err := s.Sharing(ctx)
	if err != nil {
		return control.PoolDedup{}, err
	}
	st := s.Pool.Stats()
	d := control.PoolDedup{
		LLRRM:  llrrmStatus(st),
		Refers: f.Refers, Stored: f.Stored, Saved: f.Saved, Metadata: f.Metadata,
		DedupCounts: control.DedupCounts{Shared: f.Shared, Written: f.Written, Zeros: f.Zeros}, Unequal: f.Unequal,
		References: references(&f.References), Index: dedupIndex(f.Index), Resized: dedupIndex(f.Resized), Scan: dedupScan(st.Scan), Volumes: []control.VolumeDedup{},
		Survey: control.DedupSurvey{State: string(f.Survey.State), Done: f.Survey.Done, Total: f.Survey.Total, Why: f.Survey.Why}, MeanExtent: f.Survey.MeanExtent(),
	}
	for _, v := range f.Volumes {
		d.Volumes = append(d.Volumes, control.VolumeDedup{
			Name: v.Name, Dedup: v.Run > 0, THN: v.Run, Refers: v.Used, DedupCounts: countsOf(v.VolumeStats), Survey: volumeSurvey(f.Survey, v.ID),
		})
	}
	return d, nil
}

// surveyPool begins or ends the survey of a pool.
func (g *Guest) surveyPool(ctx context.Context, name string, c control.SurveyChange) (control.PoolDedup, error) {
	t, st, err := g.serving(name)
	if err != nil {
		return control.PoolDedup{}, err
	}
	if !slices.Contains(surveyActions, c.Action) {
		return control.PoolDedup{}, control.NewError(control.KindInvalid, fmt.Sprintf("a survey cannot be made to %q", c.Action), "")
	}
	if err := st.Survey(ctx, c.Action); err != nil {
		return control.PoolDedup{}, err
	}
	p, err := st.Dedup(ctx)
	p.Pool, p.Guest = st.Name(), t.identity
	return p, err
}

// volumeSurvey is what surveys have found of a volume, nil for nothing.
func volumeSurvey(s pool.SurveyStats, id block.VolumeID) *control.VolumeSurvey {
	v, ok := s.Volumes[id]
	if !ok {
		return nil
	}
	return &control.VolumeSurvey{At: v.At, Exact: v.Exact, WouldFree: v.Frees, MeanExtent: v.MeanExtent(), Blocks: v.Blocks, Pieces: v.Pieces}
}

func countsOf(s cp.VolumeStats) control.DedupCounts {
	return control.DedupCounts{Shared: s.Shared, Written: s.Blocks, Zeros: s.Zeros}
}

// references gathers blocks by their references: 1, 2, 3 and 4, 5 to 8, and so on.
func references(blocks *[space.MaxCount + 1]int64) (out []control.DedupReferences) {
	for from, to := 1, 1; from <= space.MaxCount; from, to = to+1, min(2*to, space.MaxCount) {
		r := control.DedupReferences{From: from, To: to}
		for _, n := range blocks[from : to+1] {
			r.Blocks += n
		}
		out = append(out, r)
	}
	return out
}

func dedupScan(s pool.ScanStats) control.DedupScan {
	return control.DedupScan{
		State: string(s.State), Volume: s.Volume, Undo: s.Undo, Done: s.Done, Total: s.Total,
		Moved: s.Moved, Raced: s.Raced, Failed: s.Failed, Why: s.Why,
	}
}

func dedupIndex(x *pool.IndexProgress) *control.DedupIndex {
	if x == nil {
		return nil
	}
	return &control.DedupIndex{
		Bytes: x.Bytes, Entries: int64(x.Entries), Slots: int64(x.Slots), Every: x.Every, Ends: x.Why, Done: x.Done, Pages: x.Pages,
	}
}
