package cli

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"os"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/domain/process"
	"github.com/pollux-storage/pollux/internal/guest"
	"github.com/pollux-storage/pollux/internal/host"
	"github.com/pollux-storage/pollux/internal/release"
)

// backend is what the command line reaches past the control interface: the
// agent that `up` runs, the guest that `guest-process` runs, and the pools
// that `check` reads when nothing runs.
type backend struct {
	// agent runs the host agent until it was told to go down, or until ctx
	// ends, which leaves the guests as they are. It tells log what it does. failed
	// says why the program that was to take its place did not.
	agent func(ctx context.Context, cfg *config.Config, log io.Writer, failed string) error
	// guest is the whole life of a guest's process.
	guest func(ctx context.Context, args []string) error
	// check recounts the pools of a pair that does not run; tell, if not nil,
	// hears how far it has come.
	check func(ctx context.Context, cfg *config.Config, tell func(control.CheckProgress)) (control.CheckReport, error)
	// repair is check that mends what it can.
	repair func(ctx context.Context, cfg *config.Config, tell func(control.CheckProgress)) (control.CheckReport, error)
	// find looks for pools on devices and in folders, or where no path is given on
	// all block devices and in dir.
	find func(paths []string, dir string) (control.Found, error)
}

// system is the backend of the real program.
var system = backend{
	agent:  hostAgent,
	guest:  guest.Main,
	check:  guest.CheckOffline,
	repair: guest.RepairOffline,
	find:   guest.FindPools,
}

// hostAgent runs the agent with guests that are processes of this program.
func hostAgent(ctx context.Context, cfg *config.Config, log io.Writer, failed string) error {
	self, err := os.Executable()
	if err != nil {
		return fmt.Errorf("where this program is: %w", err)
	}
	return host.RunWith(ctx, cfg, host.Options{
		Driver: &process.Driver{
			Program: self, RunDir: cfg.RunDir(), LogDir: cfg.LogDir(), LogMax: int64(cfg.LogFile),
		},
		Command: []string{"guest-process"},
		Version: release.Version(),
		Program: self,
		Failed:  failed,
		Logger:  slog.New(slog.NewTextHandler(log, nil)),
	})
}
