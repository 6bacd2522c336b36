package region

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

func seal(p []byte) {
	ondisk.Seal(p, ondisk.Header{Kind: ondisk.KindRegion, Version: version, Length: headerLen})
}

func TestDir(t *testing.T) {
	base := filepath.Join(t.TempDir(), "with space", "regions")
	m, err := Dir(base)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = RemoveDir(base) })
	again, err := Dir(base)
	if err != nil || again != m {
		t.Fatalf("second time: %v, %+v after %+v", err, again, m)
	}
	t.Logf("%+v", m)
	if m.HugePages != (m.Note == "") {
		t.Error("a note without a reason")
	}
	st, err := os.Stat(m.Path)
	if err != nil || st.Mode().Perm() != 0o700 {
		t.Fatalf("%v, %v", err, st)
	}
	r := create1(t, filepath.Join(m.Path, "r"))
	if r.Header().Medium.HugePages != m.HugePages {
		t.Errorf("medium of the region is %+v", r.Header().Medium)
	}
	if err := RemoveDir(base); !errors.Is(err, block.ErrExists) {
		t.Errorf("with a region in it: %v", err)
	}
	if err := r.Remove(); err != nil {
		t.Fatal(err)
	}
	if err := RemoveDir(base); err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(m.Path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("still there: %v", err)
	}
	if err := RemoveDir(base); err != nil {
		t.Errorf("second time: %v", err)
	}
}

// Our file system becomes as large as regions may be, keeps what is in it and its huge
// pages; of another one the note tells that it is too small.
func TestMakeRoom(t *testing.T) {
	size := func(path string) int64 {
		var st unix.Statfs_t
		if err := unix.Statfs(path, &st); err != nil {
			t.Fatal(err)
		}
		return int64(st.Blocks) * st.Bsize
	}
	plain, err := shared(filepath.Join(t.TempDir(), "new"))
	if err != nil {
		t.Fatal(err)
	}
	if m := plain.MakeRoom(size(plain.Path)); m != plain {
		t.Errorf("%+v", m)
	}
	if m := plain.MakeRoom(1 << 60); !strings.Contains(m.Note, plain.Note+"; ") || !strings.Contains(m.Note, "holds at most") {
		t.Errorf("%+v", m)
	}
	asRoot(t)
	base := filepath.Join(t.TempDir(), "regions")
	m, err := Dir(base)
	if err != nil || m.Path != base {
		t.Skip("nothing can be mounted here")
	}
	t.Cleanup(func() { _ = RemoveDir(base) })
	r := create1(t, filepath.Join(base, "r"))
	more := size(base) + 64<<20
	if got := m.MakeRoom(more); got != m || size(base) < more {
		t.Errorf("%+v: %d bytes and not %d", got, size(base), more)
	}
	if again, err := Dir(base); err != nil || again != m {
		t.Errorf("%+v, %v", again, err)
	}
	if m.MakeRoom(1<<20) != m || size(base) < more {
		t.Error("it became smaller")
	}
	if err := r.Remove(); err != nil {
		t.Error(err)
	}
}

// Files that a mount would hide are not hidden.
func TestDirNotEmpty(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root mounts")
	}
	base := t.TempDir()
	if err := os.WriteFile(filepath.Join(base, "f"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	m, err := Dir(base)
	if err == nil && m.Path == base {
		t.Fatal("mounted over a file")
	}
}

// The fallback refuses what somebody else may have put in its place.
func TestSharedRefuses(t *testing.T) {
	dir := t.TempDir()
	open := filepath.Join(dir, "open")
	if err := errors.Join(os.Mkdir(open, 0o700), os.Chmod(open, 0o755)); err != nil {
		t.Fatal(err)
	}
	link := filepath.Join(dir, "link")
	if err := os.Symlink(dir, link); err != nil {
		t.Fatal(err)
	}
	file := filepath.Join(dir, "file")
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for _, p := range []string{open, link, file} {
		if _, err := shared(p); !errors.Is(err, block.ErrInvalid) {
			t.Errorf("%s: %v", p, err)
		}
	}
	m, err := shared(filepath.Join(dir, "new"))
	if err != nil || m.Note == "" {
		t.Errorf("new folder: %v, %+v", err, m)
	}
}

func TestParseMount(t *testing.T) {
	m, ok := parseMount(`53 28 0:47 / /run/a\040b rw,nosuid shared:3 - tmpfs pollux-regions rw,mode=700,huge=always,inode64`)
	if !ok || m.point != "/run/a b" || m.source != mountSource || !m.medium("x").HugePages {
		t.Errorf("%v %+v", ok, m)
	}
	for _, bad := range []string{"", " - ", "1 2 3 - tmpfs x", "a - b - c"} {
		if _, ok := parseMount(bad); ok {
			t.Errorf("%q was accepted", bad)
		}
	}
	for _, err := range []error{unix.EPERM, unix.EINVAL} {
		if !refused(err) {
			t.Errorf("%v is no refusal", err)
		}
	}
}
