// Package through puts clients that people have between a volume and a benchmark: they
// hold the benchmark's connection while their own to the volume is away.
package through

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"os/exec"
	"syscall"
	"time"

	"github.com/pollux-storage/pollux/test/campaign/nbdclient"
)

// The programs.
const (
	QEMU   = "qemu-storage-daemon" // with reconnect-delay
	NBDKit = "nbdkit"              // the retry filter over the nbd plugin
)

// ReconnectDelay is for how many seconds QEMU holds requests back while it has no
// connection; behind it they fail.
const ReconnectDelay = 10

// Client is a program that is a client of a volume and serves what it finds there on a
// socket of its own.
type Client struct {
	URI    string // where it serves
	name   string
	socket string
	cmd    *exec.Cmd
	said   bytes.Buffer // not to be read before done
	done   chan error
}

// Start starts a program between a volume and a socket that it makes. The program dies
// with the thread that calls, which must be locked to its goroutine for as long.
func Start(ctx context.Context, program, socket, uri string) (*Client, error) {
	_, _, export, err := nbdclient.ParseURI(uri)
	if err != nil {
		return nil, err
	}
	var args []string
	switch program {
	case QEMU:
		args, err = qemuArgs(socket, uri)
	case NBDKit:
		// The filter asks the plugin for another connection after a second, and later
		// ever more seldom.
		args = []string{"--foreground", "--exit-with-parent", "--unix", socket, "--exportname", export,
			"--filter=retry", "nbd", "uri=" + uri, "retries=8", "retry-delay=1", "retry-exponential=no"}
		export = ""
	default:
		err = fmt.Errorf("%q is no program that a volume is put through", program)
	}
	if err != nil {
		return nil, err
	}
	c := &Client{name: program, socket: socket, done: make(chan error, 1)}
	c.URI = "nbd+unix:///" + export + "?socket=" + socket
	c.cmd = exec.Command(program, args...)
	c.cmd.Stdout, c.cmd.Stderr = &c.said, &c.said
	// A benchmark that is killed leaves no processes.
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := c.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { c.done <- c.cmd.Wait() }()
	ctx, cancel := context.WithTimeoutCause(ctx, 20*time.Second, errors.New("it does not listen"))
	defer cancel()
	for {
		if _, err := os.Stat(socket); err == nil {
			return c, nil
		}
		select {
		case err := <-c.done:
			return nil, fmt.Errorf("%s ended: %w\n%s", program, err, c.said.Bytes())
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("%s: %w", program, context.Cause(ctx)), c.Stop())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

func qemuArgs(socket, uri string) ([]string, error) {
	network, address, export, err := nbdclient.ParseURI(uri)
	if err != nil {
		return nil, err
	}
	server := "server.type=unix,server.path=" + address
	if network == "tcp" {
		host, port, err := net.SplitHostPort(address)
		if err != nil {
			return nil, err
		}
		server = fmt.Sprintf("server.type=inet,server.host=%s,server.port=%s", host, port)
	}
	return []string{
		"--blockdev", fmt.Sprintf("driver=nbd,node-name=n,%s,export=%s,reconnect-delay=%d", server, export, ReconnectDelay),
		"--nbd-server", "addr.type=unix,addr.path=" + socket,
		"--export", "type=nbd,id=e,node-name=n,writable=on,name=" + export,
	}, nil
}

// Stop ends the program, by force when it does not listen to reason.
func (c *Client) Stop() error {
	_ = c.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	var err error
	select {
	case err = <-c.done:
	case <-time.After(5 * time.Second):
		_ = c.cmd.Process.Kill()
		err = <-c.done
	}
	if rerr := os.Remove(c.socket); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
		return rerr
	}
	if err != nil {
		return fmt.Errorf("%s: %w\n%s", c.name, err, c.said.Bytes())
	}
	return nil
}
