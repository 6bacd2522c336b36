package campaign

import (
	"fmt"
	"math/rand/v2"
	"strings"
	"time"
)

// act is one thing done to the pair.
type act string

// The acts. Those that name no guest concern the agent or the whole pair.
const (
	killPID   act = "kill"         // SIGKILL by process number
	killCLI   act = "kill by cli"  // pollux guest kill
	stopPID   act = "stop"         // SIGSTOP
	contPID   act = "cont"         // SIGCONT, to the process that was stopped
	hangCLI   act = "hang"         // pollux guest hang
	resumeCLI act = "resume"       // pollux guest resume; refused when it was fenced
	restart   act = "restart"      // pollux guest restart
	takeover  act = "takeover"     // begins pollux takeover, whose outcome is open
	giveback  act = "giveback"     // the same for giveback
	planned   act = "planned over" // a takeover that must succeed
	plannedGB act = "planned back" // a giveback that must succeed
	commit    act = "await cp"     // until the guest's pool has committed
	survive   act = "await served" // until the partner serves the guest's identity
	heal      act = "await well"   // until the pair is whole
	killAgent act = "kill agent"
	up        act = "up"
)

// step is an act after a delay.
type step struct {
	after time.Duration
	act   act
	guest string
}

func (s step) String() string {
	text := string(s.act)
	if s.guest != "" {
		text += " " + s.guest
	}
	if s.after > 0 {
		text = fmt.Sprintf("+%v %s", s.after, text)
	}
	return text
}

// round is one fault: a name, steps, and what comes after the pair is whole.
type round struct {
	name  string
	steps []step
	back  bool // give everything back to its own guest afterwards
}

func (r round) String() string {
	var steps []string
	for _, s := range r.steps {
		steps = append(steps, s.String())
	}
	text := fmt.Sprintf("%-22s %s", r.name+":", strings.Join(steps, "; "))
	if r.back {
		text += "; then give back"
	}
	return text
}

// draw makes round n of a seed's schedule. It depends on nothing else.
func draw(seed uint64, n int, hang time.Duration) round {
	rng := rand.New(rand.NewPCG(seed, uint64(n)))
	x, y := "a", "b"
	if rng.IntN(2) == 1 {
		x, y = y, x
	}
	either := []string{x, y}[rng.IntN(2)]
	ms := func(most int) time.Duration { return time.Duration(rng.IntN(most*1000)) * time.Microsecond }
	start := ms(150) // so that faults meet consistency points at every moment
	r := round{back: rng.IntN(2) == 0}
	faults := []func(){
		func() { r.name = "kill"; r.steps = []step{{start, killPID, x}} },
		func() { r.name = "kill by command"; r.steps = []step{{start, killCLI, x}} },
		func() {
			r.name = "short hang"
			r.steps = []step{{start, stopPID, x}, {ms(int(hang/time.Millisecond) * 3 / 4), contPID, x}}
		},
		func() {
			r.name = "hang about the limit"
			r.steps = []step{{start, stopPID, x}, {hang*3/4 + ms(int(hang/time.Millisecond)/2), contPID, x}}
		},
		func() {
			r.name = "long hang"
			r.steps = []step{{start, hangCLI, x}, {2*hang + ms(100), contPID, x}, {0, resumeCLI, x}}
		},
		func() {
			r.name = "death in takeover"
			r.steps = []step{{start, killPID, x}, {ms(80), killPID, y}}
		},
		func() {
			r.name = "hang in takeover"
			r.steps = []step{{start, killPID, x}, {ms(60), stopPID, y}, {ms(1000), contPID, y}}
		},
		func() {
			r.name = "death in planned move"
			r.steps = []step{{start, takeover, x}, {ms(40), killPID, either}}
		},
		func() {
			r.name = "death in giveback"
			r.steps = []step{{0, takeover, x}, {start, heal, ""}, {0, giveback, x}, {ms(40), killPID, either}}
		},
		func() { r.name = "both die"; r.steps = []step{{start, killPID, x}, {0, killPID, y}} },
		func() {
			r.name = "one dies, then the other"
			r.steps = []step{{start, killPID, x}, {0, survive, x}, {0, heal, ""}, {ms(50), killPID, y}}
		},
		func() {
			r.name = "over and back"
			r.steps = []step{{start, planned, x}, {ms(30), plannedGB, x}, {ms(30), planned, y}}
		},
		func() {
			r.name = "agent dies"
			r.steps = []step{{start, killAgent, ""}, {ms(300), up, ""}}
		},
		func() {
			r.name = "agent and guest die"
			r.steps = []step{{start, killAgent, ""}, {ms(30), killPID, x}, {ms(300), up, ""}}
		},
		func() {
			r.name = "agent dies, guest hangs"
			r.steps = []step{{start, killAgent, ""}, {ms(30), stopPID, x}, {ms(300), up, ""}, {ms(2000), contPID, x}}
		},
		func() {
			r.name = "all die"
			r.steps = []step{{start, killAgent, ""}, {ms(5), killPID, x}, {ms(5), killPID, y}, {ms(50), up, ""}}
		},
		func() {
			r.name = "agent dies in takeover"
			r.steps = []step{{start, killPID, x}, {ms(40), killAgent, ""}, {ms(200), up, ""}}
		},
		func() {
			r.name = "dies when it returns"
			r.steps = []step{{start, killPID, x}, {50*time.Millisecond + ms(300), killPID, x}}
		},
		func() { r.name = "restart"; r.steps = []step{{start, restart, x}} },
		func() {
			r.name = "death in commit"
			r.steps = []step{{0, commit, x}, {ms(40), killPID, x}}
		},
	}
	faults[rng.IntN(len(faults))]()
	return r
}
