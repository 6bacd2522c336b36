package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"time"

	"github.com/pollux-storage/pollux/hpdi/file"
	"github.com/pollux-storage/pollux/test/campaign/nbdclient"
)

// tgtd listens on one port, and is told what to do over a control socket of a number.
const (
	tgtControl = "77"
	tgtPortal  = "127.0.0.1:13260"
	tgtName    = "iqn.2026-01.test:restart"
)

// makePeers makes the files that peers serve. Peers that are not installed are left out.
func (b *bench) makePeers() error {
	dir := filepath.Join(b.dir, "files")
	if err := os.Mkdir(dir, 0o755); err != nil {
		return err
	}
	for n := range b.volumes {
		path := filepath.Join(dir, volumeName(n))
		if err := file.Create(path, volumeSize); err != nil {
			return err
		}
		b.files = append(b.files, path)
	}
	for _, p := range []struct {
		name     string
		run      func(context.Context) (sample, error)
		programs []string
	}{
		{caseQEMU, b.qemu, []string{"qemu-storage-daemon"}},
		{caseTGT, b.tgt, []string{"tgtd", "tgtadm", "iscsi-inq"}},
	} {
		b.run[p.name] = p.run
		for _, program := range p.programs {
			if _, err := exec.LookPath(program); err != nil {
				fmt.Fprintf(os.Stderr, "left out: %s: %v\n", p.name, err)
				delete(b.run, p.name)
			}
		}
	}
	return nil
}

// child is a peer that runs.
type child struct {
	cmd   *exec.Cmd
	said  bytes.Buffer // not to be read before ended is closed
	ended chan struct{}
	err   error
}

func start(argv ...string) (*child, error) {
	c := &child{cmd: exec.Command(argv[0], argv[1:]...), ended: make(chan struct{})}
	c.cmd.Stdout, c.cmd.Stderr = &c.said, &c.said
	// A benchmark that is killed leaves no processes.
	c.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	if err := c.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { c.err = c.cmd.Wait(); close(c.ended) }()
	return c, nil
}

func (c *child) stop() {
	_ = c.cmd.Process.Signal(syscall.SIGTERM) // it may have ended
	select {
	case <-c.ended:
	case <-time.After(5 * time.Second):
		_ = c.cmd.Process.Kill()
		<-c.ended
	}
}

// until calls try until it succeeds, or the peer has ended.
func (c *child) until(ctx context.Context, try func() error) error {
	for {
		err := try()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return errors.Join(context.Cause(ctx), err)
		case <-c.ended:
			return fmt.Errorf("%s ended: %v\n%s", c.cmd.Path, c.err, c.said.Bytes())
		case <-time.After(time.Millisecond):
		}
	}
}

func (b *bench) qemu(ctx context.Context) (s sample, err error) {
	socket := filepath.Join(b.dir, "qemu.sock")
	argv := []string{"qemu-storage-daemon", "--nbd-server", "addr.type=unix,addr.path=" + socket}
	var uris []string
	for n, path := range b.files {
		argv = append(argv, "--blockdev", fmt.Sprintf("driver=file,node-name=f%d,filename=%s,cache.direct=on", n, path),
			"--export", fmt.Sprintf("type=nbd,id=e%d,node-name=f%d,name=%s,writable=on", n, n, volumeName(n)))
		uris = append(uris, "nbd+unix:///"+volumeName(n)+"?socket="+socket)
	}
	begun := time.Now()
	c, err := start(argv...)
	if err != nil {
		return s, err
	}
	defer func() { c.stop(); _ = os.Remove(socket) }()
	// The last export: the others are made before it.
	err = c.until(ctx, func() error { _, err := nbdclient.Ask(ctx, uris[len(uris)-1]); return err })
	if err != nil {
		return s, err
	}
	cl, err := nbdclient.New(nbdclient.Options{URI: uris[0], Structured: true})
	if err != nil {
		return s, err
	}
	defer cl.Close()
	if err := cl.Do(ctx, &nbdclient.Request{Command: nbdclient.Read, Data: make([]byte, blockSize)}); err != nil {
		return s, err
	}
	s.Read = ms(time.Since(begun))
	err = askAll(ctx, uris, volumeSize)
	s.All = ms(time.Since(begun))
	return s, err
}

func (b *bench) tgt(ctx context.Context) (s sample, err error) {
	begun := time.Now()
	// One thread a unit, not sixteen.
	c, err := start("tgtd", "-f", "-C", tgtControl, "--iscsi", "portal="+tgtPortal, "--nr_iothreads=1")
	if err != nil {
		return s, err
	}
	defer func() {
		// It ends on command, and only without targets.
		_ = b.tgtadm(context.WithoutCancel(ctx), "--mode", "target", "--op", "delete", "--force", "--tid", "1")
		_ = b.tgtadm(context.WithoutCancel(ctx), "--mode", "system", "--op", "delete")
		c.stop()
	}()
	if err := c.until(ctx, func() error {
		return b.tgtadm(ctx, "--mode", "target", "--op", "new", "--tid", "1", "--targetname", tgtName)
	}); err != nil {
		return s, err
	}
	if err := b.tgtadm(ctx, "--mode", "target", "--op", "bind", "--tid", "1", "-I", "ALL"); err != nil {
		return s, err
	}
	inquire := func(lun int) error {
		out, err := exec.CommandContext(ctx, "iscsi-inq", fmt.Sprintf("iscsi://%s/%s/%d", tgtPortal, tgtName, lun)).CombinedOutput()
		if err != nil {
			return fmt.Errorf("iscsi-inq: %w: %s", err, out)
		}
		return nil
	}
	for n, path := range b.files {
		if err := b.tgtadm(ctx, "--mode", "logicalunit", "--op", "new", "--tid", "1", "--lun", fmt.Sprint(n+1), "-b", path); err != nil {
			return s, fmt.Errorf("unit %d: %w", n+1, err)
		}
		if n == 0 {
			if err := c.until(ctx, func() error { return inquire(1) }); err != nil {
				return s, err
			}
			s.Read = ms(time.Since(begun))
		}
	}
	err = inquire(len(b.files))
	s.All = ms(time.Since(begun))
	return s, err
}

func (b *bench) tgtadm(ctx context.Context, args ...string) error {
	out, err := exec.CommandContext(ctx, "tgtadm", append([]string{"-C", tgtControl, "--lld", "iscsi"}, args...)...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("tgtadm: %w: %s", err, out)
	}
	return nil
}
