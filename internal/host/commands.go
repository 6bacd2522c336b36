package host

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/domain"
	"github.com/pollux-storage/pollux/internal/partner"
	"github.com/pollux-storage/pollux/internal/region"
)

// Limits of commands.
const (
	downLimit    = 90 * time.Second // for guests to close their pools
	restartLimit = time.Minute
)

// movesItself is why commands may not move identities during an upgrade.
const movesItself = "it moves them itself"

func (a *agent) handlers() control.Handlers {
	return control.Handlers{
		Status:            a.status,
		Volumes:           a.volumes,
		Volume:            a.volume,
		CreateVolume:      a.createVolume,
		ChangeVolume:      a.changeVolume,
		DeleteVolume:      a.deleteVolume,
		Pools:             a.pools,
		Pool:              a.pool,
		CreatePool:        a.createPool,
		AddDevice:         a.addDevice,
		ExportPool:        a.exportPool,
		ImportPool:        a.importPool,
		RemoveDevice:      a.removeDevice,
		ChangeCopy:        a.changeCopy,
		ChangePool:        a.changePool,
		ScrubPool:         a.scrubPool,
		SurveyPool:        a.surveyPool,
		Dedup:             a.dedup,
		Flash:             a.flash,
		FlashPolicy:       a.flashPolicy,
		ChangeFlashPolicy: a.changeFlashPolicy,
		ChangeFlashPin:    a.changeFlashPin,
		EvacuateFlash:     a.evacuateFlash,
		ExplainFlash:      a.explainFlash,
		SimulateFlash:     a.simulateFlash,
		CheckUpgrade:      a.checkUpgrade,
		StartUpgrade:      a.startUpgrade,
		Programs:          a.programs,
		CheckTakeover:     a.checkTakeover,
		Takeover:          a.takeover,
		Giveback:          a.giveback,
		Drill:             a.drill,
		Check:             a.check,
		Down:              a.down,
		Events: func(ctx context.Context, q control.EventQuery, emit func(control.Event) error) error {
			return a.events.serve(ctx, q, a.ended, emit)
		},
	}
}

// known returns the settings of a guest, or an error for people.
func (a *agent) known(name string) (*config.Guest, error) {
	if g := a.settings().Guest(name); g != nil {
		return g, nil
	}
	return nil, control.NewError(control.KindNotFound, fmt.Sprintf("there is no guest %q", name), "see `pollux status`")
}

// paired returns the partner of a guest.
func (a *agent) paired(name string) (string, error) {
	if _, err := a.known(name); err != nil {
		return "", err
	}
	p := a.settings().Partner(name)
	if p == "" {
		return "", control.NewError(control.KindRefused, fmt.Sprintf("guest %s is alone: there is no partner", name), "add a second guest to the settings")
	}
	return p, nil
}

// move lets an identity be served by another guest, and waits for that.
func (a *agent) move(ctx context.Context, id, to, why string) error {
	done := make(chan string, 1)
	err := a.ask(ctx, func() {
		a.nextCmd++
		a.waiting[a.nextCmd] = done
		a.ref.Step(partner.Message{Kind: partner.KindMove, Identity: id, To: to, Cmd: a.nextCmd, Reason: why, Planned: true})
	})
	if err != nil {
		return err
	}
	select {
	case text := <-done:
		if text != "" {
			return control.NewError(control.KindRefused, text, "see `pollux status`")
		}
		return nil
	case <-a.ended:
		return control.NewError(control.KindNotRunning, "the agent is ending", "")
	case <-ctx.Done():
		return fmt.Errorf("waiting for %s to serve %s, which goes on: %w", to, id, ctx.Err())
	}
}

// takeover lets the partner of a guest take over all that the guest serves.
func (a *agent) takeover(ctx context.Context, name string) (control.Takeover, error) {
	to, err := a.paired(name)
	if err != nil {
		return control.Takeover{}, err
	}
	if err := a.upgrading(movesItself, false); err != nil {
		return control.Takeover{}, err
	}
	ids := []string{name}
	err = a.ask(ctx, func() {
		if a.ref.Title(to).Holder == name {
			ids = append(ids, to)
		}
	})
	if err != nil {
		return control.Takeover{}, err
	}
	a.event(name, "command", nil, "takeover of %s by %s", name, to)
	for i := len(ids) - 1; i >= 0; i-- { // the named one last, so that it is reported
		if err := a.move(ctx, ids[i], to, "takeover by command"); err != nil {
			return control.Takeover{}, fmt.Errorf("takeover of %s: %w", ids[i], err)
		}
	}
	return a.lastOf(name), nil
}

func (a *agent) giveback(ctx context.Context, name string) (control.Takeover, error) {
	if _, err := a.paired(name); err != nil {
		return control.Takeover{}, err
	}
	if err := a.upgrading(movesItself, false); err != nil {
		return control.Takeover{}, err
	}
	a.event(name, "command", nil, "giveback to %s", name)
	if err := a.move(ctx, name, name, "giveback by command"); err != nil {
		return control.Takeover{}, fmt.Errorf("giveback to %s: %w", name, err)
	}
	return a.lastOf(name), nil
}

func (a *agent) lastOf(id string) control.Takeover {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.last == nil || a.last.Of != id {
		return control.Takeover{Of: id}
	}
	return *a.last
}

// checkTakeover is the dry run: the guest that would take over looks, and the
// agent adds what it knows.
func (a *agent) checkTakeover(ctx context.Context, name string) (control.TakeoverCheck, error) {
	by, err := a.paired(name)
	if err != nil {
		return control.TakeoverCheck{}, err
	}
	r := control.TakeoverCheck{Of: name, By: by, OK: true}
	add := func(what string, ok bool, why string) {
		r.OK = r.OK && ok
		r.Checks = append(r.Checks, control.CheckItem{Name: what, OK: ok, Why: why})
	}
	add("agent", true, "it runs, and can fence")
	var seat partner.SeatView
	var title partner.TitleView
	if err := a.ask(ctx, func() { seat, title = a.ref.Seat(by), a.ref.Title(name) }); err != nil {
		return r, err
	}
	if title.Holder == by {
		add("identity", false, fmt.Sprintf("%s serves %s already", by, name))
		return r, nil
	}
	if !seat.Alive || !seat.Linked {
		add("partner", false, fmt.Sprintf("guest %s is not up", by))
		return r, nil
	}
	add("partner", true, fmt.Sprintf("guest %s is up", by))
	cctx, cancel := context.WithTimeout(ctx, answerLimit)
	defer cancel()
	c, err := a.client(by).CheckTakeover(cctx, name)
	if err != nil {
		add("partner answers", false, err.Error())
		return r, nil
	}
	r.OK = r.OK && c.OK
	r.Checks = append(r.Checks, c.Checks...)
	return r, nil
}

func (a *agent) client(name string) *control.Client {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.members[name].client
}

// domainOf returns the living domain of a guest.
func (a *agent) domainOf(name string) (domain.Domain, error) {
	if _, err := a.known(name); err != nil {
		return nil, err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if d := a.members[name].dom; d != nil && !hasEnded(d) {
		return d, nil
	}
	return nil, control.NewError(control.KindRefused, fmt.Sprintf("guest %s does not run", name), "start it with `pollux guest restart "+name+"`")
}

// drill does to a guest what faults do.
func (a *agent) drill(ctx context.Context, name, what string) error {
	if what == control.DrillRestart {
		if err := a.upgrading(movesItself, false); err != nil {
			return err
		}
		return a.restart(ctx, name)
	}
	d, err := a.domainOf(name)
	if err != nil {
		return err
	}
	a.event(name, "drill", map[string]string{"drill": what}, "drill: %s guest %s (process %d)", what, name, d.PID())
	switch what {
	case control.DrillKill:
		return d.Kill()
	case control.DrillHang:
		return d.Pause()
	case control.DrillResume:
		return d.Resume()
	}
	return control.NewError(control.KindInvalid, fmt.Sprintf("%q is not a drill", what), "")
}

// restart lets the partner serve for the time that a guest needs to start
// again; a guest alone closes its pool and opens it again.
func (a *agent) restart(ctx context.Context, name string) error {
	if _, err := a.known(name); err != nil {
		return err
	}
	d, _ := a.domainOf(name) // nil when it is down: then it is only started
	a.event(name, "command", nil, "restart of guest %s", name)
	if d != nil && a.settings().Partner(name) != "" {
		var serves, other bool
		err := a.ask(ctx, func() {
			for _, g := range a.names() {
				serves = serves || a.ref.Title(g).Holder == name
			}
			s := a.ref.Seat(a.settings().Partner(name))
			other = s.Alive && s.Linked
		})
		if err != nil {
			return err
		}
		if serves && other {
			if _, err := a.takeover(ctx, name); err != nil {
				return err
			}
		}
	}
	if err := a.ask(ctx, func() { a.ref.Step(partner.Message{Kind: partner.KindRestart, Guest: name}) }); err != nil {
		return err
	}
	var inc uint64
	if d != nil {
		inc = d.Inc()
		if err := d.Terminate(); err != nil {
			return err
		}
	}
	ctx, cancel := context.WithTimeout(ctx, restartLimit)
	defer cancel()
	return a.until(ctx, func() bool {
		s := a.ref.Seat(name)
		return s.Inc > inc && s.Linked
	})
}

// until waits for a condition that the loop can see.
func (a *agent) until(ctx context.Context, cond func() bool) error {
	t := time.NewTicker(10 * time.Millisecond)
	defer t.Stop()
	for {
		ok := false
		if err := a.ask(ctx, func() { ok = cond() }); err != nil || ok {
			return err
		}
		select {
		case <-t.C:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// down ends the guests cleanly, then takes away what the pair has made, and
// ends the loop. Whoever asks while it is under way gets the same answer.
func (a *agent) down(context.Context) error {
	a.downOnce.Do(func() {
		defer a.stop()
		ctx, cancel := context.WithTimeout(context.Background(), downLimit)
		defer cancel()
		a.event("", "command", nil, "the pair goes down")
		a.settle(ctx)
		a.downErr = a.endGuests(ctx)
		a.downErr = errors.Join(a.downErr, a.cleanUp())
		a.event("", "down", nil, "the pair is down")
	})
	return a.downErr
}

// settleLimit is how long `down` waits for a takeover that is under way.
const settleLimit = 5 * time.Second

// settle waits until somebody serves each identity, as long as a guest lives
// that could: whoever serves a pool when the pair goes down brings its log to
// the devices, and nothing has to be kept in memory.
func (a *agent) settle(ctx context.Context) {
	ctx, cancel := context.WithTimeout(ctx, settleLimit)
	defer cancel()
	tick := time.NewTicker(10 * time.Millisecond)
	defer tick.Stop()
	for {
		s, err := a.snapshot(ctx)
		if err != nil || s.settled() {
			return
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// settled reports whether no takeover is under way or to be expected.
func (s snapshot) settled() bool {
	alive := false
	for _, seat := range s.seats {
		alive = alive || seat.Alive
	}
	for _, t := range s.titles {
		if alive && t.Phase != partner.PhaseServing {
			return false
		}
	}
	return true
}

// endGuests tells the guests to end and waits; those that do not are killed,
// which leaves their logs in their regions for the next start.
func (a *agent) endGuests(ctx context.Context) error {
	var left []domain.Domain
	err := a.ask(ctx, func() {
		a.ref.Step(partner.Message{Kind: partner.KindDown})
		a.dropSpares()
		a.noSpares = true
		for _, m := range a.members {
			if m.dom != nil && !hasEnded(m.dom) {
				left = append(left, m.dom)
				if m.line == nil {
					_ = m.dom.Terminate() // it has not heard of the end
				}
				_ = m.dom.Resume() // or it would never read it
			}
		}
	})
	if err != nil {
		return err
	}
	for _, d := range left {
		select {
		case <-d.Ended():
			continue
		case <-ctx.Done():
		}
		err = errors.Join(err, fmt.Errorf("guest %s did not close its pools within %s and was killed; what was acknowledged is in its region", d.Name(), downLimit))
		if kerr := d.Kill(); kerr == nil {
			<-d.Ended()
		}
	}
	return err
}

// cleanUp removes sockets, records, and the memory of regions that are gone.
func (a *agent) cleanUp() error {
	cfg := a.settings()
	for _, g := range cfg.Guests {
		removeFile(g.Socket)
		removeFile(linkPath(cfg, g.Name))
		removeFile(sparePath(cfg, g.Name))
		removeFile(control.GuestSocket(cfg.Dir, g.Name))
		removeSockets(cfg.VhostDir(g.Name))
		removeSockets(cfg.RingDir(g.Name))
		if err := a.opt.Driver.Forget(g.Name); err != nil {
			a.log.Warn("record of a guest", "error", err)
		}
	}
	removeFile(config.EffectivePath(cfg.Dir))
	if err := region.RemoveDir(a.base); err != nil {
		a.event("", "alert", nil, "regions are kept, because something is left in them: %v", err)
		return fmt.Errorf("the guests are down, but not everything acknowledged could be brought to the devices; "+
			"nothing is lost as long as the host runs, and `pollux up` goes on from there: %v", err)
	}
	return nil
}
