package main

import (
	"bytes"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"time"
)

// The steps of the newest start are taken, of the guest's own identity.
func TestSteps(t *testing.T) {
	const log = `time=2026-01-02T03:04:05.000Z level=INFO msg="guest starts" guest=a incarnation=1 pid=7
time=2026-01-02T03:04:05.900Z level=INFO msg=serving guest=a incarnation=1 identity=a after=1s steps="start: 1s"
time=2026-01-02T03:05:00.030Z level=INFO msg="guest starts" guest=a incarnation=1 pid=8
time=2026-01-02T03:05:00.031Z level=INFO msg=granted guest=a incarnation=1 identity=b term=1 basis=start reason=""
time=2026-01-02T03:05:00.034Z level=INFO msg=granted guest=a incarnation=1 identity=a term=3 basis=start reason="a ended: killed"
time=2026-01-02T03:05:00.050Z level=INFO msg=serving guest=a incarnation=1 identity=a after=49ms steps="start: 33ms, lock devices: 12.5ms, serve: 61µs"
`
	started := time.Date(2026, 1, 2, 3, 5, 0, 10e6, time.UTC)
	got, err := steps(log, 1, started)
	want := []named{{"process", 20}, {"hello and grant", 4}, {"lock devices", 12.5}, {"serve", 0.061}}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
	for _, bad := range []string{
		log[:strings.LastIndex(log, "msg=serving")],
		strings.ReplaceAll(log, "12.5ms", "long"),
		strings.ReplaceAll(log, "03:05:00.030Z", "yesterday"),
	} {
		if got, err := steps(bad, 1, started); err == nil {
			t.Errorf("%v of\n%s", got, bad)
		}
	}
}

func TestReport(t *testing.T) {
	r := newReport(options{})
	for _, read := range []float64{30, 10, 20} {
		s := sample{Read: read, All: 10 * read, Steps: []named{{"map", 1}, {"serve", read / 2}, {"map", 2}}}
		s.rest()
		r.add(caseTakeover, s)
	}
	r.add(caseOwn, sample{Read: 2500, All: 2600, Warm: &warm{Before: warmth{Hits: 0.9, P99: 50}, After: warmth{Hits: 0.8, P99: 70}}})
	r.finish()
	c := r.find(caseTakeover)
	if want := []named{{"map", 3}, {"serve", 10}, {"first read", 7}, {"other exports", 180}}; c.Read != 20 || c.All != 200 || !slices.Equal(c.Steps, want) {
		t.Errorf("%+v", c)
	}
	if r.Cases[0].Name != caseOwn {
		t.Errorf("first comes %s", r.Cases[0].Name)
	}
	if err := r.judge(); err == nil || !strings.Contains(err.Error(), "own took 2600.0 ms, wanted are 2000") || !strings.Contains(err.Error(), "after own the cache had 0.8000, and 0.9000 before") || strings.Contains(err.Error(), caseTakeover) {
		t.Error(err)
	}
	var out bytes.Buffer
	r.print(&out)
	for _, want := range []string{"| own | 1 | 2500.0 | 2600.0 (2000) |", "| takeover | 3 | 20.0 (150) | 200.0 |", "| map | 3.00 |", "| own, before | 0.9000 | 0 | 50 | 0 |", "| own, after | 0.8000 | 0 | 70 | 0 |"} {
		if !strings.Contains(out.String(), want) {
			t.Errorf("no %q in\n%s", want, out.String())
		}
	}
}

// Every block of every volume in use is another, and the same each time.
func TestContent(t *testing.T) {
	all := content(3, 8*blockSize, 2*blockSize)
	if !bytes.Equal(all[blockSize:], content(3, 9*blockSize, blockSize)) {
		t.Error("a block alone is not what it is beside others")
	}
	if bytes.Equal(all[:blockSize], all[blockSize:]) || bytes.Equal(all[:blockSize], content(4, 8*blockSize, blockSize)) {
		t.Error("two blocks are the same")
	}
}

// Skewed reads are of what was written, and most of them of few blocks, the same each time.
func TestDraw(t *testing.T) {
	w := &world{options: options{used: 10, volumes: 10}}
	for v := range w.used {
		w.places = append(w.places, []int64{int64(v) << 20, int64(v)<<20 + 3*pieceSize})
	}
	times := map[[2]int64]int{}
	draw := w.draw(rand.New(rand.NewPCG(1, 2)))
	for range 32_000 {
		v, at := draw()
		if in := at - int64(v)<<20; in < 0 || in%blockSize != 0 || in >= pieceSize && in < 3*pieceSize || in >= 4*pieceSize {
			t.Fatalf("volume %d at %d", v, at)
		}
		times[[2]int64{int64(v), at}]++
	}
	var all []int
	for _, n := range times {
		all = append(all, n)
	}
	slices.Sort(all)
	first := 0
	for _, n := range all[len(all)-len(all)/10:] {
		first += n
	}
	if len(all) < 300 || first < 16_000 || first > 28_000 {
		t.Errorf("%d blocks of 320, a tenth of them %d times of 32000", len(all), first)
	}
}
