// Command ceiling serves memory over NBD or vhost-user with Pollux's own protocol layer and
// nothing behind it: no log, no space, no device, no check. No server built on
// that layer can be faster, so its numbers are the ceiling in the benchmarks.
// It is of no other use: a write in progress is visible to readers.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"runtime/pprof"
	"sync"
	"syscall"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/export/nbd"
	"github.com/pollux-storage/pollux/internal/export/vhostuser"
)

func main() {
	socket := flag.String("socket", "", "path of the Unix socket to serve on")
	size := flag.Int64("size", 1<<30, "bytes of memory to serve")
	machines := flag.Bool("vhost-user", false, "serve over vhost-user, and not over NBD")
	profile := flag.String("cpuprofile", "", "write a CPU profile to this file")
	flag.Parse()
	if err := run(*socket, *size, *machines, *profile); err != nil {
		fmt.Fprintln(os.Stderr, "ceiling:", err)
		os.Exit(1)
	}
}

func run(socket string, size int64, machines bool, profile string) error {
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	mem, err := hpdi.AllocPrivate(int(size))
	if err != nil {
		return err
	}
	defer func() { _ = hpdi.Free(mem) }() // the process ends anyhow
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	l, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket})
	if err != nil {
		return err
	}
	defer func() { _ = l.Close() }() // removes the socket
	if profile != "" {
		f, err := os.Create(profile)
		if err != nil {
			return err
		}
		if err := pprof.StartCPUProfile(f); err != nil {
			return err
		}
		defer pprof.StopCPUProfile()
	}
	if err := serve(ctx, l, &memory{mem: mem}, machines, log); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// serve serves a volume until ctx ends, and returns that it did.
func serve(ctx context.Context, l *net.UnixListener, v *memory, machines bool, log *slog.Logger) error {
	if machines {
		srv, err := vhostuser.New(vhostuser.Options{Volume: v, Queues: 4, Log: log})
		if err != nil {
			return err
		}
		return srv.Serve(ctx, l)
	}
	srv, err := nbd.New(nbd.Config{Exports: only{v}, Logger: log})
	if err != nil {
		return err
	}
	return srv.Serve(ctx, l)
}

// only is a list of one export.
type only struct{ v *memory }

func (o only) Lookup(name string) (nbd.Export, error) {
	if name != "memory" {
		return nbd.Export{}, block.ErrNotFound
	}
	return nbd.Export{Name: "memory", Volume: o.v}, nil
}

func (o only) List() []nbd.Export { return []nbd.Export{{Name: "memory", Volume: o.v}} }

// memory is a block.Volume that is a piece of memory.
type memory struct {
	mem    []byte
	writes sync.Pool
}

func (m *memory) Info() block.VolumeInfo {
	return block.VolumeInfo{ID: 1, Name: "memory", Size: int64(len(m.mem))}
}

func (m *memory) TryRead(p []byte, off int64) (bool, error) {
	copy(p, m.mem[off:])
	return true, nil
}

func (m *memory) Read(_ context.Context, p []byte, off int64) error {
	copy(p, m.mem[off:])
	return nil
}

func (m *memory) TryStage(off int64, n int) (block.Write, error) {
	w, ok := m.writes.Get().(*write)
	if !ok {
		w = &write{m: m}
	}
	w.bufs[0] = m.mem[off : off+int64(n)]
	return w, nil
}

func (m *memory) Stage(_ context.Context, off int64, n int) (block.Write, error) {
	return m.TryStage(off, n)
}

func (m *memory) Trim(_ context.Context, off, n int64, _ block.Tag) error {
	clear(m.mem[off : off+n])
	return nil
}

func (m *memory) WriteZeroes(ctx context.Context, off, n int64, _ bool, _ block.Tag) error {
	return m.Trim(ctx, off, n, block.Tag{})
}

func (m *memory) Flush(context.Context) error { return nil }

func (m *memory) OpenSession(context.Context, block.SessionID, int, int) (block.Session, error) {
	return nil, block.ErrUnsupported // it dies with its server
}

func (m *memory) Status(_ context.Context, off, n int64, _ int, ext []block.Extent) ([]block.Extent, error) {
	return append(ext, block.Extent{Offset: off, Length: n}), nil
}

// write gives out the memory itself.
type write struct {
	m    *memory
	bufs [1][]byte
}

func (w *write) Buffers() [][]byte            { return w.bufs[:] }
func (w *write) SetTag(block.Tag)             {}
func (w *write) TryCommit() (bool, error)     { w.Abort(); return true, nil }
func (w *write) Commit(context.Context) error { w.Abort(); return nil }
func (w *write) Abort()                       { w.m.writes.Put(w) }
