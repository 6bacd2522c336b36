package vhostuser

import (
	"bytes"
	"context"
	"errors"
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
	// In memory: the daemon says to have no write cache, so it is told to have none, and
	// each write is synchronised. A socket's path is short.
	dir, err := os.MkdirTemp("/dev/shm", "vu")
	must(t, err)
	t.Cleanup(func() { must(t, os.RemoveAll(dir)) })
	d := &daemon{sock: filepath.Join(dir, "s"), image: filepath.Join(dir, "image")}
	must(t, os.WriteFile(d.image, nil, 0o600))
	must(t, os.Truncate(d.image, size))
	d.args = []string{
		"--blockdev", "driver=file,node-name=f,discard=unmap,filename=" + d.image,
		"--export", "type=vhost-user-blk,id=e,addr.type=unix,addr.path=" + d.sock + ",node-name=f," + options,
		"--pidfile", d.sock + ".pid",
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

// A back-end of another's that is killed and started again, with requests in flight, costs
// nothing but time: it keeps no record, so that what it had not completed is done again, and
// what it had completed is in the host's memory.
func TestKilledDaemon(t *testing.T) {
	const size, part, depth = 4 << 20, 16 << 10, 16
	daemon := newDaemon(t, size, "writable=on,num-queues=2")
	d, err := Open(t.Context(), daemon.sock, Options{Queues: 2, Reconnect: time.Minute, Poll: 50 * time.Microsecond})
	must(t, err)
	q, err := d.NewQueue(depth)
	must(t, err)
	mem, err := hpdi.Alloc(depth * part)
	must(t, err)
	version := make([]byte, size/part)
	slots := make([]*hpdi.Request, depth)
	for i := range slots {
		slots[i] = &hpdi.Request{Op: hpdi.OpWrite, Vec: [][]byte{mem[i*part:][:part]}}
	}
	next := 0
	submit := func(r *hpdi.Request) {
		at := next % (size / part)
		next += 1
		version[at]++
		r.Offset = int64(at) * part
		for i := range r.Vec[0] {
			r.Vec[0][i] = version[at] ^ byte(at) ^ byte(i>>9)
		}
		must(t, q.Submit(r))
	}
	for _, r := range slots {
		submit(r)
	}
	const kills = 6
	flying, done := depth, []*hpdi.Request{}
	for n := 0; flying > 0; n++ {
		if n%150 == 149 && n/150 < kills {
			daemon.kill()
			daemon.start(t)
		}
		done, err = q.Wait(1, done[:0])
		must(t, err)
		for _, r := range done {
			must(t, r.Err)
			flying--
			if n < 150*kills+300 {
				submit(r)
				flying++
			}
		}
	}
	must(t, hpdi.Do(q, &hpdi.Request{Op: hpdi.OpFlush}))
	image, err := os.ReadFile(daemon.image)
	must(t, err)
	for at, v := range version {
		for i, b := range image[at*part:][:part] {
			if want := v ^ byte(at) ^ byte(i>>9); b != want {
				t.Fatalf("byte %d of part %d is %#x, not %#x", i, at, b, want)
			}
		}
	}
	must(t, errors.Join(q.Close(), d.Close(), hpdi.Free(mem)))
}

// Nothing is allocated for a request.
func TestAllocations(t *testing.T) {
	daemon := newDaemon(t, 1<<20, "writable=on")
	d, err := Open(t.Context(), daemon.sock, Options{Poll: 50 * time.Microsecond})
	must(t, err)
	q, err := d.NewQueue(8)
	must(t, err)
	mem, err := hpdi.Alloc(16 << 10)
	must(t, err)
	reqs := []*hpdi.Request{
		{Op: hpdi.OpRead, Vec: [][]byte{mem[:4096]}}, {Op: hpdi.OpWrite, Offset: 8192, Vec: [][]byte{mem[4096:8192], mem[:4096]}},
		{Op: hpdi.OpFlush}, {Op: hpdi.OpDiscard, Length: 4096},
	}
	done := make([]*hpdi.Request, 0, len(reqs))
	if n := testing.AllocsPerRun(200, func() {
		must(t, q.Submit(reqs...))
		for left := len(reqs); left > 0; left -= len(done) {
			if done, err = q.Wait(1, done[:0]); err != nil {
				t.Fatal(err)
			}
		}
		for _, r := range reqs {
			must(t, r.Err)
		}
	}); n != 0 {
		t.Errorf("%v allocations for %d requests", n, len(reqs))
	}
	must(t, errors.Join(q.Close(), d.Close(), hpdi.Free(mem)))
}
