package e2e

import (
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/test/pair"
)

// flash returns what `flash status` tells of a pool.
func (r *rig) flash(pool string) (f control.PoolFlash) {
	r.t.Helper()
	if err := r.JSON(r.t.Context(), &f, "flash", "status", pool); err != nil {
		r.t.Fatal(err)
	}
	return f
}

// parameter returns the value of a parameter of a pool's flash.
func (r *rig) parameter(pool, name string) string {
	r.t.Helper()
	var p control.FlashPolicy
	if err := r.JSON(r.t.Context(), &p, "flash", "policy", "show", pool); err != nil {
		r.t.Fatal(err)
	}
	for _, q := range p.Parameters {
		if q.Name == name {
			return q.Value
		}
	}
	return ""
}

// fails demands that a command ends with a status and says something.
func (r *rig) fails(status int, words string, args ...string) {
	r.t.Helper()
	_, err := r.Do(r.t.Context(), args...)
	var c *pair.CommandError
	if !errors.As(err, &c) || c.Status != status || !strings.Contains(c.Said, words) {
		r.t.Fatalf("pollux %s: %v, want status %d and %q", strings.Join(args, " "), err, status, words)
	}
}

// A volume that is pinned moves to flash and is served from there, by the survivor of its
// guest, too, which knows the policy; then all of it moves back, and the device leaves the pool.
func TestFlash(t *testing.T) {
	pair.Need(t, "qemu-io", "nbdcopy")
	s := small
	s.PoolSize = "256MiB"
	s.More = []string{"consistency_points: {interval: 200ms}"}
	r := start(t, s)
	rng := random(t)
	const size, set = 8 << 20, 64 << 10
	content := noise(rng, size)
	disk := r.volume("disk", size, "a")
	device := filepath.Join(r.Dir, "flash.img")
	r.must("pool", "add", "pool-a", device, "--class", "flash", "--size", "64MiB", "--set-bytes", "64K")
	r.well()
	if f := r.flash("pool-a"); f.Device != device || f.State != control.FlashInUse || f.SetBytes != set || f.Slots < size/set || f.Used != 0 || len(f.Primaries) != 1 {
		t.Errorf("new: %+v", f)
	}
	if p, err := r.Client().Pool(t.Context(), "pool-a"); err != nil || len(p.Devices) != 2 || p.Devices[1].Class != control.ClassFlash {
		t.Errorf("%+v, %v", p, err)
	}
	r.fails(2, "line 1, column 9: undeclared reference to 'speed'", "flash", "policy", "set", "pool-a", "promote=reads > speed")
	r.must("flash", "policy", "set", "pool-a", "interval=200ms", "budget.migrate=256M")
	r.must("flash", "policy", "set", "pool-a", "--device-class", "sata", "promote=reads > 20.0 && references > 1")
	r.must("flash", "policy", "class", "pool-a", filepath.Join(r.Dir, "pool-a.img"), "sata")

	mustQemuIO(t, disk.NBDUnix, fmt.Sprintf("write -s %s 0 %d", write(t, content), size))
	r.must("volume", "create", "other", "--size", "1M", "--guest", "a") // which takes a consistency point
	r.must("flash", "pin", "add", "disk")
	whole := func(when string) {
		t.Helper()
		if err := r.Until(t.Context(), 30*time.Second, func(control.Status) string {
			f, err := r.Client().Flash(t.Context(), "pool-a")
			if err != nil || len(f.Pins) != 1 || f.Pins[0].State != control.PinWhole || f.Pins[0].Sets < size/set {
				return fmt.Sprintf("%s: what is pinned is not on flash: %+v, %v", when, f, err)
			}
			return ""
		}); err != nil {
			t.Fatal(err)
		}
	}
	explain := func(when string) {
		t.Helper()
		var x control.FlashExplanation
		if err := r.JSON(t.Context(), &x, "flash", "explain", "disk", "--offset", fmt.Sprint(1<<20+rng.Int64N(size-1<<20))); err != nil {
			t.Fatal(err)
		}
		if !x.OnFlash || !x.Pinned || x.Class != "sata" || x.Pattern != "sata" || x.Summary != "It is on flash because it is pinned." {
			t.Errorf("%s: %+v", when, x)
		}
	}
	whole("written")
	explain("written")
	sameContent(t, disk.NBDUnix, content)

	// The survivor has the policy, the pins and the data.
	part := noise(rng, 1<<20)
	mustQemuIO(t, disk.NBDUnix, fmt.Sprintf("write -s %s 0 %d", write(t, part), len(part))) // in the log, or not any more
	copy(content, part)
	r.must("guest", "kill", "a", "--yes")
	r.well()
	if by := pair.Guest(r.status(), "a").ServedBy; by != "b" {
		t.Fatalf("%s serves a", by)
	}
	sameContent(t, disk.NBDUnix, content)
	for name, want := range map[string]string{
		"interval": "200ms", "budget.migrate": "256MiB", "patterns.sata.promote": "reads > 20.0 && references > 1", "patterns.default.promote": "",
	} {
		if got := r.parameter("pool-a", name); got != want {
			t.Errorf("after the takeover %s is %q, not %q", name, got, want)
		}
	}
	whole("taken over")
	explain("taken over")
	r.clean() // it reads all of the pool: clients are answered by the cache that was taken over
	if f := r.flash("pool-a"); !f.Primaries[0].Given || f.Primaries[0].Class != "sata" || f.Primaries[0].Flash.Reads == 0 || f.HitShare == 0 {
		t.Errorf("taken over: %+v", f)
	}

	// All of it moves back, and the device leaves the pool.
	r.must("flash", "pin", "remove", "disk")
	r.must("flash", "evacuate", "pool-a", "--wait")
	if f := r.flash("pool-a"); f.State != control.FlashEvacuated || f.Used != 0 || len(f.Pins) != 0 {
		t.Errorf("evacuated: %+v", f)
	}
	sameContent(t, disk.NBDUnix, content)
	r.must("flash", "evacuate", "pool-a", "--stop")
	r.must("pool", "remove", "pool-a", device, "--wait")
	r.fails(3, "has no flash", "flash", "status", "pool-a")
	sameContent(t, disk.NBDUnix, content)
	r.clean()
	r.must("giveback", "a")
	r.well()
	sameContent(t, disk.NBDUnix, content)

	out, err := r.Do(t.Context(), "events")
	if err != nil {
		t.Fatal(err)
	}
	for _, kind := range []string{"flash-policy-changed", "flash-class-changed", "flash-pin-added", "flash-pin-removed", "flash-evacuation-start", "flash-evacuated", "flash-evacuation-stop"} {
		if !strings.Contains(string(out), kind) {
			t.Errorf("no event %s in\n%s", kind, out)
		}
	}
	if n := strings.Count(string(out), "flash-policy-changed"); n != 3 {
		t.Errorf("%d changes of parameters", n)
	}
}
