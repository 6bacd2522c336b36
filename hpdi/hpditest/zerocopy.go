package hpditest

import (
	"bytes"
	"errors"
	"os"
	"os/exec"
	"regexp"
	"runtime"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
)

// traced is the variable of the environment that makes ZeroCopy the program that is watched.
const traced = "HPDITEST_TRACED"

// mark is a system call that does nothing: prctl with an option that no kernel has. Its
// arguments tell who watches where the vectors lie and what comes next.
const mark = 0x48504449

// The things that come next.
const (
	markMemory = iota + 1
	markWrite
	markRead
	markEnd
)

func tell(what int, mem []byte) {
	_, _, _ = unix.RawSyscall6(unix.SYS_PRCTL, mark, uintptr(what), uintptr(unsafe.Pointer(unsafe.SliceData(mem))), uintptr(len(mem)), 0, 0)
}

// ZeroCopy proves that the payload of a driver that reaches its device by system calls
// goes between the application's own memory and the kernel, all of it and nowhere else:
// it runs the calling test again as a program of its own and watches its system calls
// (ptrace). Each byte that is written must leave from the vectors, each that is read must
// arrive in them, and no system call may move a block or more from or to other memory
// meanwhile. open is called in that program alone; the device's peer must not be in it.
func ZeroCopy(t *testing.T, open func(t *testing.T) hpdi.Device) {
	t.Helper()
	for _, problem := range zeroCopy(t, open) {
		t.Error(problem)
	}
}

// zeroCopy returns what ZeroCopy fails for.
func zeroCopy(t *testing.T, open func(t *testing.T) hpdi.Device) []string {
	t.Helper()
	if os.Getenv(traced) != "" {
		beTraced(t, open)
		return nil
	}
	runtime.LockOSThread() // the tracer is a thread
	defer runtime.UnlockOSThread()
	// The name of a subtest is a path of patterns.
	cmd := exec.Command(os.Args[0], "-test.run=^"+exactly(t.Name())+"$", "-test.count=1", "-test.timeout=60s")
	cmd.Env = append(os.Environ(), traced+"=1", "GORACE=atexit_sleep_ms=0")
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &unix.SysProcAttr{Ptrace: true}
	if err := cmd.Start(); err != nil {
		if errors.Is(err, unix.EPERM) && os.Getenv("POLLUX_REQUIRE_CLIENTS") != "1" {
			t.Skipf("this process may not watch another: %v", err)
		}
		t.Fatal(err)
	}
	w := &watcher{threads: map[int]*call{}}
	status, err := w.watch(cmd.Process.Pid)
	_ = cmd.Wait() // it is reaped already
	if err != nil {
		t.Fatalf("watch system calls: %v\n%s", err, out.String())
	}
	if !status.Exited() || status.ExitStatus() != 0 {
		t.Fatalf("the program that is watched ended with %#x:\n%s", status, out.String())
	}
	return w.judge(t)
}

// exactly returns the pattern that matches a test of this name alone.
func exactly(name string) string {
	parts := strings.Split(name, "/")
	for i, p := range parts {
		parts[i] = regexp.QuoteMeta(p)
	}
	return strings.Join(parts, "$/^")
}

// beTraced writes all of a piece of memory and reads all of it, in vectors of several
// sizes that lie in it in another order than on the device.
func beTraced(t *testing.T, open func(t *testing.T) hpdi.Device) {
	d := open(t)
	bs := d.Info().BlockSize
	unit := max(bs, 4096)
	mem := alloc(t, 64*unit)
	if err := d.Register(mem); err != nil {
		t.Fatal(err)
	}
	q := newQueue(t, d, 8)
	requests := func(op hpdi.Op) []*hpdi.Request {
		var reqs []*hpdi.Request
		for _, n := range []int{1, 1, 2, 4, 8, 16, 32} { // units
			at := 0
			for _, r := range reqs {
				at += int(r.Bytes())
			}
			p := mem[len(mem)-at-n*unit:][:n*unit]
			r := &hpdi.Request{Op: op, Offset: int64(at)}
			for k := min(n, 3); k > 0; k-- {
				r.Vec = append(r.Vec, p[(k-1)*unit:][:unit])
			}
			if n > 3 {
				r.Vec = append(r.Vec, p[3*unit:])
			}
			reqs = append(reqs, r)
		}
		return reqs
	}
	fill(mem, 0, 3)
	tell(markMemory, mem)
	tell(markWrite, nil)
	do(t, q, requests(hpdi.OpWrite)...)
	tell(markEnd, nil)
	clear(mem)
	tell(markRead, nil)
	do(t, q, requests(hpdi.OpRead)...)
	tell(markEnd, nil)
	wantFill(t, mem, 0, 3)
	closeQueue(t, q)
	if err := errors.Join(d.Unregister(mem), d.Close()); err != nil {
		t.Fatal(err)
	}
}
