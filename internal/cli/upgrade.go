package cli

import (
	"context"
	"fmt"
	"path/filepath"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/control"
)

type upgradeOptions struct {
	*session
	binary           string
	rollback, resume bool
	check, yes       bool
	acceptAlerts     bool
	watch            time.Duration
}

func newUpgrade(s *session) *cobra.Command {
	o := &upgradeOptions{session: s}
	c := &cobra.Command{
		Use: "upgrade {--binary FILE | --rollback | --resume}", GroupID: groupPair,
		Short: "Give agent and guests another program, without an outage",
		Long: `Give agent and guests another program, one after the other: the partner of a guest
takes over, the guest starts with the new program and gets back what it served.
Clients wait for a moment at each takeover and giveback. Then the agent itself goes
on with the new program.

Before anything is touched it is checked that the new program runs, that it and the
present one understand each other's formats in both directions, that it reads what is
stored, that the pair is protected and has no alert. At the first doubt the upgrade
stops: the guest that it was at goes back to the program that it had, and the pair
serves. It then can go on with --resume or back with --rollback; so can one that was
interrupted because the agent or the host ended.

The pair keeps copies of the programs in DIR/bin, the one that is in use and the one
before: a file that is replaced elsewhere changes nothing by itself. --rollback goes
back to the one before, unless what is stored has moved beyond what that one reads.

The upgrade goes on when this command ends; 'pollux status' shows how far it is.
Typed at a terminal it needs --yes.`,
		Example: `  pollux upgrade --binary ./pollux-new --check
  pollux upgrade --binary ./pollux-new --yes
  pollux upgrade --rollback --yes`,
		Args: args(),
		RunE: func(c *cobra.Command, _ []string) error { return o.run(c.Context()) },
	}
	f := c.Flags()
	f.StringVar(&o.binary, "binary", "", "the new program")
	f.BoolVar(&o.rollback, "rollback", false, "go back to the program before")
	f.BoolVar(&o.resume, "resume", false, "go on with an upgrade that stopped or was interrupted")
	f.BoolVar(&o.check, "check", false, "only say whether it would begin now, and what it would do")
	f.BoolVar(&o.yes, "yes", false, "do it, also at a terminal")
	f.BoolVar(&o.acceptAlerts, "accept-alerts", false, "go on although alerts stand now; new ones stop the upgrade")
	f.DurationVar(&o.watch, "watch", 5*time.Second, "how long a guest is watched with its new program before the next")
	s.jsonFlag(c)
	return c
}

func (o *upgradeOptions) request() (control.UpgradeRequest, error) {
	req := control.UpgradeRequest{Rollback: o.rollback, Resume: o.resume, AcceptAlerts: o.acceptAlerts, Watch: control.Duration(o.watch)}
	given := 0
	for _, is := range []bool{o.binary != "", o.rollback, o.resume} {
		if is {
			given++
		}
	}
	if given != 1 {
		return req, usagef("one of --binary FILE, --rollback and --resume is needed; see 'pollux upgrade --help'")
	}
	if o.watch <= 0 || o.watch > time.Hour {
		return req, usagef("--watch: %s, up to 1h is possible", o.watch)
	}
	if o.binary != "" {
		var err error
		if req.Binary, err = filepath.Abs(o.binary); err != nil {
			return req, usagef("--binary: %w", err)
		}
	}
	return req, nil
}

func (o *upgradeOptions) run(ctx context.Context) error {
	req, err := o.request()
	if err != nil {
		return err
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	if o.check || o.terminal && !o.yes {
		return o.runCheck(ctx, client, req)
	}
	p, err := client.StartUpgrade(ctx, req)
	if err != nil {
		return err
	}
	return o.follow(ctx, client, p)
}

// runCheck shows what stands in the way and what would be done.
func (o *upgradeOptions) runCheck(ctx context.Context, client *control.Client, req control.UpgradeRequest) error {
	c, err := client.CheckUpgrade(ctx, req)
	if err != nil {
		return err
	}
	if o.json {
		err = o.printJSON(c)
	} else {
		err = o.printCheck(c)
	}
	switch {
	case err != nil:
		return err
	case !c.OK:
		return &statusError{exitRefused, errReported}
	case !o.check:
		return refused("this moves the clients of both guests, one after the other",
			"if that is meant: the same command with --yes")
	}
	return nil
}

func (o *upgradeOptions) printCheck(c control.UpgradeCheck) error {
	rows := [][]string{{"CHECK", "OK", "WHY"}}
	for _, i := range c.Checks {
		rows = append(rows, []string{i.Name, okNo(i.OK), i.Why})
	}
	if err := table(o.out, rows); err != nil {
		return err
	}
	var b strings.Builder
	for _, h := range c.Held {
		fmt.Fprintf(&b, "held back until all is done: %s\n", h)
	}
	for _, l := range c.Lost {
		fmt.Fprintf(&b, "made anew: %s\n", l)
	}
	word := "may begin now"
	if !c.OK {
		word = "CANNOT begin now"
	}
	fmt.Fprintf(&b, "the upgrade from %s to %s %s\n", c.From, c.To, word)
	for i, p := range c.Plan {
		fmt.Fprintf(&b, "  %d. %s\n", i+1, p)
	}
	_, err := o.out.Write([]byte(b.String()))
	return err
}

const (
	// upgradeLook is how often the command looks how far an upgrade is.
	upgradeLook = 100 * time.Millisecond
	// agentGone is how long the agent may be away, which it is for a moment when it
	// goes on with the new program.
	agentGone = 2 * time.Minute
)

// follow shows the steps of an upgrade until it ends.
func (o *upgradeOptions) follow(ctx context.Context, client *control.Client, p control.Programs) error {
	told := 0
	if u := p.Upgrade; u != nil {
		told = len(u.Steps) // of what was done before it stopped
	}
	var gone time.Time
	tick := time.NewTicker(upgradeLook)
	defer tick.Stop()
	for {
		if u := p.Upgrade; u != nil {
			for ; told < len(u.Steps); told++ {
				if s := u.Steps[told]; s.Took > 0 || s.Error != "" {
					o.tellStep(s)
				} else {
					break // it is under way
				}
			}
			if u.State != control.UpgradeRunning {
				return o.end(p)
			}
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("%w; the upgrade goes on, see 'pollux status'", ctx.Err())
		case <-tick.C:
		}
		next, err := client.Programs(ctx)
		switch kind := control.KindOf(err); {
		case err == nil:
			p, gone = next, time.Time{}
		case kind != control.KindNotRunning && kind != control.KindUnavailable:
			return err
		case gone.IsZero():
			gone = time.Now()
		case time.Since(gone) > agentGone:
			return fmt.Errorf("the agent is gone: %w; the guests serve on, and 'pollux up' starts it", err)
		}
	}
}

func (o *upgradeOptions) tellStep(s control.UpgradeStep) {
	who := "agent"
	if s.Guest != "" {
		who = "guest " + s.Guest
	}
	if s.Error != "" {
		o.say("%s: %s: FAILED after %s: %s", who, s.What, took(s.Took), s.Error)
		return
	}
	o.say("%s: %s (%s)", who, s.What, took(s.Took))
}

// end tells how an upgrade ended.
func (o *upgradeOptions) end(p control.Programs) error {
	u := p.Upgrade
	if o.json {
		if err := o.printJSON(p); err != nil {
			return err
		}
	}
	switch u.State {
	case control.UpgradeDone:
		if o.json {
			return nil
		}
		_, err := fmt.Fprintf(o.out, "agent and guests run %s; before it was %s\n", u.To, u.From)
		return err
	case control.UpgradeFailed:
		return control.NewError(control.KindInternal, fmt.Sprintf("the upgrade to %s has failed: %s", u.To, u.Why),
			"agent and guests run "+u.From.String()+" as before")
	}
	return control.NewError(control.KindInternal, fmt.Sprintf("the upgrade to %s was %s: %s", u.To, u.State, u.Why),
		"the pair serves; go on with 'pollux upgrade --resume', or back with 'pollux upgrade --rollback'")
}
