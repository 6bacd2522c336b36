package main

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

const qemuProgram = "qemu-storage-daemon"

// reconnectDelay is for how many seconds QEMU holds requests back while it
// has no connection; behind it they fail.
const reconnectDelay = 10

// qemu is a qemu-storage-daemon that is a client of the pair and serves what
// it finds there on a socket of its own.
type qemu struct {
	uri    string
	socket string
	cmd    *exec.Cmd
	said   bytes.Buffer // not to be read before done
	done   chan error
}

// startQEMU puts QEMU's NBD client between a volume and a socket.
func startQEMU(ctx context.Context, socket, uri string) (*qemu, error) {
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
	q := &qemu{socket: socket, done: make(chan error, 1)}
	q.uri = "nbd+unix:///" + export + "?socket=" + q.socket
	q.cmd = exec.Command(qemuProgram,
		"--blockdev", fmt.Sprintf("driver=nbd,node-name=n,%s,export=%s,reconnect-delay=%d", server, export, reconnectDelay),
		"--nbd-server", "addr.type=unix,addr.path="+q.socket,
		"--export", "type=nbd,id=e,node-name=n,writable=on,name="+export)
	q.cmd.Stdout, q.cmd.Stderr = &q.said, &q.said
	// A benchmark that is killed leaves no processes.
	q.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := q.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { q.done <- q.cmd.Wait() }()
	ctx, cancel := context.WithTimeoutCause(ctx, 20*time.Second, errors.New("it does not listen"))
	defer cancel()
	for {
		if _, err := os.Stat(q.socket); err == nil {
			return q, nil
		}
		select {
		case err := <-q.done:
			return nil, fmt.Errorf("qemu-storage-daemon ended: %w\n%s", err, q.said.Bytes())
		case <-ctx.Done():
			return nil, errors.Join(fmt.Errorf("qemu-storage-daemon: %w", context.Cause(ctx)), q.stop())
		case <-time.After(20 * time.Millisecond):
		}
	}
}

// stop ends QEMU, by force when it does not listen to reason.
func (q *qemu) stop() error {
	_ = q.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	var err error
	select {
	case err = <-q.done:
	case <-time.After(5 * time.Second):
		_ = q.cmd.Process.Kill()
		err = <-q.done
	}
	if rerr := os.Remove(q.socket); rerr != nil && !errors.Is(rerr, fs.ErrNotExist) {
		return rerr
	}
	if err != nil {
		return fmt.Errorf("qemu-storage-daemon: %w\n%s", err, q.said.Bytes())
	}
	return nil
}
