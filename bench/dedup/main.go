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
// machine, or on the time that it takes. With -pool real pools do the same beside it, in
// memory of twice the size of the images.
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
	pools := flag.Bool("pool", false, "write and read the images with real pools, too")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	if err := run(ctx, *images, strings.Split(*names, ","), *pools); err != nil {
		fmt.Fprintln(os.Stderr, "dedup:", err)
		os.Exit(1)
	}
}

// errMissed says that what was wanted is not reached; the output tells what.
var errMissed = errors.New("not all is as it should be")

func run(ctx context.Context, dir string, names []string, pools bool) error {
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
		m, err := measure(ctx, paths, pools)
		if err != nil {
			return err
		}
		m.print(os.Stdout, name)
		if pools {
			m.printPools(os.Stdout)
		}
		missed = m.verdict(os.Stdout, set) || missed
	}
	if missed {
		return errMissed
	}
	return nil
}
