package guest

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/domain"
	"github.com/pollux-storage/pollux/internal/identity"
	"github.com/pollux-storage/pollux/internal/release"
)

// firstFD is where a guest's process finds what it inherits: the listener of
// its line, then the sockets of all identities in the order of the settings.
const firstFD = 3

// mostFDs is how many these are at most.
const mostFDs = 1 + 2*config.MaxGuests

// Args are the arguments of a guest's process after the command's name.
func Args(dir, name string, inc uint64) []string {
	return []string{"--dir", dir, "--guest", name, "--incarnation", strconv.FormatUint(inc, 10)}
}

// SpareArgs are the same of a process that is told its incarnation when it is needed.
func SpareArgs(dir, name string) []string {
	return []string{"--dir", dir, "--guest", name, "--spare"}
}

// Main is the life of a guest's process.
func Main(ctx context.Context, args []string) error {
	fl := flag.NewFlagSet("guest-process", flag.ContinueOnError)
	dir := fl.String("dir", "", "directory of the pair")
	name := fl.String("guest", "", "name of the guest")
	inc := fl.Uint64("incarnation", 0, "number of this start")
	spare := fl.Bool("spare", false, "wait for the number on the standard input")
	if err := fl.Parse(args); err != nil {
		return err
	}
	if *spare {
		warm(*dir)
		var err error
		if *inc, err = awaitNumber(os.Stdin); err != nil || *inc == 0 {
			letGo()
			return err
		}
	} else if err := awaitRecord(os.Stdin); err != nil {
		return err
	}
	lines := newLogWriter(os.Stderr)
	defer lines.Flush(time.Second)
	log := slog.New(slog.NewTextHandler(lines, nil)).With("guest", *name, "incarnation", *inc)
	ctx, stop := signal.NotifyContext(ctx, unix.SIGTERM)
	defer stop()
	// What happens to the agent's terminal does not concern a guest.
	signal.Ignore(unix.SIGINT, unix.SIGHUP)

	words := newLastWords(log, *dir, *name, *inc)
	stuck := endStuck(words, lines, os.Exit)
	err := runProcess(ctx, *dir, *name, *inc, log, Options{Stuck: stuck, Stalled: words.stalled})
	if err != nil {
		log.Error("guest ends", "error", err)
		return err
	}
	log.Info("guest ends")
	words.remove()
	return nil
}

// endStuck returns what ends the process of a guest that does nothing any more. It waits for
// nothing that may be stuck, too, for longer than a moment.
func endStuck(words *lastWords, lines *logWriter, exit func(status int)) func(reason string) {
	return func(reason string) {
		words.stuck(reason)
		lines.Flush(time.Second)
		exit(domain.ExitStuck)
	}
}

// awaitRecord waits until whoever started this process has recorded it. An
// error says that it died before: no agent would ever find this guest.
func awaitRecord(stdin io.Reader) error {
	if _, err := io.ReadFull(stdin, make([]byte, 1)); err != nil {
		return fmt.Errorf("the agent died before it had recorded this guest: %w", err)
	}
	return nil
}

func runProcess(ctx context.Context, dir, name string, inc uint64, log *slog.Logger, o Options) error {
	cfg, err := config.ReadEffective(dir)
	if err != nil {
		return err
	}
	if cfg.Guest(name) == nil {
		return fmt.Errorf("there is no guest %q in the settings", name)
	}
	ln, sockets, err := inherited(cfg)
	if err != nil {
		return err
	}
	mem, err := PlanMemory(cfg)
	if err != nil {
		log.Warn("more memory is needed than is set", "error", err) // a device was added
	}
	mem.limitHeap()
	st := NewPools(cfg, mem.PoolCache())
	log.Info("guest starts", "pid", os.Getpid(), "version", release.Version())
	o.Config, o.Name, o.Inc, o.Sockets, o.Line, o.Storage, o.Plan, o.Logger = cfg, name, inc, sockets, ln, st, mem, log
	return Run(ctx, o)
}

// inherited takes the descriptors that the agent passed.
func inherited(cfg *config.Config) (*net.UnixListener, []*identity.Sockets, error) {
	take := func(i int, what string) *os.File {
		fd := firstFD + i
		unix.CloseOnExec(fd)
		return os.NewFile(uintptr(fd), what)
	}
	f := take(0, "line")
	if f == nil {
		return nil, nil, errors.New("no line to the agent was inherited: guests are started by the agent, with `pollux up`")
	}
	ln, err := net.FileListener(f)
	_ = f.Close()
	if err != nil {
		return nil, nil, fmt.Errorf("line to the agent: %w", err)
	}
	line, ok := ln.(*net.UnixListener)
	if !ok {
		return nil, nil, errors.New("line to the agent is not a unix socket")
	}
	var names []string
	var files []*os.File
	for i, g := range cfg.Guests {
		names = append(names, g.Name)
		files = append(files, take(2*i+1, "TCP socket of "+g.Name), take(2*i+2, "unix socket of "+g.Name))
	}
	sockets, err := identity.FromFiles(names, files)
	return line, sockets, err
}
