package guest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/file"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/mirror"
)

// A mirror is made of what is empty, or is what an addition has left that did not
// come to its end; what is somebody's is refused. The store here refuses all.
func TestAddMirrorContent(t *testing.T) {
	b, c := served(t)
	x, y := filepath.Join(b.cfg.Dir, "x"), filepath.Join(b.cfg.Dir, "y")
	add := func() string {
		t.Helper()
		_, err := c.AddDevice(t.Context(), "pool-a", control.PoolAdd{Device: x, Copies: []string{y}})
		if err == nil {
			t.Fatal("the store refuses, and yet it was added")
		}
		for _, path := range []string{x, y} {
			if Locked(path) {
				t.Fatalf("%s is open still", path)
			}
		}
		return err.Error()
	}
	blanks := func() {
		t.Helper()
		for _, path := range []string{x, y} {
			if err := os.WriteFile(path, make([]byte, 8<<20), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	id := func(paths ...string) mirror.ID {
		t.Helper()
		m, err := openMirror(paths, nil)
		if err != nil {
			t.Fatal(err)
		}
		defer m.Close()
		return m.ID()
	}
	const store = "not supported"
	blanks()
	if err := add(); !strings.Contains(err, store) || !strings.Contains(err, "mirror of") {
		t.Errorf("of blank devices: %s", err)
	}
	left := id(x, y)
	if err := add(); !strings.Contains(err, store) || id(x, y) != left {
		t.Errorf("what an addition has left was made anew: %s", err)
	}
	name := "mirror of " + x + ", " + y
	label := func(pool block.PoolID) {
		b.storage.mu.Lock()
		defer b.storage.mu.Unlock()
		for _, n := range []string{name, "mirror of " + x, "mirror of " + y} {
			b.storage.labels[n] = Label{Pool: pool, Name: "theirs"}
		}
	}
	label(b.storage.last().Region().Pool)
	if err := add(); !strings.Contains(err, store) || id(x, y) != left {
		t.Errorf("labelled for this pool: %s", err)
	}
	label(block.PoolID{9})
	if err := add(); !strings.Contains(err, `a copy of a mirror of pool "theirs"`) || id(x, y) != left {
		t.Errorf("a mirror of another pool: %s", err)
	}
	b.storage.mu.Lock()
	clear(b.storage.labels)
	b.storage.mu.Unlock()
	// Its making was interrupted: one is a copy, and the other is nothing.
	if err := os.WriteFile(y, make([]byte, 8<<20), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := add(); !strings.Contains(err, store) || id(x, y) == left {
		t.Errorf("half of a mirror: %s", err)
	}
	if err := os.WriteFile(y, append([]byte("a file system"), make([]byte, 8<<20)...), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := add(); !strings.Contains(err, "holds something that is not Pollux's") {
		t.Errorf("%s", err)
	}
	if err := os.Remove(y); err != nil {
		t.Fatal(err)
	}
	if err := add(); !strings.Contains(err, "no such file") {
		t.Errorf("%s", err)
	}
}

// Mirrors and devices by themselves are opened together; what is being added is
// left out as long as it is nothing, and only that.
func TestMixedDisks(t *testing.T) {
	two, three := mirrorFiles(t, "a", "b"), mirrorFiles(t, "c", "d", "e")
	one := mirrorFiles(t, "f")
	set := config.Pool{Copies: 1, Widths: []int{1, 2, 3}}
	set.Devices = append(append(append(set.Devices, one.Devices...), two.Devices...), three.Devices...)
	look := func() (devs []hpdi.Device, missed []string, err error) {
		devs, err = disks(&set, opening{open: func(path string) (hpdi.Device, error) { return file.Open(path, file.Options{Lock: true}) },
			without: func(path string, _ error) { missed = append(missed, filepath.Base(path)) }})
		closeAll(devs)
		return devs, missed, err
	}
	if devs, missed, err := look(); err != nil || len(devs) != 3 || len(mirrors(devs)) != 2 || len(missed) > 0 {
		t.Errorf("%d devices, without %q, %v", len(devs), missed, err)
	}
	tn := &tenancy{}
	tn.devices, _, _ = look()
	for place, want := range []int{-1, 0, 1, 0, 1, 2, -1} {
		m, i, err := tn.copyAt(place, &set)
		if (err != nil) != (want < 0) || err == nil && (i != want || len(m.Status().Copies) != set.Widths[1+place/3]) {
			t.Errorf("place %d: copy %d, %v", place, i, err)
		}
	}
	if err := os.Remove(two.Devices[0]); err != nil {
		t.Fatal(err)
	}
	if devs, missed, err := look(); err != nil || len(devs) != 3 || len(missed) != 1 {
		t.Errorf("%d devices, without %q, %v", len(devs), missed, err)
	}
	blank := mirrorFiles(t, "x")
	other := mirrorFiles(t, "y")
	set.Devices, set.Adding = append(append(set.Devices, blank.Devices...), other.Devices...), 2
	if devs, missed, err := look(); err != nil || len(devs) != 3 || len(mirrors(devs)) != 2 || len(missed) != 3 {
		t.Errorf("with a mirror that is none yet: %d devices, without %q, %v", len(devs), missed, err)
	}
	if err := os.Remove(two.Devices[1]); err != nil {
		t.Fatal(err)
	}
	if _, _, err := look(); err == nil || !strings.Contains(err.Error(), "1 of 2 mirrors have no copy left") {
		t.Errorf("%v", err)
	}
	set.Adding, set.Devices = 0, set.Devices[:6]
	if err := os.Remove(one.Devices[0]); err != nil {
		t.Fatal(err)
	}
	if _, _, err := look(); err == nil || !strings.Contains(err.Error(), "no such file") {
		t.Errorf("%v", err)
	}
}
