// Package cli is the pollux command: how people and programs manage a pair.
//
// Each command has one file with an options struct that its flags fill and a
// run method that does the work. Commands talk to the host agent over the
// control socket of the directory given with --dir; only `up`, `guest-process`, `support-bundle`,
// `dedup estimate`, `hpdi` and the offline forms of `check` and `pool create` do work of their own.
//
// Output goes to the writers of the session, a table for people or, with
// --json, one JSON value for programs. Messages to people while something goes
// on (what `up` waits for, for example) go to standard error, so that standard
// output stays what a program may parse.
package cli

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/control"
)

// session is what all commands of one invocation share.
type session struct {
	in       io.Reader
	out      io.Writer
	err      io.Writer
	terminal bool // a person types at in
	watched  bool // a person reads err as it is written
	now      func() time.Time

	backend backend

	dir  string // --dir
	json bool   // --json, where the command has it
}

// Main runs the command line args (without the program's name) and returns
// the exit status.
func Main(args []string) int { return run(args, system) }

func run(args []string, b backend) int {
	s := &session{
		in: os.Stdin, out: os.Stdout, err: os.Stderr,
		terminal: isTerminal(os.Stdin), watched: isTerminal(os.Stderr), now: time.Now,
		backend: b,
	}
	// The first signal asks the command to end in its own way; the second
	// ends the program, because stop takes the handler away.
	signals := []os.Signal{os.Interrupt, syscall.SIGTERM}
	if !signal.Ignored(syscall.SIGHUP) { // as nohup would have it
		signals = append(signals, syscall.SIGHUP)
	}
	ctx, stop := signal.NotifyContext(context.Background(), signals...)
	defer stop()
	context.AfterFunc(ctx, stop)
	return s.main(ctx, args)
}

func (s *session) main(ctx context.Context, args []string) int {
	root := newRoot(s)
	root.SetArgs(args)
	root.SetIn(s.in)
	root.SetOut(s.out)
	root.SetErr(s.err)
	err := root.ExecuteContext(ctx)
	if err != nil && !errors.Is(err, errReported) {
		what, todo := message(err, s.dir)
		fmt.Fprintf(s.err, "pollux: %s\n", what)
		if todo != "" {
			fmt.Fprintf(s.err, "  %s\n", todo)
		}
	}
	return exitStatus(err)
}

func newRoot(s *session) *cobra.Command {
	root := &cobra.Command{
		Use:   "pollux",
		Short: "Block volumes from a pair of storage guests, either of which may die",
		Long: `Pollux serves block volumes over NBD from a pair of guests on one host.
When one guest dies or hangs, the other fences it and serves its clients.

It does not protect against loss of the host, loss of a disk that is not
mirrored below Pollux, or loss of unflushed writes at a power cut of the host.

` + exitHelp,
		SilenceErrors: true,
		SilenceUsage:  true,
		Args:          noSuchCommand,
		RunE:          func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	root.PersistentFlags().StringVar(&s.dir, "dir", defaultDir, "directory of the pair")
	root.SetFlagErrorFunc(func(c *cobra.Command, err error) error {
		return usagef("%w; see '%s --help'", err, c.CommandPath())
	})
	root.AddGroup(
		&cobra.Group{ID: groupPair, Title: "The pair:"},
		&cobra.Group{ID: groupStorage, Title: "Storage:"},
		&cobra.Group{ID: groupFailover, Title: "Failover:"},
	)
	root.AddCommand(
		newUp(s), newDown(s), newStatus(s), newEvents(s), newCheck(s), newSupportBundle(s),
		newVolume(s), newPool(s), newDedup(s), newFlash(s), newDump(s), newHPDI(s), newVhostUserBlk(s),
		newTakeover(s), newGiveback(s), newGuest(s),
		newUpgrade(s), newVersion(s), newGuestProcess(s),
	)
	return root
}

// The groups that the help shows commands in.
const (
	groupPair     = "pair"
	groupStorage  = "storage"
	groupFailover = "failover"
)

// defaultDir is where a pair lives when --dir does not say otherwise.
const defaultDir = "./pollux-data"

// group returns a command that only holds others.
func group(use, id, short, long string, cmds ...*cobra.Command) *cobra.Command {
	c := &cobra.Command{
		Use: use, GroupID: id, Short: short, Long: long,
		Args: noSuchCommand,
		RunE: func(c *cobra.Command, _ []string) error { return c.Help() },
	}
	c.AddCommand(cmds...)
	return c
}

func noSuchCommand(c *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	return usagef("unknown command %q for %q; see '%[2]s --help'", args[0], c.CommandPath())
}

// args accepts exactly the named arguments.
func args(names ...string) cobra.PositionalArgs {
	return func(c *cobra.Command, got []string) error {
		if n := len(got); n < len(names) {
			return usagef("%s is missing; usage: %s", names[n], c.UseLine())
		}
		if len(got) > len(names) {
			return usagef("%q is one word too many; usage: %s", got[len(names)], c.UseLine())
		}
		return nil
	}
}

// jsonFlag gives a command --json.
func (s *session) jsonFlag(c *cobra.Command) {
	c.Flags().BoolVar(&s.json, "json", false, "print JSON for programs")
}

// client returns the way to the pair of --dir.
func (s *session) client() (*control.Client, error) {
	dir, err := filepath.Abs(s.dir)
	if err != nil {
		return nil, fmt.Errorf("directory %q: %w", s.dir, err)
	}
	return control.NewClient(dir), nil
}

// say tells a person what goes on, on standard error.
func (s *session) say(format string, args ...any) {
	fmt.Fprintf(s.err, format+"\n", args...)
}
