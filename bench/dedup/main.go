// Command dedup measures the policy of deduplication on images of real systems: what
// each THN saves, and what reading back costs on a disk.
//
//	go run ./bench/dedup -images DIR        make the images in DIR, by root, and measure
//	go run ./bench/dedup -images DIR -set copies
//
// Images that DIR has are used as they are. They are written one after the other to a
// store in which blocks that are not shared follow each other (internal/estimate); each
// match is verified with the bytes. Then each is read in requests of 64 KiB, on the
// model of a disk of 7,200 rpm (internal/block/blocktest). Nothing in it depends on the
// machine, or on the time that it takes.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
)

func main() {
	images := flag.String("images", "out/images", "folder with the images, made there where they are missing")
	names := flag.String("set", "bookworm,debian,copies", "which sets of images to measure")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *images, strings.Split(*names, ",")); err != nil {
		fmt.Fprintln(os.Stderr, "dedup:", err)
		os.Exit(1)
	}
}

// errMissed says that what was wanted is not reached; the output tells what.
var errMissed = errors.New("not all is as it should be")

func run(ctx context.Context, dir string, names []string) error {
	missed := false
	for _, name := range names {
		set, ok := sets[name]
		if !ok {
			return fmt.Errorf("there is no set %q of images", name)
		}
		paths, err := set.make(ctx, dir)
		if err != nil {
			return err
		}
		m, err := measure(ctx, paths)
		if err != nil {
			return err
		}
		m.print(os.Stdout, name)
		missed = m.verdict(os.Stdout, set) || missed
	}
	if missed {
		return errMissed
	}
	return nil
}
