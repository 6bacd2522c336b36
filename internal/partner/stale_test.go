package partner

import (
	"strings"
	"testing"
	"time"
)

// running returns a pair of which each guest serves its own identity.
func running(t *testing.T) *world {
	t.Helper()
	w := newWorld()
	w.startAgent()
	w.settle()
	w.pass(time.Second, 20*time.Millisecond)
	for _, g := range w.rcfg.Guests {
		if w.procs[g].m.Phase(g) != PhaseServing {
			t.Fatalf("%s does not serve:\n%s", g, w.show())
		}
	}
	w.ref.Ready()
	return w
}

// lines renders actions.
func lines(acts []Action) string {
	var s []string
	for _, a := range acts {
		s = append(s, a.String())
	}
	return strings.Join(s, "\n")
}

// Messages that are out of date, or about nobody, make neither machine do
// anything: they come late, twice, or from a process that is gone.
func TestStaleMessages(t *testing.T) {
	w := running(t)
	before := w.show()
	for _, m := range []Message{
		{Kind: KindStarted, Guest: "c", Inc: 1},
		{Kind: KindStarted, Guest: "a", Inc: 1, Known: true},
		{Kind: KindReaped, Guest: "c", Inc: 1},
		{Kind: KindReaped, Guest: "a", Inc: 7},
		{Kind: KindNoStart, Guest: "a"},
		{Kind: KindLinkDown, Guest: "a", Inc: 7},
		{Kind: KindLinkDown, Guest: "c", Inc: 1},
		{Kind: KindRestart, Guest: "c"},
		{Kind: KindHello, From: "c", Inc: 1},
		{Kind: KindServing, From: "a", Identity: "b", Term: 2},
		{Kind: KindServing, From: "a", Identity: "c", Term: 1},
		{Kind: KindReleased, From: "a", Identity: "a", Term: 99},
		{Kind: KindFailed, From: "b", Identity: "a", Term: 1},
		{Kind: KindPong, From: "a"},
		{Kind: "unknown", From: "a"},
	} {
		w.ref.Step(m)
		if acts := w.ref.Ready(); len(acts) > 0 {
			t.Errorf("referee, %s: %s", m, lines(acts))
		}
	}
	a := w.procs["a"].m
	for _, m := range []Message{
		{Kind: KindGrant, Identity: "c", Term: 99, Basis: BasisReleased},
		{Kind: KindGrant, Identity: "b", Term: 0, Basis: BasisFenced},
		{Kind: KindOpened, Identity: "a", Term: 99},
		{Kind: KindOpened, Identity: "b", Term: 1},
		{Kind: KindOpenFailed, Identity: "a", Term: 99, Reason: "late"},
		{Kind: KindServeDone, Identity: "b", Term: 1},
		{Kind: KindReleaseDone, Identity: "a", Term: 1},
		{Kind: KindLost, Identity: "a", Term: 99, Reason: "late"},
		{Kind: KindUp, Guest: "c", Inc: 9},
		{Kind: KindUp, Guest: "b", Inc: 0},
		{Kind: KindEnded, Guest: "c", Inc: 9},
		{Kind: KindEnded, Guest: "b", Inc: 0},
		{Kind: KindFenced, Guest: "c", Inc: 9},
		{Kind: KindFenced, Guest: "b", Inc: 0},
		{Kind: KindRegion, From: "c", Inc: 1, Identity: "b", Term: 99},
		{Kind: KindRegion, From: "b", Inc: 7, Identity: "b", Term: 99},
		{Kind: KindRegion, From: "b", Inc: 1, Identity: "c", Term: 99},
		{Kind: KindMapDone, Identity: "b", Term: 99},
		{Kind: KindMapDone, Identity: "c", Term: 1},
		{Kind: KindBeat, Identity: "c", Beat: 1},
		{Kind: "unknown", Identity: "a"},
	} {
		a.Step(m)
		if acts := a.Ready(); len(acts) > 0 {
			t.Errorf("guest, %s: %s", m, lines(acts))
		}
	}
	if after := w.show(); after != before {
		t.Errorf("before:\n%safter:\n%s", before, after)
	}
	if a.Phase("c") != PhaseNone {
		t.Error("a phase with an identity that there is not")
	}
}

// What cannot be done is refused with the reason, and nothing else happens.
func TestRefused(t *testing.T) {
	w := running(t)
	inc := w.procs["b"].inc
	for _, x := range []struct {
		m    Message
		want string
	}{
		{Message{Kind: KindMove, Identity: "c", To: "a", Cmd: 3}, "done 3: no such guest"},
		{Message{Kind: KindMove, Identity: "a", To: "c", Cmd: 3}, "done 3: no such guest"},
		{Message{Kind: KindMove, Identity: "a", To: "a", Cmd: 3}, "done 3: a serves a already"},
		{Message{Kind: KindWantFence, From: "a", Guest: "c", Inc: 1}, "send a: refused c#1 (no such partner)"},
		{Message{Kind: KindWantFence, From: "a", Guest: "a", Inc: 1}, "send a: refused a#1 (no such partner)"},
		{Message{Kind: KindWantFence, From: "a", Guest: "b", Inc: inc + 1}, "send a: refused b#2 (it was started again)"},
	} {
		w.ref.Step(x.m)
		if got := lines(w.ref.Ready()); got != x.want {
			t.Errorf("%s: %q, want %q", x.m, got, x.want)
		}
	}
	// A guest grants itself nothing: its partner's identity is not its own.
	b := w.procs["b"].m
	b.Step(Message{Kind: KindGrant, Identity: "a", Term: 99, Basis: BasisStart})
	if got := lines(b.Ready()); !strings.Contains(got, "failed a term=99 (not this guest's own identity)") || b.Phase("a") != PhaseNone {
		t.Errorf("granted at the start: %q", got)
	}
	// Of two that ask for each other's end only one is heard.
	hold := w.procs["b"].m.Holds()[0]
	w.ref.Step(Message{Kind: KindWantFence, From: "a", Guest: "b", Inc: inc, Identity: "b", Term: hold.Term, Reason: "no heartbeat"})
	if got := lines(w.ref.Ready()); !strings.Contains(got, "kill b#1") {
		t.Fatalf("the first: %q", got)
	}
	w.ref.Step(Message{Kind: KindWantFence, From: "b", Guest: "a", Inc: 1, Identity: "a", Term: 1, Reason: "no heartbeat"})
	if got := lines(w.ref.Ready()); got != "send b: refused a#1 (this guest is being fenced itself)" {
		t.Errorf("the second: %q", got)
	}
	// Nor is what it says of itself on a new line.
	w.ref.Step(Message{Kind: KindHello, From: "b", Inc: inc})
	if got := lines(w.ref.Ready()); got != "" {
		t.Errorf("hello of one that is killed: %q", got)
	}
	w.ref.Step(Message{Kind: KindDown})
	w.ref.Ready()
	w.ref.Step(Message{Kind: KindMove, Identity: "b", To: "a", Cmd: 4})
	if got := lines(w.ref.Ready()); got != "done 4: the pair is going down" {
		t.Errorf("a move while going down: %q", got)
	}
}

// Two guests that both say that they hold an identity, whatever made it so: one
// of them is fenced, loudly, before it is granted anything.
func TestTwoHolders(t *testing.T) {
	w := running(t)
	w.killAgent()
	w.settle()
	r := NewReferee(w.rcfg, w.now)
	r.Step(Message{Kind: KindStarted, Guest: "a", Inc: 1})
	r.Step(Message{Kind: KindStarted, Guest: "b", Inc: 1})
	// One that is no longer configured is passed over.
	r.Step(Message{Kind: KindHello, From: "a", Inc: 1, Term: 5, Holds: []Hold{{"gone", 1, PhaseServing}, {"a", 4, PhaseServing}}})
	r.Ready()
	r.Step(Message{Kind: KindHello, From: "b", Inc: 1, Term: 5, Holds: []Hold{{"a", 5, PhaseServing}}})
	if got := lines(r.Ready()); got != "raise owners: a and b both say that they hold a: b is fenced\nkill b#1" {
		t.Errorf("the referee does %q", got)
	}
	if got := r.Title("a"); got.Holder != "a" {
		t.Errorf("%+v", got)
	}
	// Its messages on the way are not heard once it is reaped.
	r.Step(Message{Kind: KindReaped, Guest: "b", Inc: 1, Reason: "killed"})
	r.Ready()
	r.Step(Message{Kind: KindReleased, From: "b", Identity: "a", Term: 5})
	if got := lines(r.Ready()); got != "" || r.Title("a").Holder != "a" {
		t.Errorf("after its end: %q", got)
	}
}

// A region that cannot be mapped is an alert that says why; the next one that
// can be mapped ends it.
func TestRegionCannotBeMapped(t *testing.T) {
	w := running(t)
	a := w.procs["a"].m
	announce := func(term uint64) {
		a.Step(Message{Kind: KindRegion, From: "b", Inc: 1, Identity: "b", Term: term, Region: Region{Path: "region-b"}})
	}
	announce(7)
	a.Step(Message{Kind: KindMapDone, Identity: "b", Term: 7, Reason: "open region-b: too many open files"})
	if got := lines(a.Ready()); !strings.Contains(got, "raise region:b: the region of b cannot be mapped: open region-b: too many open files") {
		t.Errorf("%q", got)
	}
	announce(7) // again: it is under way
	if got := lines(a.Ready()); got != "" {
		t.Errorf("announced twice: %q", got)
	}
	announce(8)
	a.Step(Message{Kind: KindMapDone, Identity: "b", Term: 8})
	if got := lines(a.Ready()); !strings.Contains(got, "clear region:b") || !strings.Contains(got, "mapped b term=8") {
		t.Errorf("%q", got)
	}
}

// Failures and givebacks of long ago do not count.
func TestOldFailuresAreForgotten(t *testing.T) {
	w := newWorld()
	w.rcfg.CrashLimit = 2
	w.mcfg.LockoutCount, w.mcfg.LockoutWindow = 1, time.Minute
	w.startAgent()
	w.settle()
	for range 4 {
		w.pass(w.rcfg.CrashWindow+time.Second, 200*time.Millisecond)
		w.die(w.procs["a"])
		w.settle()
		w.pass(40*time.Second, 200*time.Millisecond)
		if w.ref.Seat("a").Stopped || w.procs["a"].m.Phase("a") != PhaseServing {
			t.Fatalf("a does not serve again:\n%s", w.show())
		}
	}
	if w.failed != nil {
		t.Error(w.failed)
	}
}

// While nobody can open an identity, the driver is told to come back when the
// first wait is over, so that no guest waits longer than that.
func TestNextTryIsAwaited(t *testing.T) {
	w := newWorld()
	w.broken["a a"], w.broken["b a"] = true, true
	w.startAgent()
	w.settle()
	w.pass(400*time.Millisecond, 20*time.Millisecond)
	if w.ref.Title("a").Holder != "" || len(w.ref.Alerts()) == 0 {
		t.Fatalf("somebody serves a:\n%s", w.show())
	}
	if next := w.ref.Next(); !next.Equal(epoch0.Add(time.Second)) {
		t.Errorf("next look after %s", next.Sub(epoch0))
	}
}
