package cli

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/guest"
	"github.com/pollux-storage/pollux/internal/host"
)

type upOptions struct {
	*session
	detach  bool
	config  string
	onAlert string
	first   firstVolume
	report  bool // this is the agent that --detach started
}

// How long `up` waits for the guests, and how often it looks. A guest that
// recovers a pool with a full log is up within seconds.
const (
	readyLimit = 2 * time.Minute
	readyLook  = 20 * time.Millisecond
	downLimit  = 2 * time.Minute
)

func newUp(s *session) *cobra.Command {
	o := &upOptions{session: s}
	c := &cobra.Command{
		Use: "up", GroupID: groupPair,
		Short: "Start the pair",
		Long: `Start the agent and the guests of the pair in --dir; the first time, make what
they need there. Guests that run already, because only the agent had ended, are
found again and serve on meanwhile.

In the foreground the pair lives as long as the command: Ctrl-C (SIGINT),
SIGTERM or the end of the terminal (SIGHUP) takes it down cleanly, as 'pollux
down' does. A second one ends only the agent and leaves the guests.

With --detach the command returns when the guests serve. The agent then goes
on without a terminal and logs to DIR/log/agent.log. When it ends by a signal
or a crash the guests serve on, without automatic takeover, until 'pollux up'
is called again.

Settings come from --config, or from DIR/config.yaml where that exists; all of
them have defaults. See docs/operations.md.`,
		Example: `  pollux up
  pollux up --detach --dir /srv/pollux
  pollux up --first-volume disk1=10GiB`,
		Args: args(),
		RunE: func(c *cobra.Command, _ []string) error { return o.run(c.Context()) },
	}
	f := c.Flags()
	f.BoolVar(&o.detach, "detach", false, "return when the pair serves")
	f.StringVar(&o.config, "config", "", "file with settings (default: DIR/config.yaml where that exists)")
	f.StringVar(&o.onAlert, "on-alert", "", "program that is run for each alert (default: the setting alerts.command)")
	f.Var(&o.first, "first-volume", "make this volume when there is none")
	f.BoolVar(&o.report, "report", false, "")
	_ = f.MarkHidden("report") // fails only for a flag that does not exist
	return c
}

func (o *upOptions) run(ctx context.Context) error {
	cfg, err := config.Load(o.dir, o.config)
	if err != nil {
		return usagef("%w", err)
	}
	if _, err := guest.PlanMemory(cfg); err != nil {
		return usagef("%w", err)
	}
	if o.onAlert != "" {
		if o.onAlert, err = exec.LookPath(o.onAlert); err != nil {
			return usagef("--on-alert: %w", err)
		}
		if o.onAlert, err = filepath.Abs(o.onAlert); err != nil {
			return usagef("--on-alert: %w", err)
		}
		cfg.Alerts.Command = []string{o.onAlert}
	}
	if o.report {
		return o.detached(ctx, cfg)
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	if st, err := client.Status(ctx); err == nil && st.Agent.Running {
		return refused(fmt.Sprintf("the pair in %s runs already (agent pid %d)", cfg.Dir, st.Agent.PID),
			"look at it with: pollux status"+dirFlag(o.dir))
	}
	if !o.detach {
		return o.foreground(ctx, cfg, client)
	}
	if err := o.spawn(ctx, cfg); err != nil {
		return err
	}
	return o.greet(ctx, client)
}

// foreground runs the agent until it is taken down, which a signal does too.
func (o *upOptions) foreground(ctx context.Context, cfg *config.Config, client *control.Client) error {
	agent, err := o.startAgent(ctx, cfg, func(ctx context.Context, program string) error { return o.succeed(ctx, cfg, program, true) })
	if err != nil {
		return err
	}
	defer agent.leave()
	ready := make(chan error, 1)
	go func() { ready <- o.ready(ctx, client) }()
	telling, quiet := context.WithCancel(context.WithoutCancel(ctx))
	var told sync.WaitGroup
	defer told.Wait()
	defer quiet()
	for {
		select {
		case <-agent.ended:
			return agent.err
		case err := <-ready:
			ready = nil
			if ctx.Err() != nil {
				continue
			}
			if err != nil {
				o.say("pollux: %v", err)
			}
			if err := o.greet(ctx, client); err != nil {
				o.say("pollux: %v", err)
			}
			o.say("\nThe pair runs in the foreground; Ctrl-C takes it down. What happens:")
			told.Go(func() { o.tellEvents(telling, client) })
		case <-ctx.Done():
			o.say("pollux: taking the pair down; once more ends only the agent")
			down, cancel := context.WithTimeout(context.WithoutCancel(ctx), downLimit)
			defer cancel()
			if err := client.Down(down); err != nil && !agent.over() {
				return fmt.Errorf("taking the pair down: %w; its guests may run on", err)
			}
			<-agent.ended
			return agent.err
		}
	}
}

// tellEvents shows what happens from now on. That it cannot is no reason to
// end: the agent's own end shows elsewhere.
func (o *upOptions) tellEvents(ctx context.Context, client *control.Client) {
	e := &eventsOptions{session: o.session}
	var last uint64
	err := client.Events(ctx, control.EventQuery{Last: 1}, func(e control.Event) error {
		last = e.Seq
		return nil
	})
	if err == nil {
		_ = client.Events(ctx, control.EventQuery{After: last, Follow: true}, e.print)
	}
}

// agent is the host agent of this process.
type agent struct {
	cancel context.CancelFunc
	ended  chan struct{} // closed when it has ended; err is valid then
	err    error
}

// startAgent runs the agent apart from ctx's end: a signal is no reason to
// leave the guests alone. An agent that is to be followed by another program is, by
// succeed; where that fails, this program's agent goes on.
func (s *session) startAgent(ctx context.Context, cfg *config.Config, succeed func(ctx context.Context, program string) error) (*agent, error) {
	log, err := openLog(cfg)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(ctx))
	a := &agent{cancel: cancel, ended: make(chan struct{})}
	go func() {
		defer close(a.ended)
		failed := ""
		for {
			own := *cfg // the agent makes it its own
			own.Guests = slices.Clone(cfg.Guests)
			a.err = s.backend.agent(ctx, &own, log, failed)
			var next *host.Successor
			if !errors.As(a.err, &next) {
				break
			}
			if a.err = succeed(ctx, next.Program); a.err == nil || ctx.Err() != nil {
				break
			}
			failed = a.err.Error()
		}
		_ = log.Close() // what it said last is in the file or lost
	}()
	return a, nil
}

// openLog opens the file that an agent writes what it does to.
func openLog(cfg *config.Config) (*os.File, error) {
	if err := os.MkdirAll(cfg.LogDir(), 0o700); err != nil {
		return nil, fmt.Errorf("directory for logs: %w", err)
	}
	log, err := os.OpenFile(filepath.Join(cfg.LogDir(), "agent.log"), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, fmt.Errorf("log of the agent: %w", err)
	}
	return log, nil
}

// leave ends the agent and not the guests, and waits for it.
func (a *agent) leave() {
	a.cancel()
	<-a.ended
}

func (a *agent) over() bool {
	select {
	case <-a.ended:
		return true
	default:
		return false
	}
}

// ready waits until all guests are up and makes the first volume.
func (o *upOptions) ready(ctx context.Context, client *control.Client) error {
	if err := awaitGuests(ctx, client); err != nil {
		return err
	}
	if o.first.name == "" {
		return nil
	}
	volumes, err := client.Volumes(ctx)
	if err != nil || len(volumes) > 0 {
		return err
	}
	_, err = client.CreateVolume(ctx, control.VolumeCreate{Name: o.first.name, Size: int64(o.first.size)})
	return err
}

// awaitGuests waits until the agent says that every guest is up.
func awaitGuests(ctx context.Context, client *control.Client) error {
	ctx, cancel := context.WithTimeout(ctx, readyLimit)
	defer cancel()
	look := time.NewTicker(readyLook)
	defer look.Stop()
	why := "the agent does not answer"
	for {
		st, err := client.Status(ctx)
		if err == nil && st.Agent.Running {
			if why = notReady(st); why == "" {
				return nil
			}
		}
		select {
		case <-ctx.Done():
			if errors.Is(ctx.Err(), context.Canceled) {
				return ctx.Err()
			}
			return control.NewError(control.KindTimeout,
				fmt.Sprintf("not up after %v: %s", readyLimit, why),
				"the agent goes on trying; see pollux status, pollux events and the logs")
		case <-look.C:
		}
	}
}

// notReady says which guests are not up yet, or "".
func notReady(st control.Status) string {
	if len(st.Guests) == 0 {
		return "there is no guest yet"
	}
	var down []string
	for _, g := range st.Guests {
		if g.State != control.StateServing && g.State != control.StateWaiting {
			down = append(down, fmt.Sprintf("guest %s is %s", g.Name, orDash(g.State)))
		} else if g.ServedBy == "" && !cannotOpen(st, g.Name) {
			down = append(down, fmt.Sprintf("nobody serves %s yet", g.Name))
		}
	}
	return strings.Join(append(down, st.Alerts[:min(len(st.Alerts), len(down))]...), "; ")
}

// cannotOpen tells whether it is known that the pool of an identity does not
// open now: then nothing is gained by waiting.
func cannotOpen(st control.Status, identity string) bool {
	return slices.ContainsFunc(st.Alerts, func(a string) bool { return strings.Contains(a, "could not serve "+identity+":") })
}

// greet shows the pair and how to attach to it.
func (o *upOptions) greet(ctx context.Context, client *control.Client) error {
	st, err := client.Status(ctx)
	if err != nil {
		return err
	}
	if err := o.printStatus(st); err != nil {
		return err
	}
	return o.printAttach(st)
}

// firstVolume is a flag of the form NAME=SIZE.
type firstVolume struct {
	name string
	size size
}

// String shows the value in the help.
func (v *firstVolume) String() string {
	if v.name == "" {
		return ""
	}
	return v.name + "=" + v.size.String()
}

// Type names the value in the help.
func (v *firstVolume) Type() string { return "NAME=SIZE" }

// Set parses the value of the flag.
func (v *firstVolume) Set(text string) error {
	name, bytes, ok := strings.Cut(text, "=")
	if !ok {
		return usagef("%q is not of the form NAME=SIZE", text)
	}
	v.name = name
	if err := checkName("volume", name); err != nil {
		return err
	}
	return v.size.Set(bytes)
}
