package host

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/pollux-storage/pollux/internal/control"
)

// An upgrade is a goroutine of the agent that goes from step to step and keeps in the
// record of programs how far it is. It stops at the first doubt, having brought the
// guest that it was at back to the program that this guest had; an agent that ends in
// the middle leaves a record from which the next one goes on, or back, when told to.

// Successor is what an agent ends with that leaves its place to another program. The
// guests run on.
type Successor struct {
	Program string // the file to start
}

// Error says what is to be done.
func (s *Successor) Error() string { return "the agent goes on with program " + s.Program }

// upgrade is one that is under way.
type upgrade struct {
	a        *agent
	from, to string
	watch    time.Duration
	accepted map[string]bool // alerts that stood when it began
}

// halfDone is how the alert of an upgrade begins that is half done.
const halfDone = "the upgrade to "

// doingAgent is the last step.
const doingAgent = "the agent goes on with the new program"

// defaultWatch is how long a guest is watched with its new program.
const defaultWatch = 5 * time.Second

func upgradeFields(u *control.Upgrade) map[string]string {
	return map[string]string{"from": u.From.Build, "to": u.To.Build, "state": u.State}
}

// programs tells of the programs that the pair keeps.
func (a *agent) programs(context.Context) (control.Programs, error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	rec := a.builds.rec
	if rec == nil {
		return control.Programs{}, a.noBuilds()
	}
	p := control.Programs{Current: rec.program(rec.Current), Upgrade: shownUpgrade(rec)}
	if rec.Previous != "" {
		prev := rec.program(rec.Previous)
		p.Previous = &prev
	}
	return p, nil
}

// noBuilds is the refusal of an agent that cannot upgrade anything.
func (a *agent) noBuilds() error {
	return control.NewError(control.KindRefused, "there is no upgrade: "+a.builds.why, "take the pair down and start it with the other program")
}

// shownUpgrade returns the record's upgrade as others see it, a copy.
func shownUpgrade(rec *buildsRecord) *control.Upgrade {
	if rec == nil || rec.Upgrade == nil {
		return nil
	}
	u := *rec.Upgrade
	u.Steps, u.Guests = slices.Clone(u.Steps), maps.Clone(rec.Guests)
	return &u
}

// giveBuilds adds to a status what is known of programs.
func (a *agent) giveBuilds(st *control.Status) {
	a.mu.Lock()
	defer a.mu.Unlock()
	rec := a.builds.rec
	for i := range st.Guests {
		g := &st.Guests[i]
		if m := a.members[g.Name]; m.dom != nil && g.PID != 0 {
			g.Build = buildOf(m.dom.Program())
		}
	}
	if st.Agent.Build = a.builds.self; rec == nil {
		if a.opt.Program != "" {
			st.Notes = append(st.Notes, a.builds.why+"; guests are started with "+a.opt.Program+", and there is no `pollux upgrade`")
		}
		return
	}
	if u := shownUpgrade(rec); u.Pending() {
		st.Upgrade = u
		if u.State == control.UpgradeRunning {
			st.Notes = append(st.Notes, fmt.Sprintf("an upgrade to %s is under way: %s", u.To, u.Doing))
		} else {
			st.Alerts = append(st.Alerts, fmt.Sprintf(halfDone+"%s is half done and was %s: %s; go on with `pollux upgrade --resume`, or back with `pollux upgrade --rollback`", u.To, u.State, u.Why))
		}
		return
	}
	if a.builds.self != rec.Current {
		st.Notes = append(st.Notes, fmt.Sprintf("the agent runs program %s, guests are started with %s: `pollux upgrade --binary` brings both together",
			rec.program(a.builds.self), rec.program(rec.Current)))
	}
}

// beginChange takes the right to change volumes or pools, which ends with
// a.change.Unlock. While an upgrade is under way there is none; and while two programs
// are in use of which one may write what the other does not read, nobody may ask it to.
func (a *agent) beginChange() error {
	a.change.Lock()
	if err := a.upgrading("nothing is changed meanwhile", true); err != nil {
		a.change.Unlock()
		return err
	}
	return nil
}

// upgrading refuses what may not be done during an upgrade. half also refuses it while
// one is half done that holds things back.
func (a *agent) upgrading(why string, half bool) error {
	a.mu.Lock()
	defer a.mu.Unlock()
	rec := a.builds.rec
	switch {
	case rec == nil || !rec.Upgrade.Pending():
		return nil
	case a.builds.run != nil:
		return control.NewError(control.KindRefused, fmt.Sprintf("an upgrade to %s is under way, and %s", rec.Upgrade.To, why), "wait for its end; `pollux status` shows it")
	case half && len(rec.Upgrade.Held) > 0:
		return control.NewError(control.KindRefused, fmt.Sprintf("an upgrade to %s is half done, and what one program might write now the other could not read: %s", rec.Upgrade.To, strings.Join(rec.Upgrade.Held, "; ")),
			"go on with `pollux upgrade --resume`, or back with `pollux upgrade --rollback`")
	}
	return nil
}

// checkUpgrade is the dry run.
func (a *agent) checkUpgrade(ctx context.Context, req control.UpgradeRequest) (control.UpgradeCheck, error) {
	p, err := a.planUpgrade(ctx, req)
	if err != nil {
		return control.UpgradeCheck{}, err
	}
	return p.UpgradeCheck, nil
}

// startUpgrade begins an upgrade, which goes on without the caller.
func (a *agent) startUpgrade(ctx context.Context, req control.UpgradeRequest) (control.Programs, error) {
	a.change.Lock() // what is being changed is finished first
	defer a.change.Unlock()
	p, err := a.planUpgrade(ctx, req)
	if err != nil {
		return control.Programs{}, err
	}
	if !p.OK {
		var why []string
		for _, c := range p.Checks {
			if !c.OK {
				why = append(why, c.Name+": "+c.Why)
			}
		}
		a.event("", "upgrade-refused", nil, "upgrade to %s is refused: %s", p.To, strings.Join(why, "; "))
		return control.Programs{}, control.NewError(control.KindRefused, "the upgrade is not begun: "+strings.Join(why, "; "), p.hint)
	}
	if _, err := install(a.settings().Dir, p.file, p.To.Build); err != nil {
		return control.Programs{}, err
	}
	if _, err := askBuild(ctx, copyPath(a.settings().Dir, p.To.Build)); err != nil {
		return control.Programs{}, err
	}
	u := &upgrade{a: a, from: p.From.Build, to: p.To.Build, watch: defaultWatch, accepted: p.alerts}
	if req.Watch > 0 {
		u.watch = time.Duration(req.Watch)
	}
	err = a.editBuilds(func(r *buildsRecord) {
		up := &control.Upgrade{State: control.UpgradeRunning, Back: p.back, From: p.From, To: p.To, Started: time.Now().UTC(), Held: p.Held, Steps: []control.UpgradeStep{}}
		if old := r.Upgrade; old.Pending() {
			up.Started, up.Steps = old.Started, old.Steps
		}
		r.Versions[p.To.Build], r.Versions[p.From.Build] = p.To.Version, p.From.Version
		r.Upgrade, a.builds.run = up, u
	})
	if err != nil {
		a.mu.Lock()
		a.builds.run = nil
		a.mu.Unlock()
		return control.Programs{}, err
	}
	what := "upgrade"
	if p.back {
		what = "rollback"
	}
	a.event("", "command", nil, "%s from %s to %s", what, p.From, p.To)
	a.wg.Go(u.run)
	return a.programs(ctx)
}

// finishUpgrade ends an upgrade that has come to its end.
func (a *agent) finishUpgrade(rec *buildsRecord) {
	u := rec.Upgrade
	now := time.Now().UTC()
	if n := len(u.Steps); n > 0 && u.Steps[n-1].What == doingAgent {
		u.Steps[n-1].Took = control.Duration(now.Sub(u.Steps[n-1].At))
	}
	u.State, u.Doing, u.Why, u.Ended = control.UpgradeDone, "", "", now
	if u.To.Build != rec.Current { // else it went back before anything had been done
		rec.Previous, rec.Current = u.From.Build, u.To.Build
	}
	rec.Seats = nil
	a.event("", "upgrade-done", upgradeFields(u), "agent and guests run program %s after %s", u.To, u.Ended.Sub(u.Started).Round(time.Millisecond))
}
