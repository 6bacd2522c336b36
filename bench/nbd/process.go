package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"
)

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
		// The name in parentheses may have spaces; utime and stime are the
		// 14th and 15th field of the line, the 12th and 13th behind the name.
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

// dropPageCache empties the host's page cache, as far as that is clean.
func dropPageCache() error {
	if err := os.WriteFile("/proc/sys/vm/drop_caches", []byte("1"), 0); err != nil {
		return fmt.Errorf("empty the page cache: %w", err)
	}
	return nil
}

// resident returns the lines of /proc/PID/status that say where memory is.
func resident(pid int) (map[string]int64, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return nil, err
	}
	m := map[string]int64{}
	for line := range strings.Lines(string(b)) {
		f := strings.Fields(line)
		if len(f) == 3 && f[2] == "kB" {
			n, err := strconv.ParseInt(f[1], 10, 64)
			if err != nil {
				return nil, err
			}
			m[strings.TrimSuffix(f[0], ":")] = n << 10
		}
	}
	return m, nil
}

// child is a server that runs in the foreground of this program.
type child struct {
	cmd  *exec.Cmd
	log  string
	done chan error
}

// start starts a server whose output goes to a file in dir.
func start(dir, name string, argv ...string) (*child, error) {
	c := &child{cmd: exec.Command(argv[0], argv[1:]...), log: filepath.Join(dir, name+".log"), done: make(chan error, 1)}
	f, err := os.Create(c.log)
	if err != nil {
		return nil, err
	}
	defer func() { _ = f.Close() }() // the child has its own
	c.cmd.Stdout, c.cmd.Stderr = f, f
	// A benchmark that is killed leaves no servers.
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := c.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { c.done <- c.cmd.Wait() }()
	return c, nil
}

// awaitSocket waits until a server listens.
func (c *child) awaitSocket(ctx context.Context, path string) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for {
		if _, err := os.Stat(path); err == nil {
			return nil
		}
		select {
		case err := <-c.done:
			c.done <- err
			return fmt.Errorf("%s ended: %w\n%s", c.cmd.Path, err, tail(c.log))
		case <-ctx.Done():
			return fmt.Errorf("%s does not listen on %s: %w\n%s", c.cmd.Path, path, ctx.Err(), tail(c.log))
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// stop ends the server, by force when it does not listen to reason.
func (c *child) stop() {
	_ = c.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	select {
	case <-c.done:
	case <-time.After(5 * time.Second):
		_ = c.cmd.Process.Kill()
		<-c.done
	}
}

// tail returns the end of a log.
func tail(path string) string {
	b, err := os.ReadFile(path)
	if err != nil {
		return err.Error()
	}
	return string(b[max(0, len(b)-2000):])
}

// output runs a command for at most limit and returns what it printed.
func output(ctx context.Context, limit time.Duration, argv ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	cmd := exec.CommandContext(ctx, argv[0], argv[1:]...)
	cmd.WaitDelay = 5 * time.Second
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		return nil, fmt.Errorf("%s: %w\n%s%s", strings.Join(argv, " "), errors.Join(err, ctx.Err()), stderr.Bytes(), out)
	}
	return out, nil
}
