package region

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/block"
)

// asRoot skips a test that mounts or gives files away.
func asRoot(t *testing.T) {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("only root may do that")
	}
}

func refusal(t *testing.T, what string, err, kind error, words ...string) {
	t.Helper()
	if !errors.Is(err, kind) {
		t.Errorf("%s: %v, want %v", what, err, kind)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%s: %v does not say %q", what, err, w)
		}
	}
}

// A host without room for a region says how to help it, and nothing of the
// region is left.
func TestNoRoom(t *testing.T) {
	asRoot(t)
	dir := t.TempDir()
	if err := unix.Mount("test", dir, "tmpfs", 0, "size=2m"); err != nil {
		t.Skip("cannot mount: ", err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	path := filepath.Join(dir, "r")
	_, err := Create(path, Options{Pool: block.PoolID{1}, Owner: "a", Epoch: 1, LogBytes: 8 << 20})
	refusal(t, "create", err, unix.ENOSPC, path, "no room for", "smaller log")
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("%v, %v", left, err)
	}
	r, err := Create(path, Options{Pool: block.PoolID{1}, Owner: "a", Epoch: 1, LogBytes: 1 << 20})
	if err != nil {
		t.Fatal("a smaller one: ", err)
	}
	if err := r.Remove(); err != nil {
		t.Error(err)
	}
}

// A region that belongs to another user is not trusted.
func TestForeignOwner(t *testing.T) {
	asRoot(t)
	path := filepath.Join(t.TempDir(), "r")
	if err := create1(t, path).Close(); err != nil {
		t.Fatal(err)
	}
	if err := os.Chown(path, 12345, -1); err != nil {
		t.Skip("cannot give files away: ", err)
	}
	_, err := Open(path, true)
	refusal(t, "open", err, block.ErrInvalid, path, "belongs to user 12345")
	if err := os.Chown(path, 0, -1); err != nil {
		t.Fatal(err)
	}
	r, err := Open(path, true)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
}

// A file that is larger than a process can map is looked at all the same, as far as a
// region is mapped.
func TestInspectEndlessFile(t *testing.T) {
	dir, err := os.MkdirTemp(shm, "pollux-test") // other file systems end earlier
	if err != nil {
		t.Skip("no ", shm)
	}
	defer os.RemoveAll(dir)
	path := filepath.Join(dir, "r")
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	size := int64(1) << 47 // as much as there are addresses
	if err := errors.Join(f.Truncate(size), f.Close()); err != nil {
		t.Skip("no such files here: ", err)
	}
	in, err := Inspect(path)
	if err != nil {
		t.Fatal(err)
	}
	if in.Valid() || in.Bytes != size || len(in.mem) != firstAt {
		t.Errorf("%+v", in)
	}
	if err := in.Close(); err != nil {
		t.Error(err)
	}
}

// What is in the way of a folder for regions is named.
func TestFolderInTheWay(t *testing.T) {
	asRoot(t)
	dir := t.TempDir()
	file := filepath.Join(dir, "f")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err := Dir(filepath.Join(file, "below"))
	refusal(t, "below a file", err, unix.ENOTDIR, "region folder", file)
	_, err = shared(filepath.Join(file, "below"))
	refusal(t, "shared below a file", err, unix.ENOTDIR, "region folder", file)

	// Something that is no folder lies where the fallback would be.
	base := filepath.Join(dir, "base")
	if err := os.WriteFile(fallback(base), nil, 0o600); err != nil {
		t.Skip("no ", shm)
	}
	defer os.Remove(fallback(base))
	refusal(t, "a file for a folder", RemoveDir(base), unix.ENOTDIR, "region folder", fallback(base))
	if err := errors.Join(os.Remove(fallback(base)), os.Mkdir(fallback(base), 0o700), os.WriteFile(filepath.Join(fallback(base), "pool-a"), nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(fallback(base))
	refusal(t, "a region in it", RemoveDir(base), block.ErrExists, fallback(base), "still holds pool-a")
	if _, err := os.Stat(filepath.Join(fallback(base), "pool-a")); err != nil {
		t.Error("it was removed: ", err)
	}
}

// Memory that somebody uses is not taken away, and the folder is found where it
// is as long as it is there.
func TestBusyFolder(t *testing.T) {
	asRoot(t)
	base := filepath.Join(t.TempDir(), "regions")
	m, err := Dir(base)
	if err != nil {
		t.Fatal(err)
	}
	if m.Path != base {
		t.Skip("this host does not let us mount")
	}
	if at, err := FindDir(base); err != nil || at != base {
		t.Errorf("found at %s: %v", at, err)
	}
	f, err := os.Create(filepath.Join(base, "f"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(f.Name()); err != nil {
		t.Fatal(err)
	}
	refusal(t, "an open file", RemoveDir(base), unix.EBUSY, "unmount region folder", base)
	if err := f.Close(); err != nil {
		t.Fatal(err)
	}
	if err := RemoveDir(base); err != nil {
		t.Fatal(err)
	}
	if at, err := FindDir(base); err != nil || at != fallback(base) {
		t.Errorf("found at %s: %v", at, err)
	}
}

// A region whose file was closed cannot be removed any more, and says so.
func TestRemoveClosed(t *testing.T) {
	r := create1(t, filepath.Join(t.TempDir(), "r"))
	if err := r.Close(); err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Error("closed twice: ", err)
	}
	refusal(t, "remove", r.Remove(), os.ErrInvalid, "remove region", r.Path())
}

// A region in a folder that takes no changes stays, and is closed.
func TestRemoveRefused(t *testing.T) {
	asRoot(t)
	dir := t.TempDir()
	if err := unix.Mount("test", dir, "tmpfs", 0, ""); err != nil {
		t.Skip("cannot mount: ", err)
	}
	defer func() {
		if err := unix.Unmount(dir, 0); err != nil {
			t.Error(err)
		}
	}()
	path := filepath.Join(dir, "r")
	if err := create1(t, path).Close(); err != nil {
		t.Fatal(err)
	}
	r, err := Open(path, true)
	if err != nil {
		t.Fatal(err)
	}
	if err := r.Close(); err != nil {
		t.Error(err)
	}
	if err := unix.Mount("", dir, "", unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		t.Skip("cannot make it read-only: ", err)
	}
	if r, err = Open(path, true); err != nil {
		t.Fatal(err)
	}
	refusal(t, "remove", r.Remove(), unix.EROFS, "remove region", path)
	if _, err := os.Stat(path); err != nil {
		t.Error(err)
	}
}
