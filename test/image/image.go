// Package image makes real file system images and moves them in and out of NBD
// exports with the programs that people use for it, in the ways in which these
// programs survive the death of a server.
package image

import (
	"bytes"
	"context"
	"crypto/sha256"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"time"
)

// Image is a file system image on the disk of the host.
type Image struct {
	Path string
	Size int64
	Sum  string // SHA-256
	From string // what is in it, for people
}

// bootstrapTime bounds the making of a Debian tree, which needs a mirror.
const bootstrapTime = 4 * time.Minute

// Debian makes an ext4 image of a new Debian root file system in dir.
func Debian(ctx context.Context, dir string) (Image, error) {
	return build(ctx, dir, debianTree)
}

// Host makes an ext4 image of folders of this host in dir.
func Host(ctx context.Context, dir string, folders ...string) (Image, error) {
	return build(ctx, dir, func(ctx context.Context, tree string) (string, error) {
		return hostTree(ctx, tree, folders)
	})
}

// build makes an image of the tree that fill makes and describes.
func build(ctx context.Context, dir string, fill func(ctx context.Context, tree string) (string, error)) (Image, error) {
	tree := filepath.Join(dir, "tree")
	defer os.RemoveAll(tree)
	from, err := fill(ctx, tree)
	if err != nil {
		return Image{}, err
	}
	return Of(ctx, tree, filepath.Join(dir, "image.ext4"), from)
}

// Of makes an ext4 image of a tree at path; from says for people what is in the tree.
func Of(ctx context.Context, tree, path, from string) (Image, error) {
	used, files, err := treeSize(tree)
	if err != nil {
		return Image{}, err
	}
	const mib = 1 << 20
	img := Image{
		Path: path,
		// Room for metadata, inode tables and a journal.
		Size: (used + used/4 + int64(files)*512 + 96*mib) &^ (mib - 1),
		From: fmt.Sprintf("%s, %d files", from, files),
	}
	f, err := os.Create(img.Path)
	if err != nil {
		return Image{}, err
	}
	defer f.Close()
	if err := f.Truncate(img.Size); err != nil {
		return Image{}, err
	}
	if _, err := Run(ctx, "mke2fs", "-q", "-F", "-t", "ext4", "-b", "4096", "-d", tree, img.Path); err != nil {
		return Image{}, err
	}
	img.Sum, err = Checksum(img.Path)
	return img, err
}

func debianTree(ctx context.Context, tree string) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, bootstrapTime)
	defer cancel()
	suite := "stable"
	if release, err := os.ReadFile("/etc/os-release"); err == nil {
		for line := range strings.Lines(string(release)) {
			if name, ok := strings.CutPrefix(line, "VERSION_CODENAME="); ok {
				suite = strings.Trim(strings.TrimSpace(name), `"`)
			}
		}
	}
	return Bootstrap(ctx, suite, nil, tree)
}

// Bootstrap makes the tree of a Debian release with some packages beside the essential
// ones, and describes it.
func Bootstrap(ctx context.Context, suite string, packages []string, tree string) (string, error) {
	args := []string{"--quiet", "--variant=minbase"}
	from := "Debian " + suite
	if len(packages) > 0 {
		args = append(args, "--include="+strings.Join(packages, ","))
		from += " with " + strings.Join(packages, ", ")
	}
	_, err := Run(ctx, "mmdebstrap", append(args, suite, tree)...)
	return from, err
}

func hostTree(ctx context.Context, tree string, folders []string) (string, error) {
	if err := os.Mkdir(tree, 0o755); err != nil {
		return "", err
	}
	args := []string{"-r", "--no-dereference", "--preserve=mode,timestamps,links"}
	_, err := Run(ctx, "cp", append(append(args, folders...), tree)...)
	return strings.Join(folders, " and ") + " of this host", err
}

// treeSize returns the bytes that the files of a tree take in whole blocks,
// and how many entries it has.
func treeSize(tree string) (size int64, files int, err error) {
	err = filepath.WalkDir(tree, func(_ string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		info, err := d.Info()
		if err != nil {
			return err
		}
		files++
		size += (info.Size() + 4095) &^ 4095
		return nil
	})
	return size, files, err
}

// Checksum is the SHA-256 of a file.
func Checksum(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	h := sha256.New()
	if _, err := io.Copy(h, f); err != nil {
		return "", fmt.Errorf("reading %s: %w", path, err)
	}
	return fmt.Sprintf("%x", h.Sum(nil)), nil
}

// Run runs a program and returns its standard output; its error has the end
// of what the program complained about.
func Run(ctx context.Context, name string, args ...string) ([]byte, error) {
	cmd := exec.CommandContext(ctx, name, args...)
	var out, complaint bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &complaint
	if err := cmd.Run(); err != nil {
		return nil, commandError(ctx, name, err, complaint.String())
	}
	return out.Bytes(), nil
}

func commandError(ctx context.Context, name string, err error, complaint string) error {
	if ctx.Err() != nil {
		err = context.Cause(ctx)
	}
	lines := strings.Split(strings.TrimSpace(complaint), "\n")
	if n := len(lines); n > 6 {
		lines = lines[n-6:]
	}
	return fmt.Errorf("%s: %w: %s", name, err, strings.Join(lines, "\n    "))
}
