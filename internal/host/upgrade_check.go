package host

import (
	"context"
	"fmt"
	"math"
	"os"
	"slices"
	"strings"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/partner"
	"github.com/pollux-storage/pollux/internal/region"
	"github.com/pollux-storage/pollux/internal/release"
)

// upgradePlan is what an upgrade would do, and whether it may.
type upgradePlan struct {
	control.UpgradeCheck
	file   string // the program
	back   bool
	hint   string
	alerts map[string]bool // that stand now
}

func (p *upgradePlan) check(name string, ok bool, why, hint string) {
	p.Checks = append(p.Checks, control.CheckItem{Name: name, OK: ok, Why: why})
	if !ok {
		p.OK = false
		if p.hint == "" {
			p.hint = hint
		}
	}
}

// planUpgrade looks whether an upgrade may begin, and changes nothing. An error says
// that the request makes no sense.
func (a *agent) planUpgrade(ctx context.Context, req control.UpgradeRequest) (*upgradePlan, error) {
	p := &upgradePlan{UpgradeCheck: control.UpgradeCheck{OK: true, Checks: []control.CheckItem{}}, alerts: map[string]bool{}}
	pending, err := a.target(p, req)
	if err != nil {
		return nil, err
	}
	to, err := askBuild(ctx, p.file)
	if err != nil {
		p.check("program", false, err.Error(), "give the path of a pollux program that runs on this host")
		return p, nil
	}
	p.To.Version = to.Version
	p.check("program", true, fmt.Sprintf("%s is %s", p.file, p.To), "")
	from, err := askBuild(ctx, copyPath(a.settings().Dir, p.From.Build))
	if err != nil {
		p.check("program in use", false, err.Error(), "take the pair down, and start it with the new program")
		return p, nil
	}
	p.From.Version = from.Version
	a.checkFormats(p, from, to)
	st, s, err := a.observe(ctx)
	if err != nil {
		return nil, err
	}
	a.checkPair(p, st, s, req, pending)
	for _, name := range a.names() {
		if title := s.titles[name]; title.Holder == name && s.seats[name].Alive {
			c, err := a.checkTakeover(ctx, name)
			why := fmt.Sprintf("guest %s can take over", c.By)
			for _, i := range c.Checks {
				if !i.OK {
					why = i.Name + ": " + i.Why
				}
			}
			if err != nil {
				why = err.Error()
			}
			p.check("partner of "+name, err == nil && c.OK, why, "see `pollux takeover --check "+name+"`")
		}
	}
	a.planSteps(p, s)
	return p, nil
}

// target settles from which program to which, and tells whether an upgrade is half done.
func (a *agent) target(p *upgradePlan, req control.UpgradeRequest) (pending bool, err error) {
	given := 0
	for _, is := range []bool{req.Binary != "", req.Rollback, req.Resume} {
		if is {
			given++
		}
	}
	if given != 1 {
		return false, control.NewError(control.KindInvalid, "an upgrade needs a program, or is a rollback, or goes on with one that stopped: one of the three", "")
	}
	if err := a.upgrading("there is one at a time", false); err != nil {
		return false, err
	}
	var build string
	if req.Binary != "" {
		p.file = a.absolute(req.Binary)
		if fi, err := os.Stat(p.file); err != nil || !fi.Mode().IsRegular() {
			return false, control.NewError(control.KindNotFound, fmt.Sprintf("program %s is no file that can be read: %v", p.file, err), "")
		}
		if build, err = hashFile(p.file); err != nil {
			return false, fmt.Errorf("program: %w", err)
		}
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	rec := a.builds.rec
	if rec == nil {
		return false, a.noBuilds()
	}
	u := rec.Upgrade
	pending = u.Pending()
	switch {
	case req.Binary != "" && pending && build != u.To.Build:
		return pending, control.NewError(control.KindRefused, fmt.Sprintf("an upgrade to %s is half done", u.To), "go on with it with --resume, or back with --rollback, before another")
	case req.Binary != "" && !pending:
		p.From, p.To = rec.program(rec.Current), control.Program{Build: build}
		if build == rec.Current && a.builds.self == build {
			return pending, control.NewError(control.KindRefused, fmt.Sprintf("the pair runs %s already", rec.program(build)), "")
		}
		return pending, nil
	case req.Rollback && pending:
		p.From, p.To, p.back = u.To, u.From, !u.Back
	case req.Rollback && rec.Previous == "":
		return pending, control.NewError(control.KindRefused, "there is no program before the present one", "")
	case req.Rollback:
		p.From, p.To, p.back = rec.program(rec.Current), rec.program(rec.Previous), true
	case !pending:
		return pending, control.NewError(control.KindRefused, "no upgrade has stopped half way", "begin one with --binary")
	default: // on with it
		p.From, p.To, p.back = u.From, u.To, u.Back
	}
	p.file = copyPath(a.cfg.Dir, p.To.Build)
	return pending, nil
}

// checkFormats compares the programs, and what is stored with the one to come.
func (a *agent) checkFormats(p *upgradePlan, from, to release.Build) {
	v := release.Compare(from, to)
	p.Held, p.Lost = v.Held, v.Lost
	why := "each reads what the other writes"
	if len(v.Refusals) > 0 {
		why = "during the upgrade a guest with one program takes over the pool of the other, and they do not understand each other: " + strings.Join(v.Refusals, "; ")
	}
	p.check("formats", len(v.Refusals) == 0, why,
		"take the pair down with `pollux down`, which brings all that is in memory to the devices, and start it with the new program; what it writes then may be beyond the old one")
	seen, err := a.stored()
	if err != nil {
		p.check("what is stored", false, err.Error(), "see `pollux status`")
		return
	}
	bad := to.Unreadable(seen)
	why = fmt.Sprintf("%s reads the %d structures that lead to everything else", to.Version, len(seen))
	hint := "use a program that reads it"
	if len(bad) > 0 {
		why = strings.Join(bad, "; ")
		if p.back {
			hint = "the formats were moved up since the upgrade: there is no way back to this program, only to one that reads them"
		}
	}
	p.check("what is stored", len(bad) == 0, why, hint)
}

// checkPair looks at the state of the pair.
func (a *agent) checkPair(p *upgradePlan, st control.Status, s snapshot, req control.UpgradeRequest, pending bool) {
	names := a.names()
	p.check("two guests", len(names) == 2, fmt.Sprintf("there are %d", len(names)),
		"a guest alone has nobody who serves meanwhile: take it down and start it with the new program")
	down := slices.ContainsFunc(names, func(n string) bool { return !s.seats[n].Alive || !s.seats[n].Linked })
	// What is half done may be so because a guest does not come up.
	if pending && down {
		served := true
		for _, n := range names {
			served = served && s.titles[n].Phase == partner.PhaseServing
		}
		p.check("served", served, "all that the pair has is served, and the guest that is down comes first", "see `pollux status`")
	} else {
		why := "either guest may stop now"
		for _, g := range st.Guests {
			if !g.Protected {
				why = fmt.Sprintf("%s is not protected: %s", g.Name, g.Why)
			}
		}
		p.check("protected", st.Protected, why, "see `pollux status`; begin when the pair is protected")
	}
	for _, t := range ownAlerts(st) {
		p.alerts[t] = true
	}
	why := "there are none"
	if len(p.alerts) > 0 {
		why = strings.Join(ownAlerts(st), "; ")
	}
	p.check("alerts", len(p.alerts) == 0 || req.AcceptAlerts || pending && down, why, "see to them first, or go on in spite of them with --accept-alerts")
}

// ownAlerts are the alerts of the pair without that of an upgrade that is half done.
func ownAlerts(st control.Status) []string {
	return slices.DeleteFunc(st.AlertTexts(), func(t string) bool { return strings.HasPrefix(t, halfDone) })
}

// order returns the guests in the order in which they are restarted, those that are
// down first.
func (a *agent) order(s snapshot) []string {
	names := slices.Clone(a.names())
	slices.Reverse(names) // the first guest commonly has most of the clients
	slices.SortStableFunc(names, func(x, y string) int {
		up := func(n string) int {
			if seat := s.seats[n]; seat.Alive && seat.Linked {
				return 1
			}
			return 0
		}
		return up(x) - up(y)
	})
	return names
}

// planSteps says what would be done.
func (a *agent) planSteps(p *upgradePlan, s snapshot) {
	for _, g := range a.order(s) {
		if a.runs(g) == p.To.Build && a.startsWith(g) == p.To.Build {
			continue
		}
		p.Plan = append(p.Plan, fmt.Sprintf("guest %s: its partner takes over, it starts with %s, and gets back what it served", g, p.To))
	}
	if a.builds.self != p.To.Build {
		p.Plan = append(p.Plan, doingAgent)
	}
}

// runs returns the build that a guest's process is of, "" if none is known.
func (a *agent) runs(guest string) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	if m := a.members[guest]; m.dom != nil && !hasEnded(m.dom) {
		return buildOf(m.dom.Program())
	}
	return ""
}

// startsWith returns the build that a guest is started with.
func (a *agent) startsWith(guest string) string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.builds.rec.Guests[guest]
}

// A device's head is where labels, superblocks and small records are; that of one of
// several copies has as much before it.
const headBlocks = 256

// stored returns the versions of what leads to everything else: the structures at the
// beginning of each device, and those of the regions. What lies behind them, journal,
// trees and log, raises their versions when it changes.
func (a *agent) stored() ([]release.Seen, error) {
	var out []release.Seen
	cfg := a.settings()
	for _, g := range cfg.Guests {
		var failed error
		had := len(out)
		for _, path := range g.Pool.Devices {
			seen, err := headOf(path)
			if err != nil {
				failed = fmt.Errorf("device of pool %s: %w", g.Pool.Name, err)
			}
			out = append(out, seen...)
		}
		// Of several copies one may be absent; the others say the same.
		if failed != nil && (g.Pool.Copies < 2 || len(out) == had) {
			return nil, failed
		}
		path := cfg.RegionPath(g.Name)
		if _, err := os.Stat(path); err != nil {
			continue // an identity without a pool has none
		}
		seen, err := regionVersions(path)
		if err != nil {
			return nil, err
		}
		out = append(out, seen...)
	}
	return out, nil
}

func headOf(path string) ([]release.Seen, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	head := make([]byte, 2*headBlocks*block.Size)
	n, err := f.ReadAt(head, 0)
	if n < headBlocks*block.Size {
		return nil, fmt.Errorf("read %s: %w", path, err)
	}
	out := sealed(head[:headBlocks*block.Size], "device "+path)
	if slices.ContainsFunc(out, func(s release.Seen) bool { return s.Kind == string(ondisk.KindMirror) }) {
		out = append(out, sealed(head[headBlocks*block.Size:n&^(block.Size-1)], "device "+path)...)
	}
	return out, nil
}

// regionVersions returns those of a region's header and of its log.
func regionVersions(path string) ([]release.Seen, error) {
	r, err := region.Open(path, true)
	if err != nil {
		return nil, err
	}
	h := r.Header()
	if err := r.Close(); err != nil {
		return nil, err
	}
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("region: %w", err)
	}
	defer f.Close()
	places := []int64{0, block.Size}
	if len(h.Sections) > 0 {
		places = append(places, h.Sections[0].Offset)
	}
	var out []release.Seen
	page := make([]byte, block.Size)
	for _, at := range places {
		if _, err := f.ReadAt(page, at); err != nil {
			return nil, fmt.Errorf("region %s: %w", path, err)
		}
		out = append(out, sealed(page, "region "+path)...)
	}
	return out, nil
}

// sealed finds the sealed structures that begin at the blocks of p. One that is being
// written at this moment is not seen; there are two of each that matters.
func sealed(p []byte, where string) []release.Seen {
	var out []release.Seen
	for ; len(p) >= block.Size; p = p[block.Size:] {
		if !strings.HasPrefix(string(p[:3]), "PLX") {
			continue
		}
		kind := ondisk.Kind(p[:8])
		h, err := ondisk.Open(p, kind, math.MaxUint16)
		if err != nil {
			continue
		}
		s := release.Seen{Kind: string(kind), Version: int(h.Version), Where: where}
		if !slices.Contains(out, s) {
			out = append(out, s)
		}
	}
	return out
}
