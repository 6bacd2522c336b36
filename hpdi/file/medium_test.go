package file

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
)

// fakeSysfs makes a folder like /sys, with a device for each number, which is a link, as the
// kernel's are.
func fakeSysfs(t *testing.T) string {
	t.Helper()
	root := t.TempDir()
	put := func(path, text string) {
		t.Helper()
		path = filepath.Join(root, path)
		if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for link, dev := range map[string]string{
		"8:0": "pci/sda", "8:1": "pci/sda/sda1", "259:0": "pci/nvme0/nvme0n1", "259:2": "pci/nvme0/nvme0n1/nvme0n1p2",
		"253:0": "virtual/block/dm-0", "253:1": "virtual/block/dm-1", "9:0": "virtual/block/md0", "43:0": "virtual/block/nbd0",
	} {
		put(filepath.Join("devices", dev, "dev"), link+"\n")
		put(filepath.Join("dev", "block", "README"), "")
		if err := os.Symlink(filepath.Join("../../devices", dev), filepath.Join(root, "dev/block", link)); err != nil {
			t.Fatal(err)
		}
	}
	put("devices/pci/sda/queue/rotational", "1\n")
	put("devices/pci/nvme0/nvme0n1/queue/rotational", "0\n")
	put("devices/virtual/block/dm-0/queue/rotational", "1\n")
	put("devices/virtual/block/dm-1/queue/rotational", "0\n")
	put("devices/virtual/block/md0/queue/rotational", "no number\n")
	return root
}

func TestRotates(t *testing.T) {
	root := fakeSysfs(t)
	for _, tt := range []struct {
		what         string
		major, minor uint32
		want         bool
	}{
		{"disk", 8, 0, true},
		{"partition of a disk", 8, 1, true},
		{"flash drive", 259, 0, false},
		{"partition of a flash drive", 259, 2, false},
		{"volume that says so", 253, 0, true},
		{"volume that says it does not", 253, 1, false},
		{"something else than a number", 9, 0, true},
		{"a device that says nothing", 43, 0, true},
		{"no such device", 8, 16, true},
		{"a file system without a device", 0, 41, true},
	} {
		if got := rotates(root, unix.Mkdev(tt.major, tt.minor)); got != tt.want {
			t.Errorf("%s: %t", tt.what, got)
		}
	}
	if !rotates(filepath.Join(root, "none"), unix.Mkdev(259, 0)) {
		t.Error("without sysfs a medium does not rotate")
	}
}

func infoOf(t *testing.T, path string) hpdi.Info {
	t.Helper()
	d, err := Open(path, Options{})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	return d.Info()
}

// What is opened says what the kernel says of what it is on.
func TestMedium(t *testing.T) {
	said := func(dev uint64) bool {
		text, err := os.ReadFile(fmt.Sprintf("/sys/dev/block/%d:%d/queue/rotational", unix.Major(dev), unix.Minor(dev)))
		if err != nil {
			t.Skipf("nothing is known of it: %v", err)
		}
		return string(text) != "0\n"
	}
	path := filepath.Join(t.TempDir(), "disk")
	if err := Create(path, 1<<20); err != nil {
		t.Fatal(err)
	}
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Fatal(err)
	}
	t.Run("in memory", func(t *testing.T) {
		path := filepath.Join(memoryDir(t), "disk")
		if err := Create(path, 1<<20); err != nil {
			t.Fatal(err)
		}
		if infoOf(t, path).Rotates {
			t.Error("memory rotates")
		}
	})
	t.Run("block device", func(t *testing.T) {
		name := loop(t, path)
		var st unix.Stat_t
		if err := unix.Stat(name, &st); err != nil {
			t.Fatal(err)
		}
		if got := infoOf(t, name).Rotates; got != said(st.Rdev) {
			t.Errorf("it is opened with %t", got)
		}
	})
	if got := infoOf(t, path).Rotates; got != said(st.Dev) {
		t.Errorf("it is opened with %t", got)
	}
}
