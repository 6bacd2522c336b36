package vm

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path"
	"path/filepath"
	"slices"
	"strings"
)

// archive writes a cpio archive in the format that the kernel unpacks as its first
// file system ("newc", Documentation/driver-api/early-userspace/buffer-format.rst of Linux).
type archive struct {
	w     *bufio.Writer
	inode int
	seen  map[string]bool
}

func newArchive(w io.Writer) *archive {
	return &archive{w: bufio.NewWriterSize(w, 1<<20), seen: map[string]bool{}}
}

// Modes of entries, as stat has them.
const (
	modeDir  = 0o040755
	modeFile = 0o100755
)

// entry writes a header and the content of size bytes.
func (a *archive) entry(name string, mode uint32, size int64, content io.Reader) error {
	name = strings.TrimPrefix(name, "/")
	a.inode++
	// inode mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
	head := fmt.Sprintf("070701%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%08x%s\x00",
		a.inode, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, len(name)+1, 0, name)
	if err := a.padded(int64(len(head)), strings.NewReader(head)); err != nil {
		return err
	}
	return a.padded(size, content)
}

// padded writes n bytes and zeros up to a multiple of four.
func (a *archive) padded(n int64, r io.Reader) error {
	if n == 0 {
		return nil
	}
	if _, err := io.CopyN(a.w, r, n); err != nil {
		return err
	}
	_, err := a.w.WriteString("\x00\x00\x00"[:(4-n%4)%4])
	return err
}

// dirs makes the directories above a name.
func (a *archive) dirs(name string) error {
	var up []string
	for d := path.Dir(name); d != "/" && d != "."; d = path.Dir(d) {
		up = append(up, d)
	}
	slices.Reverse(up)
	for _, d := range up {
		if a.seen[d] {
			continue
		}
		a.seen[d] = true
		if err := a.entry(d, modeDir, 0, nil); err != nil {
			return err
		}
	}
	return nil
}

// text adds a file with the given content.
func (a *archive) text(name, content string) error {
	if err := a.dirs(name); err != nil {
		return err
	}
	return a.entry(name, modeFile, int64(len(content)), strings.NewReader(content))
}

// file adds a file of the host under a name. What is there already stays.
func (a *archive) file(name, from string) error {
	if a.seen[name] {
		return nil
	}
	a.seen[name] = true
	if err := a.dirs(name); err != nil {
		return err
	}
	f, err := os.Open(from)
	if err != nil {
		return err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return err
	}
	return a.entry(name, modeFile, st.Size(), f)
}

// program adds a program of the host with the libraries that it loads.
func (a *archive) program(name string) error {
	from, err := exec.LookPath(name)
	for _, dir := range []string{"/usr/sbin", "/sbin"} { // not in everybody's path
		if err != nil {
			from, err = exec.LookPath(filepath.Join(dir, name))
		}
	}
	if err != nil {
		return err
	}
	if err := a.file("/usr/bin/"+filepath.Base(name), from); err != nil {
		return err
	}
	out, err := exec.Command("ldd", from).CombinedOutput()
	if err != nil {
		if strings.Contains(string(out), "not a dynamic executable") {
			return nil
		}
		return fmt.Errorf("libraries of %s: %w: %s", from, err, out)
	}
	for line := range strings.Lines(string(out)) {
		// "libc.so.6 => /lib/libc.so.6 (0x...)", or the loader's path alone.
		for _, word := range strings.Fields(line) {
			if strings.HasPrefix(word, "/") {
				if err := a.file(word, word); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// end writes the trailer.
func (a *archive) end() error {
	return errors.Join(a.entry("TRAILER!!!", 0, 0, nil), a.w.Flush())
}

// Image says what is in the first file system of a machine.
type Image struct {
	Modules  []string // of the kernel, by name; what they depend on comes along
	Programs []string // of the host, with their libraries
	Files    map[string]string
}

// Write makes the file at path that a machine boots.
func (i Image) Write(ctx context.Context, k Kernel, file string) (err error) {
	f, err := os.Create(file)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	a := newArchive(f)
	init, err := BuildProgram(ctx, "github.com/pollux-storage/pollux/test/vm/init", filepath.Dir(file))
	if err != nil {
		return err
	}
	if err := a.file("/init", init); err != nil {
		return err
	}
	mods, err := k.order(append([]string{"virtio_pci", "virtio_blk", "virtio_console", "crc32c_generic", "ext4"}, i.Modules...))
	if err != nil {
		return err
	}
	var order strings.Builder
	for _, m := range mods {
		fmt.Fprintln(&order, m.name+".ko")
		if err := a.text("/modules/"+m.name+".ko", string(m.content)); err != nil {
			return err
		}
	}
	if err := a.text("/modules/order", order.String()); err != nil {
		return err
	}
	// What programs look up.
	if err := errors.Join(a.text("/etc/passwd", "root:x:0:0:root:/tmp:/bin/sh\n"), a.text("/etc/group", "root:x:0:\n"), a.text("/etc/mtab", "")); err != nil {
		return err
	}
	for _, p := range i.Programs {
		if err := a.program(p); err != nil {
			return err
		}
	}
	for name, from := range i.Files {
		if err := a.file(name, from); err != nil {
			return err
		}
	}
	return a.end()
}

// BuildProgram builds a Go program of this module that runs anywhere, into a
// directory, and returns its path.
func BuildProgram(ctx context.Context, pkg, dir string) (string, error) {
	out := filepath.Join(dir, path.Base(pkg)+".bin")
	return out, goStatic(ctx, "build", "-o", out, pkg)
}

// BuildTest builds the tests of a package likewise.
func BuildTest(ctx context.Context, pkg, dir string) (string, error) {
	out := filepath.Join(dir, path.Base(pkg)+".test")
	return out, goStatic(ctx, "test", "-c", "-o", out, pkg)
}

func goStatic(ctx context.Context, args ...string) error {
	cmd := exec.CommandContext(ctx, "go", args...)
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("go %s: %w\n%s", strings.Join(args, " "), err, out)
	}
	return nil
}

var errNoKernel = fmt.Errorf("the kernel for virtual machines is missing: run make deps: %w", fs.ErrNotExist)
