package file

import (
	"os"
	"path/filepath"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
)

// known opens a file conventionally and returns what was found.
func known(t *testing.T, path string) Known {
	t.Helper()
	d, err := Open(path, Options{Lock: true})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	k, ok := KnownOf(d)
	if !ok {
		t.Skip("the file system does not tell when a file was made")
	}
	return k
}

// open opens a file by what is known of it, and returns what the device says of itself.
func openKnown(t *testing.T, path string, o Options) hpdi.Info {
	t.Helper()
	d, err := Open(path, o)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	return d.Info()
}

func TestKnown(t *testing.T) {
	dir := t.TempDir()
	path := create(t, dir, testSize)
	k := known(t, path)
	// What no file is like shows where it comes from.
	k.Info.Note, k.Info.Rotates, k.Info.Name = "told", !k.Info.Rotates, "another name"
	told := func(o Options) bool {
		t.Helper()
		o.Known = &k
		info := openKnown(t, path, o)
		if info.Name != path || info.Size != testSize && info.Size != 2*testSize || info.BlockSize != BlockSize || info.ReadOnly != o.ReadOnly {
			t.Fatalf("%+v", info)
		}
		return info.Note == "told"
	}
	if !told(Options{Lock: true}) || !told(Options{}) {
		t.Error("what is known was tried out again")
	}
	for what, o := range map[string]Options{"reading only": {ReadOnly: true}, "page cache": {Direct: DirectOff}, "goroutines": {Engine: EngineSync}} {
		if told(o) {
			t.Errorf("%s: what was found for another purpose counts", what)
		}
	}
	k.Info.Driver = "another"
	if told(Options{}) {
		t.Error("a driver that was not chosen counts")
	}
	k = known(t, path)
	k.Info.Note = "told"
	if err := os.Truncate(path, 2*testSize); err != nil {
		t.Fatal(err)
	}
	if told(Options{}) {
		t.Error("a file that has grown counts as the same")
	}
	if err := os.Truncate(path, testSize); err != nil {
		t.Fatal(err)
	}
	if !told(Options{}) {
		t.Error("a file that is as it was does not count as the same")
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if again := create(t, dir, testSize); again != path {
		t.Fatalf("%s instead of %s", again, path)
	}
	if told(Options{}) {
		t.Error("another file of the same name and size counts as the same")
	}
	k.Identity.Born = 0
	if k.Identity.Sure() {
		t.Error("an inode alone tells a file")
	}
}

// A file that keeps its inode is the same under any name and after writes.
func TestKnownMoved(t *testing.T) {
	dir := t.TempDir()
	path := create(t, dir, testSize)
	k := known(t, path)
	other := filepath.Join(dir, "other")
	if err := os.Rename(path, other); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(other, os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(make([]byte, BlockSize), 0); err != nil {
		t.Fatal(err)
	}
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if now := known(t, other); now.Identity != k.Identity {
		t.Errorf("%+v is %+v", now.Identity, k.Identity)
	}
}

func TestKnownDisk(t *testing.T) {
	dir := t.TempDir()
	first := loopWith(t, create(t, dir, testSize), 512, unix.LO_FLAGS_DIRECT_IO)
	k := known(t, first)
	if !k.Identity.Block || k.Identity.Inode != 0 || k.Identity.Size != testSize {
		t.Errorf("%+v", k.Identity)
	}
	if again := known(t, first); again.Identity != k.Identity {
		t.Errorf("%+v is %+v", again.Identity, k.Identity)
	}
	k.Info.Note = "told"
	if info := openKnown(t, first, Options{Lock: true, Known: &k}); info.Note != "told" {
		t.Error("what is known was tried out again")
	}
	other := loopWith(t, create(t, t.TempDir(), testSize), 512, unix.LO_FLAGS_DIRECT_IO)
	if info := openKnown(t, other, Options{Known: &k}); info.Note == "told" {
		t.Error("another disk counts as the same")
	}
}

func TestKnownOfOthers(t *testing.T) {
	if _, ok := KnownOf(nil); ok {
		t.Error("a device of no driver is known")
	}
}
