package e2e

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/test/pair"
)

var raceFlag = flag.Bool("race-guests", false, "build the program with the race detector")

var build = sync.OnceValues(func() (string, error) {
	dir, err := os.MkdirTemp("", "plx-bin-")
	if err != nil {
		return "", err
	}
	built = dir
	return pair.Build(context.Background(), dir, *raceFlag)
})

// built is the directory of the program, removed at the end.
var built string

func TestMain(m *testing.M) {
	status := m.Run()
	if built != "" {
		os.RemoveAll(built)
	}
	os.Exit(status)
}

// rig is a pair of one test.
type rig struct {
	*pair.Pair
	t *testing.T
}

// small are the settings of a pair that leaves room for others. What is given
// back is given back by command.
var small = pair.Settings{Log: "32MiB", Cache: "16MiB", PoolSize: "1GiB", Failover: []string{"giveback_delay: -1s"}}

// start starts a pair, which the end of the test checks and takes down.
func start(t *testing.T, s pair.Settings) *rig {
	t.Helper()
	if testing.Short() {
		t.Skip("starts real guests")
	}
	bin, err := build()
	if err != nil {
		t.Fatal(err)
	}
	p, err := pair.New(bin, "", s)
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{p, t}
	t.Cleanup(r.end)
	r.up()
	return r
}

func (r *rig) end() {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	logs := r.Logs(100_000)
	for _, word := range []string{"DATA RACE", "panic:", "fatal error:"} {
		if i := strings.Index(logs, word); i >= 0 {
			r.t.Errorf("a log tells of a fault: %.4000s", logs[i:])
		}
	}
	if r.t.Failed() {
		r.t.Log(r.Logs(30))
	}
	if err := r.Remove(ctx); err != nil {
		r.t.Error(err)
	}
}

// up starts the pair, or its agent, and waits until all is well.
func (r *rig) up() {
	r.t.Helper()
	if err := r.Up(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
	r.well()
}

func (r *rig) well() {
	r.t.Helper()
	if err := r.Until(r.t.Context(), 30*time.Second, pair.Well); err != nil {
		r.t.Fatal(err)
	}
}

// down takes the pair down; nothing may be left of it.
func (r *rig) down() {
	r.t.Helper()
	if err := r.Down(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
}

// must runs a command of the pair.
func (r *rig) must(args ...string) {
	r.t.Helper()
	if _, err := r.Do(r.t.Context(), args...); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) status() control.Status {
	r.t.Helper()
	// By the command, because what it prints is what clients are given.
	var st control.Status
	if err := r.JSON(r.t.Context(), &st, "status"); err != nil {
		r.t.Fatal(err)
	}
	return st
}

// volume creates a volume and returns how clients reach it.
func (r *rig) volume(name string, size int64, guest string) control.Export {
	r.t.Helper()
	r.must("volume", "create", name, "--size", fmt.Sprint(size), "--guest", guest)
	return r.export(name)
}

func (r *rig) export(volume string) control.Export {
	r.t.Helper()
	for _, g := range r.status().Guests {
		for _, e := range g.Exports {
			if e.Volume == volume {
				return e
			}
		}
	}
	r.t.Fatalf("status tells of no export of %s", volume)
	return control.Export{}
}

// clean demands that a recount finds nothing.
func (r *rig) clean() {
	r.t.Helper()
	if _, err := r.Check(r.t.Context()); err != nil {
		r.t.Fatal(err)
	}
}

// run runs a client, which must succeed, and returns what it printed.
func run(t *testing.T, name string, args ...string) string {
	t.Helper()
	out, err := try(t, name, args...)
	if err != nil {
		t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
	}
	return out
}

// try runs a client for at most a minute.
func try(t *testing.T, name string, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeoutCause(t.Context(), time.Minute, errors.New("it does not end"))
	defer cancel()
	cmd := exec.CommandContext(ctx, name, args...)
	cmd.Dir = t.TempDir() // fio leaves files where it stands
	out, err := cmd.CombinedOutput()
	if err != nil && ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	return string(out), err
}

// qemuIO runs commands of qemu-io. It succeeds when all commands do.
func qemuIO(t *testing.T, uri string, commands ...string) (string, error) {
	t.Helper()
	args := []string{"-f", "raw"}
	for _, c := range commands {
		args = append(args, "-c", c)
	}
	out, err := try(t, "qemu-io", append(args, uri)...)
	if err == nil && strings.Contains(out, "failed") {
		err = errors.New("a command failed")
	}
	return out, err
}

// mustQemuIO runs commands of qemu-io that must succeed.
func mustQemuIO(t *testing.T, uri string, commands ...string) {
	t.Helper()
	if out, err := qemuIO(t, uri, commands...); err != nil {
		t.Fatalf("qemu-io %q: %v\n%s", commands, err, out)
	}
}

// wantError demands that a command of qemu-io fails with a message.
func wantError(t *testing.T, uri, command, message string) {
	t.Helper()
	if out, err := qemuIO(t, uri, command); err == nil || !strings.Contains(out, message) {
		t.Errorf("qemu-io %s: %v, want %q:\n%s", command, err, message, out)
	}
}

// random draws from POLLUX_SEED, and prints the seed.
func random(t *testing.T) *rand.Rand {
	t.Helper()
	seed := uint64(time.Now().UnixNano()) % 1_000_000
	if env := os.Getenv("POLLUX_SEED"); env != "" {
		var err error
		if seed, err = strconv.ParseUint(env, 10, 64); err != nil {
			t.Fatalf("POLLUX_SEED: %v", err)
		}
	}
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// noise is n bytes in which no two blocks are alike.
func noise(rng *rand.Rand, n int) []byte {
	b := make([]byte, 0, n+8)
	for len(b) < n {
		b = binary.LittleEndian.AppendUint64(b, rng.Uint64())
	}
	return b[:n]
}

func write(t *testing.T, content []byte) (path string) {
	t.Helper()
	path = filepath.Join(t.TempDir(), "content")
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// sameContent demands that an export holds some content, read by nbdcopy.
func sameContent(t *testing.T, uri string, want []byte) {
	t.Helper()
	back := filepath.Join(t.TempDir(), "back")
	run(t, "nbdcopy", uri, back)
	got, err := os.ReadFile(back)
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != len(want) {
		t.Fatalf("%s: %d bytes, want %d", uri, len(got), len(want))
	}
	if !bytes.Equal(got, want) {
		i := 0
		for got[i] == want[i] {
			i++
		}
		t.Fatalf("%s: byte %d is %#x, want %#x", uri, i, got[i], want[i])
	}
}
