package main

import (
	"context"
	"encoding/json"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/flashmap/policy"
)

// seed returns the seed of a random test and prints it.
func seed(t *testing.T) uint64 {
	t.Helper()
	s := rand.Uint64()
	if v := os.Getenv("POLLUX_SEED"); v != "" {
		var err error
		if s, err = strconv.ParseUint(v, 10, 64); err != nil {
			t.Fatalf("POLLUX_SEED: %v", err)
		}
	}
	t.Logf("seed %d (POLLUX_SEED=%d repeats this run)", s, s)
	return s
}

// Each workload, made small, comes to what is wanted with the defaults.
func TestWorkloads(t *testing.T) {
	s := seed(t)
	size := scale{sets: 128, setBytes: 256 * kib, rate: 3000, day: 8, stay: 4, half: 8}
	if os.Getenv("POLLUX_SOAK") == "1" {
		size = scale{sets: 4096, setBytes: 256 * kib, rate: 32_000, day: 48, stay: 12, half: 48}
	}
	p := policy.Defaults()
	if os.Getenv("POLLUX_SOAK") != "1" {
		p.Interval *= 2 // half the work
	}
	size.window = p.Collect.Window
	for i := range workloads {
		w := &workloads[i]
		t.Run(w.name, func(t *testing.T) {
			o, err := measure(t.Context(), w, size, s, p)
			if err != nil {
				t.Fatal(err)
			}
			for _, v := range o.verdicts() {
				if !v.Reached {
					t.Error(v.Text)
				}
			}
			if o.Policy.mean() >= o.None.mean() {
				t.Errorf("%v an access, %v without flash", o.Policy.mean(), o.None.mean())
			}
			if o.Promoted == 0 || o.Promoted+o.Demoted >= o.Fetched {
				t.Errorf("%d and %d sets moved, a cache fetched %d", o.Promoted, o.Demoted, o.Fetched)
			}
		})
	}
}

// What a policy that is bad comes to is seen, so that good verdicts mean something.
func TestBadPolicy(t *testing.T) {
	s := seed(t)
	p := policy.Defaults()
	q := policy.DefaultPattern()
	q.Promote = "reads < 6.0" // what is used most stays where it is
	p.Patterns = map[string]policy.Pattern{policy.AnyType: q}
	size := scale{sets: 128, setBytes: 256 * kib, window: p.Collect.Window, rate: 1000, day: 4, stay: 2, half: 4}
	missed := 0
	for i := range workloads[:1] {
		o, err := measure(t.Context(), &workloads[i], size, s, p)
		if err != nil {
			t.Fatal(err)
		}
		for _, v := range o.verdicts() {
			if !v.Reached {
				missed++
			}
		}
	}
	if missed < 1 {
		t.Error("all verdicts are good")
	}
}

func TestRun(t *testing.T) {
	dir := t.TempDir()
	o := options{out: filepath.Join(dir, "out", "flash.json"), seed: 1, only: "zipf", params: filepath.Join(dir, "p.yaml"),
		scale: scale{sets: 128, setBytes: 256 * kib, rate: 1000, day: 4, stay: 2, half: 4}}
	if err := os.WriteFile(o.params, []byte("collect: {window: 5m}"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := run(t.Context(), o); err != nil && err != errMissed {
		t.Fatal(err)
	}
	b, err := os.ReadFile(o.out)
	if err != nil {
		t.Fatal(err)
	}
	var all results
	if err := json.Unmarshal(b, &all); err != nil || len(all.Workloads) != 1 || len(all.Latencies) != 0 || all.Workloads[0].Slots == 0 || all.Workloads[0].Policy.Hits == 0 {
		t.Errorf("%v, %+v", err, all)
	}
	o.only, o.part = latencies, 500
	if err := run(t.Context(), o); err != nil && err != errMissed {
		t.Fatal(err)
	}
	if b, err = os.ReadFile(o.out); err != nil {
		t.Fatal(err)
	}
	all = results{}
	if err := json.Unmarshal(b, &all); err != nil || len(all.Workloads) != 0 || len(all.Latencies) != 2 || all.Latencies[0].Rows[2].Primary.Requests == 0 {
		t.Errorf("%v, %+v", err, all)
	}
	for name, change := range map[string]func(*options){
		"no such workload": func(o *options) { o.only = "no" },
		"no such file":     func(o *options) { o.params = filepath.Join(dir, "no") },
		"a wrong file":     func(o *options) { o.params = o.out },
	} {
		bad := o
		if change(&bad); run(t.Context(), bad) == nil {
			t.Error(name)
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := run(ctx, o); err == nil {
		t.Error("a run that was ended has ended well")
	}
}

// Moves that are paced hardly hold clients up; those that are not do, so that it would be
// seen if they were.
func TestLatencies(t *testing.T) {
	part := 12
	if os.Getenv("POLLUX_SOAK") == "1" {
		part = 1
	}
	all, err := measureLatencies(t.Context(), part, seed(t), policy.Defaults().Budget)
	if err != nil {
		t.Fatal(err)
	}
	// Of fewer requests the tail is less certain.
	limit := tailLimit
	if part > 1 {
		limit += 0.1
	}
	for _, l := range all {
		none, burst, paced := l.Rows[0], l.Rows[1], l.Rows[2]
		t.Logf("%s: %+v", l.Drive, l.Rows)
		if none.Busy < 0.5 || none.Busy > 0.6 {
			t.Errorf("%s: busy for %.2f of the time", l.Drive, none.Busy)
		}
		if r := max(ratio(paced.Primary, none.Primary), ratio(paced.Flash, none.Flash)); r > limit || paced.Moved < 30 {
			t.Errorf("%s: with %d moves p99 is %.2f times as long", l.Drive, paced.Moved, r)
		}
		if r := ratio(burst.Primary, none.Primary); r < 1.2 || burst.Moved <= paced.Moved {
			t.Errorf("%s: with %d moves that nobody paces p99 is %.2f times as long", l.Drive, burst.Moved, r)
		}
	}
}

// What the rivals do, in numbers that are easily seen.
func TestRivals(t *testing.T) {
	c := counts{1: 50, 2: 30, 3: 15, 4: 5}
	if hits, all := c.best(2); hits != 80 || all != 100 {
		t.Errorf("%d of %d", hits, all)
	}
	for share, want := range map[float64]int{0: 0, 0.5: 1, 0.51: 2, 0.95: 3, 1: 4} {
		if got := roomFor(share, []counts{c, c}); got != want {
			t.Errorf("%v needs %d sets, want %d", share, got, want)
		}
	}
	l := newLRU(2)
	hits := 0
	for _, set := range []int{1, 2, 1, 3, 2, 1, 1} {
		if l.use(set) {
			hits++
		}
	}
	if hits != 2 || l.taken != 5 {
		t.Errorf("%d hits, %d fetched", hits, l.taken)
	}
}

// A window is made the same each time, in order of time and within the device.
func TestDraw(t *testing.T) {
	s := scale{sets: 256, setBytes: 256 * kib, window: 10 * time.Minute, rate: 2000, day: 2, stay: 2}
	places := permute(s, 5)
	for i := range workloads {
		w := &workloads[i]
		for index := range 4 {
			a, b := w.draw(s, 5, index, places), w.draw(s, 5, index, places)
			if len(a) < s.rate/4 || len(a) != len(b) {
				t.Fatalf("%s: %d and %d accesses", w.name, len(a), len(b))
			}
			for k := range a {
				if a[k] != b[k] {
					t.Fatalf("%s: %+v, then %+v", w.name, a[k], b[k])
				}
				if a[k].at < 0 || k > 0 && a[k].at < a[k-1].at || a[k].offset < 0 || a[k].offset%(4*kib) != 0 ||
					a[k].offset+a[k].bytes > int64(s.sets)*s.setBytes {
					t.Fatalf("%s: %+v", w.name, a[k])
				}
			}
		}
	}
}
