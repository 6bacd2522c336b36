// Package partner is the protocol by which two guests back each other up
// (DESIGN.md, system A): who serves which identity, when one guest takes over
// from the other, and when it gives back.
//
// It is two state machines without clock, disk, network or goroutine, in the
// manner of a Raft node: a [Machine] in each guest and a [Referee] in the host
// agent. A driver feeds them with Step and Tick, carries out what Ready
// returns, in order, and feeds the outcomes back. Tests drive them through
// written scenarios and through thousands of random runs.
//
// # Words
//
// An identity is what clients know a guest by; both bear the same name. A
// guest holds an identity from the moment it receives a grant until it has
// released it or its process has been reaped. Each start of a guest's process
// has an incarnation number, each grant a term; both only grow.
//
// # What must hold
//
//   - At most one guest holds an identity. Only the referee grants, and only
//     an identity that no living guest holds. A referee that was itself
//     restarted grants nothing until every living guest has told it what it
//     holds, or has been reaped.
//   - A guest acts on its partner's pool only after the referee has confirmed
//     the fence (the process is reaped) or the partner's release. The locks
//     on the devices, which the driver takes before it opens a pool, are the
//     second bar to the same door.
//   - Only the referee fences. A guest that has lost the agent goes on serving
//     and takes nothing over.
//   - A watcher that was late itself restarts its count: silence is counted
//     only over time in which the watcher was awake.
//   - A guest that comes back waits until it is given its identity.
//   - Where a failed guest is started again before its partner takes over, the
//     referee decides between them, once: until the limit only the guest may be
//     granted its identity, and from then on only the partner, after the guest was
//     fenced if it had been granted.
//   - What kills whoever serves an identity kills the partner once.
//   - What is sent on a line is read on that line or lost: a guest reads a line
//     to its end before it answers on the next one, and answers made for one
//     line are never sent on another. So a hello is the truth.
//   - Whoever holds an identity is watched: by its partner, through the heartbeat
//     of its regions, or by the referee, which asks it.
//   - A stuck device is an alert and never a reason to take over.
package partner

import (
	"fmt"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
)

// Host is the name by which messages call the agent.
const Host = "host"

// Kind says what a message is.
type Kind string

// Messages from the referee to a guest.
const (
	// KindGrant: the identity is yours under this term; Basis says why.
	KindGrant Kind = "grant"
	// KindRelease: hand the identity over.
	KindRelease Kind = "release"
	// KindUp: the partner's process runs; with Well it is also able to serve.
	KindUp Kind = "up"
	// KindEnded: the partner's process has ended.
	KindEnded Kind = "ended"
	// KindFenced: the partner's process was reaped; grants follow.
	KindFenced Kind = "fenced"
	// KindRefused: the fence is refused, for a reason.
	KindRefused Kind = "refused"
	// KindStop: close everything cleanly and end.
	KindStop Kind = "stop"
	// KindPing: answer KindPong.
	KindPing Kind = "ping"
)

// Messages from a guest to the referee. KindRegion and KindMapped are also
// passed on to the partner.
const (
	// KindHello: the guest is on the line and holds these identities.
	KindHello Kind = "hello"
	// KindRegion announces the region of an identity, or, without one, that there
	// is none any more.
	KindRegion Kind = "region"
	// KindMapped: the guest has mapped its partner's region.
	KindMapped Kind = "mapped"
	// KindWantFence asks for a fence of the partner.
	KindWantFence Kind = "want-fence"
	// KindServing: the guest serves the identity.
	KindServing Kind = "serving"
	// KindReleased: the guest holds the identity no more.
	KindReleased Kind = "released"
	// KindFailed: the guest could not open the identity's pool and holds
	// nothing of it.
	KindFailed Kind = "failed"
	// KindPong: the guest's loop turns.
	KindPong Kind = "pong"
)

// What a driver tells its machine.
const (
	KindAgentBack   Kind = "agent-back"   // the line to the agent is up
	KindAgentLost   Kind = "agent-lost"   // the line has ended
	KindBeat        Kind = "beat"         // the partner's heartbeat for an identity, as read
	KindMapDone     Kind = "map-done"     // outcome of DoMap; Reason when it failed
	KindOpened      Kind = "opened"       // outcome of DoOpen
	KindOpenFailed  Kind = "open-failed"  // outcome of DoOpen
	KindServeDone   Kind = "serve-done"   // outcome of DoServe
	KindReleaseDone Kind = "release-done" // outcome of DoRelease
	KindClosing     Kind = "closing"      // the identity's pool is being closed, and the identity served on without: its heartbeat may stop
	KindLost        Kind = "lost"         // a pool stopped by itself: a higher epoch, or a failure
	KindEvent       Kind = "event"        // something of Identity that people may want to know: Event says what kind, Reason what; it goes to the agent
	KindStuck       Kind = "stuck"        // the device named by Identity does not answer; Reason is empty when it does again
)

// What a driver tells the referee.
const (
	KindStarted  Kind = "started"   // a guest's process runs; Known when it is new and so holds nothing
	KindReaped   Kind = "reaped"    // it ended and was reaped
	KindNoStart  Kind = "no-start"  // outcome of DoStart when there is no process
	KindLinkDown Kind = "link-down" // the line to a living guest broke
	KindMove     Kind = "move"      // command: Guest hands over to its partner, or is given back
	KindRestart  Kind = "restart"   // command: start a guest that was stopped or awaits its restart
	KindDown     Kind = "down"      // command: no more starts; guests are told to stop
)

// The bases of a grant.
const (
	BasisStart    = "start"    // the identity is the guest's own and nobody held it
	BasisFenced   = "fenced"   // its holder was fenced
	BasisReleased = "released" // its holder released it
	BasisRestart  = "restart"  // the identity is the guest's own, whose process ended and was started again at once
	// BasisLate: its holder was fenced and was started again first; that start
	// holds nothing and will not be granted it any more.
	BasisLate = "late"
)

// Region describes a region as announced.
type Region struct {
	Path  string       `json:"path,omitempty"`
	Pool  block.PoolID `json:"pool,omitzero"`
	Bytes int64        `json:"bytes,omitempty"`
}

// Hold is an identity that a guest holds.
type Hold struct {
	Identity string `json:"identity"`
	Term     uint64 `json:"term"`
	Phase    Phase  `json:"phase"`
}

// Step is a timed part of a takeover, carried for people.
type Step struct {
	Name string        `json:"name"`
	Took time.Duration `json:"took"`
}

// Message is an input of a machine, and what travels between them. Which
// fields matter depends on Kind.
type Message struct {
	Kind     Kind   `json:"kind"`
	From     string `json:"from,omitempty"`
	Guest    string `json:"guest,omitempty"` // whom it is about
	Inc      uint64 `json:"inc,omitempty"`   // that guest's incarnation
	Identity string `json:"identity,omitempty"`
	Term     uint64 `json:"term,omitempty"`
	Basis    string `json:"basis,omitempty"`
	Reason   string `json:"reason,omitempty"`
	Event    string `json:"event,omitempty"`
	Well     bool   `json:"well,omitempty"`
	Known    bool   `json:"known,omitempty"`
	Planned  bool   `json:"planned,omitempty"` // a person asked for it
	Beat     uint64 `json:"beat,omitempty"`
	To       string `json:"to,omitempty"`  // of a move: the guest that shall serve
	Cmd      uint64 `json:"cmd,omitempty"` // of a move: echoed in DoDone
	Region   Region `json:"region,omitzero"`
	Holds    []Hold `json:"holds,omitempty"`
	Steps    []Step `json:"steps,omitempty"`
	// Since is when the cause was noticed, in Unix nanoseconds, so that both
	// sides of a takeover time the same thing.
	Since int64 `json:"since,omitempty"`
}

// Phase is how far a guest is with an identity.
type Phase string

// The phases.
const (
	PhaseNone      Phase = ""
	PhaseOpening   Phase = "opening"
	PhaseStarting  Phase = "starting" // the pool is open, the sockets are not yet accepting
	PhaseServing   Phase = "serving"
	PhaseReleasing Phase = "releasing"
)

// Do says what a driver shall do.
type Do string

// The actions of both machines.
const (
	// DoSend sends Message to Message's addressee: the host, or Guest.
	DoSend Do = "send"
	// DoMap maps a region of the partner read-only; answer KindMapDone.
	DoMap Do = "map"
	// DoUnmap drops that mapping.
	DoUnmap Do = "unmap"
	// DoOpen locks the devices of an identity's pool, opens the pool with its
	// region; answer KindOpened or KindOpenFailed.
	DoOpen Do = "open"
	// DoServe accepts clients of the identity; answer KindServeDone.
	DoServe Do = "serve"
	// DoRelease stops serving at once and leaves pool and devices; answer
	// KindReleaseDone.
	DoRelease Do = "release"
	// DoStop closes everything cleanly and ends the guest.
	DoStop Do = "stop"
	// DoRaise and DoClear set and remove an alert by Key.
	DoRaise Do = "raise"
	DoClear Do = "clear"
	// DoNote records an event.
	DoNote Do = "note"

	// DoKill kills the incarnation of a guest; KindReaped follows.
	DoKill Do = "kill"
	// DoStart starts a guest's process; KindStarted follows.
	DoStart Do = "start"
	// DoDone reports the outcome of a command; Text is its error.
	DoDone Do = "done"
)

// NoteLate is the key of a note that a guest which was started again first did not
// serve in time.
const NoteLate = "restart-late"

// Action is one thing for the driver to do.
type Action struct {
	Do       Do
	To       string // addressee of DoSend
	Message  Message
	Guest    string
	Inc      uint64
	Identity string
	Term     uint64
	Takeover bool // DoOpen: the pool is the partner's
	Region   Region
	Key      string // of an alert; kind of a note
	Text     string
	Cmd      uint64
}

// String writes an action as scenarios show it.
func (a Action) String() string {
	switch a.Do {
	case DoSend:
		return "send " + a.To + ": " + a.Message.String()
	case DoOpen:
		if a.Takeover {
			return fmt.Sprintf("open %s term=%d of the partner", a.Identity, a.Term)
		}
		return fmt.Sprintf("open %s term=%d", a.Identity, a.Term)
	case DoServe, DoRelease:
		return fmt.Sprintf("%s %s term=%d", a.Do, a.Identity, a.Term)
	case DoMap, DoUnmap:
		return fmt.Sprintf("%s region of %s", a.Do, a.Identity)
	case DoRaise:
		return fmt.Sprintf("raise %s: %s", a.Key, a.Text)
	case DoClear:
		return "clear " + a.Key
	case DoNote:
		return fmt.Sprintf("note %s: %s", a.Key, a.Text)
	case DoKill:
		return fmt.Sprintf("kill %s#%d", a.Guest, a.Inc)
	case DoStart:
		return "start " + a.Guest
	case DoDone:
		if a.Text == "" {
			return fmt.Sprintf("done %d", a.Cmd)
		}
		return fmt.Sprintf("done %d: %s", a.Cmd, a.Text)
	}
	return string(a.Do)
}

// String writes a message as scenarios show it.
func (m Message) String() string {
	s := string(m.Kind)
	if m.Guest != "" {
		s += fmt.Sprintf(" %s#%d", m.Guest, m.Inc)
	} else if m.Inc != 0 {
		s += fmt.Sprintf(" #%d", m.Inc)
	}
	if m.Identity != "" {
		s += " " + m.Identity
	}
	if m.Term != 0 {
		s += fmt.Sprintf(" term=%d", m.Term)
	}
	for _, h := range m.Holds {
		s += fmt.Sprintf(" holds=%s/%d/%s", h.Identity, h.Term, h.Phase)
	}
	if m.Basis != "" {
		s += " basis=" + m.Basis
	}
	if m.Well {
		s += " well"
	}
	if m.Reason != "" {
		s += " (" + m.Reason + ")"
	}
	return s
}
