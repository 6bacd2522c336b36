package region

import (
	"bufio"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/block"
)

// Medium says where regions live and what that means for a takeover.
type Medium struct {
	Path      string // folder for region files
	HugePages bool   // the file system gives huge pages
	Note      string // what to expect and how to do better, empty on the best medium
}

const (
	// mountSource names our mounts in /proc/self/mountinfo.
	mountSource = "pollux-regions"
	shm         = "/dev/shm"
	plainNote   = "regions have small pages, so that the host needs 25 to 75 ms for each GiB of a killed guest's " +
		"region before the partner may serve: run as root to get huge pages"
)

// Dir returns the folder for the regions of the instance whose files are
// below base, and makes it if need be. As root that is base itself, with a
// private file system of huge pages mounted on it. Where that is not
// possible, it is a folder below /dev/shm, and the Note says what it costs.
func Dir(base string) (Medium, error) {
	base, err := filepath.Abs(base)
	if err != nil {
		return Medium{}, fmt.Errorf("region folder: %w", err)
	}
	if os.Geteuid() == 0 {
		m, err := mounted(base)
		if err == nil || !refused(err) {
			return m, err
		}
	}
	return shared(fallback(base))
}

// MakeRoom returns the medium after its file system was made one that may hold so many
// bytes, if it is ours: the host gives it half of its memory, of which most may be meant
// for regions. It takes nothing before regions do. Where it is somebody else's and
// smaller, the Note says so.
func (m Medium) MakeRoom(bytes int64) Medium {
	var st unix.Statfs_t
	if err := unix.Statfs(m.Path, &st); err != nil || int64(st.Blocks)*st.Bsize >= bytes {
		return m
	}
	mt, ok := mountAt(m.Path)
	err := error(unix.EPERM)
	if ok && mt.source == mountSource {
		const flags = unix.MS_REMOUNT | unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
		err = unix.Mount(mountSource, m.Path, "tmpfs", flags, fmt.Sprintf("size=%d", bytes))
	}
	if err == nil {
		return m
	}
	note := fmt.Sprintf("%s holds at most %d MiB, and regions may need %d: what finds no room there ends with its guest, "+
		"as indexes of fingerprints and caches, or is refused, as logs of new pools", m.Path, int64(st.Blocks)*st.Bsize>>20, bytes>>20)
	if m.Note != "" {
		note = m.Note + "; " + note
	}
	m.Note = note
	return m
}

// refused says that the host does not let us mount.
func refused(err error) bool {
	return errors.Is(err, unix.EPERM) || errors.Is(err, unix.EACCES) ||
		errors.Is(err, unix.ENODEV) || errors.Is(err, unix.EINVAL) || errors.Is(err, unix.ENOSYS)
}

// mounted makes sure that our file system is mounted on base.
func mounted(base string) (Medium, error) {
	if err := os.MkdirAll(base, 0o700); err != nil {
		return Medium{}, fmt.Errorf("region folder: %w", err)
	}
	base, err := filepath.EvalSymlinks(base)
	if err != nil {
		return Medium{}, fmt.Errorf("region folder: %w", err)
	}
	if mt, ok := mountAt(base); ok && mt.source == mountSource {
		return mt.medium(base), nil
	}
	if names, err := names(base); err != nil || len(names) != 0 {
		if err == nil {
			err = fmt.Errorf("mount would hide %s in it: %w", names[0], block.ErrExists)
		}
		return Medium{}, fmt.Errorf("region folder %s: %w", base, err)
	}
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	err = unix.Mount(mountSource, base, "tmpfs", flags, "mode=0700,huge=always")
	if errors.Is(err, unix.EINVAL) { // a kernel without huge pages for files
		err = unix.Mount(mountSource, base, "tmpfs", flags, "mode=0700")
	}
	if err != nil {
		return Medium{}, fmt.Errorf("mount memory on region folder %s: %w", base, err)
	}
	// Only a matter of tidiness in other mount namespaces.
	_ = unix.Mount("", base, "", unix.MS_PRIVATE, "")
	mt, ok := mountAt(base)
	if !ok {
		return Medium{}, fmt.Errorf("region folder %s: mounted and not there: %w", base, block.ErrNotFound)
	}
	return mt.medium(base), nil
}

// fallback returns the folder below /dev/shm for base.
func fallback(base string) string {
	h := sha256.Sum256([]byte(base))
	return filepath.Join(shm, fmt.Sprintf("pollux-%d-%x", os.Geteuid(), h[:6]))
}

// shared makes sure that dir, in a folder where everybody may write, is ours
// alone.
func shared(dir string) (Medium, error) {
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return Medium{}, fmt.Errorf("region folder: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return Medium{}, fmt.Errorf("region folder %s: %w", dir, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != os.Geteuid() || st.Mode&0o077 != 0 {
		return Medium{}, fmt.Errorf("region folder %s is not a folder of user %d with mode 0700; remove it: %w",
			dir, os.Geteuid(), block.ErrInvalid)
	}
	return mediumOf(dir), nil
}

// RemoveDir takes back what Dir has made for base. While a region is left in
// it, it changes nothing and returns block.ErrExists.
func RemoveDir(base string) error {
	base, err := filepath.Abs(base)
	if err != nil {
		return fmt.Errorf("region folder: %w", err)
	}
	if real, err := filepath.EvalSymlinks(base); err == nil {
		if mt, ok := mountAt(real); ok && mt.source == mountSource {
			if err := mustBeEmpty(real); err != nil {
				return err
			}
			if err := unix.Unmount(real, 0); err != nil {
				return fmt.Errorf("unmount region folder %s: %w", real, err)
			}
			if err := os.Remove(real); err != nil {
				return fmt.Errorf("remove region folder: %w", err)
			}
		}
	}
	dir := fallback(base)
	if err := mustBeEmpty(dir); err != nil {
		return err
	}
	if err := os.Remove(dir); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("remove region folder: %w", err)
	}
	return nil
}

func mustBeEmpty(dir string) error {
	left, err := names(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return fmt.Errorf("region folder: %w", err)
	}
	if len(left) != 0 {
		return fmt.Errorf("region folder %s still holds %s: %w", dir, strings.Join(left, ", "), block.ErrExists)
	}
	return nil
}

func names(dir string) ([]string, error) {
	entries, err := os.ReadDir(dir)
	var n []string
	for _, e := range entries {
		n = append(n, e.Name())
	}
	return n, err
}

// mount is a line of /proc/self/mountinfo.
type mount struct {
	point, fstype, source, options string
}

func (m mount) medium(path string) Medium {
	med := Medium{Path: path, HugePages: m.fstype == "tmpfs" && huge(m.options)}
	if !med.HugePages {
		med.Note = plainNote
	}
	return med
}

func huge(options string) bool {
	for o := range strings.SplitSeq(options, ",") {
		if o == "huge=always" || o == "huge=within_size" {
			return true
		}
	}
	return false
}

// mediumOf describes the file system that dir lies on.
func mediumOf(dir string) Medium {
	if real, err := filepath.EvalSymlinks(dir); err == nil {
		if abs, err := filepath.Abs(real); err == nil {
			for at := abs; ; at = filepath.Dir(at) {
				if m, ok := mountAt(at); ok {
					return m.medium(dir)
				}
				if at == "/" {
					break
				}
			}
		}
	}
	return Medium{Path: dir, Note: plainNote}
}

// mountAt returns the mount that is visible at exactly that path.
func mountAt(path string) (mount, bool) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return mount{}, false
	}
	defer f.Close()
	var found mount
	ok := false
	for s := bufio.NewScanner(f); s.Scan(); {
		// A later mount on the same point hides the earlier one.
		if m, good := parseMount(s.Text()); good && m.point == path {
			found, ok = m, true
		}
	}
	return found, ok
}

// parseMount reads "id parent dev root point options [tags] - type source
// super-options".
func parseMount(line string) (mount, bool) {
	left, right, ok := strings.Cut(line, " - ")
	l, r := strings.Fields(left), strings.Fields(right)
	if !ok || len(l) < 5 || len(r) < 3 {
		return mount{}, false
	}
	return mount{point: unescape.Replace(l[4]), fstype: r[0], source: unescape.Replace(r[1]), options: r[2]}, true
}

// unescape undoes what the kernel does to mount points.
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)
