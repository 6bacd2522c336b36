package config

import (
	"fmt"
	"strings"
	"testing"
)

func TestGroups(t *testing.T) {
	devs := strings.Fields("0 1 2 3 4 5")
	for _, c := range []struct {
		p        Pool
		want     string
		mirrored bool
		wrong    string
	}{
		{p: Pool{Copies: 1, Devices: devs[:2]}, want: "[[0] [1]]"},
		{p: Pool{Copies: 2, Devices: devs[:4]}, want: "[[0 1] [2 3]]", mirrored: true},
		{p: Pool{Copies: 2, Devices: devs[:3]}, want: "[[0 1] [2]]", wrong: "3 devices cannot be divided into mirrors of 2"},
		{p: Pool{Copies: 2, Devices: devs[:3], Adding: 1}, want: "[[0 1] [2]]"},
		{p: Pool{Copies: 1, Devices: devs[:3], Adding: 2}, want: "[[0] [1 2]]"},
		{p: Pool{Copies: 1, Devices: devs, Widths: []int{1, 2, 3}}, want: "[[0] [1 2] [3 4 5]]"},
		{p: Pool{Copies: 2, Devices: devs, Widths: []int{3, 2}, Adding: 1}, want: "[[0 1 2] [3 4] [5]]"},
		{p: Pool{Copies: 2, Devices: devs[:5], Widths: []int{2, 3}}, want: "[[0 1] [2 3 4]]", mirrored: true},
		{p: Pool{Copies: 2, Devices: devs, Widths: []int{2, 3}}, want: "[[0 1] [2 3 4] [5]]", wrong: "6 devices are not mirrors of [2 3]"},
		{p: Pool{Copies: 1, Devices: devs[:4], Widths: []int{4}}, want: "[[0 1 2 3]]", mirrored: true, wrong: "a device with 4 copies"},
		{p: Pool{Copies: 1}, want: "[]"},
	} {
		if got := fmt.Sprint(c.p.Groups()); got != c.want || c.p.Mirrored() != c.mirrored {
			t.Errorf("%+v: %s, %v", c.p, got, c.p.Mirrored())
		}
		if err := c.p.validateGroups(); fmt.Sprint(err) != c.wrong && (c.wrong != "" || err != nil) {
			t.Errorf("%+v: %v", c.p, err)
		}
		if c.wrong == "" && c.p.Adding == 0 && len(c.p.Devices) > 0 {
			if w := WidthsOf(c.p.Groups(), c.p.Copies); fmt.Sprint(w) != fmt.Sprint(c.p.Widths) {
				t.Errorf("%+v: widths %v", c.p, w)
			}
		}
	}
}

// What was exported is the pair's no more, whatever its settings name; what was
// imported is, under its own name, in place of that.
func TestStateOfMoves(t *testing.T) {
	dir := t.TempDir()
	load := func(a, b GuestState) (pa, pb Pool) {
		t.Helper()
		if err := (State{Guests: map[string]GuestState{"a": a, "b": b}}).Write(dir); err != nil {
			t.Fatal(err)
		}
		c, err := Load(dir, "")
		if err != nil {
			t.Fatal(err)
		}
		return c.Guest("a").Pool, c.Guest("b").Pool
	}
	a, b := load(GuestState{Exported: "pool-a"}, GuestState{})
	if a.Exists() || a.Create || len(a.Devices) > 0 || !b.Exists() {
		t.Errorf("%+v, %+v", a, b)
	}
	in := GuestState{Exported: "pool-b", Pool: "pool-a", Devices: []string{"/x", "/y", "/z"}, Copies: 2, Widths: []int{2, 1}, Created: true, Import: &Import{ID: "1"}}
	a, b = load(GuestState{Exported: "pool-a"}, in) // a name that was the other guest's
	if a.Exists() || !b.Exists() || b.Name != "pool-a" || b.Create || b.Import == nil || len(b.Groups()) != 2 {
		t.Errorf("%+v, %+v", a, b)
	}
}
