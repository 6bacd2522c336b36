package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/test/pair"
)

// server is a back-end that is measured.
type server struct {
	name string
	peer bool // what Pollux is compared with
	sock string
	argv []string // of a back-end that is a program of its own
	pair *served  // or the pair that it is a volume of
	cmd  *exec.Cmd
	said bytes.Buffer
}

// served is a pair with one guest's volumes.
type served struct {
	*pair.Pair
	pid int
}

// servers lists what is measured.
func servers(ctx context.Context, o options, dir string) ([]*server, error) {
	var list []*server
	image := file(dir, "image")
	daemon := func(name, node string, more ...string) *server {
		s := &server{name: name, peer: true, sock: file(dir, name)}
		export := "type=vhost-user-blk,id=e,addr.type=unix,addr.path=" + s.sock + ",node-name=f,writable=on,num-queues=4"
		s.argv = append([]string{"qemu-storage-daemon", "--blockdev", node, "--pidfile", s.sock + ".pid"}, more...)
		if len(more) > 0 {
			export += ",iothread=t"
		}
		s.argv = append(s.argv, "--export", export)
		return s
	}
	inMemory := "driver=file,node-name=f,cache.direct=off,filename=" + image
	for _, s := range []*server{
		{name: "pollux", pair: &served{}},
		daemon("qsd", inMemory), daemon("qsd-iothread", inMemory, "--object", "iothread,id=t"),
		daemon("qsd-null", fmt.Sprintf("driver=null-co,node-name=f,read-zeroes=on,size=%d", o.size), "--object", "iothread,id=t"),
		{name: "ceiling", sock: file(dir, "ceiling")},
	} {
		if chosen(s.name, o) && (s.pair == nil || o.pollux != "") {
			list = append(list, s)
		}
	}
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		return nil, err
	}
	if err := os.Truncate(image, o.size); err != nil {
		return nil, err
	}
	for _, s := range list {
		switch {
		case s.name == "ceiling":
			program := file(dir, "ceiling-server")
			if out, err := exec.CommandContext(ctx, "go", "build", "-o", program, "github.com/pollux-storage/pollux/bench/ceiling").CombinedOutput(); err != nil {
				return nil, fmt.Errorf("build the ceiling: %w: %s", err, out)
			}
			s.argv = []string{program, "-vhost-user", "-socket", s.sock, "-size", fmt.Sprint(o.size)}
			if o.profile != "" {
				s.argv = append(s.argv, "-cpuprofile", o.profile)
			}
		case s.pair != nil:
			p, err := pair.New(o.pollux, dir, pair.Settings{PoolSize: fmt.Sprint(4*o.size + 2<<30), Log: fmt.Sprint(2 * o.size), Cache: fmt.Sprint(o.size/4*5 + 64<<20)})
			if err != nil {
				return nil, err
			}
			s.pair.Pair = p
		default:
			if _, err := exec.LookPath(s.argv[0]); err != nil {
				return nil, err
			}
		}
	}
	return list, nil
}

// start serves.
func (s *server) start(ctx context.Context) error {
	if s.pair != nil {
		if err := s.pair.Up(ctx); err != nil {
			return err
		}
		var err error
		s.sock, err = s.pair.volume(ctx, "bench", 256<<20)
		return err
	}
	s.cmd = exec.Command(s.argv[0], s.argv[1:]...)
	s.cmd.Stdout, s.cmd.Stderr = &s.said, &s.said
	// A benchmark that is killed leaves no servers.
	s.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := s.cmd.Start(); err != nil {
		return err
	}
	for begun := time.Now(); time.Since(begun) < 20*time.Second; {
		if d, err := open(ctx, s.sock, 1); err == nil {
			return d.Close()
		}
		if err := rest(ctx, 20*time.Millisecond); err != nil {
			return err
		}
	}
	return fmt.Errorf("it does not listen: %s", s.said.String())
}

// volume makes a volume of guest a and returns where its socket is.
func (p *served) volume(ctx context.Context, name string, size int64) (string, error) {
	if _, err := p.Do(ctx, "volume", "create", name, "--size", fmt.Sprint(size), "--guest", "a"); err != nil {
		return "", err
	}
	var sock string
	err := p.Until(ctx, 20*time.Second, func(st control.Status) string {
		for _, g := range st.Guests {
			for _, e := range g.Exports {
				if e.Volume == name && e.VhostUser != nil && e.VhostUser.Socket != "" {
					sock, p.pid = e.VhostUser.Socket, g.PID
					return ""
				}
			}
		}
		return "volume " + name + " has no socket"
	})
	return sock, err
}

// pids are the processes that serve the disk.
func (s *server) pids() []int {
	if s.pair != nil {
		return []int{s.pair.pid}
	}
	return []int{s.cmd.Process.Pid}
}

// settle waits, for a limited time, until a guest has written what it was given to its
// devices, which would disturb the next one.
func (s *server) settle(ctx context.Context) error {
	if s.pair == nil {
		return nil
	}
	const step = 200 * time.Millisecond
	before, err := cpuTime(s.pids())
	for begun := time.Now(); err == nil && time.Since(begun) < 15*time.Second; {
		if err := rest(ctx, step); err != nil {
			return err
		}
		var after time.Duration
		if after, err = cpuTime(s.pids()); after-before < step/20 {
			break
		}
		before = after
	}
	return err
}

// stop ends it.
func (s *server) stop(ctx context.Context) error {
	if s.pair != nil {
		if s.pair.Pair == nil {
			return nil
		}
		return s.pair.Remove(context.WithoutCancel(ctx))
	}
	if s.cmd == nil || s.cmd.Process == nil {
		return nil
	}
	if err := s.cmd.Process.Signal(syscall.SIGTERM); err != nil {
		return errors.Join(err, s.cmd.Wait())
	}
	if err := s.cmd.Wait(); err != nil && s.cmd.ProcessState.ExitCode() > 0 {
		return fmt.Errorf("%s ended with %w: %s", s.name, err, s.said.String())
	}
	return nil
}

// clockTicks is the unit of the times in /proc/PID/stat on Linux.
const clockTicks = 100

// cpuTime returns the processor time that processes have used.
func cpuTime(pids []int) (time.Duration, error) {
	var sum int64
	for _, pid := range pids {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil {
			return 0, fmt.Errorf("server is gone: %w", err)
		}
		// utime and stime are the 12th and 13th field behind the name in parentheses.
		f := strings.Fields(string(b[bytes.LastIndexByte(b, ')')+1:]))
		if len(f) < 13 {
			return 0, fmt.Errorf("/proc/%d/stat: %q", pid, b)
		}
		for _, s := range f[11:13] {
			n, err := strconv.ParseInt(s, 10, 64)
			if err != nil {
				return 0, fmt.Errorf("/proc/%d/stat: %w", pid, err)
			}
			sum += n
		}
	}
	return time.Duration(sum) * time.Second / clockTicks, nil
}
