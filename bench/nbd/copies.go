package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/pollux-storage/pollux/bench/stat"
)

// copied is how often a server copied each byte of its clients.
type copied struct {
	Row    string `json:"row"`
	Server string `json:"server"`
	// Socket and File are what passed between the server and the kernel's
	// buffers, by system calls, for each byte of clients: over sockets, and to
	// and from the page cache.
	Socket float64 `json:"socket"`
	File   float64 `json:"file"`
	// User is what the server copied within its own memory, nil where that
	// cannot be counted.
	User *float64 `json:"user,omitempty"`
}

func (c copied) sum() float64 {
	if c.User == nil {
		return c.Socket + c.File
	}
	return c.Socket + c.File + *c.User
}

// copyRows are the rows of which copies are counted, with the bytes that are
// moved: a traced server is slow.
var copyRows = map[string]int64{
	"4k-randwrite-qd16": 64 << 20, "4k-randread-qd16": 64 << 20, "4k-randread-cold": 64 << 20,
	"128k-write-sustained": 512 << 20, "128k-read-qd16": 512 << 20, "128k-read-cold": 512 << 20,
}

// countCopies counts the bytes that servers copy, with strace at the border of
// the kernel and with a probe on Go's copy function within Pollux.
//
// A consistency point that copies what a client has overwritten meanwhile does
// not, so its part may be below one. What goes past the page cache is moved by
// the device, and no copy. Copies of the peers within their own memory are not
// counted, and neither is what the client copies at its end of the socket.
func countCopies(ctx context.Context, o options, dir string) error {
	if os.Geteuid() != 0 {
		fmt.Println("Copies are not counted: only root may trace the pair.")
		return nil
	}
	list, err := servers(ctx, o, dir)
	if err != nil {
		return err
	}
	defer func() {
		for _, s := range list {
			s.stop()
		}
	}()
	rep := &report{Notes: map[string]string{}, LeftOut: map[string]string{}}
	list, failed := startAll(ctx, list, rep)
	if failed != nil {
		return failed
	}
	fmt.Printf("Bytes copied for each byte of clients:\n\n")
	fmt.Printf("| row | server | sockets | page cache | own memory | all |\n|---|---|--:|--:|--:|--:|\n")
	var all []copied
	for _, r := range allRows {
		moved, ok := copyRows[r.Name]
		if !ok || !chosen(r.Name, o.rows) {
			continue
		}
		r.Bytes = func(options) int64 { return moved }
		for _, s := range list {
			if !r.suits(s.name()) {
				continue
			}
			c, err := copiesOf(ctx, s, r, o, filepath.Join(dir, "trace"))
			if err != nil {
				return fmt.Errorf("%s on %s: %w", r.Name, s.name(), err)
			}
			user := "not counted"
			if c.User != nil {
				user = fmt.Sprintf("%.2f", *c.User)
			}
			fmt.Printf("| %s | %s | %.2f | %.2f | %s | **%.2f** |\n", c.Row, c.Server, c.Socket, c.File, user, c.sum())
			all = append(all, c)
		}
	}
	return stat.WriteJSON(filepath.Join(filepath.Dir(o.out), "copies.json"), all)
}

// copiesOf counts during one row, and until what it wrote is on disk.
func copiesOf(ctx context.Context, s server, r row, o options, dir string) (c copied, err error) {
	if err := s.settle(ctx); err != nil {
		return c, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return c, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	moves, err := startMoves(ctx, s, dir)
	if err != nil {
		return c, err
	}
	t, err := startTrace(ctx, s.pids(), dir)
	if err != nil {
		return c, errors.Join(err, moves.remove(ctx))
	}
	_, err = measure(ctx, s, r, o)
	t.interrupt()
	user, merr := moves.end(ctx)
	if err = errors.Join(err, merr); err != nil {
		return c, err
	}
	seen, err := readTrace(dir, directFiles(s.pids()))
	if err != nil {
		return c, err
	}
	bytes := float64(r.Bytes(o))
	c = copied{Row: r.Name, Server: s.name(), Socket: seen.socket / bytes, File: seen.file / bytes}
	if user >= 0 {
		u := float64(user) / bytes
		c.User = &u
	}
	if c.Socket < 0.99 {
		return c, fmt.Errorf("only %.2f of what the client moved was seen on sockets", c.Socket)
	}
	return c, nil
}

// startTrace attaches strace to all threads of some processes.
func startTrace(ctx context.Context, pids []int, dir string) (*child, error) {
	argv := []string{"strace", "-ff", "-y", "-s", "0", "-o", filepath.Join(dir, "t"), "-e",
		"trace=read,write,readv,writev,pread64,pwrite64,preadv,pwritev,preadv2,pwritev2,recvfrom,sendto,recvmsg,sendmsg"}
	for _, pid := range pids {
		argv = append(argv, "-p", strconv.Itoa(pid))
	}
	c, err := start(dir, "strace", argv...)
	if err != nil {
		return nil, fmt.Errorf("%w: `make deps` installs it", err)
	}
	return c, c.awaitText(ctx, "attached", len(pids))
}

// awaitText waits until a text has been printed n times.
func (c *child) awaitText(ctx context.Context, text string, n int) error {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	for {
		b, err := os.ReadFile(c.log)
		if err != nil {
			return err
		}
		if strings.Count(string(b), text) >= n {
			return nil
		}
		select {
		case <-c.done:
			return fmt.Errorf("%s ended:\n%s", c.cmd.Path, b)
		case <-ctx.Done():
			c.stop()
			return fmt.Errorf("%s: %w\n%s", c.cmd.Path, ctx.Err(), b)
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// interrupt ends a program as its user would, so that it cleans up.
func (c *child) interrupt() {
	_ = c.cmd.Process.Signal(syscall.SIGINT) // it may have ended
	select {
	case <-c.done:
	case <-time.After(20 * time.Second):
		c.stop()
	}
}

// bytesSeen are bytes that passed the border of the kernel.
type bytesSeen struct{ socket, file float64 }

// A call of strace's: `pwrite64(8</disk/file>, ""..., 4096, 0) = 4096`.
var traced = regexp.MustCompile(`^\w+\(\d+<([^>]*)>.* = (\d+)$`)

// readTrace adds up what strace has written, a file for each thread.
func readTrace(dir string, direct map[string]bool) (n bytesSeen, err error) {
	files, err := filepath.Glob(filepath.Join(dir, "t.*"))
	if err != nil {
		return n, err
	}
	for _, name := range files {
		text, err := os.ReadFile(name)
		if err != nil {
			return n, err
		}
		for line := range strings.Lines(string(text)) {
			n.add(strings.TrimSpace(line), direct)
		}
	}
	return n, nil
}

func (n *bytesSeen) add(line string, direct map[string]bool) {
	m := traced.FindStringSubmatch(line)
	if m == nil {
		return // it failed, or has no descriptor
	}
	bytes, err := strconv.ParseFloat(m[2], 64)
	if err != nil {
		return
	}
	switch where := m[1]; {
	case strings.HasPrefix(where, "socket:"), strings.HasPrefix(where, "UNIX"):
		n.socket += bytes
	case strings.HasPrefix(where, "/") && !direct[where]:
		n.file += bytes
	}
}

// directFiles returns the files that processes have open past the page cache.
func directFiles(pids []int) map[string]bool {
	direct := map[string]bool{}
	for _, pid := range pids {
		links, _ := filepath.Glob(fmt.Sprintf("/proc/%d/fd/*", pid)) // the pattern is good
		for _, link := range links {
			path, err := os.Readlink(link)
			if err != nil {
				continue // closed meanwhile
			}
			info, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%s", pid, filepath.Base(link)))
			if err != nil {
				continue
			}
			for line := range strings.Lines(string(info)) {
				if f := strings.Fields(line); len(f) == 2 && f[0] == "flags:" {
					flags, err := strconv.ParseUint(f[1], 8, 64)
					if err == nil && flags&syscall.O_DIRECT != 0 {
						direct[path] = true
					}
				}
			}
		}
	}
	return direct
}
