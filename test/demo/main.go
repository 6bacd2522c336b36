// Command demo shows what a pair is for. It makes a real ext4 image, writes it
// into a volume with clients that everybody has, kills the guest that serves
// it in the middle, and proves that nothing was lost: the image reads back
// identical, and e2fsck finds nothing to complain about. A second client
// writes one block after the other all the while and measures the pause.
//
// It runs a pair of its own in a temporary directory. `make demo` calls it.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/dustin/go-humanize"

	"github.com/pollux-storage/pollux/test/image"
)

type options struct {
	bin   string
	dir   string
	plain bool
	keep  bool
	limit time.Duration
}

func main() {
	var o options
	flag.StringVar(&o.bin, "pollux", "bin/pollux", "the program to show")
	flag.StringVar(&o.dir, "tmp", "", "where to work (a new temporary directory)")
	flag.BoolVar(&o.plain, "plain", false, "take files of this host instead of making a Debian tree")
	flag.BoolVar(&o.keep, "keep", false, "leave the files for a look")
	flag.DurationVar(&o.limit, "limit", 15*time.Minute, "give up after this time")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	ctx, cancel := context.WithTimeout(ctx, o.limit)
	defer cancel()
	proved, err := demo(ctx, o)
	if err != nil {
		fmt.Fprintln(os.Stderr, "demo: FAILED:", err)
		os.Exit(1)
	}
	fmt.Printf("\nOK: %s\n", proved)
}

// makeImage makes an image of a Debian root file system, or where there is no
// mirror of files of this host.
func makeImage(ctx context.Context, dir string, plain bool) (image.Image, error) {
	if !plain {
		img, err := image.Debian(ctx, dir)
		if err == nil {
			return img, nil
		}
		fmt.Printf("  no Debian tree (%v);\n  taking /etc and /usr/share of this host\n", err)
	}
	return image.Host(ctx, dir, "/etc", "/usr/share")
}

// demo works in a directory that it removes, and returns what it has proved.
func demo(ctx context.Context, o options) (proved string, err error) {
	if o.bin, err = filepath.Abs(o.bin); err != nil {
		return "", err
	}
	dir, err := os.MkdirTemp(o.dir, "pollux-demo-")
	if err != nil {
		return "", err
	}
	if o.keep {
		fmt.Println("working in", dir)
	} else {
		defer os.RemoveAll(dir)
	}

	step("making an ext4 image")
	img, err := makeImage(ctx, dir, o.plain)
	if err != nil {
		return "", err
	}
	fmt.Printf("  %s, %s, sha256 %s\n", humanize.IBytes(uint64(img.Size)), img.From, img.Sum[:16])

	step("starting a pair")
	p := &pair{bin: o.bin, dir: filepath.Join(dir, "pair")}
	settings := filepath.Join(dir, "pollux.yaml")
	if err := os.WriteFile(settings, []byte(demoSettings), 0o600); err != nil {
		return "", err
	}
	if _, err := p.do(ctx, "up", "--detach", "--config", settings); err != nil {
		return "", err
	}
	defer func() {
		if err != nil {
			p.logs()
		}
		// The pair ends also when the demo was interrupted.
		if _, e := p.do(context.WithoutCancel(ctx), "down"); e != nil {
			err = errors.Join(err, e)
		}
	}()
	first, second, err := p.show(ctx, dir, img)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("a guest was killed in the middle of each of 2 imports; its clients waited %v and %v; "+
		"the image of %s is identical and e2fsck is clean",
		first.Round(time.Millisecond), second.Round(time.Millisecond), humanize.IBytes(uint64(img.Size))), nil
}

// show does what the demo is for, and returns the pauses of its two rounds.
func (p *pair) show(ctx context.Context, dir string, img image.Image) (first, second time.Duration, err error) {
	if _, err := p.do(ctx, "volume", "create", "probe", "--size", "64M", "--guest", "a"); err != nil {
		return 0, 0, err
	}
	first, err = p.round(ctx, dir, img, "nbd", "nbdcopy through nbdkit --filter=retry", image.Nbdcopy(dir))
	if err != nil {
		return 0, 0, err
	}
	step("giving guest a's volumes back to it")
	protected := func(st status) bool { return st.Protected }
	if err := p.until(ctx, "guest a is back", protected); err != nil {
		return 0, 0, err
	}
	if _, err := p.do(ctx, "giveback", "a"); err != nil {
		return 0, 0, err
	}
	if err := p.until(ctx, "the pair is protected", protected); err != nil {
		return 0, 0, err
	}
	second, err = p.round(ctx, dir, img, "qemu", "qemu-img convert with reconnect-delay", image.QemuImg)
	if err != nil {
		return 0, 0, err
	}
	step("recounting the pools")
	_, err = p.do(ctx, "check")
	return first, second, err
}

// demoSettings are the defaults, except that ports are free ones, so that no
// pair which serves already is met, and that giveback waits for the demo.
const demoSettings = `
guests:
  - {name: a, port: 0}
  - {name: b, port: 0}
failover: {giveback_delay: -1s}
`

// round imports the image into a new volume, kills the guest that serves it
// half-way, and reads the image back. It returns the pause that the probe saw.
func (p *pair) round(ctx context.Context, dir string, img image.Image, volume, how string, write image.Copier) (time.Duration, error) {
	step("importing the image with " + how)
	if _, err := p.do(ctx, "volume", "create", volume, "--size", fmt.Sprint(img.Size), "--guest", "a"); err != nil {
		return 0, err
	}
	_, target, err := p.serving(ctx, volume)
	if err != nil {
		return 0, err
	}
	_, probed, err := p.serving(ctx, "probe")
	if err != nil {
		return 0, err
	}
	pr, err := newProbe(probed.NBDUnix)
	if err != nil {
		return 0, err
	}
	probing, stop := context.WithCancel(ctx)
	defer stop()
	ended := make(chan struct{})
	go func() { defer close(ended); pr.run(probing) }()
	if err := pr.answered(ctx, 0); err != nil {
		return 0, err
	}

	var dead string
	var killed error
	begin := time.Now()
	err = write(ctx, img, target.NBDUnix, func(program image.Program) {
		pr.reset()
		dead, killed = p.kill(ctx, volume)
		if !program.Running() {
			killed = errors.Join(killed, errors.New("the import ended before the guest was killed: the image is too small"))
		}
		fmt.Printf("  half is written after %v: guest %s is killed with SIGKILL\n",
			time.Since(begin).Round(time.Millisecond), dead)
	})
	if err := errors.Join(err, killed); err != nil {
		return 0, err
	}
	fmt.Printf("  all is written after %v\n", time.Since(begin).Round(time.Millisecond))
	_, writes, _ := pr.result()
	if err := pr.answered(ctx, writes); err != nil {
		return 0, err
	}
	stop()
	<-ended
	pause, writes, err := pr.result()
	if err != nil {
		return 0, fmt.Errorf("the probing client: %w", err)
	}
	now, _, err := p.serving(ctx, volume)
	if err != nil {
		return 0, err
	}
	if now.Name == dead {
		return 0, fmt.Errorf("guest %s was killed and yet serves %s: nobody took over", dead, volume)
	}
	fmt.Printf("  guest %s serves it now; the probing client waited %v for it, and else %v at most in %d writes\n",
		now.Name, pause.reconnect.Round(100*time.Microsecond), pause.other.Round(100*time.Microsecond), writes)
	if st, err := p.status(ctx); err == nil {
		fmt.Printf("  the takeover took %s\n", st.LastTakeover)
	}
	return pause.reconnect, verify(ctx, dir, img, target.NBDUnix)
}

// verify reads the export back and compares it with the image.
func verify(ctx context.Context, dir string, img image.Image, uri string) error {
	if err := img.Verify(ctx, dir, uri); err != nil {
		return err
	}
	fmt.Printf("  read back: sha256 %s\n  e2fsck -fn: clean\n", img.Sum[:16])
	return nil
}

func step(what string) { fmt.Printf("== %s\n", what) }
