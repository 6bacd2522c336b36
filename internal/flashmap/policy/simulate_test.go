package policy

import (
	"math"
	"reflect"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/flashmap/collect"
)

// testTrial has a history of so many equal windows, in which set i was read 100-10·i times
// outside of runs, set 0 was scanned besides, and others that are not known were read.
func testTrial(windows, slots int) Trial {
	p := Past{Number: 1, Type: "disk", Geometry: collect.Geometry{Size: 100 * setBytes, SetBytes: setBytes}}
	for i := range windows {
		w := collect.Window{Start: start.Add(time.Duration(i) * 10 * time.Minute), Length: 10 * time.Minute, Reads: 50, Runs: 20}
		for set := range 10 {
			u := collect.Used{Set: collect.Set(set), Reads: float32(100 - 10*set), Size: 4 * kib}
			if set == 0 {
				u.Runs = 20
			}
			w.Reads += float64(u.Reads)
			w.Sets = append(w.Sets, u)
		}
		p.Windows = append(p.Windows, w)
	}
	return Trial{
		Params: Defaults(), Slots: slots, SetBytes: setBytes, Devices: []Past{p},
		Latencies: Latencies{Primary: 8 * time.Millisecond, Run: time.Millisecond, Flash: 100 * time.Microsecond},
	}
}

// Where flash serves what keeps moving the arm away, runs are as fast as they can be.
func TestSimulateStreams(t *testing.T) {
	for slots, want := range map[int]float64{
		0:  600*8e6 + 20*6e6,
		10: 50*8e6 + 550*1e5 + 20*1e5, // set 0 has the runs, and is on flash
	} {
		trial := testTrial(6, slots)
		trial.Latencies.Run, trial.Latencies.Stream = 6*time.Millisecond, time.Millisecond
		if slots == 0 {
			trial.Latencies.Stream = 0
		}
		for range 2 { // with nothing on flash it makes no difference
			p, err := Simulate(trial)
			if err != nil {
				t.Fatal(err)
			}
			if _, mean := p.Over(3); math.Abs(float64(mean)-want/620) > 1e3 {
				t.Errorf("%d slots, %+v: %v an access, want %v", slots, trial.Latencies, mean, time.Duration(want/620))
			}
			trial.Latencies.Stream = time.Millisecond
		}
	}
	// Set 9, which nobody reads outside of runs, has them, and stays.
	trial := testTrial(6, 9)
	trial.Latencies.Run, trial.Latencies.Stream = 6*time.Millisecond, time.Millisecond
	for i := range trial.Devices[0].Windows {
		w := &trial.Devices[0].Windows[i]
		w.Reads -= 10
		w.Sets[0].Runs, w.Sets[9].Runs, w.Sets[9].Reads = 0, 20, 0
	}
	p, err := Simulate(trial)
	if err != nil {
		t.Fatal(err)
	}
	// 590 of 610 accesses were outside of runs, and 50 of 70 are.
	run := 1e6 + 5e6*(50.0/70)/(590.0/610)
	want := 50*8e6 + 540*1e5 + 20*run
	if _, mean := p.Over(3); math.Abs(float64(mean)-want/610) > 1e3 {
		t.Errorf("%v an access, want %v", mean, time.Duration(want/610))
	}
}

func TestSimulate(t *testing.T) {
	for _, tt := range []struct {
		slots int
		hits  float64 // of 550 known accesses and 50 others
	}{{0, 0}, {1, 100}, {3, 270}, {10, 550}, {50, 550}} {
		trial := testTrial(6, tt.slots)
		p, err := Simulate(trial)
		if err != nil {
			t.Fatal(err)
		}
		hits, mean := p.Over(3)
		if math.Abs(hits-tt.hits/600) > 1e-6 {
			t.Errorf("%d slots: a hit share of %.4f, want %.4f", tt.slots, hits, tt.hits/600)
		}
		runs := 20.0
		if tt.slots > 0 {
			runs = 0 // set 0 is on flash
		}
		want := ((600-tt.hits)*8e6 + runs*1e6 + (tt.hits+20-runs)*1e5) / 620
		if math.Abs(float64(mean)-want) > 1e3 {
			t.Errorf("%d slots: %v an access, want %v", tt.slots, mean, time.Duration(want))
		}
		if p.Moves.Promoted != min(tt.slots, 10) || p.Moves.Demoted != 0 || len(p.Windows) != 6 {
			t.Errorf("%d slots: %+v, %d windows", tt.slots, p.Moves, len(p.Windows))
		}
		if first, _ := p.Over(0); tt.slots > 0 && first >= hits {
			t.Errorf("%d slots: no time was needed to fill flash", tt.slots)
		}
		again, err := Simulate(trial)
		if err != nil || !reflect.DeepEqual(p, again) {
			t.Errorf("%d slots: the second simulation differs: %v", tt.slots, err)
		}
	}
}

// What is there at the beginning, pins, another policy and other devices are part of a trial.
func TestSimulateOther(t *testing.T) {
	over := func(trial Trial) float64 {
		t.Helper()
		p, err := Simulate(trial)
		if err != nil {
			t.Fatal(err)
		}
		hits, _ := p.Over(0)
		return hits
	}
	trial := testTrial(4, 3)
	trial.Devices[0].On = []collect.Set{0, 1, 2}
	if got := over(trial); math.Abs(got-270.0/600) > 1e-6 {
		t.Errorf("with flash filled: %v", got)
	}
	trial.Params.Patterns = map[string]Pattern{AnyType: {MinAccesses: 1, Saves: time.Millisecond, Promote: "false", WriteWeight: 1}}
	trial.Devices[0].On = nil
	if got := over(trial); got != 0 {
		t.Errorf("with a rule that never holds: %v", got)
	}
	trial.Pins = []Pin{{Device: 1, Offset: 9 * setBytes, Length: setBytes}}
	if got := over(trial); math.Abs(got-10.0/600) > 1e-3 {
		t.Errorf("with a pin: %v", got)
	}
	trial = testTrial(6, 13)
	other := testTrial(2, 0).Devices[0]
	other.Number = 2
	trial.Devices = append(trial.Devices, other)
	p, err := Simulate(trial)
	if err != nil || p.Windows[3].Accesses > 600.1 || p.Windows[4].Accesses < 1199.9 {
		t.Errorf("a device that joins late: %v, %+v", err, p.Windows)
	}
	if p.Moves.Promoted < 13 {
		t.Errorf("%+v", p.Moves)
	}
	if p, err := Simulate(Trial{Params: Defaults(), SetBytes: setBytes}); err != nil || len(p.Windows) != 0 {
		t.Errorf("nothing: %v, %+v", err, p)
	}
	if hits, mean := (&Predicted{}).Over(3); hits != 0 || mean != 0 {
		t.Errorf("of nothing: %v, %v", hits, mean)
	}
}

func TestSimulateRefused(t *testing.T) {
	for name, change := range map[string]func(*Trial){
		"parameters": func(t *Trial) { t.Params.Interval = 0 },
		"slots":      func(t *Trial) { t.Slots = -1 },
		"set size":   func(t *Trial) { t.SetBytes = 64 * kib },
		"no size":    func(t *Trial) { t.SetBytes = 0 },
		"windows":    func(t *Trial) { t.Devices[0].Windows[1].Length = time.Hour },
	} {
		trial := testTrial(3, 1)
		change(&trial)
		if _, err := Simulate(trial); err == nil {
			t.Errorf("%s: simulated", name)
		}
	}
}
