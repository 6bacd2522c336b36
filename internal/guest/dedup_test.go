package guest

import (
	"slices"
	"testing"

	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/partner"
	"github.com/pollux-storage/pollux/internal/space"
)

// Each block is in one of the groups of references, and blocks that are free are in none.
func TestGroupsOfReferences(t *testing.T) {
	var blocks [space.MaxCount + 1]int64
	for i := range blocks {
		blocks[i] = int64(1000 + i)
	}
	sum := func(from, to int) (n int64) {
		for i := from; i <= to; i++ {
			n += int64(1000 + i)
		}
		return n
	}
	var want []control.DedupReferences
	for _, r := range [][2]int{{1, 1}, {2, 2}, {3, 4}, {5, 8}, {9, 16}, {17, 32}, {33, 64}, {65, 128}, {129, 255}} {
		want = append(want, control.DedupReferences{From: r[0], To: r[1], Blocks: sum(r[0], r[1])})
	}
	if got := references(&blocks); !slices.Equal(got, want) {
		t.Errorf("%+v", got)
	}
}

// The survey of a pool takes the commands that there are, and what was found is part of
// the status.
func TestSurveyPool(t *testing.T) {
	b := newBench(t)
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindServing)
	c, ctx := b.client(), t.Context()
	if _, err := c.CreateVolume(ctx, control.VolumeCreate{Name: "w", Size: 4096, Guest: "a"}); err != nil {
		t.Fatal(err)
	}
	export := func() control.Export {
		t.Helper()
		st, err := c.Status(ctx)
		if err != nil || len(st.Guests[0].Exports) != 1 {
			t.Fatalf("%+v, %v", st, err)
		}
		return st.Guests[0].Exports[0]
	}
	if e := export(); e.Survey != nil {
		t.Errorf("%+v", e)
	}
	for _, x := range []struct {
		pool, action string
		kind         control.Kind
	}{
		{"pool-a", control.SurveyStart, ""}, {"pool-a", control.SurveyStop, ""}, {"pool-a", "sing", control.KindInvalid},
		{"pool-x", control.SurveyStart, control.KindNotFound},
	} {
		p, err := c.SurveyPool(ctx, x.pool, control.SurveyChange{Action: x.action})
		if kindOf(err) != x.kind || err == nil && (p.Pool != "pool-a" || p.Guest != "a" || p.Survey.State != x.action) {
			t.Errorf("%s: %+v, %v", x.action, p, err)
		}
	}
	if e := export(); e.Survey == nil || e.Survey.WouldFree != 77 {
		t.Errorf("%+v", e)
	}
	b.storage.last().refuse.Store(true)
	if _, err := c.SurveyPool(ctx, "pool-a", control.SurveyChange{Action: control.SurveyStart}); kindOf(err) != control.KindNoSpace {
		t.Error(err)
	}
}
