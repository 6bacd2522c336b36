package config

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestDefaults(t *testing.T) {
	dir := t.TempDir()
	c, err := Load(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	if c.Guests[0].Endpoint() != "127.0.0.11:10809" || c.Guests[1].Endpoint() != "127.0.0.12:10809" {
		t.Errorf("endpoints %s, %s", c.Guests[0].Endpoint(), c.Guests[1].Endpoint())
	}
	if c.Guests[0].Pool.Devices[0] != filepath.Join(dir, "pool-a.img") || c.Log != 256<<20 || c.Failover.HangTimeout != time.Second {
		t.Errorf("%+v", c)
	}
	if c.DedupIndex != 32<<20 || DefaultDedupIndex(512<<20) != 8<<20 || DefaultDedupIndex(1<<40) != 32<<20 || DefaultDedupIndex(1) != minDedupIndex {
		t.Errorf("indexes of fingerprints have %s", c.DedupIndex)
	}
	if c.Partner("a") != "b" || c.Partner("b") != "a" || c.Guest("c") != nil {
		t.Error("partners are wrong")
	}
}

func TestFileAndState(t *testing.T) {
	dir := t.TempDir()
	text := `
log: 64MiB
failover:
  giveback_delay: 3s
guests:
  - name: left
    address: 127.0.1.1
    port: 0
    pool: {devices: [x.img, /dev/sdz], size: 1G}
`
	if err := os.WriteFile(filepath.Join(dir, "config.yaml"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	st := State{Guests: map[string]GuestState{"left": {Port: 4711, Adding: "/dev/sdy"}}}
	if err := st.Write(dir); err != nil {
		t.Fatal(err)
	}
	c, err := Load(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	g := c.Guest("left")
	if *g.Port != 4711 || c.Log != 64<<20 || g.Pool.Size != 1<<30 || c.Failover.GivebackDelay != 3*time.Second || c.Partner("left") != "" {
		t.Errorf("%+v", c)
	}
	if got := strings.Join(g.Pool.Devices, " "); got != filepath.Join(dir, "x.img")+" /dev/sdz /dev/sdy" {
		t.Error(got)
	}
	if err := os.MkdirAll(c.RunDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := c.WriteEffective(); err != nil {
		t.Fatal(err)
	}
	e, err := ReadEffective(dir)
	if err != nil || e.Guest("left").Endpoint() != g.Endpoint() || e.Failover != c.Failover {
		t.Errorf("%+v, %v", e, err)
	}
}

func TestRefusals(t *testing.T) {
	for text, want := range map[string]string{
		"logg: 1G":                                                       "logg",
		"log: 1K":                                                        "log: 1KiB is too small",
		"dedup_index: 32K":                                               "dedup_index: 32KiB is too small",
		"log: lots":                                                      "not a size",
		"guests: [{name: A}]":                                            "guests[0].name",
		"guests: [{name: a, address: nowhere}]":                          "guests[0].address",
		"guests: [{name: a}, {name: a}]":                                 "that of guests[0].name already",
		"guests: [{name: a}, {name: b}, {name: c}]":                      "there are 3",
		"nbd: {tls: maybe}":                                              "nbd.tls",
		"nbd: {tls: required}":                                           "needs nbd.cert",
		"vhost_user: {queues: 65}":                                       "vhost_user.queues",
		"rings: {clients: 1025}":                                         "rings.clients",
		"nbd: {allow: [10.0.0.0/99]}":                                    "nbd.allow",
		"exports: {v: {allow: [x]}}":                                     "exports.v.allow",
		"failover: {hang_timeout: 100ms}":                                "failover.hang_timeout",
		"failover: {policy: hope}":                                       "failover.policy",
		"failover: {restart_limit: 49ms}":                                "failover.restart_limit",
		"guests: [{name: a, policy: Restart-first}]":                     "guests[0].policy",
		"failover: {heartbeat: 1ms}":                                     "failover.heartbeat",
		"consistency_points: {interval: 1ms}":                            "consistency_points.interval",
		"consistency_points: {interval: 1h}":                             "consistency_points.interval",
		"consistency_points: {size: 1K}":                                 "consistency_points.size",
		"consistency_points: {size: 193MiB}":                             "three quarters of the log of 256MiB",
		"resilver: {rate: 1MiB}":                                         "resilver.rate",
		"alerts: {full_warning: 96}":                                     "full_warning",
		"metrics: {address: nowhere}":                                    "metrics.address",
		"consistency_points: {fold_after: 10}":                           "consistency_points.fold_after",
		"consistency_points: {fold_after: 2000, fold_limit: 1500}":       "consistency_points.fold_limit",
		"guests: [{name: a, port: 70000}]":                               "guests[0].port",
		"guests: [{name: a, pool: {size: 1M}}]":                          "guests[0].pool.size",
		"cleaner: {rate: 1K}":                                            "cleaner.rate",
		"scrub: {rate: 1K}":                                              "scrub.rate",
		"scrub: {every: 1m}":                                             "scrub.every",
		"cleaner: {low_water: 91}":                                       "cleaner.low_water",
		"guests: [{name: a, socket: /" + strings.Repeat("x", 120) + "}]": "choose a shorter --dir",
	} {
		dir := t.TempDir()
		file := filepath.Join(dir, "f.yaml")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(dir, file); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: error %v lacks %q", text, err, want)
		}
	}
}

// TestPolicy: a guest has the pair's policy, or its own.
func TestPolicy(t *testing.T) {
	for text, want := range map[string][2]string{
		"":                                   {DefaultPolicy, DefaultPolicy},
		"failover: {policy: restart-first}":  {RestartFirst, RestartFirst},
		"failover: {policy: takeover-first}": {TakeoverFirst, TakeoverFirst},
		"guests: [{name: a}, {name: b, port: 1, policy: restart-first}]":                                     {DefaultPolicy, RestartFirst},
		"failover: {policy: restart-first}\nguests: [{name: a, policy: takeover-first}, {name: b, port: 1}]": {TakeoverFirst, RestartFirst},
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "config.yaml"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := Load(dir, "")
		if err != nil {
			t.Errorf("%s: %v", text, err)
			continue
		}
		if got := [2]string{c.Guests[0].Policy, c.Guests[1].Policy}; got != want {
			t.Errorf("%s: %v, want %v", text, got, want)
		}
		if c.Failover.RestartLimit != 500*time.Millisecond {
			t.Error(c.Failover.RestartLimit)
		}
	}
}

func FuzzParse(f *testing.F) {
	f.Add([]byte("log: 1G\nguests: [{name: a, port: 0}]\n"))
	f.Add([]byte("exports: {v: {read_only: true}}"))
	f.Fuzz(func(t *testing.T, p []byte) {
		c, err := Parse(p)
		if err != nil {
			return
		}
		c.Dir = "/x"
		c.setDefaults()
		_ = c.Validate()
	})
}

// TestWatchLimits: times in which nothing is found, and reports that hold nothing, are refused.
func TestWatchLimits(t *testing.T) {
	for text, want := range map[string]string{
		"failover: {stuck_timeout: 4s}": "failover.stuck_timeout",
		"alerts: {stuck_device: 999ms}": "stuck_device",
		"crash_reports: {keep: 1001}":   "crash_reports.keep",
		"crash_reports: {keep: -1}":     "crash_reports.keep",
		"crash_reports: {size: 8KiB}":   "crash_reports.size",
		"crash_reports: {size: 1GiB}":   "crash_reports.size",
		"crash_reports: {size: 16KiB}":  "",
		"failover: {stuck_timeout: 5s}": "",
		"alerts: {stuck_device: 1s}":    "",
	} {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "config.yaml"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		if _, err := Load(dir, ""); (err == nil) != (want == "") || err != nil && !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v", text, err)
		}
	}
	c, err := Load(t.TempDir(), "")
	if err != nil || c.Failover.StuckTimeout != time.Minute || c.Alerts.StuckDevice != 5*time.Second || c.CrashReports != (CrashReports{Keep: 8, Size: 1 << 20}) {
		t.Errorf("%+v, %v", c, err)
	}
}

// What is to survive a crash of the host is not said to be written before its folder is
// durable, which takes the right to read it.
func TestReplaceIsDurable(t *testing.T) {
	dir, err := os.MkdirTemp("/tmp", "config-test-") // that anybody can enter
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := errors.Join(os.Chmod(dir, 0o755), os.RemoveAll(dir)); err != nil {
			t.Error(err)
		}
	}()
	if err := os.Chmod(dir, 0o333); err != nil { // takes files and cannot be read
		t.Fatal(err)
	}
	path := filepath.Join(dir, "file")
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlock: what root may not any more ends with the thread
		if os.Geteuid() == 0 {
			if err := unix.Setfsuid(65534); err != nil {
				t.Error(err)
				return
			}
		}
		for what, err := range map[string]error{"Replace": Replace(path, []byte("x")), "WriteJSON": WriteJSON(path, 1)} {
			if !errors.Is(err, fs.ErrPermission) || !strings.Contains(err.Error(), path) {
				t.Errorf("%s into a folder that cannot be made durable: %v", what, err)
			}
		}
		if err := WriteRunJSON(path, 2); err != nil {
			t.Errorf("what need not be durable: %v", err)
		}
	}()
	<-done
	if p, err := os.ReadFile(path); err != nil || string(p) != "2\n" {
		t.Errorf("the file holds %q, %v", p, err)
	}
}

// TestVolumeSockets: the directories may lie elsewhere, and a path that no socket can have
// says what to do.
func TestVolumeSockets(t *testing.T) {
	for text, want := range map[string][2]string{
		"":                                      {"/vhost/a/v.sock", "/ring/a/v.ring"},
		"vhost_user: {dir: x}\nrings: {dir: y}": {"/x/a/v.sock", "/y/a/v.ring"},
		"vhost_user: {dir: /z, queues: 3}\nrings: {dir: /z}": {"/z/a/v.sock", "/z/a/v.ring"},
	} {
		dir := t.TempDir()
		file := filepath.Join(dir, "f.yaml")
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := Load(dir, file)
		if err != nil {
			t.Fatal(err)
		}
		for i, of := range []struct {
			path    func(string, string) (string, error)
			in      string
			setting string
		}{{c.VhostSocket, c.VhostDir("a"), "vhost_user.dir"}, {c.RingSocket, c.RingDir("a"), "rings.dir"}} {
			want := want[i]
			if !strings.HasPrefix(want, "/z") {
				want = dir + want
			}
			if got, err := of.path("a", "v"); got != want || err != nil {
				t.Errorf("%q: %s, %v", text, got, err)
			}
			if got, err := of.path("a", "../v/w"); err != nil || filepath.Dir(got) != filepath.Dir(want) {
				t.Errorf("a name with slashes: %s, %v", got, err)
			}
			room := 107 - len(of.in) - len("/.sock")
			if got, err := of.path("a", strings.Repeat("v", room)); len(got) != 107 || err != nil {
				t.Errorf("the longest path: %s, %v", got, err)
			}
			if _, err := of.path("a", strings.Repeat("v", room+1)); err == nil || !strings.Contains(err.Error(), "has 108 bytes, and the system allows 107: set "+of.setting) {
				t.Errorf("a path that is too long: %v", err)
			}
		}
	}
}

// Settings that an older program has left for the guests lack what is new: it has its
// defaults.
func TestOlderEffective(t *testing.T) {
	dir := t.TempDir()
	c, err := Load(dir, "")
	if err != nil {
		t.Fatal(err)
	}
	want := [2]any{c.VhostUser, c.Rings}
	c.VhostUser, c.Rings = VhostUser{}, Rings{}
	if err := os.MkdirAll(c.RunDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := c.WriteEffective(); err != nil {
		t.Fatal(err)
	}
	got, err := ReadEffective(dir)
	if err != nil {
		t.Fatal(err)
	}
	if got := [2]any{got.VhostUser, got.Rings}; got != want {
		t.Errorf("%+v, want %+v", got, want)
	}
}
