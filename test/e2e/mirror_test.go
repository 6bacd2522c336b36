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
	if c, _ := r.copyOf(second); c.State != "in sync" || c.Repaired == 0 {
		t.Errorf("after it was overwritten: %+v", c)
	}
	swap("a")
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
	if alerts := strings.Join(r.alerts(), "\n"); !strings.Contains(alerts, "copy 2 of mirror 1 of pool pool-a is absent") {
		t.Errorf("alerts: %s", alerts)
	}

	r.must("pool", "replace", "pool-a", second)
	change()
	r.resilvered(second)
	change()
	r.clean()
	r.must("pool", "offline", "pool-a", first)
	change()
	r.must("pool", "online", "pool-a", first)
	r.resilvered(first)
	if alerts := r.alerts(); len(alerts) > 0 {
		t.Errorf("alerts: %v", alerts)
	}
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

// copyOf returns what status says of a device, if its guest has answered in time.
func (r *rig) copyOf(path string) (d control.DeviceStatus, ok bool) {
	r.t.Helper()
	for _, g := range r.status().Guests {
		for _, d := range g.Devices {
			if d.Path == path {
				return d, true
			}
		}
	}
	return d, false
}

func (r *rig) alerts() (all []string) {
	r.t.Helper()
	st := r.status()
	for _, g := range st.Guests {
		all = append(all, g.Alerts...)
	}
	return all
}

// resilvered waits until a copy has everything.
func (r *rig) resilvered(path string) {
	r.t.Helper()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		switch d, _ := r.copyOf(path); {
		case d.State == "in sync":
			return
		case time.Now().After(deadline):
			r.t.Fatalf("%s is not resilvered: %+v", path, d)
		}
	}
}
