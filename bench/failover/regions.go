package main

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/test/pair"
)

// regionMount is the source by which a pair knows a mount of its own, and
// unmounts it when it goes down.
const regionMount = "pollux-regions"

// smallPages mounts memory without huge pages where the pair of a directory
// would mount it with them. Who is not root gets small pages anyhow.
func smallPages(dir string) error {
	if os.Geteuid() != 0 {
		return nil
	}
	at := filepath.Join(dir, "region")
	if err := os.Mkdir(at, 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	if err := unix.Mount(regionMount, at, "tmpfs", unix.MS_NOSUID|unix.MS_NODEV|unix.MS_NOEXEC, "mode=0700,huge=never"); err != nil {
		return fmt.Errorf("mount memory without huge pages on %s: %w", at, err)
	}
	return nil
}

// regions returns the size of the guest's region, and whether it has the pages
// that were asked for.
func regions(ctx context.Context, p *pair.Pair, o options) (size int64, hugePages bool, err error) {
	st, err := p.Status(ctx)
	if err != nil {
		return 0, false, err
	}
	for _, r := range pair.Guest(st, "a").Region {
		size, hugePages = max(size, r.Bytes), r.HugePages
	}
	if hugePages && !o.huge {
		return 0, false, errors.New("the regions have huge pages all the same")
	}
	return size, hugePages, nil
}
