package file

import (
	"runtime"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
)

// Disks that stop at will are not to be had in a test. What makes a request last as long
// as a test wants is, for a ring, a pipe in the file's place, and for the goroutines of
// the sync engine, which read at an offset, memory that the kernel waits for.

// pipeFor makes what rings of d are given from then on go to a pipe, until fast is called.
// A read lasts until something is written to the pipe by release.
func pipeFor(t *testing.T, d *device) (fast func(), release func(n int)) {
	t.Helper()
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _, _ = unix.Close(pipe[0]), unix.Close(pipe[1]) })
	file := d.fd
	d.fd = pipe[0]
	release = func(n int) {
		t.Helper()
		if _, err := unix.Write(pipe[1], make([]byte, n)); err != nil {
			t.Error(err)
		}
	}
	return func() { d.fd = file }, release
}

// awaited returns n bytes of memory that is not there: whoever uses it waits, in the
// kernel too, until release is called.
func awaited(t *testing.T, n int) (mem []byte, release func()) {
	t.Helper()
	const (
		version       = 0xaa
		ioctlAPI      = 0xc018aa3f
		ioctlRegister = 0xc020aa00
		ioctlZero     = 0xc020aa04
		modeMissing   = 1
	)
	fd, _, errno := unix.Syscall(unix.SYS_USERFAULTFD, unix.O_CLOEXEC, 0, 0)
	if errno != 0 {
		t.Skipf("no userfaultfd: %v", errno)
	}
	t.Cleanup(func() { _ = unix.Close(int(fd)) })
	mem, err := unix.Mmap(-1, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = unix.Munmap(mem) })
	base := uint64(uintptr(unsafe.Pointer(&mem[0])))
	api := [3]uint64{version}
	register := [4]uint64{base, uint64(n), modeMissing}
	if err := ioctl(int(fd), ioctlAPI, unsafe.Pointer(&api)); err != nil {
		t.Skipf("userfaultfd: %v", err)
	}
	if err := ioctl(int(fd), ioctlRegister, unsafe.Pointer(&register)); err != nil {
		t.Skipf("userfaultfd: %v", err)
	}
	return mem, func() {
		zero := [4]uint64{base, uint64(n)}
		if err := ioctl(int(fd), ioctlZero, unsafe.Pointer(&zero)); err != nil {
			t.Error(err)
		}
	}
}

// inFlight is a queue of which some requests last until release is called: for the sync
// engine as many as it has goroutines, for the ring as many as were asked for.
type inFlight struct {
	d       *device
	q       hpdi.Queue
	held    []*hpdi.Request
	release func()
}

// hold opens a device and a queue of that depth with requests in flight that last. The
// queue takes others beside them.
func hold(t *testing.T, engine Engine, depth, n int) *inFlight {
	t.Helper()
	d := open(t, create(t, t.TempDir(), testSize), Options{Engine: engine, Fixed: FixedOff}).(*device)
	f := &inFlight{d: d, q: newQueue(t, d, depth)}
	t.Cleanup(func() { closeQueue(t, f.q) })
	var mem []byte
	var fast func()
	if engine == EngineSync {
		n = min(depth, syncWorkers)
		mem, f.release = awaited(t, n*BlockSize)
	} else {
		mem = alloc(t, n*BlockSize)
		var write func(int)
		fast, write = pipeFor(t, d)
		f.release = func() { write(n * BlockSize) }
	}
	for i := range n {
		f.held = append(f.held, &hpdi.Request{Op: hpdi.OpRead, Offset: int64(i * BlockSize), Vec: [][]byte{mem[i*BlockSize : (i+1)*BlockSize]}})
	}
	if err := f.q.Submit(f.held...); err != nil {
		t.Fatal(err)
	}
	if engine == EngineSync { // until all goroutines have theirs
		for q := f.q.(*syncQueue); ; {
			q.mu.Lock()
			n := q.waiting.n
			q.mu.Unlock()
			if n == 0 {
				break
			}
			runtime.Gosched()
		}
	} else {
		fast()
	}
	return f
}
