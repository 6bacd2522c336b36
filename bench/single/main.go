// Command single serves one volume of a new pool over NBD from one process:
// everything a request passes, without agent, partner and command line. It is
// for profiles and for finding out which part of the way costs what; its pool
// is thrown away.
//
//	go run ./bench/single -dir /disk/tmp -socket /tmp/s -cpuprofile cpu.pprof
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
	"path/filepath"
	"runtime"
	"runtime/pprof"
	"syscall"

	"github.com/pollux-storage/pollux/bench/counting"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/export/nbd"
)

type options struct {
	dir, socket, profile, mutex string
	size, log, cache            int64
}

func main() {
	var o options
	flag.StringVar(&o.dir, "dir", "", "existing folder for the pool's device")
	flag.StringVar(&o.socket, "socket", "", "path of the Unix socket to serve on")
	flag.Int64Var(&o.size, "size", 1<<30, "bytes of the volume, which is called bench")
	flag.Int64Var(&o.log, "log", 256<<20, "bytes of the operation log")
	flag.Int64Var(&o.cache, "cache", 256<<20, "bytes of the cache")
	flag.StringVar(&o.profile, "cpuprofile", "", "write a CPU profile to this file, from the first SIGUSR1 to the end")
	flag.StringVar(&o.mutex, "mutexprofile", "", "write at the end how long locks were waited for")
	flag.Parse()
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, o); err != nil {
		fmt.Fprintln(os.Stderr, "single:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, o options) (err error) {
	dev, err := counting.NewFile(filepath.Join(o.dir, "single.img"), 4*o.size+4<<30)
	if err != nil {
		return err
	}
	p, err := counting.NewPool(ctx, counting.Options{On: dev, Log: o.log, Cache: o.cache})
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, p.Close(ctx)) }()
	if _, err := p.CreateVolume(ctx, "bench", o.size); err != nil {
		return err
	}
	v, err := p.Volume("bench")
	if err != nil {
		return err
	}
	if o.profile != "" {
		stop, err := profile(o.profile)
		if err != nil {
			return err
		}
		defer stop()
	}
	if o.mutex != "" {
		runtime.SetMutexProfileFraction(1)
		defer func() { err = errors.Join(err, writeMutexes(o.mutex)) }()
	}
	return serve(ctx, v, o.socket)
}

func writeMutexes(path string) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	return errors.Join(pprof.Lookup("mutex").WriteTo(f, 0), f.Close())
}

// profile starts a CPU profile at SIGUSR1.
func profile(path string) (stop func(), err error) {
	f, err := os.Create(path)
	if err != nil {
		return nil, err
	}
	usr1 := make(chan os.Signal, 1)
	signal.Notify(usr1, syscall.SIGUSR1)
	go func() {
		<-usr1
		if err := pprof.StartCPUProfile(f); err != nil {
			fmt.Fprintln(os.Stderr, "single:", err)
		}
	}()
	return func() { pprof.StopCPUProfile(); _ = f.Close() }, nil
}

func serve(ctx context.Context, v block.Volume, socket string) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: slog.LevelWarn}))
	srv, err := nbd.New(nbd.Config{Exports: only{v}, Logger: log})
	if err != nil {
		return err
	}
	l, err := net.Listen("unix", socket)
	if err != nil {
		return err
	}
	defer func() { _ = l.Close() }() // removes the socket
	if err := srv.Serve(ctx, l); !errors.Is(err, context.Canceled) {
		return err
	}
	return nil
}

// only is a list of one export.
type only struct{ v block.Volume }

func (o only) Lookup(name string) (nbd.Export, error) {
	if name != "bench" {
		return nbd.Export{}, block.ErrNotFound
	}
	return nbd.Export{Name: "bench", Volume: o.v}, nil
}

func (o only) List() []nbd.Export { return []nbd.Export{{Name: "bench", Volume: o.v}} }
