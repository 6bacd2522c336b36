// Package pair runs real pairs for tests and benchmarks: the program itself,
// in a directory and on ports of its own, driven by the commands that a person
// types. Two pairs never meet, and nothing but their own processes is ever
// signalled.
package pair

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"

	"github.com/pollux-storage/pollux/internal/control"
)

// Settings are the defaults with free ports and small pools, and givebacks by
// command only. More settings may be appended at the end of the failover map,
// or with Pool and Head.
type Settings struct {
	Log, Cache string            // sizes
	PoolSize   string            // of each guest's file
	Copies     int               // files of each guest's pool that keep the same; 1 if 0
	Devices    int               // files of guest a's pool, each of PoolSize; the program's default if 0
	Failover   []string          // "name: value"
	Policies   map[string]string // of guests, what comes first when they fail; the program's default if not there
	More       []string          // lines of their own
}

// text writes the settings file.
func (s Settings) text() string {
	var b strings.Builder
	put := func(name, value string) {
		if value != "" {
			fmt.Fprintf(&b, "%s: %s\n", name, value)
		}
	}
	put("log", s.Log)
	put("cache", s.Cache)
	size := s.PoolSize
	if size == "" {
		size = "4GiB"
	}
	b.WriteString("guests:\n")
	for _, g := range []string{"a", "b"} {
		devices := ""
		if g == "a" && s.Devices > 0 {
			var names []string
			for i := range s.Devices {
				names = append(names, fmt.Sprintf("disk-%02d.img", i))
			}
			devices = fmt.Sprintf(", devices: [%s]", strings.Join(names, ", "))
		}
		policy := ""
		if p := s.Policies[g]; p != "" {
			policy = ", policy: " + p
		}
		fmt.Fprintf(&b, "  - {name: %s, port: 0%s, pool: {size: %s, copies: %d%s}}\n", g, policy, size, max(s.Copies, 1), devices)
	}
	if len(s.Failover) > 0 {
		fmt.Fprintf(&b, "failover: {%s}\n", strings.Join(s.Failover, ", "))
	}
	for _, line := range s.More {
		b.WriteString(line + "\n")
	}
	return b.String()
}

// Pair is one pair in one directory. Its methods may be called concurrently.
type Pair struct {
	Bin    string // the program
	Dir    string
	client *control.Client
	memory []string // where regions were when the pair was last taken down
}

// Build compiles the program into a directory, with the race detector if that
// is asked for, and returns its path. POLLUX_BIN names one that exists already;
// POLLUX_COVERPKG names packages whose statements it shall count, as -coverpkg
// of go build does.
func Build(ctx context.Context, dir string, race bool) (string, error) {
	if bin := os.Getenv("POLLUX_BIN"); bin != "" {
		return filepath.Abs(bin)
	}
	bin := filepath.Join(dir, "pollux")
	return bin, compile(ctx, bin, race, "", "")
}

// BuildAs compiles a program into a directory that says of itself that it is of a
// version, and that some rows of its table of formats are other ones; see
// internal/release for their form.
func BuildAs(ctx context.Context, dir string, race bool, version, claims string) (string, error) {
	bin := filepath.Join(dir, "pollux-"+version)
	return bin, compile(ctx, bin, race, version, claims)
}

// compile builds the program.
func compile(ctx context.Context, bin string, race bool, version, claims string) error {
	args := []string{"build", "-o", bin}
	if version != "" {
		const release = "github.com/pollux-storage/pollux/internal/release"
		args = append(args, "-ldflags", fmt.Sprintf("-X '%s.version=%s' -X '%s.claims=%s'", release, version, release, claims))
	}
	if race {
		args = append(args, "-race")
	}
	if pkgs := os.Getenv("POLLUX_COVERPKG"); pkgs != "" {
		args = append(args, "-cover", "-covermode=atomic", "-coverpkg="+pkgs)
	}
	cmd := exec.CommandContext(ctx, "go", append(args, "github.com/pollux-storage/pollux/cmd/pollux")...)
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go build: %w\n%s", err, out)
	}
	return nil
}

// New prepares a pair in a new directory below base (the system's temporary
// one when empty). Nothing runs yet.
func New(bin, base string, s Settings) (*Pair, error) {
	// Short, because paths of sockets are.
	dir, err := os.MkdirTemp(base, "plx-")
	if err != nil {
		return nil, err
	}
	p := &Pair{Bin: bin, Dir: filepath.Join(dir, "d")}
	p.client = control.NewClient(p.Dir)
	if err := os.Mkdir(p.Dir, 0o700); err != nil {
		return nil, err
	}
	return p, os.WriteFile(filepath.Join(p.Dir, "config.yaml"), []byte(s.text()), 0o600)
}

// Remove takes the pair down, if it runs, and removes its directory.
func (p *Pair) Remove(ctx context.Context) error {
	if err := p.Down(ctx); err != nil {
		return err // and leave everything for a look
	}
	p.client.Close()
	return os.RemoveAll(filepath.Dir(p.Dir))
}

// Down takes the pair down and sees to it that nothing is left.
func (p *Pair) Down(ctx context.Context) error {
	if st, err := p.Status(ctx); err == nil {
		for _, g := range st.Guests {
			for _, r := range g.Region {
				p.memory = append(p.memory, r.Path)
			}
		}
	}
	if _, err := p.Do(ctx, "down"); err != nil {
		return err
	}
	if left := p.Left(); len(left) > 0 {
		return fmt.Errorf("left behind by down: %s", strings.Join(left, "; "))
	}
	return nil
}

// CommandError is a command that failed.
type CommandError struct {
	Args   []string
	Status int // exit status
	Said   string
	Err    error
}

// Error shows the command and what it said.
func (e *CommandError) Error() string {
	return fmt.Sprintf("pollux %s: %v: %s", strings.Join(e.Args, " "), e.Err, strings.TrimSpace(e.Said))
}

func (e *CommandError) Unwrap() error { return e.Err }

// Do runs a command of the pair and returns what it printed.
func (p *Pair) Do(ctx context.Context, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, p.Bin, append(args[:len(args):len(args)], "--dir", p.Dir)...)
	var out, said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &said
	if err := cmd.Run(); err != nil {
		if cause := context.Cause(ctx); cause != nil {
			err = cause
		}
		return out.Bytes(), &CommandError{args, cmd.ProcessState.ExitCode(), said.String(), err}
	}
	return out.Bytes(), nil
}

// JSON runs a command and decodes what it printed, also when it failed after
// printing.
func (p *Pair) JSON(ctx context.Context, v any, args ...string) error {
	out, err := p.Do(ctx, append(args[:len(args):len(args)], "--json")...)
	if len(out) > 0 {
		if jerr := json.Unmarshal(out, v); jerr != nil && err == nil {
			return fmt.Errorf("pollux %s printed %q: %w", strings.Join(args, " "), out, jerr)
		}
	}
	return err
}

// Up starts the pair, or its agent when the guests run.
func (p *Pair) Up(ctx context.Context) error {
	_, err := p.Do(ctx, "up", "--detach")
	return err
}

// Check recounts the pools and returns what is wrong.
func (p *Pair) Check(ctx context.Context) (control.CheckReport, error) {
	var r control.CheckReport
	if err := p.JSON(ctx, &r, "check"); err != nil {
		return r, err
	}
	if !r.OK || len(r.Pools) == 0 {
		return r, fmt.Errorf("the check finds: %+v", r)
	}
	return r, nil
}

// Status asks over the control socket, as `pollux status` does.
func (p *Pair) Status(ctx context.Context) (control.Status, error) { return p.client.Status(ctx) }

// Client is the control client.
func (p *Pair) Client() *control.Client { return p.client }

// ErrGone says that a guest or export is not in the status.
var ErrGone = errors.New("not in the status")

// Guest returns a guest of a status.
func Guest(st control.Status, name string) control.GuestStatus {
	for _, g := range st.Guests {
		if g.Name == name {
			return g
		}
	}
	return control.GuestStatus{}
}

// Export returns the export of a volume.
func (p *Pair) Export(ctx context.Context, volume string) (control.Export, error) {
	st, err := p.Status(ctx)
	if err != nil {
		return control.Export{}, err
	}
	for _, g := range st.Guests {
		for _, e := range g.Exports {
			if e.Volume == volume {
				return e, nil
			}
		}
	}
	return control.Export{}, fmt.Errorf("volume %s: %w", volume, ErrGone)
}

// Until waits for a status with which ok has nothing to complain about.
func (p *Pair) Until(ctx context.Context, limit time.Duration, ok func(control.Status) string) error {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	tick := time.NewTicker(5 * time.Millisecond)
	defer tick.Stop()
	why := "no status yet"
	for {
		st, err := p.Status(ctx)
		if err != nil {
			why = err.Error()
		} else if why = ok(st); why == "" {
			return nil
		}
		select {
		case <-ctx.Done():
			if text, err := p.Do(context.WithoutCancel(ctx), "status"); err == nil {
				why += "\n" + string(text)
			}
			return fmt.Errorf("after %v still: %s", limit, why)
		case <-tick.C:
		}
	}
}

// Well is a complaint about a status in which not everything is as it should
// be: agent and guests up, all identities served, protected, no alert.
func Well(st control.Status) string {
	switch {
	case !st.Agent.Running:
		return "the agent does not run"
	case len(st.Guests) != 2:
		return fmt.Sprintf("%d guests", len(st.Guests))
	}
	for _, g := range st.Guests {
		switch {
		case g.State != control.StateServing && g.State != control.StateWaiting:
			return fmt.Sprintf("guest %s is %s", g.Name, g.State)
		case g.PID <= 1:
			return fmt.Sprintf("guest %s has no process", g.Name)
		case g.ServedBy == "":
			return fmt.Sprintf("nobody serves %s", g.Name)
		case !g.Protected:
			return fmt.Sprintf("guest %s is not protected: %s", g.Name, g.Why)
		}
		for _, s := range g.PoolStats {
			if s.Error != "" {
				return fmt.Sprintf("pool %s: %s", s.Name, s.Error)
			}
		}
	}
	if !st.Protected {
		return "the pair is not protected"
	}
	if len(st.Alerts) > 0 {
		return "alerts: " + strings.Join(st.Alerts, "; ")
	}
	return ""
}

// Logs returns the ends of the logs of agent and guests.
func (p *Pair) Logs(lines int) string {
	files, _ := filepath.Glob(filepath.Join(p.Dir, "log", "*.log"))
	var b strings.Builder
	for _, f := range files {
		text, err := os.ReadFile(f)
		if err != nil {
			continue
		}
		all := strings.Split(strings.TrimRight(string(text), "\n"), "\n")
		fmt.Fprintf(&b, "--- %s\n%s\n", filepath.Base(f), strings.Join(all[max(0, len(all)-lines):], "\n"))
	}
	return b.String()
}
