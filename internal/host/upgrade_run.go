package host

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/domain"
	"github.com/pollux-storage/pollux/internal/partner"
)

// Limits of the steps of an upgrade.
const (
	settleWait  = time.Minute      // for the pair to be protected
	startWait   = 30 * time.Second // for a guest to be there with its new program
	placeWait   = 30 * time.Second // for a guest to serve again
	killAfter   = 10 * time.Second // a guest that does not end when it is told to
	watchLook   = 50 * time.Millisecond
	watchStatus = 500 * time.Millisecond // between two looks at alerts
	alertStands = 2 * time.Second        // an alert that is gone earlier is no doubt
)

// errEnding says that the agent ends: the next one finds the upgrade interrupted.
var errEnding = errors.New("the agent is ending")

// run is the whole upgrade.
func (u *upgrade) run() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	go func() {
		select {
		case <-u.a.ended:
			cancel()
		case <-ctx.Done():
		}
	}()
	err := u.guests(ctx)
	if err == nil {
		err = u.agent()
	}
	if err != nil && !u.ending() {
		u.stopped(err)
	}
}

func (u *upgrade) ending() bool { return isClosed(u.a.ended) }

// guests brings one guest after the other to the new program.
func (u *upgrade) guests(ctx context.Context) error {
	s, err := u.a.snapshot(ctx)
	if err != nil {
		return err
	}
	for _, g := range u.a.order(s) {
		if u.a.runs(g) == u.to && u.a.startsWith(g) == u.to && len(u.seats(g)) == 0 {
			continue
		}
		if err := u.guest(ctx, g); err != nil {
			return fmt.Errorf("guest %s: %w", g, err)
		}
	}
	return nil
}

// seats returns what a guest shall have back since before an interruption.
func (u *upgrade) seats(g string) []string {
	u.a.mu.Lock()
	defer u.a.mu.Unlock()
	return slices.Clone(u.a.builds.rec.Seats[g])
}

// guest brings one guest to the new program, or back to the one it had.
func (u *upgrade) guest(ctx context.Context, g string) error {
	had := u.a.startsWith(g)
	if had == u.to {
		had = u.from
	}
	other := u.a.settings().Partner(g)
	s, err := u.a.snapshot(ctx)
	if err != nil {
		return err
	}
	up := s.seats[g].Alive && s.seats[g].Linked
	if up {
		if err := u.step(g, "the pair is protected and has no new alert", func() error { return u.settled(ctx) }); err != nil {
			return err
		}
		if s, err = u.a.snapshot(ctx); err != nil {
			return err
		}
	}
	ids := u.seats(g)
	for _, id := range u.a.names() {
		if s.titles[id].Holder == g && !slices.Contains(ids, id) {
			ids = append(ids, id)
		}
	}
	if err := u.setSeats(g, ids); err != nil {
		return err
	}
	if u.a.runs(g) != u.to || u.a.startsWith(g) != u.to {
		if up {
			err := u.step(g, "guest "+other+" takes over", func() error { return u.a.place(ctx, other, ids) })
			if err != nil {
				// Whatever has moved goes home; the guest runs as before.
				return u.after(err, u.a.place(ctx, g, ids), g)
			}
		}
		err := u.step(g, "start with the new program", func() error { return u.start(ctx, g, u.to, up) })
		if err != nil {
			return u.back(ctx, g, had, ids, err)
		}
	}
	if err := u.step(g, "it is ready to take over", func() error { return u.settled(ctx) }); err != nil {
		return u.back(ctx, g, had, ids, err)
	}
	if err := u.step(g, "it serves again", func() error { return u.a.place(ctx, g, ids) }); err != nil {
		return u.back(ctx, g, had, ids, err)
	}
	if err := u.step(g, "it goes on serving", func() error { return u.watchGuest(ctx, g, ids) }); err != nil {
		return u.back(ctx, g, had, ids, err)
	}
	return u.setSeats(g, nil)
}

// setSeats remembers what a guest shall have back.
func (u *upgrade) setSeats(g string, ids []string) error {
	return u.a.editBuilds(func(r *buildsRecord) {
		if r.Seats == nil {
			r.Seats = map[string][]string{}
		}
		if r.Seats[g] = ids; len(ids) == 0 {
			delete(r.Seats, g)
		}
	})
}

// after is the error of a step and of what was done about it.
func (u *upgrade) after(err, undo error, g string) error {
	if undo != nil {
		return fmt.Errorf("%w; and it could not be brought back to where it was: %w", err, undo)
	}
	return fmt.Errorf("%w; guest %s runs as it did before", err, g)
}

// back brings a guest back to the program that it had, because of err.
func (u *upgrade) back(ctx context.Context, g, had string, ids []string, err error) error {
	if u.ending() {
		return errEnding
	}
	other := u.a.settings().Partner(g)
	undo := u.step(g, "back to the program before", func() error {
		s, err := u.a.snapshot(ctx)
		if err != nil {
			return err
		}
		up := s.seats[g].Alive && s.seats[g].Linked
		if up {
			if err := u.a.place(ctx, other, ids); err != nil {
				return err
			}
		}
		if err := u.start(ctx, g, had, up); err != nil {
			return err
		}
		if err := u.a.protectedWithin(ctx, settleWait); err != nil {
			return err
		}
		return u.a.place(ctx, g, ids)
	})
	if undo == nil {
		undo = u.setSeats(g, nil)
	}
	return u.after(err, undo, g)
}

// step does one thing and records it.
func (u *upgrade) step(g, what string, f func() error) error {
	if u.ending() {
		return errEnding
	}
	began := time.Now()
	if err := u.a.editBuilds(func(r *buildsRecord) {
		r.Upgrade.Doing = what
		if g != "" {
			r.Upgrade.Doing = "guest " + g + ": " + what
		}
	}); err != nil {
		return err
	}
	err := f()
	if u.ending() {
		return errEnding // and leave the record as it is
	}
	s := control.UpgradeStep{Guest: g, What: what, At: began.UTC(), Took: control.Duration(time.Since(began))}
	text := "done"
	if err != nil {
		s.Error, text = err.Error(), err.Error()
	}
	u.a.event(g, "upgrade-step", nil, "%s: %s (%s)", what, text, time.Duration(s.Took).Round(time.Millisecond))
	return errors.Join(err, u.a.editBuilds(func(r *buildsRecord) {
		r.Upgrade.Steps, r.Upgrade.Doing = append(r.Upgrade.Steps, s), ""
	}))
}

// settled waits until either guest may stop, and demands that there is no alert that
// was not there before.
func (u *upgrade) settled(ctx context.Context) error {
	if err := u.a.protectedWithin(ctx, settleWait); err != nil {
		return err
	}
	return u.calmly(ctx)
}

// calmly demands that nothing is wrong that was not when the upgrade began. What passes
// within a moment, as each takeover has some, is none.
func (u *upgrade) calmly(ctx context.Context) error {
	began := time.Now()
	for {
		st, err := u.a.status(ctx)
		if err != nil {
			return err
		}
		if err = u.calm(st); err == nil || time.Since(began) > alertStands {
			return err
		}
		select {
		case <-time.After(watchLook):
		case <-u.a.ended:
			return errEnding
		}
	}
}

// calm returns an error for what is wrong in a status and was not when the upgrade
// began.
func (u *upgrade) calm(st control.Status) error {
	for _, t := range ownAlerts(st) {
		if !u.accepted[t] {
			return fmt.Errorf("an alert was raised: %s", t)
		}
	}
	for _, g := range st.Guests {
		for _, p := range g.PoolStats {
			if p.Error != "" {
				return fmt.Errorf("pool %s: %s", p.Name, p.Error)
			}
		}
	}
	return nil
}

// protectedWithin waits until each identity is protected.
func (a *agent) protectedWithin(ctx context.Context, limit time.Duration) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	why := ""
	err := a.until(ctx, func() bool {
		s := a.look()
		for _, g := range a.names() {
			if ok, reason := a.protection(g, s); !ok {
				why = reason
				return false
			}
		}
		return true
	})
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("redundancy is lost: after %s still %s", limit, why)
	}
	return err
}

// start lets a guest end and start with a program, and waits for it. gently lets it end
// by itself.
func (u *upgrade) start(ctx context.Context, g, build string, gently bool) error {
	a := u.a
	if err := a.editBuilds(func(r *buildsRecord) { r.Guests[g] = build }); err != nil {
		return err
	}
	var inc uint64
	var d domain.Domain // the run that is to end; one that begins meanwhile has the new program
	err := a.ask(ctx, func() {
		m := a.members[g]
		inc, d = m.inc, m.dom
		m.noStart, m.end = "", ""
		a.ref.Step(partner.Message{Kind: partner.KindRestart, Guest: g})
	})
	if err != nil {
		return err
	}
	if d != nil && !hasEnded(d) {
		end := d.Kill
		if gently {
			end = d.Terminate
		}
		if err := end(); err != nil && !hasEnded(d) {
			return err
		}
		select {
		case <-d.Ended():
		case <-time.After(killAfter):
			if err := d.Kill(); err != nil && !hasEnded(d) {
				return err
			}
			<-d.Ended()
		case <-a.ended:
			return errEnding
		}
	}
	ctx, cancel := context.WithTimeout(ctx, startWait)
	defer cancel()
	var failed error
	err = a.until(ctx, func() bool {
		m, s := a.members[g], a.ref.Seat(g)
		switch {
		case m.noStart != "":
			failed = errors.New(m.noStart)
		case m.inc > inc+1 || m.inc == inc+1 && !s.Alive:
			failed = fmt.Errorf("its process ended before it was there: %s; see its log and `pollux events`", cmp.Or(m.end, "it was started again"))
		}
		return failed != nil || m.inc == inc+1 && s.Alive && s.Linked
	})
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("it does not come up within %s; see its log", startWait)
	}
	return errors.Join(failed, err)
}

// place brings identities to a guest and waits until it serves them. What is on its way
// by itself is waited for.
func (a *agent) place(ctx context.Context, to string, ids []string) error {
	ctx, cancel := context.WithTimeout(ctx, placeWait)
	defer cancel()
	for _, id := range ids {
		for {
			var t partner.TitleView
			if err := a.ask(ctx, func() { t = a.ref.Title(id) }); err != nil {
				return err
			}
			if t.Holder == to && t.Phase == partner.PhaseServing {
				break
			}
			var err error
			if t.Holder != to {
				err = a.move(ctx, id, to, "upgrade")
			}
			select {
			case <-time.After(20 * time.Millisecond):
			case <-a.ended:
				return errEnding
			case <-ctx.Done():
				return fmt.Errorf("guest %s does not come to serve %s within %s: %w", to, id, placeWait, cmp.Or(err, ctx.Err()))
			}
		}
	}
	return nil
}

// watchGuest looks for some time whether a guest goes on serving.
func (u *upgrade) watchGuest(ctx context.Context, g string, ids []string) error {
	a := u.a
	var inc uint64
	if err := a.ask(ctx, func() { inc = a.members[g].inc }); err != nil {
		return err
	}
	end := time.Now().Add(u.watch)
	var looked time.Time
	for {
		var wrong string
		err := a.ask(ctx, func() {
			s := a.ref.Seat(g)
			switch {
			case a.members[g].inc != inc || !s.Alive:
				wrong = fmt.Sprintf("its process ended after it had served: %s; see its log and `pollux events`", cmp.Or(a.members[g].end, "it was started again"))
			case !s.Linked:
				wrong = "its line to the agent broke after it had served"
			}
			for _, id := range ids {
				if t := a.ref.Title(id); wrong == "" && t.Holder != g {
					wrong = fmt.Sprintf("it serves %s no more", id)
				}
			}
		})
		if err != nil {
			return err
		}
		if wrong != "" {
			return errors.New(wrong)
		}
		if last := time.Now().After(end); last || time.Since(looked) >= watchStatus {
			if err := u.calmly(ctx); err != nil {
				return err
			}
			if looked = time.Now(); last {
				return nil
			}
		}
		select {
		case <-time.After(watchLook):
		case <-a.ended:
			return errEnding
		}
	}
}

// agent leaves the agent's place to the new program, as the last step.
func (u *upgrade) agent() error {
	a := u.a
	if a.builds.self == u.to {
		return a.editBuilds(func(r *buildsRecord) {
			a.builds.run = nil
			a.finishUpgrade(r)
			a.tidyCopies()
		})
	}
	err := a.editBuilds(func(r *buildsRecord) {
		r.Upgrade.Doing = doingAgent
		r.Upgrade.Steps = append(r.Upgrade.Steps, control.UpgradeStep{What: doingAgent, At: time.Now().UTC()})
		a.successor = &Successor{Program: copyPath(a.cfg.Dir, u.to)}
	})
	if err != nil {
		return err
	}
	a.event("", "upgrade-step", nil, "%s", doingAgent)
	a.stop()
	return nil
}

// stopped ends an upgrade that is not done.
func (u *upgrade) stopped(why error) {
	a := u.a
	err := a.editBuilds(func(r *buildsRecord) {
		up := r.Upgrade
		up.State, up.Why, up.Doing, up.Ended = control.UpgradeStopped, strings.ReplaceAll(why.Error(), "\n", "; "), "", time.Now().UTC()
		if a.allRun(up.From.Build) {
			up.State = control.UpgradeFailed
		}
		a.builds.run = nil
		a.event("", "upgrade-"+up.State, upgradeFields(up), "upgrade to %s stops: %s", up.To, up.Why)
	})
	if err != nil {
		a.event("", "alert", nil, "how far the upgrade is cannot be recorded: %v", err)
	}
}

// allRun tells, with a.mu held, whether agent and guests are of one build.
func (a *agent) allRun(build string) bool {
	ok := a.builds.self == build
	for name, m := range a.members {
		ok = ok && a.builds.rec.Guests[name] == build && (m.dom == nil || buildOf(m.dom.Program()) == build)
	}
	return ok
}
