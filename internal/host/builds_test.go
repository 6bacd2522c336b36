package host

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/release"
)

const (
	buildX = "00000000000000aa"
	buildY = "00000000000000bb"
)

// keeper is an agent of which nothing runs, that keeps programs.
func keeper(t *testing.T, rec *buildsRecord) *agent {
	t.Helper()
	cfg := settingsIn(t, pairConfig)
	events, err := openEvents(filepath.Join(cfg.Dir, "events.log"), 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(events.close)
	a := &agent{opt: Options{Program: os.Args[0], Version: "v1"}, log: quiet(), events: events, cfg: cfg, members: map[string]*member{}}
	for _, g := range cfg.Guests {
		a.members[g.Name] = &member{name: g.Name}
	}
	if rec != nil {
		if err := os.MkdirAll(binDir(cfg.Dir), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := config.WriteJSON(recordPath(cfg.Dir), rec); err != nil {
			t.Fatal(err)
		}
	}
	return a
}

func record(current string, u *control.Upgrade) *buildsRecord {
	return &buildsRecord{Format: upgradeVersion, Current: current, Previous: buildY, Versions: map[string]string{current: "v0"},
		Guests: map[string]string{"a": current, "b": buildY}, Upgrade: u}
}

// What an agent finds when it starts decides what guests are started with.
func TestPrograms(t *testing.T) {
	self, err := hashFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	to := func(state, doing string, to string) *control.Upgrade {
		return &control.Upgrade{State: state, Doing: doing, From: control.Program{Build: buildX}, To: control.Program{Build: to, Version: "v9"}, Started: time.Now()}
	}
	for _, c := range []struct {
		name                    string
		rec                     *buildsRecord
		failed                  string
		current, previous, a, b string
		state, why              string
	}{
		{"nothing is kept", nil, "", self, "", self, self, "", ""},
		{"another program while nothing runs", record(buildX, nil), "", self, buildX, self, self, "", ""},
		{"an upgrade that was done", record(buildX, to(control.UpgradeDone, "", buildX)), "", self, buildX, self, self, "", ""},
		{"one that stopped", record(buildX, to(control.UpgradeStopped, "", buildY)), "", buildX, buildY, buildX, buildY, control.UpgradeStopped, ""},
		{"one in the middle", record(buildX, to(control.UpgradeRunning, "guest b: it goes on serving", buildY)), "", buildX, buildY, buildX, buildY, control.UpgradeInterrupted, "ended in the middle"},
		{"one whose last step this is", record(buildX, to(control.UpgradeRunning, doingAgent, self)), "", self, buildX, buildX, buildY, control.UpgradeDone, ""},
		{"one whose last step failed", record(buildX, to(control.UpgradeRunning, doingAgent, buildY)), "it did not start", buildX, buildY, buildX, buildY, control.UpgradeStopped, "it did not start"},
	} {
		t.Run(c.name, func(t *testing.T) {
			a := keeper(t, c.rec)
			a.opt.Failed = c.failed
			if err := a.prepareBuilds(false); err != nil {
				t.Fatal(err)
			}
			kept, err := readRecord(a.cfg.Dir)
			if err != nil {
				t.Fatal(err)
			}
			for _, r := range []*buildsRecord{a.builds.rec, kept} {
				if r.Current != c.current || r.Previous != c.previous || r.Guests["a"] != c.a || r.Guests["b"] != c.b {
					t.Errorf("current %s, previous %s, guests %v", r.Current, r.Previous, r.Guests)
				}
				if c.state == "" && r.Upgrade != nil || c.state != "" && (r.Upgrade.State != c.state || !strings.Contains(r.Upgrade.Why, c.why)) {
					t.Errorf("upgrade %+v", r.Upgrade)
				}
			}
			if build, err := hashFile(copyPath(a.cfg.Dir, self)); err != nil || build != self {
				t.Errorf("the copy of the program: %s, %v", build, err)
			}
			// What is not to be had is no reason not to start a guest.
			want := copyPath(a.cfg.Dir, self)
			if c.a != self {
				want = ""
			}
			if got := a.programOf("a"); got != want {
				t.Errorf("guest a is started with %q, want %q", got, want)
			}
		})
	}
}

// Copies that nobody needs are removed, and no file of anybody else's.
func TestTidyCopies(t *testing.T) {
	a := keeper(t, record(buildX, nil))
	dir := a.cfg.Dir
	old, half, foreign := copyPath(dir, "00000000000000cc"), filepath.Join(binDir(dir), ".copy-1"), filepath.Join(binDir(dir), "pollux-mine")
	for _, path := range []string{old, half, foreign, copyPath(dir, buildX), copyPath(dir, buildY)} {
		if err := os.WriteFile(path, []byte("x"), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	if err := a.prepareBuilds(true); err != nil { // as with guests that run
		t.Fatal(err)
	}
	for path, kept := range map[string]bool{old: false, half: false, foreign: true, copyPath(dir, buildX): true, copyPath(dir, buildY): true} {
		if _, err := os.Stat(path); (err == nil) != kept {
			t.Errorf("%s: %v, to be kept: %v", path, err, kept)
		}
	}
	if a.builds.rec.Current != buildX {
		t.Errorf("guests that run come back with %s", a.builds.rec.Current)
	}
}

// Without a place for copies the pair starts, and says that there are no upgrades.
func TestNoCopies(t *testing.T) {
	a := keeper(t, nil)
	if err := os.WriteFile(binDir(a.cfg.Dir), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := readRecord(a.cfg.Dir); err == nil {
		t.Error("a record is read where there is none")
	}
	_ = os.Remove(binDir(a.cfg.Dir))
	if err := os.Symlink("/nonexistent/place", binDir(a.cfg.Dir)); err != nil {
		t.Fatal(err)
	}
	if err := a.prepareBuilds(false); err != nil {
		t.Fatal(err)
	}
	if a.programOf("a") != "" {
		t.Error("guests are started with a copy that there is not")
	}
	_, err := a.programs(t.Context())
	refused(t, "programs", err, control.KindRefused)
	_, err = a.startUpgrade(t.Context(), control.UpgradeRequest{Binary: os.Args[0]})
	refused(t, "upgrade", err, control.KindRefused)
}

// A copy is what was checked, or none.
func TestInstall(t *testing.T) {
	a := keeper(t, nil)
	path := filepath.Join(a.cfg.Dir, "program")
	if err := os.WriteFile(path, []byte("one"), 0o600); err != nil {
		t.Fatal(err)
	}
	build, err := install(a.cfg.Dir, path, "")
	if err != nil || buildOf(copyPath(a.cfg.Dir, build)) != build {
		t.Fatal(build, err)
	}
	// A copy that was damaged is made anew.
	if err := os.Chmod(copyPath(a.cfg.Dir, build), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(copyPath(a.cfg.Dir, build), []byte("on"), 0o600); err != nil {
		t.Fatal(err)
	}
	if again, err := install(a.cfg.Dir, path, build); err != nil || again != build {
		t.Fatal(again, err)
	}
	if now, err := hashFile(copyPath(a.cfg.Dir, build)); err != nil || now != build {
		t.Error(now, err)
	}
	if err := os.WriteFile(path, []byte("two"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := install(a.cfg.Dir, path, build); err == nil || !strings.Contains(err.Error(), "has changed") {
		t.Errorf("a file that was replaced after its check: %v", err)
	}
	if left, _ := filepath.Glob(filepath.Join(binDir(a.cfg.Dir), ".copy-*")); len(left) > 0 {
		t.Errorf("left behind: %q", left)
	}
}

// During an upgrade nothing is changed or moved by command; when it is half done, what
// the other program could not read cannot be asked for.
func TestHeldBack(t *testing.T) {
	u := &control.Upgrade{State: control.UpgradeStopped, To: control.Program{Build: buildY}, From: control.Program{Build: buildX}}
	a := keeper(t, nil)
	a.builds.rec = record(buildX, u)
	allowed := func(change, move bool) {
		t.Helper()
		err := a.beginChange()
		if err == nil {
			a.change.Unlock()
		}
		if (err == nil) != change {
			t.Errorf("a change: %v", err)
		}
		if err := a.upgrading(movesItself, false); (err == nil) != move {
			t.Errorf("a move: %v", err)
		}
	}
	allowed(true, true)
	u.Held = []string{"superblock: v2 writes version 7 when it is asked to"}
	allowed(false, true)
	u.State, a.builds.run = control.UpgradeRunning, &upgrade{}
	allowed(false, false)
	u.State, a.builds.run = control.UpgradeDone, nil
	allowed(true, true)
}

// The structures at the beginning of a device tell what a program must read.
func TestStored(t *testing.T) {
	path := filepath.Join(t.TempDir(), "device")
	const size = 4 << 20
	dev := make([]byte, size)
	put := func(block int, kind ondisk.Kind, version uint16) {
		ondisk.Seal(dev[block*4096:], ondisk.Header{Kind: kind, Version: version, Length: 100})
	}
	put(0, ondisk.KindLabel, 1)
	put(1, ondisk.KindSuperblock, 7)
	put(2, ondisk.KindSuperblock, 6)
	put(300, ondisk.KindSuperblock, 9) // somebody's data
	copy(dev[5*4096:], "PLXsuperbly written")
	look := func() []release.Seen {
		t.Helper()
		if err := os.WriteFile(path, dev, 0o600); err != nil {
			t.Fatal(err)
		}
		seen, err := headOf(path)
		if err != nil {
			t.Fatal(err)
		}
		return seen
	}
	where := "device " + path
	want := []release.Seen{{Kind: "PLXlabel", Version: 1, Where: where}, {Kind: "PLXsuper", Version: 7, Where: where}, {Kind: "PLXsuper", Version: 6, Where: where}}
	if seen := look(); !slices.Equal(seen, want) {
		t.Errorf("%+v", seen)
	}
	// On one of several copies the device begins behind the header of the mirror.
	put(0, ondisk.KindMirror, 1)
	if seen := look(); len(seen) != 4 || seen[3].Version != 9 {
		t.Errorf("%+v", seen)
	}
	if err := os.Truncate(path, 4096); err != nil {
		t.Fatal(err)
	}
	if _, err := headOf(path); err == nil {
		t.Error("a device that ends at once is read")
	}
}

func FuzzRecord(f *testing.F) {
	f.Add([]byte(`{"format":1,"current":"00000000000000aa","guests":{"a":"00000000000000aa"},"upgrade":{"state":"running","from":{"build":"00000000000000aa"},"to":{"build":"00000000000000bb"}}}`))
	f.Add([]byte(`{"format":2,"current":"00000000000000aa"}`))
	f.Add([]byte(`{"format":1,"current":"../../../bin/sh"}`))
	f.Fuzz(func(t *testing.T, p []byte) {
		r, err := parseRecord(p)
		if err != nil {
			return
		}
		for _, b := range append([]string{r.Current}, r.Guests["a"]) {
			if b != "" && filepath.Dir(copyPath("/d", b)) != "/d/bin" {
				t.Errorf("build %q leads to %s", b, copyPath("/d", b))
			}
		}
	})
}

// FuzzBuild: whatever a program says of itself is refused or can be compared.
func FuzzBuild(f *testing.F) {
	f.Add([]byte(`{"version":"v1","formats":[{"name":"label","place":"devices","reads_from":1,"reads_to":1,"writes":1,"asked":1}]}`))
	f.Add([]byte(`{"version":"v1","formats":[]}`))
	f.Add([]byte(`{"version":"v1","formats":[{"name":"label","reads_from":2,"reads_to":1}]}`))
	f.Fuzz(func(t *testing.T, p []byte) {
		b, err := parseBuild(p)
		if err != nil {
			return
		}
		if v := release.Compare(b, b); len(v.Refusals)+len(v.Held)+len(v.Lost) > 0 {
			t.Errorf("%s does not work with itself: %+v", p, v)
		}
		release.Compare(release.This(), b)
		b.Unreadable([]release.Seen{{Kind: "PLXlabel", Version: 1}})
	})
}
