package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/file"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/blockio"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/cache"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/pool"
)

// fullPool measures a pool that is full and fragmented, as far as its
// reference counts tell: they are made up, for nobody waits for 10 TiB to be
// written. So it is not checked.
func fullPool(ctx context.Context, o options, dir string, size int64) error {
	p := &pollux{title: "pollux", program: o.pollux, dir: dir, volume: "bench", size: size / 2, poolSize: size, limit: o.guestMemory}
	defer p.stop()
	if err := p.start(ctx); err != nil {
		return err
	}
	if _, err := output(ctx, time.Minute, p.program, "down", "--dir", dir); err != nil {
		return err
	}
	if err := makeFull(filepath.Join(dir, "pool-a.img")); err != nil {
		return err
	}
	begin := time.Now()
	if _, err := output(ctx, time.Minute, p.program, "up", "--dir", dir, "--detach"); err != nil {
		return err
	}
	started := time.Since(begin)
	if err := p.find(ctx); err != nil {
		return err
	}
	if err := p.loadedCounts(ctx); err != nil {
		return err
	}
	loaded := time.Since(begin)
	idle, err := resident(p.first)
	if err != nil {
		return err
	}
	if _, err := load(ctx, p.uri(), size/2, o.runtime+time.Minute, "--rw=randwrite", "--bs=4k", "--iodepth=16", "--time_based", fmt.Sprintf("--runtime=%d", int(o.runtime.Seconds()))); err != nil {
		return err
	}
	used, err := resident(p.first)
	if err != nil {
		return err
	}
	if text, err := output(ctx, time.Minute, p.program, "status", "--memory", "--dir", dir); err == nil {
		defer fmt.Printf("\n%s\n", text)
	}
	dead := time.Now()
	if err := syscall.Kill(p.first, syscall.SIGKILL); err != nil {
		return err
	}
	takeover, err := p.takeover(ctx)
	if err != nil {
		return err
	}
	steps, err := output(ctx, time.Minute, p.program, "status", "--dir", dir)
	if err != nil {
		return err
	}
	if err := p.loadedCounts(ctx); err != nil {
		return err
	}
	again := time.Since(dead)
	survivor, err := resident(p.guests[1])
	if err != nil {
		return err
	}
	if _, last, ok := strings.Cut(string(steps), "LAST "); ok {
		defer fmt.Printf("\nLAST %s\n", last)
	}
	row := func(m map[string]int64) string {
		return fmt.Sprintf("%d MiB (%d + %d)", m["VmRSS"]>>20, m["RssAnon"]>>20, m["RssShmem"]>>20)
	}
	fmt.Printf("| full pool | start | counts loaded after | resident (own + shared) | after writes | takeover | counts loaded after | survivor |\n|--:|--:|--:|--:|--:|--:|--:|--:|\n")
	fmt.Printf("| %d GiB | %v | %v | %s | %s | %.1f ms | %v | %s |\n", size>>30, started.Round(time.Millisecond), loaded.Round(10*time.Millisecond),
		row(idle), row(used), takeover, again.Round(10*time.Millisecond), row(survivor))
	if _, err := output(ctx, time.Minute, p.program, "down", "--dir", dir); err != nil {
		return fmt.Errorf("%w\n%s", err, tail(filepath.Join(dir, "log", "guest-b.log")))
	}
	p.up = false
	return os.RemoveAll(dir)
}

// loadedCounts waits until the pool of guest a has its counts in memory.
func (p *pollux) loadedCounts(ctx context.Context) error {
	for begin := time.Now(); time.Since(begin) < 5*time.Minute; time.Sleep(20 * time.Millisecond) {
		s, err := p.status(ctx)
		if err != nil {
			return err
		}
		for _, g := range s.Guests {
			for _, st := range g.PoolStats {
				if st.Identity == "a" && !st.Loading {
					return nil
				}
			}
		}
	}
	return errors.New("the reference counts are not loaded within 5 minutes")
}

// fullWriter writes pages one behind the other.
type fullWriter struct {
	set  *devices.Set
	at   block.Physical
	next int // pages in buf
	buf  []byte
}

// WritePage implements blockmap.PageWriter.
func (w *fullWriter) WritePage(page []byte, _ bool) (block.Pointer, error) {
	p := block.Pointer{Phys: w.at + block.Physical(w.next), Birth: 1, Sum: ondisk.CRC(page)}
	copy(w.buf[w.next*block.Size:], page)
	if w.next++; w.next*block.Size == len(w.buf) {
		return p, w.flush()
	}
	return p, nil
}

// FreePage implements blockmap.PageWriter.
func (w *fullWriter) FreePage(block.Pointer) error { return nil }

func (w *fullWriter) flush() error {
	if w.next == 0 {
		return nil
	}
	err := w.set.Do([]*devices.IO{{Op: hpdi.OpWrite, At: w.at, Vec: [][]byte{w.buf[:w.next*block.Size]}}})
	w.at, w.next = w.at+block.Physical(w.next), 0
	return err
}

// makeFull replaces the reference counts of a pool of one device that is closed:
// all blocks have one reference, apart from the last eight of each track.
func makeFull(path string) (err error) {
	dev, err := file.Open(path, file.Options{Lock: true})
	if err != nil {
		return err
	}
	set := devices.NewSet([]hpdi.Device{dev})
	defer func() { err = errors.Join(err, set.Close()) }()
	l, err := pool.ReadLabel(dev)
	if err != nil {
		return err
	}
	sb, err := cp.ReadSuperblock(set, l.Pool)
	if err != nil {
		return err
	}
	reader, err := blockio.New(set, cache.New(make([]byte, 16<<20)))
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, reader.Close()) }()
	buf, err := hpdi.Alloc(block.TrackBytes)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, hpdi.Free(buf)) }()

	d := &sb.Devices[0]
	leaves := (d.Blocks + block.Size - 1) / block.Size
	pages := leaves + leaves/blockmap.Fanout + leaves/blockmap.Fanout/blockmap.Fanout + 3
	own := (d.Blocks - pages) / block.TrackBlocks * block.TrackBlocks // from here on lie the pages
	w := &fullWriter{set: set, at: block.At(0, own), buf: buf}
	u := blockmap.NewUpdate(reader, w, block.Pointer{})
	sb.Used = 0
	edit := func(leaf uint64, page *[block.Size]byte) error {
		for i := range page {
			b := leaf*block.Size + uint64(i)
			// What the pool holds already lies in its first GiB.
			free := b%block.TrackBlocks >= block.TrackBlocks-8 && b > d.First+1<<30/block.Size && b < own
			if b >= d.First && b < d.Blocks && !free {
				page[i] = 1
				sb.Used++
			}
		}
		return nil
	}
	for parent := uint64(0); parent*blockmap.Fanout < leaves; parent++ {
		if err := u.Group(parent, func(leaf uint64, _ bool) bool { return leaf < leaves }, edit); err != nil {
			return err
		}
	}
	if d.Counts, err = u.Finish(); err != nil {
		return err
	}
	if err := w.flush(); err != nil {
		return err
	}
	sb.Generation++
	return cp.WriteSuperblock(set, sb)
}
