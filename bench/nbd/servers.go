package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/pollux-storage/pollux/bench/fio"
	"github.com/pollux-storage/pollux/test/pair"
)

// server is something that is measured.
type server interface {
	name() string
	note() string // what a reader of the table must know, or ""
	// start makes the data set and serves it.
	start(ctx context.Context) error
	uri() string
	pids() []int // whose CPU time is the server's
	// warm brings the data set into the caches that the server relies on.
	warm() error
	// settle brings what was written to disk, so that it disturbs neither the
	// next run of another server nor one of its own.
	settle(ctx context.Context) error
	stop()
}

// peer is a server that runs in the foreground and serves a file, or memory.
type peer struct {
	title   string
	remark  string
	file    string // "" when it serves memory
	cached  bool   // relies on the page cache
	size    int64
	socket  string
	export  string
	command []string
	dir     string
	child   *child
}

func (p *peer) name() string { return p.title }
func (p *peer) note() string { return p.remark }
func (p *peer) uri() string  { return "nbd+unix:///" + p.export + "?socket=" + p.socket }
func (p *peer) pids() []int  { return []int{p.child.cmd.Process.Pid} }

func (p *peer) start(ctx context.Context) error {
	if p.file != "" {
		if err := randomFile(p.file, p.size); err != nil {
			return err
		}
	}
	c, err := start(p.dir, p.title, p.command...)
	if err != nil {
		return err
	}
	p.child = c
	if err := c.awaitSocket(ctx, p.socket); err != nil {
		return err
	}
	if p.file == "" {
		return fio.Fill(ctx, p.uri(), p.size)
	}
	return nil
}

// warm reads the file once: a cold row of another server may have emptied the
// page cache.
func (p *peer) warm() error {
	if !p.cached {
		return nil
	}
	f, err := os.Open(p.file)
	if err != nil {
		return err
	}
	buf := make([]byte, 1<<20)
	for err == nil {
		_, err = f.Read(buf)
	}
	if errors.Is(err, io.EOF) {
		err = nil
	}
	return errors.Join(err, f.Close())
}

func (p *peer) settle(context.Context) error {
	if p.file == "" {
		return nil
	}
	f, err := os.OpenFile(p.file, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

func (p *peer) stop() {
	if p.child != nil {
		p.child.stop()
		p.child = nil
	}
	if p.file != "" {
		_ = os.Remove(p.file) // the directory goes anyhow
	}
}

// randomFile writes a file that has no holes and that nothing can compress.
func randomFile(path string, size int64) error {
	src := rand.NewChaCha8([32]byte{1})
	return pair.PlaceFile(path, size, func(p []byte) { _, _ = src.Read(p) }) // never fails
}

// servers lists what is to be measured, and removes what cannot be.
func servers(ctx context.Context, o options, dir string) ([]server, error) {
	file := func(name string) string { return filepath.Join(dir, name+".img") }
	sock := func(name string) string { return filepath.Join(dir, name+".sock") }
	qsd := func(name, cache string) *peer {
		return &peer{title: name, file: file(name), cached: cache == "cache.direct=off", size: o.size, socket: sock(name), export: "bench", dir: dir, command: []string{
			"qemu-storage-daemon", "--blockdev", "driver=file,node-name=f,filename=" + file(name) + "," + cache,
			"--nbd-server", "addr.type=unix,addr.path=" + sock(name),
			"--export", "type=nbd,id=e,node-name=f,name=bench,writable=on",
		}}
	}
	kit := func(name, cache, note string) *peer {
		return &peer{title: name, remark: note, file: file(name), cached: cache == "cache=default", size: o.size, socket: sock(name), export: "bench", dir: dir,
			command: []string{"nbdkit", "-f", "-U", sock(name), "file", file(name), cache}}
	}
	var list []server
	if o.pollux != "" {
		list = append(list,
			&pollux{title: "pollux", program: o.pollux, dir: filepath.Join(dir, "pair"), size: o.size, volume: "bench", poolSize: 4*o.size + 4<<30, full: true, placed: true, cache: o.size/4*5 + 64<<20, log: o.log},
			&pollux{title: "pollux-cold", program: o.pollux, dir: filepath.Join(dir, "cold"), size: o.size, volume: "bench", poolSize: 4*o.size + 4<<30, full: true, placed: true, cache: o.size / 32, log: o.log})
	}
	list = append(list,
		qsd("qsd-cached", "cache.direct=off"),
		qsd("qsd-direct", "cache.direct=on,aio=native"),
		kit("nbdkit-cached", "cache=default", ""),
		kit("nbdkit-nocache", "cache=none", "nbdkit's file plugin offers no O_DIRECT; with cache=none it drops pages from the page cache after use"),
	)
	ceiling := filepath.Join(dir, "ceiling")
	if chosen("ceiling", o.servers) {
		if _, err := output(ctx, 3*time.Minute, "go", "build", "-o", ceiling, "github.com/pollux-storage/pollux/bench/ceiling"); err != nil {
			return nil, err
		}
	}
	list = append(list, &peer{title: "ceiling", remark: "Pollux's protocol layer over plain memory: no log, no disk, no second guest",
		size: o.size, socket: sock("ceiling"), export: "memory", dir: dir,
		command: []string{ceiling, "-socket", sock("ceiling"), "-size", fmt.Sprint(o.size)}})
	var kept []server
	for _, s := range list {
		if !chosen(s.name(), o.servers) {
			continue
		}
		if p, ok := s.(*peer); ok {
			if _, err := exec.LookPath(p.command[0]); err != nil {
				fmt.Fprintf(os.Stderr, "left out: %s: %v\n", s.name(), err)
				continue
			}
		}
		kept = append(kept, s)
	}
	return kept, nil
}

// pollux is a pair, managed through its command line.
type pollux struct {
	title    string
	program  string
	dir      string
	volume   string
	size     int64
	poolSize int64
	full     bool // write the whole volume once
	placed   bool // the file of its pool has no holes, as those of the peers
	cache    int64
	log      int64
	limit    string // of a guest's memory, the setting `memory`

	up     bool
	agent  int
	guests []int
	nbd    string
	first  int // process of the guest that serves the volume
}

func (p *pollux) name() string { return p.title }
func (p *pollux) note() string {
	if p.cache < p.size {
		return fmt.Sprintf("a pair with a cache of %d MiB, one part in %d of the data set", p.cache>>20, p.size/p.cache)
	}
	return fmt.Sprintf("CPU is that of agent and both guests; consistency points run during the measurement; a cache of %d MiB holds the data set, as the page cache does for the cached peers", p.cache>>20)
}
func (p *pollux) uri() string { return p.nbd }
func (p *pollux) pids() []int { return append([]int{p.agent}, p.guests...) }
func (p *pollux) warm() error { return nil } // nothing takes from its cache

// polluxStatus is what is needed of `pollux status --json`.
type polluxStatus struct {
	Agent  struct{ PID int }
	Guests []struct {
		Name    string
		State   string
		PID     int
		Exports []struct {
			Volume  string
			NBDUnix string `json:"nbd_unix"`
		}
		PoolStats []struct {
			Identity string `json:"identity"`
			Dirty    int64  `json:"dirty_bytes"`
			Loading  bool   `json:"loading"`
		} `json:"pool_stats"`
	}
}

func (p *pollux) status(ctx context.Context) (*polluxStatus, error) {
	b, err := output(ctx, 20*time.Second, p.program, "status", "--dir", p.dir, "--json")
	if err != nil {
		return nil, err
	}
	var s polluxStatus
	if err := json.Unmarshal(b, &s); err != nil {
		return nil, fmt.Errorf("pollux status --json: %w", err)
	}
	return &s, nil
}

func (p *pollux) start(ctx context.Context) error {
	if err := os.MkdirAll(p.dir, 0o755); err != nil {
		return err
	}
	if p.placed {
		if err := pair.PlaceFile(filepath.Join(p.dir, "pool-a.img"), p.poolSize, nil); err != nil {
			return err
		}
	}
	// Ports of its own, so that a pair which runs on this machine is not in
	// the way.
	settings := ""
	if p.cache > 0 {
		settings += fmt.Sprintf("cache: %d\n", p.cache)
	}
	if p.limit != "" {
		settings += fmt.Sprintf("memory: %s\n", p.limit)
	}
	if p.log > 0 {
		settings += fmt.Sprintf("log: %d\n", p.log)
	}
	settings += fmt.Sprintf("guests:\n  - {name: a, address: 127.0.0.11, port: 0, pool: {size: %d}}\n"+
		"  - {name: b, address: 127.0.0.12, port: 0, pool: {size: %d}}\n", p.poolSize, min(p.poolSize, 64<<30))
	if err := os.WriteFile(filepath.Join(p.dir, "config.yaml"), []byte(settings), 0o644); err != nil {
		return err
	}
	p.up = true
	if _, err := output(ctx, time.Minute, p.program, "up", "--dir", p.dir, "--detach"); err != nil {
		return err
	}
	if _, err := output(ctx, time.Minute, p.program, "volume", "create", p.volume, "--size", fmt.Sprint(p.size), "--guest", "a", "--dir", p.dir); err != nil {
		return err
	}
	if err := p.find(ctx); err != nil {
		return err
	}
	if p.full {
		return fio.Fill(ctx, p.nbd, p.size)
	}
	return nil
}

// find asks the running pair for its processes and the volume's address.
func (p *pollux) find(ctx context.Context) error {
	s, err := p.status(ctx)
	if err != nil {
		return err
	}
	p.agent, p.guests, p.nbd = s.Agent.PID, nil, ""
	for _, g := range s.Guests {
		p.guests = append(p.guests, g.PID)
		for _, e := range g.Exports {
			if e.Volume == p.volume {
				p.nbd, p.first = e.NBDUnix, g.PID
			}
		}
	}
	if p.nbd == "" {
		return fmt.Errorf("pollux status --json shows no export of volume %s", p.volume)
	}
	return nil
}

// settle waits, for a limited time, until the dirty blocks are on disk and the
// pair is idle, for a fold may still work on them.
func (p *pollux) settle(ctx context.Context) error {
	const step = 200 * time.Millisecond
	before, err := cpuTime(p.pids())
	for begin := time.Now(); err == nil && time.Since(begin) < 20*time.Second; {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(step):
		}
		var after time.Duration
		if after, err = cpuTime(p.pids()); err != nil {
			return err
		}
		idle := after-before < step/5
		before = after
		var dirty int64
		if dirty, err = p.dirty(ctx); err == nil && idle && dirty == 0 {
			return nil
		}
	}
	return err // nil: a trickle of writes of its own disturbs nobody
}

// dirty returns how much is in the logs and not on the devices.
func (p *pollux) dirty(ctx context.Context) (n int64, err error) {
	s, err := p.status(ctx)
	if err != nil {
		return 0, err
	}
	for _, g := range s.Guests {
		for _, d := range g.PoolStats {
			n += d.Dirty
		}
	}
	return n, nil
}

func (p *pollux) stop() {
	if !p.up {
		return
	}
	p.up = false
	// Also after an interrupt, hence without the context.
	if _, err := output(context.Background(), time.Minute, p.program, "down", "--dir", p.dir); err == nil {
		return
	} else {
		fmt.Fprintln(os.Stderr, "the pair did not go down, its processes are killed:", err)
	}
	for _, pid := range append(p.guests, p.agent) {
		if pid > 1 {
			_ = syscall.Kill(pid, syscall.SIGKILL)
		}
	}
}
