package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"

	"github.com/pollux-storage/pollux/test/image"
)

// system is an image of a Debian system.
type system struct {
	suite    string
	packages []string
	// private is the number of a copy that has files of its own; 0 has none.
	private uint64
}

func (s system) file() string {
	name := s.suite
	for _, p := range s.packages {
		name += "-" + p
	}
	if s.private > 0 {
		name += fmt.Sprintf("-copy%d", s.private)
	}
	return name + ".ext4"
}

// set is images that are written one after the other.
type set struct {
	systems []system
	// release says that all are of one release, of which most is wanted.
	release bool
}

var bookworm = []system{
	{suite: "bookworm"},
	{suite: "bookworm", packages: []string{"nginx"}},
	{suite: "bookworm", packages: []string{"postgresql"}},
}

var sets = map[string]set{
	"bookworm": {systems: bookworm, release: true},
	"debian": {systems: append(append([]system{}, bookworm...),
		system{suite: "trixie"}, system{suite: "trixie", packages: []string{"nginx"}})},
	"copies": {systems: []system{
		{suite: "bookworm", private: 1}, {suite: "bookworm", private: 2},
		{suite: "bookworm", private: 3}, {suite: "bookworm", private: 4},
	}},
}

// make makes the images that dir lacks and returns the paths of all.
func (s set) make(ctx context.Context, dir string) ([]string, error) {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, err
	}
	var paths []string
	for _, sys := range s.systems {
		path := filepath.Join(dir, sys.file())
		paths = append(paths, path)
		if _, err := os.Stat(path); !errors.Is(err, fs.ErrNotExist) {
			if err != nil {
				return nil, err
			}
			continue
		}
		fmt.Fprintln(os.Stderr, "making", path)
		if err := sys.make(ctx, dir, path); err != nil {
			return nil, fmt.Errorf("image %s: %w", path, err)
		}
	}
	return paths, nil
}

func (s system) make(ctx context.Context, dir, path string) error {
	tree, err := os.MkdirTemp(dir, "tree-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(tree)
	root := filepath.Join(tree, "root")
	from, err := image.Bootstrap(ctx, s.suite, s.packages, root)
	if err != nil {
		return err
	}
	if s.private > 0 {
		if err := writePrivate(filepath.Join(root, "srv", "data"), s.private); err != nil {
			return err
		}
	}
	// An image that was not finished shall not be taken for one.
	part := filepath.Join(tree, "image")
	if _, err := image.Of(ctx, root, part, from); err != nil {
		return err
	}
	return os.Rename(part, path)
}

// writePrivate writes 64 files of 4 KiB to 2 MiB that no other copy has.
func writePrivate(dir string, seed uint64) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	random := rand.NewChaCha8([32]byte{byte(seed)})
	sizes := rand.New(random)
	for i := range 64 {
		f, err := os.Create(filepath.Join(dir, fmt.Sprintf("%02d.bin", i)))
		if err != nil {
			return err
		}
		_, err = io.CopyN(f, random, (1+sizes.Int64N(512))*4096)
		if err = errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	return nil
}
