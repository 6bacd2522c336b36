package vhostuser

import (
	"bytes"
	"context"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/hpditest"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// daemon is a qemu-storage-daemon that serves a file.
type daemon struct {
	sock, image string
	args        []string
	cmd         *exec.Cmd
	out         bytes.Buffer
}

// newDaemon starts one with a file of that many bytes. The options are of its export.
func newDaemon(t testing.TB, size int64, options string) *daemon {
	t.Helper()
	dir, err := os.MkdirTemp("", "vu") // a socket's path is short
	must(t, err)
	t.Cleanup(func() { must(t, os.RemoveAll(dir)) })
	d := &daemon{sock: filepath.Join(dir, "s"), image: filepath.Join(dir, "image")}
	must(t, os.WriteFile(d.image, nil, 0o600))
	must(t, os.Truncate(d.image, size))
	d.args = []string{
		"--blockdev", "driver=file,node-name=f,discard=unmap,filename=" + d.image,
		"--export", "type=vhost-user-blk,id=e,addr.type=unix,addr.path=" + d.sock + ",node-name=f," + options,
		"--pidfile", d.sock + ".pid", "--chardev", "socket,id=q,path=" + d.sock + ".qmp,server=on,wait=off", "--monitor", "chardev=q",
	}
	d.start(t)
	t.Cleanup(d.kill)
	return d
}

func (d *daemon) start(t testing.TB) {
	t.Helper()
	d.cmd = exec.Command("qemu-storage-daemon", d.args...)
	d.cmd.Stdout, d.cmd.Stderr = &d.out, &d.out
	must(t, d.cmd.Start())
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	for {
		if _, err := os.Stat(d.sock + ".pid"); err == nil { // it is written when all is there
			return
		}
		if ctx.Err() != nil {
			t.Fatalf("qemu-storage-daemon does not listen: %s", d.out.String())
		}
		time.Sleep(time.Millisecond) // another program starts
	}
}

// kill ends it as a crash does.
func (d *daemon) kill() {
	if d.cmd != nil {
		_ = d.cmd.Process.Kill()
		_ = d.cmd.Wait() // it was killed
		_, _ = os.Remove(d.sock), os.Remove(d.sock+".pid")
		d.cmd = nil
	}
}

// ask sends a command to its monitor.
func (d *daemon) ask(t testing.TB, command string) {
	t.Helper()
	c, err := net.Dial("unix", d.sock+".qmp")
	must(t, err)
	defer func() { _ = c.Close() }()
	must(t, c.SetDeadline(time.Now().Add(20*time.Second)))
	for _, line := range []string{`{"execute":"qmp_capabilities"}`, command} {
		_, err := fmt.Fprintln(c, line)
		must(t, err)
	}
	var got []byte
	buf := make([]byte, 4096)
	for bytes.Count(got, []byte(`"return"`)) < 2 {
		n, err := c.Read(buf)
		must(t, err)
		if got = append(got, buf[:n]...); bytes.Contains(got, []byte(`"error"`)) {
			t.Fatalf("%s", got)
		}
	}
}

// Another's back-end is a device in every way in which queues can be laid out.
func TestStorageDaemon(t *testing.T) {
	for name, c := range map[string]struct {
		options string
		o       Options
	}{
		"split":              {"writable=on,num-queues=4", Options{Poll: 50 * time.Microsecond}},
		"four queues":        {"writable=on,num-queues=4", Options{Queues: 4}},
		"no events":          {"writable=on", Options{NoEventIdx: true, Poll: 50 * time.Microsecond}},
		"no indirect":        {"writable=on", Options{NoIndirect: true, QueueSize: 128}},
		"large blocks":       {"writable=on,logical-block-size=4096", Options{Queues: 2}},
		"a very short queue": {"writable=on", Options{QueueSize: 4}},
	} {
		t.Run(name, func(t *testing.T) {
			daemon := newDaemon(t, hpditest.MinSize, c.options)
			hpditest.Run(t, func(t *testing.T) hpdi.Device {
				d, err := Open(t.Context(), daemon.sock, c.o)
				must(t, err)
				return d
			})
		})
	}
}
