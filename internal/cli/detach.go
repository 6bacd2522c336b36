package cli

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
)

// reportFD is the descriptor on which a detached agent tells the command that
// started it how the start went: one outcome as JSON.
const reportFD = 3

// outcome of a detached start.
type outcome struct {
	Ready bool           `json:"ready"`
	Error *control.Error `json:"error,omitempty"`
}

// spawn starts this program again as a detached agent and waits until the
// pair serves. An agent that ends earlier gives its error to the caller.
func (o *upOptions) spawn(ctx context.Context, cfg *config.Config) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("where this program is: %w", err)
	}
	cmd, got, err := o.launch(cfg, self, o.first.String())
	if err != nil {
		return err
	}
	select {
	case err := <-got:
		if err == nil {
			return cmd.Process.Release()
		}
		return err
	case <-ctx.Done():
		return fmt.Errorf("interrupted; the agent (pid %d) goes on starting: %w", cmd.Process.Pid, ctx.Err())
	}
}

// launch starts a program as a detached agent. What it reports of its start comes on
// the channel.
func (o *upOptions) launch(cfg *config.Config, program, firstVolume string) (*exec.Cmd, <-chan error, error) {
	log, err := openLog(cfg)
	if err != nil {
		return nil, nil, err
	}
	defer log.Close()
	reports, report, err := os.Pipe()
	if err != nil {
		return nil, nil, err
	}
	defer report.Close()

	words := []string{"up", "--report", "--dir", cfg.Dir}
	if o.config != "" {
		file, err := filepath.Abs(o.config)
		if err != nil {
			return nil, nil, errors.Join(fmt.Errorf("settings %q: %w", o.config, err), reports.Close())
		}
		words = append(words, "--config", file)
	}
	if o.onAlert != "" {
		words = append(words, "--on-alert", o.onAlert)
	}
	if firstVolume != "" {
		words = append(words, "--first-volume", firstVolume)
	}
	cmd := exec.Command(program, words...)
	cmd.Args[0] = os.Args[0]
	cmd.Dir = "/" // hold no directory of the caller's
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{report}
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("starting the agent: %w", err), reports.Close())
	}
	got := make(chan error, 1)
	go func() {
		defer reports.Close()
		got <- readOutcome(reports, log.Name())
	}()
	return cmd, got, nil
}

// successorLimit is how long the program that takes an agent's place may take until
// the guests, which run, are seen to serve.
const successorLimit = time.Minute

// succeed lets another program take the place of an agent that has ended. Should that
// not do, it is ended, and an error says why. With stay it is waited for until it ends;
// the end of ctx then ends it, and leaves the guests.
func (o *upOptions) succeed(ctx context.Context, cfg *config.Config, program string, stay bool) error {
	cmd, got, err := o.launch(cfg, program, "")
	if err != nil {
		return err
	}
	limit := time.NewTimer(successorLimit)
	defer limit.Stop()
	select {
	case err = <-got:
	case <-limit.C:
		err = fmt.Errorf("it is not ready after %s", successorLimit)
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		_ = cmd.Process.Kill()
		_ = cmd.Wait() // so that its lock is free
		return fmt.Errorf("the agent with the new program did not take over: %w", err)
	}
	if !stay {
		return cmd.Process.Release()
	}
	stop := context.AfterFunc(ctx, func() { _ = cmd.Process.Signal(syscall.SIGTERM) })
	defer stop()
	o.say("pollux: the agent goes on with another program, as process %d", cmd.Process.Pid)
	if err := cmd.Wait(); err != nil && ctx.Err() == nil {
		// The agent has gone, and nobody is left to ask: not an error of the upgrade.
		o.say("pollux: the agent (process %d) ended: %v; its last words are in %s", cmd.Process.Pid, err, filepath.Join(cfg.LogDir(), "agent.log"))
	}
	return nil
}

// readOutcome returns what the detached agent reports.
func readOutcome(reports *os.File, log string) error {
	var out outcome
	if err := json.NewDecoder(reports).Decode(&out); err != nil {
		return fmt.Errorf("the agent ended before it was ready; its last words are in %s", log)
	}
	if out.Error != nil {
		return out.Error
	}
	return nil
}

// detached is the life of a detached agent. Its end by a signal leaves the
// guests as they are.
func (o *upOptions) detached(ctx context.Context, cfg *config.Config) error {
	// Guests must not inherit the pipe, or the caller would wait for them.
	unix.CloseOnExec(reportFD)
	report := os.NewFile(reportFD, "report")
	client, err := o.client()
	if err != nil {
		return err
	}
	agent, err := o.startAgent(ctx, cfg, func(ctx context.Context, program string) error { return o.succeed(ctx, cfg, program, false) })
	if err != nil {
		return err
	}
	defer agent.leave()
	ready := make(chan error, 1)
	go func() { ready <- o.ready(ctx, client) }()
	for {
		select {
		case <-agent.ended:
			if ready != nil { // nobody has heard of the failure yet
				err := agent.err
				if err == nil {
					err = errors.New("the agent ended before it was ready")
				}
				tell(report, outcome{Error: control.AsError(err)})
			}
			return agent.err
		case err := <-ready:
			ready = nil
			out := outcome{Ready: err == nil}
			if err != nil {
				// The agent goes on: guests may come up yet, and those that
				// are up serve.
				out.Error = control.AsError(err)
			}
			tell(report, out)
		case <-ctx.Done():
			return nil
		}
	}
}

// tell reports an outcome. A caller that has gone does not need it.
func tell(report *os.File, out outcome) {
	_ = json.NewEncoder(report).Encode(out)
	_ = report.Close()
}
