package pair

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Process is one process of a pair, held by a descriptor that cannot come to
// mean another one.
type Process struct {
	PID int
	fd  int
}

// Hold finds a process of this pair by its number.
func (p *Pair) Hold(pid int) (*Process, error) {
	if pid <= 1 {
		return nil, fmt.Errorf("process %d: %w", pid, unix.ESRCH)
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return nil, fmt.Errorf("process %d: %w", pid, err)
	}
	// Looked at after it is held: the number may have been another's before.
	if !p.owns(pid) {
		unix.Close(fd)
		return nil, fmt.Errorf("process %d is none of the pair in %s", pid, p.Dir)
	}
	return &Process{pid, fd}, nil
}

// HoldGuest finds the process of a guest.
func (p *Pair) HoldGuest(ctx context.Context, name string) (*Process, error) {
	st, err := p.Status(ctx)
	if err != nil {
		return nil, err
	}
	return p.Hold(Guest(st, name).PID)
}

// HoldAgent finds the process of the agent.
func (p *Pair) HoldAgent(ctx context.Context) (*Process, error) {
	st, err := p.Status(ctx)
	if err != nil {
		return nil, err
	}
	return p.Hold(st.Agent.PID)
}

// Signal sends a signal; to a process that has ended it is nothing.
func (h *Process) Signal(s unix.Signal) error {
	if err := unix.PidfdSendSignal(h.fd, s, nil, 0); !errors.Is(err, unix.ESRCH) {
		return err
	}
	return nil
}

// Ended tells whether the process has ended.
func (h *Process) Ended() bool {
	n, _ := unix.Poll([]unix.PollFd{{Fd: int32(h.fd), Events: unix.POLLIN}}, 0)
	return n > 0
}

// Close lets go of the process.
func (h *Process) Close() { unix.Close(h.fd) }

// owns tells whether a process runs for this pair: its command line names the
// directory, as those of agent and guests do.
func (p *Pair) owns(pid int) bool {
	line, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil {
		return false
	}
	for _, word := range bytes.Split(line, []byte{0}) {
		if w := string(word); w == p.Dir || strings.HasPrefix(w, p.Dir+"/") || strings.HasSuffix(w, "="+p.Dir) {
			return true
		}
	}
	return false
}

// Processes returns those of the pair that live.
func (p *Pair) Processes() []int {
	var pids []int
	names, _ := filepath.Glob("/proc/[0-9]*")
	for _, n := range names {
		if pid, err := strconv.Atoi(filepath.Base(n)); err == nil && pid != os.Getpid() && p.owns(pid) {
			pids = append(pids, pid)
		}
	}
	return pids
}

// Left names what is left of a pair that is down: processes, mounts, sockets
// and memory.
func (p *Pair) Left() []string {
	var left []string
	for _, pid := range p.Processes() {
		line, _ := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
		left = append(left, fmt.Sprintf("process %d %q", pid, bytes.ReplaceAll(line, []byte{0}, []byte{' '})))
	}
	mounts, _ := os.ReadFile("/proc/self/mounts")
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); len(f) > 1 && strings.HasPrefix(f[1], p.Dir) {
			left = append(left, "mount "+f[1])
		}
	}
	_ = filepath.WalkDir(p.Dir, func(path string, d fs.DirEntry, err error) error {
		if err == nil && d.Type()&fs.ModeSocket != 0 {
			left = append(left, "socket "+path)
		}
		return nil
	})
	for _, path := range p.memory {
		if _, err := os.Stat(path); err == nil {
			left = append(left, "region "+path)
		}
	}
	return left
}
