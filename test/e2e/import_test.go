package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/test/image"
	"github.com/pollux-storage/pollux/test/pair"
)

// A real image is imported while the guest that serves it is killed: guest a
// under nbdcopy, then guest b, which serves everything by then, under qemu-img.
// Each time the survivor has the image, and in the end it has both.
func TestImportWhileTheGuestDies(t *testing.T) {
	pair.Need(t, "mke2fs", "e2fsck", "nbdkit", "nbdcopy", "qemu-img")
	s := small
	s.Log, s.PoolSize = "64MiB", "8GiB"
	r := start(t, s)
	dir := t.TempDir()
	img := makeImage(t, dir)

	first := r.volume("first", img.Size, "a")
	r.importAndKill(img, first.NBDUnix, image.Nbdcopy(dir), "a")
	r.verify(img, dir, first, "b")
	r.well() // guest a is back, and waits

	second := r.volume("second", img.Size, "a")
	r.importAndKill(img, second.NBDUnix, image.QemuImg, "b")
	r.verify(img, dir, second, "a")
	r.verify(img, dir, first, "a")
	r.clean()
}

func makeImage(t *testing.T, dir string) image.Image {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	var img image.Image
	var err error
	if os.Getenv("POLLUX_SOAK") == "1" {
		pair.Need(t, "mmdebstrap")
		img, err = image.Debian(ctx, dir)
	} else {
		img, err = image.Host(ctx, dir, hostFolders(t)...)
	}
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("%s: %d MiB", img.From, img.Size>>20)
	return img
}

// hostFolders are some of the host, with one of big files which makes the image
// big enough to be killed in the middle of.
func hostFolders(t *testing.T) []string {
	t.Helper()
	big := filepath.Join(t.TempDir(), "big")
	if err := os.Mkdir(big, 0o755); err != nil {
		t.Fatal(err)
	}
	rng := random(t)
	for i := range 8 {
		if err := os.WriteFile(filepath.Join(big, fmt.Sprint(i)), noise(rng, 8<<20), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	folders := []string{big, "/etc"}
	for _, f := range []string{"/usr/share/perl", "/usr/share/i18n", "/usr/share/vim", "/usr/share/zoneinfo"} {
		if _, err := os.Stat(f); err == nil {
			folders = append(folders, f)
		}
	}
	return folders
}

// importAndKill copies an image into a volume and kills a guest when half of it
// is written.
func (r *rig) importAndKill(img image.Image, uri string, copy image.Copier, guest string) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), 4*time.Minute)
	defer cancel()
	victim, err := r.HoldGuest(ctx, guest)
	if err != nil {
		r.t.Fatal(err)
	}
	defer victim.Close()
	begin := time.Now()
	var half time.Duration
	var killed error
	err = copy(ctx, img, uri, func(program image.Program) {
		half = time.Since(begin)
		if killed = victim.Signal(unix.SIGKILL); killed != nil {
			return
		}
		if !program.Running() {
			killed = errors.New("the program had ended before the guest was killed")
		}
	})
	if err := errors.Join(err, killed); err != nil {
		r.t.Fatal(err)
	}
	if !victim.Ended() {
		r.t.Fatalf("guest %s was killed and lives", guest)
	}
	r.t.Logf("guest %s was killed after %v, the copy took %v", guest,
		half.Round(time.Millisecond), time.Since(begin).Round(time.Millisecond))
}

// verify demands that a guest serves a volume and that it holds the image.
func (r *rig) verify(img image.Image, dir string, e control.Export, by string) {
	r.t.Helper()
	if now := r.export(e.Volume); now.ServedBy != by || now.NBD != e.NBD || now.NBDUnix != e.NBDUnix {
		r.t.Fatalf("guest %s should serve %+v: %+v", by, e, now)
	}
	for _, uri := range []string{e.NBD, e.NBDUnix} {
		ctx, cancel := context.WithTimeout(r.t.Context(), 2*time.Minute)
		defer cancel()
		if err := img.Verify(ctx, dir, uri); err != nil {
			r.t.Fatal(err)
		}
	}
}
