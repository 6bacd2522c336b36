package campaign

import (
	"flag"
	"os"
	"strconv"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/test/campaign/nbdclient"
	"github.com/pollux-storage/pollux/test/pair"
)

var (
	seedFlag   = flag.Uint64("seed", 0, "seed of the campaign; 0 draws one")
	roundsFlag = flag.Int("rounds", 0, "faults to run; 0 for a short campaign")
	onlyFlag   = flag.String("only", "", "run only faults whose name contains this")
	killsFlag  = flag.Int("kills", 0, "kills under the disks of machines with each policy; 0 for a few")
	limitFlag  = flag.Duration("limit", 0, "no further kills with a policy after so long; 0 for all of them")
	raceFlag   = flag.Bool("race-guests", false, "build the program with the race detector")
)

// shortTime bounds a campaign within `go test ./...`.
const shortTime = 40 * time.Second

func seed(t *testing.T) uint64 {
	s := *seedFlag
	if env := os.Getenv("POLLUX_SEED"); s == 0 && env != "" {
		var err error
		if s, err = strconv.ParseUint(env, 10, 64); err != nil {
			t.Fatalf("POLLUX_SEED: %v", err)
		}
	}
	if s == 0 {
		s = uint64(time.Now().UnixNano()) % 1_000_000
	}
	return s
}

type testLog struct{ t *testing.T }

func (l testLog) Write(p []byte) (int, error) {
	l.t.Log(string(p[:len(p)-1]))
	return len(p), nil
}

func TestCampaign(t *testing.T) {
	if testing.Short() {
		t.Skip("runs a real pair for most of a minute")
	}
	bin, err := pair.Build(t.Context(), t.TempDir(), *raceFlag)
	if err != nil {
		t.Fatal(err)
	}
	o := Options{Bin: bin, Seed: seed(t), Rounds: *roundsFlag, Only: *onlyFlag, Log: testLog{t}}
	if o.Rounds == 0 {
		o.Rounds, o.Limit = 1000, shortTime
	}
	t.Logf("seed %d", o.Seed)
	begin := time.Now()
	res, err := Run(t.Context(), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%d rounds in %v: %d requests answered, %d connections, nothing lost",
		res.Rounds, time.Since(begin).Round(time.Second), res.Requests, res.Connects)
}

// TestKills kills the serving guest under the disks of machines, whose partner takes over or
// which is started again.
func TestKills(t *testing.T) {
	if testing.Short() {
		t.Skip("runs real pairs")
	}
	if raceEnabled {
		t.Skip("clients with the race detector are too slow to have requests in flight at a kill")
	}
	bin, err := pair.Build(t.Context(), t.TempDir(), *raceFlag)
	if err != nil {
		t.Fatal(err)
	}
	for _, policy := range []string{config.TakeoverFirst, config.RestartFirst} {
		o := Options{Bin: bin, Seed: seed(t), Rounds: *killsFlag, Limit: *limitFlag, Log: testLog{t}}
		if o.Rounds == 0 {
			o.Rounds, o.Limit = 5, shortTime/4
		}
		begin := time.Now()
		res, err := Kills(t.Context(), o, policy)
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("seed %d, %s: %d kills in %v, %d requests, each answered once and without an error; of those in flight %d were run again and %d were in the log",
			o.Seed, policy, res.Rounds, time.Since(begin).Round(time.Second), res.Requests, res.Again, res.Logged)
	}
}

func TestStamps(t *testing.T) {
	for _, size := range []int{512, 4096, 8192} {
		p := make([]byte, size)
		if op, err := parse(p, 1, 2); op != 0 || err != nil {
			t.Errorf("zeroes: %d, %v", op, err)
		}
		fill(p, 1, 2, 3)
		if op, err := parse(p, 1, 2); op != 3 || err != nil {
			t.Errorf("%d, %v", op, err)
		}
		if _, err := parse(p, 1, 3); err == nil {
			t.Error("a misplaced unit was taken")
		}
		// A torn unit: its end is that of another operation.
		q := make([]byte, size)
		fill(q, 1, 2, 4)
		for cut := 8; cut < size; cut += 8 {
			torn := append(append([]byte{}, p[:cut]...), q[cut:]...)
			if _, err := parse(torn, 1, 2); err == nil && cut > 24 && cut < size {
				t.Errorf("torn at %d of %d and taken", cut, size)
			}
			clear(torn[:cut])
			if _, err := parse(torn, 1, 2); err == nil {
				t.Errorf("zeroed up to %d of %d and taken", cut, size)
			}
		}
	}
}

// TestHistories: the checker finds what it shall find, and no more.
func TestHistories(t *testing.T) {
	w := func(v uint64, call, ret int) access {
		return access{write: true, value: v, call: time.Duration(call), ret: time.Duration(ret)}
	}
	r := func(v uint64, call, ret int) access {
		return access{value: v, call: time.Duration(call), ret: time.Duration(ret)}
	}
	lost := func(v uint64, call, ret int) access {
		a := w(v, call, ret)
		a.maybe = true
		return a
	}
	for name, tt := range map[string]struct {
		ok  bool
		all []access
	}{
		"plain":                                 {true, []access{w(1, 0, 1), r(1, 2, 3), w(2, 4, 5), r(2, 6, 7)}},
		"acknowledged write lost":               {false, []access{w(1, 0, 1), r(9, 2, 3)}},
		"write lost after it was seen":          {false, []access{w(1, 0, 1), w(2, 2, 3), r(2, 4, 5), r(1, 6, 7)}},
		"concurrent writes, either order":       {true, []access{w(1, 0, 5), w(2, 0, 5), r(1, 6, 7)}},
		"concurrent writes, both orders":        {false, []access{w(1, 0, 5), w(2, 0, 5), r(1, 6, 7), r(2, 8, 9)}},
		"lost attempt had an effect":            {true, []access{lost(1, 0, 3), r(1, 1, 2), w(1, 3, 4), r(1, 5, 6)}},
		"lost attempt had none":                 {true, []access{lost(1, 0, 3), r(9, 1, 2), w(1, 3, 4), r(1, 5, 6)}},
		"lost attempt overwritten, then resent": {true, []access{lost(1, 0, 4), w(2, 1, 2), r(2, 2, 3), w(1, 4, 6), r(1, 7, 8)}},
		"effect after the fence":                {false, []access{lost(1, 0, 3), w(2, 4, 5), r(1, 6, 7)}},
	} {
		if got := linearizable(9, tt.all); got != tt.ok {
			t.Errorf("%s: linearizable is %t\n%s", name, got, describe(tt.all))
		}
	}
}

// TestSettle: a history must account for what is read at its end.
func TestSettle(t *testing.T) {
	h := newHistory(2)
	at := func(ms int) nbdclient.Attempt {
		return nbdclient.Attempt{Sent: h.began.Add(time.Duration(ms) * time.Millisecond), Ended: h.began.Add(time.Duration(ms+1) * time.Millisecond)}
	}
	h.wrote(0, 1, 5, []nbdclient.Attempt{at(0)})
	h.read(0, []uint64{5, 0}, []nbdclient.Attempt{at(2)})
	if err := h.settle([]uint64{5, 0}); err != nil {
		t.Fatal(err)
	}
	h.read(0, []uint64{0, 0}, []nbdclient.Attempt{at(4)})
	if err := h.settle([]uint64{0, 0}); err == nil {
		t.Error("a unit that was lost between two histories was not noticed")
	}
}

// TestSchedules: a seed draws the same schedule each time, and every fault
// comes up.
func TestSchedules(t *testing.T) {
	names := map[string]bool{}
	for n := range 300 {
		r := draw(1, n, hangTimeout)
		if again := draw(1, n, hangTimeout); again.String() != r.String() {
			t.Fatalf("round %d is %v and then %v", n, r, again)
		}
		names[r.name] = true
	}
	if len(names) != 20 {
		t.Errorf("300 rounds have %d kinds of fault: %v", len(names), names)
	}
}
