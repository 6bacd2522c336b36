package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/test/pair"
	"github.com/pollux-storage/pollux/test/prove"
)

// other builds the program as one of another release, once for each.
var other = struct {
	sync.Mutex
	built map[string]string
}{built: map[string]string{}}

func program(t *testing.T, version, claims string) string {
	t.Helper()
	if _, err := build(); err != nil { // makes the directory
		t.Fatal(err)
	}
	other.Lock()
	defer other.Unlock()
	if bin := other.built[version]; bin != "" {
		return bin
	}
	dir := built
	if dir == "" { // the program came ready
		dir = t.TempDir()
	}
	bin, err := pair.BuildAs(t.Context(), dir, *raceFlag, version, claims)
	if err != nil {
		t.Fatal(err)
	}
	if dir == built {
		other.built[version] = bin
	}
	return bin
}

// broken writes a program that does what a script says when it shall be a guest or an
// agent, and is the real one otherwise.
func broken(t *testing.T, script string) string {
	t.Helper()
	bin, err := build()
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(t.TempDir(), "pollux-broken")
	text := "#!/bin/sh\n" + script + "\nexec " + bin + " \"$@\"\n"
	if err := os.WriteFile(path, []byte(text), 0o700); err != nil {
		t.Fatal(err)
	}
	return path
}

// loaded is a pair with a client of each guest.
func loaded(t *testing.T) *rig {
	r := start(t, small)
	for _, g := range []string{"a", "b"} {
		c, err := prove.Start(r.volume("disk-"+g, prove.Size, g).NBDUnix, random(t).Uint64())
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			err := c.Stop()
			pause, ops := c.Look()
			t.Logf("client of %s: %d requests, longest pause %v", g, ops, pause)
			if err != nil || ops == 0 {
				t.Errorf("the client of %s: %d requests, %v", g, ops, err)
			}
		})
	}
	return r
}

// upgrade runs the command and returns how it ended.
func (r *rig) upgrade(args ...string) (control.Programs, error) {
	r.t.Helper()
	var p control.Programs
	ctx, cancel := context.WithTimeout(r.t.Context(), 2*time.Minute)
	defer cancel()
	err := r.JSON(ctx, &p, append([]string{"upgrade", "--watch", "300ms"}, args...)...)
	return p, err
}

// builds returns which builds agent and guests run.
func (r *rig) builds() string {
	r.t.Helper()
	st := r.status()
	return strings.Join([]string{st.Agent.Build, pair.Guest(st, "a").Build, pair.Guest(st, "b").Build}, " ")
}

// wants demands a refusal or failure of a command, with its exit status and a word.
func wants(t *testing.T, err error, status int, words ...string) {
	t.Helper()
	var ce *pair.CommandError
	if !errors.As(err, &ce) {
		t.Fatalf("it did not fail as a command: %v", err)
	}
	if ce.Status != status {
		t.Errorf("status %d, want %d: %v", ce.Status, status, err)
	}
	for _, w := range words {
		if !strings.Contains(ce.Said, w) {
			t.Errorf("%q is not said: %v", w, err)
		}
	}
}

// copies returns the programs that the pair keeps.
func (r *rig) copies() []string {
	files, _ := filepath.Glob(filepath.Join(r.Dir, "bin", "pollux-*"))
	return files
}

// TestUpgrade goes to a newer program, and back, and meets what is refused, with a client
// of each guest.
func TestUpgrade(t *testing.T) {
	r := loaded(t)
	newer := program(t, "v2.1.0", "superblock=1-7/3/7,index=2-2/2/2")
	before := r.builds()
	build := strings.Fields(before)[0]
	if before != strings.Join([]string{build, build, build}, " ") || len(build) != 16 {
		t.Fatalf("builds %q", before)
	}
	t.Run("refused", func(t *testing.T) {
		_, err := r.upgrade("--binary", program(t, "v3.0.0", "operation log=3-3/3/3"))
		wants(t, err, 5, "operation log: v3.0.0 writes version 3", "reads 1 to 2", "pollux down")
		_, err = r.upgrade("--binary", program(t, "v3.1.0", "superblock=1-7/7/7"))
		wants(t, err, 5, "superblock: v3.1.0 writes version 7", "reads 1 to 6")
		_, err = r.upgrade("--binary", r.Bin)
		wants(t, err, 5, "already")
		_, err = r.upgrade("--binary", filepath.Join(r.Dir, "config.yaml"))
		wants(t, err, 5, "program")
		_, err = r.upgrade("--binary", filepath.Join(r.Dir, "nothing"))
		wants(t, err, 3, "no file")
		_, err = r.upgrade("--rollback")
		wants(t, err, 5, "no program before")
		_, err = r.upgrade("--resume")
		wants(t, err, 5, "no upgrade has stopped")
		_, err = r.upgrade("--resume", "--rollback")
		wants(t, err, 2)
		if now := r.builds(); now != before || len(r.copies()) != 1 {
			t.Errorf("something was touched: %s, %q", now, r.copies())
		}
	})

	var check control.UpgradeCheck
	if err := r.JSON(t.Context(), &check, "upgrade", "--check", "--binary", newer); err != nil || !check.OK {
		t.Fatalf("%+v, %v", check, err)
	}
	if len(check.Held) != 1 || !strings.Contains(check.Held[0], "superblock") || len(check.Lost) != 2 || len(check.Plan) != 3 {
		t.Errorf("%+v", check)
	}
	agent := r.status().Agent.PID
	p, err := r.upgrade("--binary", newer)
	if err != nil {
		t.Fatal(err)
	}
	r.well()
	st := r.status()
	if p.Current.Version != "v2.1.0" || p.Previous == nil || p.Previous.Build != build || p.Upgrade.State != control.UpgradeDone {
		t.Errorf("%+v", p)
	}
	for _, g := range st.Guests {
		if g.Version != "v2.1.0" || g.Build != p.Current.Build {
			t.Errorf("guest %s is %s %s", g.Name, g.Version, g.Build)
		}
	}
	if st.Agent.Version != "v2.1.0" || st.Agent.PID == agent || st.Upgrade != nil {
		t.Errorf("%+v, %+v", st.Agent, st.Upgrade)
	}
	// A guest that crashes comes back with the program of its record.
	r.must("guest", "kill", "b")
	if err := r.Until(t.Context(), 30*time.Second, func(st control.Status) string {
		if g := pair.Guest(st, "b"); g.Restarts == 0 || g.Build != p.Current.Build {
			return fmt.Sprintf("guest b runs %q", g.Build)
		}
		return pair.Well(st)
	}); err != nil {
		t.Fatal(err)
	}
	r.must("giveback", "b")
	if _, err := r.upgrade("--rollback"); err != nil {
		t.Fatal(err)
	}
	r.well()
	if now := r.builds(); now != before {
		t.Errorf("after the rollback: %s, want %s", now, before)
	}
	// A third program: the one before the last is not kept.
	if _, err := r.upgrade("--binary", program(t, "v2.2.0", "")); err != nil {
		t.Fatal(err)
	}
	r.well()
	if left := r.copies(); len(left) != 2 {
		t.Errorf("kept %q", left)
	}
	r.clean()
}

// TestRollbackBeyond: what is stored may have moved beyond what the program before reads.
func TestRollbackBeyond(t *testing.T) {
	bin, err := build()
	if err != nil {
		t.Fatal(err)
	}
	r := loaded(t)
	// The program before knows superblocks up to version 3, which sharing goes beyond.
	old := program(t, "v0.9.0", "superblock=1-3/3/3")
	if _, err := r.upgrade("--binary", old); err != nil {
		t.Fatal(err)
	}
	var check control.UpgradeCheck
	if err := r.JSON(t.Context(), &check, "upgrade", "--check", "--binary", bin); err != nil || len(check.Held) != 1 {
		t.Fatalf("%+v, %v", check, err)
	}
	if _, err := r.upgrade("--binary", bin); err != nil {
		t.Fatal(err)
	}
	r.must("volume", "create", "shared", "--size", "16M", "--guest", "a", "--dedup", "on")
	uri := r.export("shared").NBDUnix
	mustQemuIO(t, uri, "write -P 5 0 1M", "write -P 5 4M 1M", "flush")
	if err := r.Until(t.Context(), 30*time.Second, func(control.Status) string {
		_, err := r.upgrade("--check", "--rollback")
		var ce *pair.CommandError
		if errors.As(err, &ce) && ce.Status == 5 {
			return ""
		}
		return fmt.Sprintf("the way back is still open: %v", err)
	}); err != nil {
		t.Fatal(err)
	}
	before := r.builds()
	_, err = r.upgrade("--rollback")
	wants(t, err, 5, "superblock of version 4", "v0.9.0 reads 1 to 3", "no way back")
	if now := r.builds(); now != before {
		t.Errorf("builds %s, want %s", now, before)
	}
	r.clean()
}

// TestBrokenPrograms: whatever is wrong with a new program, the pair serves, and no guest
// is left with it.
func TestBrokenPrograms(t *testing.T) {
	for _, c := range []struct {
		name, script string
		words        []string
	}{
		{"exits at once", `if [ "$1" = guest-process ]; then echo "this program is broken" >&2; exit 3; fi`, []string{"status 3", "as before"}},
		{"hangs at its start", `if [ "$1" = guest-process ]; then exec sleep 600; fi`, []string{"before it was there", "as before"}},
		{"crashes when it serves", `
if [ "$1" = guest-process ]; then
	(
		exec 3>&- 4>&- 5>&- 6>&- 7>&- </dev/null >/dev/null 2>&1
		until grep -q '"kind":"giveback"' "$3/events.log"; do
			sleep 0.05
			grep -q guest-process /proc/$$/cmdline || exit 0
		done
		sleep 0.2
		grep -q guest-process /proc/$$/cmdline && kill -KILL $$
	) &
fi`, []string{"ended after it had served", "as before"}},
	} {
		t.Run(c.name, func(t *testing.T) {
			r := loaded(t)
			before := r.builds()
			watch := "2s"
			_, err := r.upgrade("--binary", broken(t, c.script), "--watch", watch)
			wants(t, err, 1, c.words...)
			r.well()
			if now := r.builds(); now != before {
				t.Errorf("builds %s, want %s", now, before)
			}
			for _, g := range r.status().Guests {
				if g.ServedBy != g.Name {
					t.Errorf("%s is served by %s", g.Name, g.ServedBy)
				}
			}
			// Nothing stands in the way of a program that works.
			if _, err := r.upgrade("--binary", program(t, "v2.2.0", "")); err != nil {
				t.Fatal(err)
			}
			r.well()
			r.clean()
		})
	}
}

// TestAlertStops: an alert that is raised while an upgrade is under way stops it, and
// the guest that it was at goes back; one that stands before is to be accepted.
func TestAlertStops(t *testing.T) {
	s := small
	s.More = []string{"alerts: {full_warning: 10}"}
	newer := program(t, "v2.2.0", "")
	r := start(t, s)
	before := r.builds()
	fill := r.volume("fill", 256<<20, "a")
	type outcome struct {
		p   control.Programs
		err error
	}
	ended := make(chan outcome, 1)
	go func() {
		var o outcome
		o.err = r.JSON(t.Context(), &o.p, "upgrade", "--watch", "1m", "--binary", newer)
		ended <- o
	}()
	err := r.Until(t.Context(), 30*time.Second, func(st control.Status) string {
		if st.Upgrade == nil || !strings.Contains(st.Upgrade.Doing, "goes on serving") {
			return "the upgrade has not come to watch guest b"
		}
		return ""
	})
	if err != nil {
		t.Fatal(err)
	}
	mustQemuIO(t, fill.NBDUnix, "write -P 3 0 64M", "write -P 3 64M 64M", "write -P 3 128M 64M", "flush")
	o := <-ended
	wants(t, o.err, 1, "an alert was raised", "pool-a is full", "as before")
	if o.p.Upgrade == nil || o.p.Upgrade.State != control.UpgradeFailed {
		t.Errorf("%+v", o.p.Upgrade)
	}
	if now := r.builds(); now != before {
		t.Errorf("builds %s, want %s", now, before)
	}
	_, err = r.upgrade("--binary", newer)
	wants(t, err, 5, "alerts: ", "pool-a is full", "--accept-alerts")
	if _, err := r.upgrade("--binary", newer, "--accept-alerts"); err != nil {
		t.Fatal(err)
	}
	if st := r.status(); st.Agent.Version != "v2.2.0" || pair.Guest(st, "a").Version != "v2.2.0" {
		t.Errorf("%+v", st.Agent)
	}
	r.clean()
}

// TestBrokenAgent: guests are on the new program, and it is no agent: the old one goes
// on, and the pair can go back.
func TestBrokenAgent(t *testing.T) {
	r := loaded(t)
	before := r.builds()
	p, err := r.upgrade("--binary", broken(t, `if [ "$1" = up ]; then exit 3; fi`))
	wants(t, err, 1, "did not take over", "--rollback")
	if p.Upgrade == nil || p.Upgrade.State != control.UpgradeStopped {
		t.Fatalf("%+v", p)
	}
	st := r.status()
	if st.Agent.Build != strings.Fields(before)[0] || st.Upgrade == nil || !strings.Contains(strings.Join(st.Alerts, ";"), "half done") {
		t.Fatalf("%+v, %+v, %q", st.Agent, st.Upgrade, st.Alerts)
	}
	if _, err := r.upgrade("--binary", program(t, "v2.2.0", "")); err == nil {
		t.Error("another upgrade is begun while one is half done")
	}
	if _, err := r.upgrade("--rollback"); err != nil {
		t.Fatal(err)
	}
	r.well()
	if now := r.builds(); now != before {
		t.Errorf("builds %s, want %s", now, before)
	}
	r.clean()
}

// halfDone begins an upgrade and kills command and agent when guest b has the new program
// and a has not.
func (r *rig) halfDone(bin string) {
	r.t.Helper()
	cmd := exec.Command(r.Bin, "upgrade", "--binary", bin, "--watch", "1m", "--dir", r.Dir)
	if err := cmd.Start(); err != nil {
		r.t.Fatal(err)
	}
	err := r.Until(r.t.Context(), 30*time.Second, func(st control.Status) string {
		if st.Upgrade == nil || !strings.Contains(st.Upgrade.Doing, "goes on serving") {
			return "the upgrade has not come to watch guest b"
		}
		return ""
	})
	if err == nil {
		// What may not be done meanwhile.
		_, err := r.Do(r.t.Context(), "volume", "create", "x", "--size", "1M")
		wants(r.t, err, 5, "under way")
		_, err = r.Do(r.t.Context(), "takeover", "a")
		wants(r.t, err, 5, "under way")
		_, err = r.upgrade("--rollback")
		wants(r.t, err, 5, "under way")
	}
	_ = cmd.Process.Kill()
	_ = cmd.Wait()
	if err != nil {
		r.t.Fatal(err)
	}
	r.kill(r.HoldAgent)
}

// kill kills a process of the pair and waits for its end.
func (r *rig) kill(hold func(context.Context) (*pair.Process, error)) {
	r.t.Helper()
	h, err := hold(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	defer h.Close()
	if err := h.Signal(unix.SIGKILL); err != nil {
		r.t.Fatal(err)
	}
	for !h.Ended() {
		time.Sleep(time.Millisecond)
	}
}

// interrupted starts an agent after halfDone and demands that it knows.
func (r *rig) interrupted() {
	r.t.Helper()
	if err := r.Up(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
	err := r.Until(r.t.Context(), 30*time.Second, func(st control.Status) string {
		switch {
		case st.Upgrade == nil || st.Upgrade.State != control.UpgradeInterrupted:
			return fmt.Sprintf("upgrade %+v", st.Upgrade)
		case !st.Protected:
			return "not protected"
		}
		return ""
	})
	if err != nil {
		r.t.Fatal(err)
	}
	st := r.status()
	a, b := pair.Guest(st, "a").Build, pair.Guest(st, "b").Build
	if a != st.Upgrade.From.Build || b != st.Upgrade.To.Build {
		r.t.Errorf("a runs %s and b %s of an upgrade from %s to %s", a, b, st.Upgrade.From, st.Upgrade.To)
	}
}

// TestInterrupted: an upgrade whose agent and command were killed goes on, and back; the
// guests may have died, too, as when the host ended.
func TestInterrupted(t *testing.T) {
	newer := program(t, "v2.1.0", "superblock=1-7/3/7,index=2-2/2/2")
	t.Run("on", func(t *testing.T) {
		r := loaded(t)
		r.halfDone(newer)
		r.interrupted()
		_, err := r.Do(t.Context(), "volume", "create", "x", "--size", "1M")
		wants(t, err, 5, "half done", "superblock")
		if _, err := r.upgrade("--resume"); err != nil {
			t.Fatal(err)
		}
		r.well()
		r.must("volume", "create", "x", "--size", "1M")
		if st := r.status(); st.Agent.Version != "v2.1.0" || pair.Guest(st, "a").Version != "v2.1.0" {
			t.Errorf("%+v", st.Agent)
		}
		r.clean()
	})
	t.Run("back", func(t *testing.T) {
		r := loaded(t)
		before := r.builds()
		r.halfDone(newer)
		r.interrupted()
		if _, err := r.upgrade("--rollback"); err != nil {
			t.Fatal(err)
		}
		r.well()
		if now := r.builds(); now != before {
			t.Errorf("builds %s, want %s", now, before)
		}
		r.clean()
	})
	t.Run("all dead", func(t *testing.T) {
		r := loaded(t)
		r.halfDone(newer)
		for _, g := range []string{"a", "b"} {
			r.kill(func(ctx context.Context) (*pair.Process, error) { return r.HoldGuest(ctx, g) })
		}
		r.interrupted()
		if _, err := r.upgrade("--resume"); err != nil {
			t.Fatal(err)
		}
		r.well()
		r.clean()
	})
}

// TestUpgradeForeground: an agent in the foreground leaves its place to the new program
// and stays for its terminal; a signal to it takes the pair down. Identities that go home
// by themselves are waited for.
func TestUpgradeForeground(t *testing.T) {
	s := small
	s.Failover = []string{"giveback_delay: 1ms"}
	newer := program(t, "v2.2.0", "")
	r := start(t, s)
	r.down()
	cmd := exec.Command(r.Bin, "up", "--dir", r.Dir)
	var said bytes.Buffer
	cmd.Stdout, cmd.Stderr = &said, &said
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	r.well()
	if _, err := r.upgrade("--binary", newer); err != nil {
		t.Fatal(err)
	}
	r.well()
	st := r.status()
	if st.Agent.Version != "v2.2.0" || st.Agent.PID == cmd.Process.Pid {
		t.Errorf("%+v", st.Agent)
	}
	select {
	case err := <-ended:
		t.Fatalf("the foreground has ended: %v\n%s", err, said.String())
	default:
	}
	if err := cmd.Process.Signal(unix.SIGTERM); err != nil {
		t.Fatal(err)
	}
	select {
	case err := <-ended:
		if err != nil || !strings.Contains(said.String(), "goes on with another program") {
			t.Errorf("%v\n%s", err, said.String())
		}
	case <-time.After(time.Minute):
		t.Fatal("the pair does not go down by a signal to the foreground")
	}
	if left := r.Left(); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// TestReplacedFile: a file that is replaced changes nothing while the pair runs, and the
// next start takes it.
func TestReplacedFile(t *testing.T) {
	bin, err := build()
	if err != nil {
		t.Fatal(err)
	}
	mine := filepath.Join(t.TempDir(), "pollux") // there until the pair is down
	r := start(t, small)
	before := r.builds()
	content, err := os.ReadFile(bin)
	if err != nil {
		t.Fatal(err)
	}
	// What follows the program's end is never run, and makes it another file.
	if err := os.WriteFile(mine, append(content, "another"...), 0o700); err != nil {
		t.Fatal(err)
	}
	r.Bin = mine
	r.kill(r.HoldAgent)
	r.up()
	fields := strings.Fields(before)
	now := strings.Fields(r.builds())
	if now[0] == fields[0] || now[1] != fields[1] || now[2] != fields[2] {
		t.Errorf("builds %q, before %q", now, before)
	}
	if st := r.status(); !strings.Contains(strings.Join(st.Notes, ";"), "guests are started with") {
		t.Errorf("notes %q", st.Notes)
	}
	r.must("guest", "restart", "a")
	r.must("giveback", "a")
	if again := strings.Fields(r.builds()); again[1] != fields[1] {
		t.Errorf("guest a came back with %s", again[1])
	}
	r.down()
	r.up()
	if now := strings.Fields(r.builds()); now[0] == fields[0] || now[1] != now[0] || now[2] != now[0] {
		t.Errorf("after a clean start: %q, before %q", now, before)
	}
}
