package host

import (
	"bytes"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/release"
)

// Guests are started from copies of the program in DIR/bin, one for each build, so that
// a file that is replaced elsewhere changes nothing by itself. Which copy a guest is
// started from is recorded, by guest: in the middle of an upgrade one that crashed comes
// back with the program that it had. docs/format/upgrade.md has the record.

// upgradeVersion is that of the record; docs/format/upgrade.md describes it.
const upgradeVersion = 1

// buildsRecord is what is kept of the programs, durably.
type buildsRecord struct {
	Format   int               `json:"format"` // upgradeVersion
	Current  string            `json:"current"`
	Previous string            `json:"previous,omitempty"`
	Versions map[string]string `json:"versions"` // as builds say themselves
	// Guests says from which build each guest is started.
	Guests map[string]string `json:"guests"`
	// Upgrade is the one that runs, or ran last.
	Upgrade *control.Upgrade `json:"upgrade,omitempty"`
	// Seats are the identities that a guest shall have back, which it held when its
	// restart began.
	Seats map[string][]string `json:"seats,omitempty"`
}

func binDir(dir string) string     { return filepath.Join(dir, "bin") }
func recordPath(dir string) string { return filepath.Join(binDir(dir), "builds.json") }

// copyName is what copies are called; the build follows.
const copyName = "pollux-"

func copyPath(dir, build string) string { return filepath.Join(binDir(dir), copyName+build) }

// buildOf returns the build of a program that is a copy, "" of another.
func buildOf(program string) string {
	build, ok := strings.CutPrefix(filepath.Base(program), copyName)
	if !ok || !validBuild(build) {
		return ""
	}
	return build
}

const buildLen = 16

func validBuild(s string) bool {
	p, err := hex.DecodeString(s)
	return err == nil && len(p) == buildLen/2 && strings.ToLower(s) == s
}

// hashFile returns the build of a file.
func hashFile(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", fmt.Errorf("read %s: %w", path, err)
	}
	return hex.EncodeToString(h.Sum(nil))[:buildLen], nil
}

// install copies a program into the directory, unless it is there, and returns its
// build. want is the build that it must be, if not "".
func install(dir, path, want string) (string, error) {
	build, err := hashFile(path)
	if err != nil {
		return "", err
	}
	if want != "" && build != want {
		return "", fmt.Errorf("%s has changed since it was checked", path)
	}
	to := copyPath(dir, build)
	if same(path, to) {
		return build, nil
	}
	if have, err := hashFile(to); err == nil && have == build {
		return build, nil
	}
	if err := os.MkdirAll(binDir(dir), 0o700); err != nil {
		return "", err
	}
	in, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer in.Close()
	out, err := os.CreateTemp(binDir(dir), ".copy-*")
	if err != nil {
		return "", err
	}
	h := sha256.New()
	_, err = io.Copy(io.MultiWriter(out, h), in)
	if err == nil && hex.EncodeToString(h.Sum(nil))[:buildLen] != build {
		err = fmt.Errorf("%s changes while it is read", path)
	}
	if err == nil {
		err = errors.Join(out.Chmod(0o500), out.Sync())
	}
	if err = errors.Join(err, out.Close()); err == nil {
		err = os.Rename(out.Name(), to)
	}
	if err != nil {
		_ = os.Remove(out.Name())
		return "", fmt.Errorf("copy of the program %s: %w", path, err)
	}
	return build, nil
}

// same reports whether two paths lead to one file, whose content is the same then.
func same(a, b string) bool {
	x, errX := os.Stat(a)
	y, errY := os.Stat(b)
	return errX == nil && errY == nil && os.SameFile(x, y)
}

// mayRun says why programs in the directory cannot be started.
func mayRun(dir string) error {
	var st unix.Statfs_t
	if err := unix.Statfs(dir, &st); err == nil && st.Flags&unix.ST_NOEXEC != 0 {
		return fmt.Errorf("%s lies on a file system that is mounted noexec", dir)
	}
	return nil
}

// parseRecord reads the record.
func parseRecord(p []byte) (*buildsRecord, error) {
	var r buildsRecord
	if err := json.Unmarshal(p, &r); err != nil {
		return nil, err
	}
	if r.Format < 1 || r.Format > upgradeVersion {
		return nil, fmt.Errorf("it is of version %d, this program knows up to %d", r.Format, upgradeVersion)
	}
	builds := append(slices.Collect(maps.Values(r.Guests)), r.Current)
	if r.Previous != "" {
		builds = append(builds, r.Previous)
	}
	if u := r.Upgrade; u != nil {
		builds = append(builds, u.From.Build, u.To.Build)
		u.Guests = nil
	}
	for _, b := range builds {
		if !validBuild(b) {
			return nil, fmt.Errorf("%q is no build", b)
		}
	}
	if r.Guests == nil {
		r.Guests = map[string]string{}
	}
	if r.Versions == nil {
		r.Versions = map[string]string{}
	}
	return &r, nil
}

func readRecord(dir string) (*buildsRecord, error) {
	p, err := os.ReadFile(recordPath(dir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	var r *buildsRecord
	if err == nil {
		r, err = parseRecord(p)
	}
	if err != nil {
		return nil, control.NewError(control.KindInvalid, fmt.Sprintf("record of programs %s: %v", recordPath(dir), err),
			"if no upgrade is half done, remove it: guests are then started with the program of `pollux up`")
	}
	return r, nil
}

func (r *buildsRecord) program(build string) control.Program {
	return control.Program{Build: build, Version: r.Versions[build]}
}

// builds is what the agent knows of programs. The zero value starts guests with the
// driver's program.
type builds struct {
	self string // build of this process; "" if programs are not kept
	why  string // they are not kept
	rec  *buildsRecord
	run  *upgrade // that is under way in this process; nil if none is

	saving sync.Mutex // held while rec is stored, so that the newest is last; before mu
}

// prepareBuilds settles which programs guests are started with. alive says that some
// run.
func (a *agent) prepareBuilds(alive bool) error {
	if a.opt.Program == "" {
		a.builds.why = "this agent keeps no copies of its program"
		return nil
	}
	dir := a.cfg.Dir
	rec, err := readRecord(dir)
	if err != nil {
		return err
	}
	self, err := install(dir, "/proc/self/exe", "")
	if err == nil {
		err = mayRun(binDir(dir))
	}
	if err != nil {
		// The pair can do without; it must not fail to start for want of a copy.
		a.builds.why = fmt.Sprintf("no copy of the program is kept: %v", err)
		a.event("", "program", nil, "%s; guests are started with %s, and there is no `pollux upgrade`", a.builds.why, a.opt.Program)
		return nil
	}
	if rec == nil {
		rec = &buildsRecord{Format: upgradeVersion, Current: self, Guests: map[string]string{}, Versions: map[string]string{}}
	}
	rec.Versions[self] = a.opt.Version
	if alive && self != rec.Current && !rec.Upgrade.Pending() {
		if err := a.understands(rec); err != nil {
			return err
		}
	}
	a.builds.self, a.builds.rec = self, rec
	a.resumeRecord(rec, self, alive)
	for _, g := range a.cfg.Guests {
		if rec.Guests[g.Name] == "" {
			rec.Guests[g.Name] = rec.Current
		}
	}
	if err := config.WriteJSON(recordPath(a.cfg.Dir), rec); err != nil {
		return err
	}
	a.tidyCopies()
	return nil
}

// understands refuses an agent that the guests which run would not understand.
func (a *agent) understands(rec *buildsRecord) error {
	path := copyPath(a.cfg.Dir, rec.Current)
	guests, err := askBuild(context.Background(), path)
	if err != nil {
		a.event("", "program", nil, "whether the guests, of program %s, understand this agent is not known: %v", rec.program(rec.Current), err)
		return nil
	}
	agent := release.This()
	apart := func(f release.Format) bool { return f.Place == release.OnDevices || f.Place == release.InRegion }
	guests.Formats, agent.Formats = slices.DeleteFunc(guests.Formats, apart), slices.DeleteFunc(agent.Formats, apart)
	if v := release.Compare(guests, agent); len(v.Refusals) > 0 {
		return control.NewError(control.KindRefused, "the guests run with another program, and this agent and they do not understand each other: "+strings.Join(v.Refusals, "; "),
			"start the agent with "+path)
	}
	return nil
}

// resumeRecord brings a record up to what an agent finds that starts.
func (a *agent) resumeRecord(rec *buildsRecord, self string, alive bool) {
	u := rec.Upgrade
	switch {
	case u.Pending():
		if u.State != control.UpgradeRunning {
			return
		}
		if u.Doing == doingAgent && self == u.To.Build {
			a.finishUpgrade(rec)
			return
		}
		u.State, u.Why = control.UpgradeInterrupted, "the agent ended in the middle of it"
		if a.opt.Failed != "" {
			u.State, u.Why = control.UpgradeStopped, a.opt.Failed
			u.Steps = append(u.Steps, control.UpgradeStep{What: doingAgent, At: time.Now().UTC(), Error: a.opt.Failed})
		}
		u.Doing, u.Ended = "", time.Now().UTC()
		a.event("", "upgrade-"+u.State, upgradeFields(u), "upgrade to %s: %s", u.To, u.Why)
	case !alive && self != rec.Current:
		a.event("", "program", nil, "the pair starts with program %s; before it was %s", rec.program(self), rec.program(rec.Current))
		rec.Previous, rec.Current, rec.Upgrade = rec.Current, self, nil
		rec.Guests = map[string]string{}
	}
}

// editBuilds changes the record durably. While it is stored a.mu is free: the loop does not
// wait for a disk.
func (a *agent) editBuilds(edit func(*buildsRecord)) error {
	a.builds.saving.Lock()
	defer a.builds.saving.Unlock()
	a.mu.Lock()
	edit(a.builds.rec)
	rec, err := json.Marshal(a.builds.rec)
	path := recordPath(a.cfg.Dir)
	a.mu.Unlock()
	if err == nil {
		err = config.WriteJSON(path, json.RawMessage(rec))
	}
	if err != nil {
		return fmt.Errorf("record of programs: %w", err)
	}
	return nil
}

// tidyCopies removes copies that nobody needs.
func (a *agent) tidyCopies() {
	rec := a.builds.rec
	keep := []string{a.builds.self, rec.Current, rec.Previous}
	keep = append(keep, slices.Collect(maps.Values(rec.Guests))...)
	if u := rec.Upgrade; u.Pending() {
		keep = append(keep, u.From.Build, u.To.Build)
	}
	for _, m := range a.members {
		if m.dom != nil {
			keep = append(keep, buildOf(m.dom.Program()))
		}
	}
	files, _ := filepath.Glob(filepath.Join(binDir(a.cfg.Dir), "*"))
	temps, _ := filepath.Glob(filepath.Join(binDir(a.cfg.Dir), ".copy-*"))
	for _, path := range append(files, temps...) {
		build := buildOf(path)
		if path != recordPath(a.cfg.Dir) && (build != "" && !slices.Contains(keep, build) || slices.Contains(temps, path)) {
			removeFile(path)
		}
	}
	maps.DeleteFunc(rec.Versions, func(b, _ string) bool { return !slices.Contains(keep, b) })
}

// programOf returns what a guest is started with; "" is the driver's own.
func (a *agent) programOf(guest string) string {
	a.mu.Lock()
	rec := a.builds.rec
	if rec == nil {
		a.mu.Unlock()
		return ""
	}
	path := copyPath(a.cfg.Dir, rec.Guests[guest])
	a.mu.Unlock()
	if _, err := os.Stat(path); err != nil {
		a.event(guest, "alert", nil, "guest %s is started with the program of the agent, %s: that of its record is not to be had: %v", guest, a.opt.Program, err)
		return ""
	}
	return path
}

// Limits of asking a program what it is.
const (
	askProgram   = 10 * time.Second
	mostOfAnswer = 1 << 20
)

// askBuild runs a program and has it say its version and formats. A file that was written a
// moment ago may not be ready: a process that is being started elsewhere has it open for
// writing until it runs.
func askBuild(ctx context.Context, path string) (release.Build, error) {
	for try := 0; ; try++ {
		b, err := askOnce(ctx, path)
		if try == 20 || !errors.Is(err, syscall.ETXTBSY) {
			return b, err
		}
		select {
		case <-time.After(10 * time.Millisecond):
		case <-ctx.Done():
			return b, err
		}
	}
}

func askOnce(ctx context.Context, path string) (release.Build, error) {
	ctx, cancel := context.WithTimeout(ctx, askProgram)
	defer cancel()
	cmd := exec.CommandContext(ctx, path, "version", "--formats", "--json")
	cmd.Dir = "/"
	cmd.WaitDelay = time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
	var said beginning
	out := &limited{left: mostOfAnswer}
	cmd.Stdout, cmd.Stderr = out, &said
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = fmt.Errorf("it does not answer within %s", askProgram)
		}
		return release.Build{}, fmt.Errorf("`%s version --formats --json`: %w: %s", path, err, bytes.TrimSpace(said))
	}
	b, err := parseBuild(out.buf.Bytes())
	if err != nil {
		return b, fmt.Errorf("what `%s version --formats --json` says: %w", path, err)
	}
	return b, nil
}

func parseBuild(p []byte) (release.Build, error) {
	var b release.Build
	if err := json.Unmarshal(p, &b); err != nil {
		return b, err
	}
	return b, b.Validate()
}

// limited keeps so many bytes and refuses more.
type limited struct {
	buf  bytes.Buffer
	left int
}

func (l *limited) Write(p []byte) (int, error) {
	if len(p) > l.left {
		return 0, errors.New("it says too much")
	}
	l.left -= len(p)
	return l.buf.Write(p)
}
