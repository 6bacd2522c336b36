package cli

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
)

type downOptions struct{ *session }

func newDown(s *session) *cobra.Command {
	o := &downOptions{s}
	return &cobra.Command{
		Use: "down", GroupID: groupPair,
		Short: "Stop the pair cleanly",
		Long: `Stop the guests and the agent cleanly: everything that was acknowledged is on
the devices afterwards, and nothing is left in memory. Where nothing runs there
is nothing to do. Guests whose agent has ended are taken down too.`,
		Args: args(),
		RunE: func(c *cobra.Command, _ []string) error { return o.run(c.Context()) },
	}
}

func (o *downOptions) run(ctx context.Context) error {
	client, err := o.client()
	if err != nil {
		return err
	}
	st, err := client.Status(ctx)
	if err != nil && control.KindOf(err) == control.KindNotRunning {
		o.say("nothing runs in %s", o.dir)
		return nil
	}
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, downLimit)
	defer cancel()
	if !st.Agent.Running {
		err = o.orphans(ctx, client)
	} else {
		err = errors.Join(client.Down(ctx), awaitExit(ctx, st.Agent.PID))
	}
	if err != nil {
		return err
	}
	_, err = fmt.Fprintln(o.out, "the pair is down")
	return err
}

// orphans takes guests down whose agent has ended: an agent that lives for
// that long finds them again and stops them.
func (o *downOptions) orphans(ctx context.Context, client *control.Client) error {
	o.say("the agent is not running; starting one to stop the guests")
	cfg, err := config.ReadEffective(o.dir)
	if err != nil {
		return err
	}
	// It lives for one command and begins no upgrade.
	agent, err := o.startAgent(ctx, cfg, func(context.Context, string) error { return nil })
	if err != nil {
		return err
	}
	defer agent.leave()
	for !agent.over() {
		if st, err := client.Status(ctx); err == nil && st.Agent.Running {
			if err := client.Down(ctx); err != nil {
				return err
			}
			break
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-agent.ended:
		case <-time.After(readyLook):
		}
	}
	<-agent.ended
	return agent.err
}

// awaitExit waits until a process has ended, so that a caller may start the
// pair again at once.
func awaitExit(ctx context.Context, pid int) error {
	if pid <= 0 {
		return nil
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("waiting for the agent to end: %w", err)
	}
	defer unix.Close(fd)
	for ctx.Err() == nil {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 100)
		if n > 0 {
			return nil
		}
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("waiting for the agent to end: %w", err)
		}
	}
	return fmt.Errorf("the agent (pid %d) has not ended: %w", pid, ctx.Err())
}
