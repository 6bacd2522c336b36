package e2e

import (
	"os"
	"path/filepath"
	"testing"

	"github.com/pollux-storage/pollux/test/pair"
)

// A pool of one mirror gets a second one under a client, the larger one, so that
// data lie on both; then a copy of each is lost, and guests die. A single device is
// refused.
func TestAddMirror(t *testing.T) {
	pair.Need(t, "qemu-io", "nbdcopy")
	s := small
	s.PoolSize, s.Copies = "128MiB", 2
	r := start(t, s)
	rng := random(t)
	const size = 96 << 20
	content := noise(rng, size)
	disk := r.volume("disk", size, "a")
	before, err := r.Client().Pool(t.Context(), "pool-a")
	if err != nil {
		t.Fatal(err)
	}
	if before.Stats.Free > size {
		t.Fatalf("%d bytes are free in one mirror: nothing would lie on the other", before.Stats.Free)
	}
	one, two, lone := filepath.Join(r.Dir, "one.img"), filepath.Join(r.Dir, "two.img"), filepath.Join(r.Dir, "lone.img")
	r.refused("would be lost with it", "pool", "add", "pool-a", lone, "--size", "128MiB")
	if _, err := os.Stat(lone); err == nil {
		t.Error("what was refused has left a file")
	}
	r.must("pool", "add", "pool-a", "--mirror", one, two, "--size", "256MiB")
	r.well()
	run(t, "nbdcopy", "--flush", write(t, content), disk.NBDUnix)
	if p, err := r.Client().Pool(t.Context(), "pool-a"); err != nil || p.Stats.Capacity < before.Stats.Capacity+200<<20 || len(p.Devices) != 4 || p.Devices[3].Mirror != 2 {
		t.Errorf("%+v, %v", p, err)
	}
	r.must("guest", "kill", "a", "--yes")
	r.well()
	sameContent(t, disk.NBDUnix, content)
	r.clean()
	r.must("giveback", "a")
	r.well()

	// One copy of each is enough.
	r.down()
	for _, path := range []string{filepath.Join(r.Dir, "pool-a.copy2.img"), one} {
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
	sameContent(t, r.export("disk").NBDUnix, content)
	r.must("pool", "replace", "pool-a", one, "--size", "256MiB")
	r.must("pool", "replace", "pool-a", filepath.Join(r.Dir, "pool-a.copy2.img"), "--size", "128MiB")
	r.until(copyIs(one, "in sync", nil))
	r.until(copyIs(filepath.Join(r.Dir, "pool-a.copy2.img"), "in sync", nil))
	r.well()
	r.down()
	for _, path := range []string{filepath.Join(r.Dir, "pool-a.img"), two} { // the others
		if err := os.Remove(path); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
	sameContent(t, r.export("disk").NBDUnix, content)
	r.clean()

	// Who insists gets a single device, and mirrors come to it as before.
	r.must("pool", "add", "pool-b", lone, "--size", "128MiB", "--force")
	r.must("pool", "add", "pool-b", filepath.Join(r.Dir, "more.img"), "--size", "128MiB")
	r.must("pool", "add", "pool-b", "--mirror", filepath.Join(r.Dir, "x.img"), filepath.Join(r.Dir, "y.img"), filepath.Join(r.Dir, "z.img"), "--size", "128MiB")
	r.down()
	r.clean()
	if err := r.Up(t.Context()); err != nil {
		t.Fatal(err)
	}
	r.until(copyIs(filepath.Join(r.Dir, "z.img"), "in sync", nil))
	if p, err := r.Client().Pool(t.Context(), "pool-b"); err != nil || len(p.Devices) != 7 || p.State != "open" {
		t.Errorf("%+v, %v", p, err)
	}
	r.clean()
}
