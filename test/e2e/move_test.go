package e2e

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/test/pair"
)

// refused runs a command that must be refused, with certain words.
func (r *rig) refused(words string, args ...string) {
	r.t.Helper()
	_, err := r.Do(r.t.Context(), args...)
	var c *pair.CommandError
	if !errors.As(err, &c) || c.Status != 5 || !strings.Contains(c.Said, words) {
		r.t.Fatalf("pollux %s: %v, want a refusal that says %q", strings.Join(args, " "), err, words)
	}
}

// found returns a pool that a listing finds.
func (r *rig) found(name string, where ...string) control.FoundPool {
	r.t.Helper()
	var f control.Found
	if err := r.JSON(r.t.Context(), &f, append([]string{"pool", "import"}, where...)...); err != nil {
		r.t.Fatal(err)
	}
	for _, p := range f.Pools {
		if p.Name == name {
			return p
		}
	}
	r.t.Fatalf("no pool %s in %+v", name, f)
	return control.FoundPool{}
}

// A pool of mirrors moves from one pair to another, under another name and guest,
// where guests die, and back; what was not exported is refused. Nothing is lost.
func TestMove(t *testing.T) {
	pair.Need(t, "qemu-io", "nbdcopy")
	s := small
	s.PoolSize, s.Copies = "256MiB", 2
	r := start(t, s)
	s.Copies = 1
	other := start(t, s)
	rng := random(t)
	const size = 16 << 20
	content := noise(rng, size)
	disk := r.volume("disk", size, "a")
	run(t, "nbdcopy", "--flush", write(t, content), disk.NBDUnix)
	first := filepath.Join(r.Dir, "pool-a.img")

	// Clients keep it, unless they are cut off.
	client := exec.CommandContext(t.Context(), "qemu-io", "-f", "raw", "-c", "read 0 4k", "-c", "sleep 60000", disk.NBDUnix)
	if err := client.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = client.Process.Kill()
		_ = client.Wait()
	}()
	r.until(func(st control.Status) string {
		if e := pair.Guest(st, "a").Exports; len(e) == 0 || e[0].Connections == 0 {
			return "nobody is connected"
		}
		return ""
	})
	r.refused("1 connections", "pool", "export", "pool-a")
	if f := r.found("pool-a", r.Dir+"/"); f.State != control.FoundInUse {
		t.Errorf("while it is served: %+v", f)
	}
	other.refused("has a pool already", "pool", "import", "pool-a", r.Dir+"/")
	other.refused("a guest has one pool", "pool", "import", "pool-a", r.Dir+"/", "--guest", "b")
	other.must("pool", "export", "pool-b")
	other.must("pool", "export", "pool-b") // again is no error
	other.well()
	other.refused("is in use", "pool", "import", "pool-a", r.Dir+"/", "--as", "moved", "--force", "--accept-loss")
	mustQemuIO(t, disk.NBDUnix, "write -P 7 0 64k") // not flushed
	copy(content, strings.Repeat("\x07", 64<<10))
	r.must("pool", "export", "pool-a", "--force")
	r.well()
	if _, err := qemuIO(t, disk.NBDUnix, "read 0 4k"); err == nil {
		t.Error("the volume of an exported pool is served")
	}

	// The devices leave.
	there := t.TempDir()
	for _, name := range []string{"pool-a.img", "pool-a.copy2.img"} {
		if err := os.Rename(filepath.Join(r.Dir, name), filepath.Join(there, name)); err != nil {
			t.Fatal(err)
		}
	}
	if f := other.found("pool-a", there+"/"); f.State != control.FoundExported || f.Guest != "a" || f.Wants != 1 || len(f.Devices) != 1 ||
		len(f.Devices[0].Copies) != 2 || f.Devices[0].Copies[1].State != "in sync" || f.Host == "" {
		t.Errorf("exported: %+v", f)
	}
	other.refused(`there is a pool "pool-a" already`, "pool", "import", "pool-a", there+"/")
	other.volume("disk", 1<<20, "a")
	other.refused(`has a volume "disk"`, "pool", "import", "pool-a", there+"/", "--as", "moved")
	other.must("volume", "rename", "disk", "own")
	other.must("pool", "import", "pool-a", there+"/", "--as", "moved")
	other.must("pool", "import", "moved", there+"/") // again is no error
	other.well()
	disk = other.export("disk")
	if disk.Guest != "b" {
		t.Errorf("%+v", disk)
	}
	sameContent(t, disk.NBDUnix, content)
	mustQemuIO(t, disk.NBDUnix, "write -P 9 1M 64k")
	copy(content[1<<20:], strings.Repeat("\x09", 64<<10))
	other.must("guest", "kill", "b", "--yes") // its partner knows the pool, too
	other.well()
	sameContent(t, disk.NBDUnix, content)
	other.must("giveback", "b")
	other.well()
	other.clean()
	other.down()
	other.clean()
	other.up()
	sameContent(t, other.export("disk").NBDUnix, content)

	// The pair that it left goes on without it, also after a restart.
	r.down()
	r.up()
	r.clean()
	if out, err := r.Do(t.Context(), "pool", "list"); err != nil || strings.Contains(string(out), "pool-a") {
		t.Errorf("it lists a pool that has gone: %v, %s", err, out)
	}

	// And back, with one copy missing, which is then replaced.
	other.must("pool", "export", "moved")
	if err := os.Remove(filepath.Join(there, "pool-a.copy2.img")); err != nil {
		t.Fatal(err)
	}
	r.must("pool", "import", other.found("moved", there+"/").ID, there+"/", "--as", "pool-a")
	sameContent(t, r.export("disk").NBDUnix, content)
	p, err := r.Client().Pool(t.Context(), "pool-a")
	if err != nil || len(p.Devices) != 2 || p.Devices[0].Path != filepath.Join(there, "pool-a.img") || p.Devices[1].State != "absent" {
		t.Fatalf("%+v, %v", p, err)
	}
	lacking := filepath.Join(r.Dir, "missing", "pool-a-device1-copy2")
	r.must("pool", "replace", "pool-a", lacking, first, "--size", "256MiB")
	r.until(copyIs(first, "in sync", nil))
	r.well()
	sameContent(t, r.export("disk").NBDUnix, content)
	r.clean()

	// A pool that was only closed may be opened again where it was.
	r.down()
	if f := other.found("pool-a", there+"/"); f.State != control.FoundNotExported {
		t.Errorf("closed: %+v", f)
	}
	other.refused("closed, but not exported", "pool", "import", "pool-a", there+"/", "--as", "taken")
	other.must("pool", "import", "pool-a", r.Dir+"/", "--as", "taken", "--force")
	sameContent(t, other.export("disk").NBDUnix, content)
	other.clean()
	if out, err := other.Do(t.Context(), "events"); err != nil || !strings.Contains(string(out), "pool moved is exported") || !strings.Contains(string(out), "pool taken is imported") {
		t.Errorf("events: %v, %s", err, out)
	}
}
