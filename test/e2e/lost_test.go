package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/test/pair"
)

// killAll ends the agent and both guests, as nobody could have wished.
func (r *rig) killAll() {
	r.t.Helper()
	agent, err := r.HoldAgent(r.t.Context())
	if err != nil {
		r.t.Fatal(err)
	}
	all := []*pair.Process{agent}
	for _, name := range []string{"a", "b"} {
		p, err := r.HoldGuest(r.t.Context(), name)
		if err != nil {
			r.t.Fatal(err)
		}
		all = append(all, p)
	}
	for _, p := range all {
		if err := p.Signal(unix.SIGKILL); err != nil {
			r.t.Fatal(err)
		}
	}
	for _, p := range all {
		for !p.Ended() {
			select {
			case <-time.After(time.Millisecond):
			case <-r.t.Context().Done():
				r.t.Fatal("a process does not end")
			}
		}
		p.Close()
	}
}

// accept sets accept_loss for the pool of guest a, or takes it out again.
func (r *rig) accept(loss bool) {
	r.t.Helper()
	path := filepath.Join(r.Dir, "config.yaml")
	text, err := os.ReadFile(path)
	if err != nil {
		r.t.Fatal(err)
	}
	was, now := "{name: a, port: 0, pool: {", "{name: a, port: 0, pool: {accept_loss: true, "
	if !loss {
		was, now = now, was
	}
	if !strings.Contains(string(text), was) {
		r.t.Fatalf("the settings are %s", text)
	}
	if err := os.WriteFile(path, []byte(strings.Replace(string(text), was, now, 1)), 0o600); err != nil {
		r.t.Fatal(err)
	}
}

// A pool whose region was damaged while nobody lived says so, where, and what to do. It
// serves what was flushed when the loss is accepted, and goes on as any other.
func TestAcceptLoss(t *testing.T) {
	pair.Need(t, "qemu-io", "nbdcopy")
	s := small
	s.PoolSize = "256MiB"
	s.More = []string{"consistency_points: {interval: 1m}"} // nothing but flushes makes durable
	r := start(t, s)
	rng := random(t)
	kept, lost := r.volume("kept", 1<<20, "a"), r.volume("lost", 1<<20, "a")
	mustQemuIO(t, kept.NBD, "write -P 0x11 0 65536", "flush")
	content := noise(rng, 1<<20)
	run(t, "nbdcopy", write(t, content), lost.NBDUnix) // without a flush
	path := ""
	for _, g := range r.status().Guests {
		for _, x := range g.Region {
			if x.Identity == "a" && g.Name == "a" {
				path = x.Path
			}
		}
	}
	r.killAll()
	file, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	for _, at := range []int64{0, 4096} { // both copies of the header
		if _, err := file.WriteAt(noise(rng, 512), at); err != nil {
			t.Fatal(err)
		}
	}
	if err := file.Close(); err != nil {
		t.Fatal(err)
	}

	_ = r.Up(t.Context()) // what it says of a pool that does not open is not the question here
	r.until(func(st control.Status) string {
		text := alerts(st)
		for _, want := range []string{"region", path, "set accept_loss for the pool"} {
			if !strings.Contains(text, want) {
				return fmt.Sprintf("no alert tells of %q: %s", want, text)
			}
		}
		return ""
	})
	if err := r.Down(t.Context()); err != nil && !strings.Contains(err.Error(), "pool") {
		t.Fatal(err)
	}
	r.accept(true)
	r.up()
	mustQemuIO(t, r.export("kept").NBD, "read -P 0x11 0 65536", "write -P 0x22 0 65536", "flush")
	mustQemuIO(t, r.export("lost").NBD, fmt.Sprintf("read -P 0 0 %d", 1<<20))
	r.clean()
	r.down()
	r.accept(false)
	r.up()
	mustQemuIO(t, r.export("kept").NBD, "read -P 0x22 0 65536")
	r.clean()
}
