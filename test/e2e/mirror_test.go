package e2e

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/test/pair"
)

// The device of one copy is overwritten, truncated, removed and replaced while
// clients write, and guests die in between. No client sees an error, nothing is
// lost, and in the end the replacement alone is a whole pool.
func TestMirror(t *testing.T) {
	pair.Need(t, "qemu-io", "nbdcopy")
	s := small
	s.PoolSize, s.Copies = "256MiB", 2
	r := start(t, s)
	rng := random(t)
	const size = 32 << 20
	content := noise(rng, size)
	disk := r.volume("disk", size, "a")
	run(t, "nbdcopy", "--flush", write(t, content), disk.NBDUnix)
	first, second := filepath.Join(r.Dir, "pool-a.img"), filepath.Join(r.Dir, "pool-a.copy2.img")
	change := func() {
		t.Helper()
		at, n := rng.IntN(size/blockSize-64)*blockSize, (1+rng.IntN(64))*blockSize
		v := byte(1 + rng.IntN(255))
		mustQemuIO(t, disk.NBDUnix, fmt.Sprintf("write -P %d %d %d", v, at, n), "flush")
		copy(content[at:], slices.Repeat([]byte{v}, n))
	}
	swap := func(from string) { // whoever serves has nothing in its cache
		t.Helper()
		r.must("guest", "kill", from, "--yes")
		r.well()
		sameContent(t, disk.NBDUnix, content)
		change()
	}

	// Everything but what the mirror keeps for itself turns into rubbish.
	r.down() // so that no guest has anything in memory
	rubbish(t, second, noise(rng, 1<<20), 1<<20, 256<<20)
	r.up()
	sameContent(t, disk.NBDUnix, content)
	r.until(copyIs(second, "in sync", func(d control.DeviceStatus) bool { return d.Repaired > 0 }))
	r.must("pool", "scrub", "start", "pool-a")
	r.until(scrubbed)
	swap("a")
	if out, err := r.Do(t.Context(), "events"); err != nil || !strings.Contains(string(out), "scrub-end") {
		t.Errorf("events tell nothing of the scrub: %v, %s", err, out)
	}
	r.clean()

	if err := os.Truncate(second, 8<<20); err != nil {
		t.Fatal(err)
	}
	change()
	sameContent(t, disk.NBDUnix, content)
	if err := os.Remove(second); err != nil {
		t.Fatal(err)
	}
	r.must("giveback", "a")
	r.well()
	sameContent(t, disk.NBDUnix, content)
	change()
	r.until(func(st control.Status) string {
		if all := alerts(st); !strings.Contains(all, "copy 2 of mirror 1 of pool pool-a is absent") {
			return "alerts: " + all
		}
		return ""
	})

	r.must("pool", "replace", "pool-a", second)
	change()
	r.until(copyIs(second, "in sync", nil))
	change()
	r.clean()
	r.must("pool", "offline", "pool-a", first)
	change()
	r.must("pool", "online", "pool-a", first)
	r.until(copyIs(first, "in sync", nil))
	r.until(alerts)
	r.down()
	if err := os.Remove(first); err != nil {
		t.Fatal(err)
	}
	r.clean()
	r.up()
	sameContent(t, disk.NBDUnix, content)
	r.clean()
}

// rubbish overwrites a file from an offset up to its size.
func rubbish(t *testing.T, path string, what []byte, from, to int64) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for ; from < to; from += int64(len(what)) {
		if _, err := f.WriteAt(what, from); err != nil {
			t.Fatal(err)
		}
	}
}

// scrubbed wants a scrub of pool-a that went through, mended something and lost
// nothing.
func scrubbed(st control.Status) string {
	for _, g := range st.Guests {
		for _, p := range g.PoolStats {
			if s := p.Scrub; p.Name == "pool-a" && s.State == control.ScrubDone && s.Now.Repaired > 0 && s.Now.Unreadable == 0 {
				return ""
			}
		}
	}
	return fmt.Sprintf("no scrub that is through: %+v", st.Guests)
}

// until waits until what status tells is so; ok says why it is not.
func (r *rig) until(ok func(control.Status) string) {
	r.t.Helper()
	if err := r.Until(r.t.Context(), time.Minute, ok); err != nil {
		r.t.Fatal(err)
	}
}

// copyIs wants a copy in a state, and whatever else also says.
func copyIs(path, state string, also func(control.DeviceStatus) bool) func(control.Status) string {
	return func(st control.Status) string {
		for _, g := range st.Guests {
			for _, d := range g.Devices {
				if d.Path == path && d.State == state && (also == nil || also(d)) {
					return ""
				}
			}
		}
		return fmt.Sprintf("no copy on %s is %s, or not as it should be: %+v", path, state, st.Guests)
	}
}

// alerts returns all alerts, one a line.
func alerts(st control.Status) string {
	var all []string
	for _, g := range st.Guests {
		all = append(all, g.Alerts...)
	}
	return strings.Join(all, "\n")
}
