package file

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
)

// onThread runs f on a thread of its own that ends with it, so that what f
// does to the thread concerns nobody else.
func onThread(t *testing.T, f func()) {
	t.Helper()
	done := make(chan struct{})
	go func() {
		defer close(done) // after Goexit too, as of t.Skip
		runtime.LockOSThread()
		f()
	}()
	<-done
}

// asNobody runs f without the rights of root.
func asNobody(t *testing.T, f func()) {
	t.Helper()
	onThread(t, func() {
		if os.Geteuid() == 0 {
			// This also takes the capabilities that pass over permissions.
			if err := unix.Setfsuid(65534); err != nil {
				t.Error(err)
				return
			}
		}
		f()
	})
}

// folder returns a folder that everybody can enter, with mode.
func folder(t *testing.T, mode os.FileMode) string {
	t.Helper()
	dir, err := os.MkdirTemp("/tmp", "hpdi-file-test-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := os.RemoveAll(dir); err != nil {
			t.Error(err)
		}
	})
	if err := os.Chmod(dir, mode); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestPermissionDenied: the error names the file, and a file that was made on
// the way is gone again.
func TestPermissionDenied(t *testing.T) {
	closed := folder(t, 0o755)
	path := filepath.Join(closed, "disk")
	if err := Create(path, testSize); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(path, 0o444); err != nil {
		t.Fatal(err)
	}
	if os.Geteuid() != 0 { // then the folder is ours
		if err := os.Chmod(closed, 0o555); err != nil {
			t.Fatal(err)
		}
		defer func() { _ = os.Chmod(closed, 0o755) }()
	}
	blind := folder(t, 0o333) // takes files and cannot be read
	defer func() { _ = os.Chmod(blind, 0o755) }()
	var denied, made, unsynced error
	var reading hpdi.Device
	var readErr error
	asNobody(t, func() {
		_, denied = Open(path, Options{Lock: true})
		reading, readErr = Open(path, Options{ReadOnly: true})
		made = Create(filepath.Join(closed, "new"), testSize)
		unsynced = Create(filepath.Join(blind, "new"), testSize)
	})
	if !errors.Is(denied, unix.EACCES) || !strings.Contains(denied.Error(), path) {
		t.Errorf("open of a file that may only be read: %v", denied)
	}
	if readErr != nil {
		t.Errorf("open for reading: %v", readErr)
	} else if err := reading.Close(); err != nil {
		t.Error(err)
	}
	if !errors.Is(made, unix.EACCES) || !strings.Contains(made.Error(), filepath.Join(closed, "new")) {
		t.Errorf("create in a folder that may not be written: %v", made)
	}
	if !errors.Is(unsynced, unix.EACCES) || !strings.Contains(unsynced.Error(), blind) {
		t.Errorf("create in a folder that cannot be made durable: %v", unsynced)
	}
	for _, dir := range []string{closed, blind} {
		if _, err := os.Lstat(filepath.Join(dir, "new")); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("%s: a file that was refused is there: %v", dir, err)
		}
	}
}

// TestCreateTooLarge: no file system holds a file of that size.
func TestCreateTooLarge(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	err := Create(path, 1<<62)
	if !errors.Is(err, unix.EFBIG) && !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), path) {
		t.Errorf("create: %v", err)
	}
	if _, err := os.Lstat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the file is there all the same: %v", err)
	}
}

// inMount runs f on a thread that sees a new file system at dir, which goes
// with the last file that is open in it. Without permission to mount it logs
// and does not run f.
func inMount(t *testing.T, kind, options, dir string, f func() error) {
	t.Helper()
	onThread(t, func() {
		err := unix.Unshare(unix.CLONE_NEWNS | unix.CLONE_FS)
		if err == nil {
			err = unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, "")
		}
		if err == nil {
			err = unix.Mount("none", dir, kind, 0, options)
		}
		if err != nil {
			t.Logf("no %s: %v", kind, err)
		} else if err := f(); err != nil {
			t.Error(err)
		}
	})
}

// TestFullFileSystem: a write for which there is no room fails by name and
// place, and what was there is still there. Room makes it work again.
func TestFullFileSystem(t *testing.T) {
	const room = 64 * BlockSize
	for _, engine := range engines(t) {
		t.Run(string(engine), func(t *testing.T) {
			dir := t.TempDir()
			path := filepath.Join(dir, "disk")
			var d hpdi.Device
			inMount(t, "tmpfs", fmt.Sprintf("size=%d", room), dir, func() error {
				err := Create(path, testSize)
				if err == nil {
					d, err = Open(path, Options{Engine: engine})
				}
				return err
			})
			if d == nil {
				t.Skip("mounting is not permitted here")
			}
			defer d.Close()
			q := newQueue(t, d, 4)
			defer closeQueue(t, q)
			p := alloc(t, room)
			p[0], p[room-1] = 1, 2
			if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpWrite, Vec: [][]byte{p}}); err != nil {
				t.Fatal(err)
			}
			more := &hpdi.Request{Op: hpdi.OpWrite, Offset: room, Vec: [][]byte{p[:2*BlockSize]}}
			err := hpdi.Do(q, more)
			if !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), fmt.Sprintf("at %d", room)) {
				t.Errorf("write into a full file system: %v", err)
			}
			got := alloc(t, room)
			if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{got}}); err != nil || got[0] != 1 || got[room-1] != 2 {
				t.Errorf("what was there reads as %d and %d: %v", got[0], got[room-1], err)
			}
			if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpDiscard, Offset: BlockSize, Length: 4 * BlockSize}); err != nil {
				t.Fatal(err)
			}
			if err := hpdi.Do(q, more); err != nil {
				t.Errorf("with room again: %v", err)
			}
		})
	}
}

// TestNoDirectIO opens a file of a file system that does not know direct I/O.
func TestNoDirectIO(t *testing.T) {
	path := ""
	for _, p := range []string{"/sys/kernel/uevent_seqnum", "/sys/kernel/profiling", "/sys/power/state"} {
		if st, err := os.Stat(p); err == nil && st.Size() >= BlockSize {
			path = p
			break
		}
	}
	if path == "" {
		t.Skip("no sysfs here")
	}
	d := open(t, path, Options{ReadOnly: true})
	if info := d.Info(); info.Direct || !strings.Contains(info.Note, "no direct I/O: the file system does not take it") {
		t.Errorf("info %+v", info)
	}
	_, err := Open(path, Options{ReadOnly: true, Direct: DirectOn})
	if !errors.Is(err, unix.EINVAL) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "direct I/O") {
		t.Errorf("direct I/O was demanded: %v", err)
	}
}

// TestLargeTransfer: one call to the kernel carries at most maxTransfer bytes.
func TestLargeTransfer(t *testing.T) {
	if unsafe.Sizeof(uintptr(0)) < 8 {
		t.Skip("not enough addresses")
	}
	mem, err := hpdi.Alloc(maxTransfer + 2*BlockSize) // only its addresses are used
	if err != nil {
		t.Skip(err)
	}
	defer func() { _ = hpdi.Free(mem) }()
	var iov [4]iovec
	vec := [][]byte{mem[BlockSize : 2*BlockSize], mem[:BlockSize], mem[2*BlockSize:]}
	moved := int64(0)
	for _, want := range []int64{maxTransfer, 2 * BlockSize, 0} {
		n, sum := fillIovecs(iov[:], vec, moved), int64(0)
		for _, v := range iov[:n] {
			sum += int64(v.len)
		}
		if sum != want {
			t.Errorf("after %d bytes: %d in the next call, want %d", moved, sum, want)
		}
		moved += sum
	}
}

// filter makes the kernel refuse a call of this thread with errno, as the
// seccomp profile of a container does, or an old kernel. With an argument, only
// calls whose sixth argument has that lower half are refused.
func filter(call uintptr, errno unix.Errno, sixth *uint32) error {
	const load, equal, ret = unix.BPF_LD | unix.BPF_W | unix.BPF_ABS, unix.BPF_JMP | unix.BPF_JEQ | unix.BPF_K, unix.BPF_RET | unix.BPF_K
	const numberAt, sixthAt = 0, 16 + 5*8
	prog := []unix.SockFilter{{Code: load, K: numberAt}, {Code: equal, K: uint32(call), Jf: 1}}
	if sixth != nil {
		prog = []unix.SockFilter{{Code: load, K: numberAt}, {Code: equal, K: uint32(call), Jf: 3}, {Code: load, K: sixthAt}, {Code: equal, K: *sixth, Jf: 1}}
	}
	prog = append(prog, unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_ERRNO | uint32(errno)}, unix.SockFilter{Code: ret, K: unix.SECCOMP_RET_ALLOW})
	if err := unix.Prctl(unix.PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0); err != nil {
		return err
	}
	p := unix.SockFprog{Len: uint16(len(prog)), Filter: &prog[0]}
	return unix.Prctl(unix.PR_SET_SECCOMP, unix.SECCOMP_MODE_FILTER, uintptr(unsafe.Pointer(&p)), 0, 0)
}

// TestNoURing: where io_uring is not to be had, auto goes on without it and
// says why, and who demands it hears the same; nothing stays open behind.
func TestNoURing(t *testing.T) {
	if _, err := probeURing(false); err != nil {
		t.Skip(err)
	}
	path := create(t, t.TempDir(), testSize)
	entries := uint32(ringOffSQEs)
	for _, tt := range []struct {
		call  uintptr
		errno unix.Errno
		sixth *uint32
		want  string
	}{
		{unix.SYS_IO_URING_SETUP, unix.EPERM, nil, "sysctl kernel.io_uring_disabled"},
		{unix.SYS_IO_URING_SETUP, unix.ENOSYS, nil, "the kernel has none"},
		{unix.SYS_IO_URING_SETUP, unix.ENOMEM, nil, "ulimit -l"},
		{unix.SYS_IO_URING_SETUP, unix.EMFILE, nil, "too many open files"},
		{unix.SYS_IO_URING_REGISTER, unix.EINVAL, nil, "too old"},
		{unix.SYS_MMAP, unix.ENOMEM, &entries, "bytes of the ring"},
	} {
		t.Run(fmt.Sprint(tt.want), func(t *testing.T) {
			unfiltered := open(t, path, Options{Engine: EngineURing})
			before := descriptors(t)
			var fallen hpdi.Device
			var openErr, demanded, queueErr error
			onThread(t, func() {
				if err := filter(tt.call, tt.errno, tt.sixth); err != nil {
					t.Logf("no filter: %v", err)
					return
				}
				fallen, openErr = Open(path, Options{})
				_, demanded = Open(path, Options{Engine: EngineURing})
				if tt.call != unix.SYS_IO_URING_REGISTER {
					_, queueErr = unfiltered.NewQueue(4)
				}
			})
			if fallen == nil && openErr == nil {
				t.Skip("system calls cannot be filtered here")
			}
			if openErr != nil {
				t.Fatalf("auto: %v", openErr)
			}
			if info := fallen.Info(); info.Driver != "sync" || !strings.Contains(info.Note, "no io_uring: ") || !strings.Contains(info.Note, tt.want) {
				t.Errorf("auto chose %+v", info)
			}
			q := newQueue(t, fallen, 4)
			if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpFlush}); err != nil {
				t.Errorf("without io_uring: %v", err)
			}
			if err := errors.Join(q.Close(), fallen.Close()); err != nil {
				t.Error(err)
			}
			for _, err := range []error{demanded, queueErr} {
				if err == nil && tt.call == unix.SYS_IO_URING_REGISTER {
					continue // a queue does not ask again
				}
				if !errors.Is(err, tt.errno) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("demanded: %v", err)
				}
			}
			if after := descriptors(t); after != before {
				t.Errorf("%d descriptors are open, before %d", after, before)
			}
		})
	}
}

// descriptors counts what this process has open.
func descriptors(t *testing.T) int {
	t.Helper()
	names, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		t.Skip(err)
	}
	return len(names)
}

// TestBrokenRingInFlight: when the ring breaks while the kernel may still write
// into the memory of a request, nobody is told that it is done, and the device,
// and with it its lock, stays held.
func TestBrokenRingInFlight(t *testing.T) {
	if _, err := probeURing(false); err != nil {
		t.Skip(err)
	}
	for _, noticed := range []string{"submit", "wait"} {
		t.Run(noticed, func(t *testing.T) { brokenInFlight(t, noticed) })
	}
}

// brokenInFlight breaks a ring that has one request in flight. The method that
// is called next notices.
func brokenInFlight(t *testing.T, noticed string) {
	path := create(t, t.TempDir(), testSize)
	opened, err := Open(path, Options{Engine: EngineURing, Lock: true})
	if err != nil {
		t.Fatal(err)
	}
	d := opened.(*device)
	q := newQueue(t, d, 4).(*uringQueue)
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	file := d.fd
	d.fd = pipe[0] // nothing comes from there: the read stays in flight
	held := reads(t, 1)[0]
	err = q.Submit(held)
	d.fd = file
	if err != nil {
		t.Fatal(err)
	}
	ring, err := unix.Dup(q.ring.fd)
	if err != nil {
		t.Fatal(err)
	}
	null, err := os.Open(os.DevNull)
	if err != nil {
		t.Fatal(err)
	}
	defer null.Close()
	if err := unix.Dup3(int(null.Fd()), q.ring.fd, unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	q.ring.conn = unpolled{} // the poller still knows the ring
	back := 0                // what is certainly not done comes back with an error
	if noticed == "submit" {
		back = 1
		if err := q.Submit(reads(t, 1)...); err == nil || !strings.Contains(err.Error(), path) {
			t.Errorf("submit to a broken ring: %v", err)
		}
	}
	done, err := q.Wait(1, nil)
	if err == nil || !strings.Contains(err.Error(), path) || len(done) != back || slices.Contains(done, held) {
		t.Errorf("wait on a broken ring: %v, %v", done, err)
	}
	for _, r := range done {
		if r.Err == nil {
			t.Errorf("%s at %d has no error", r.Op, r.Offset)
		}
	}
	if err := q.Close(); err == nil || !strings.Contains(err.Error(), "1 requests in flight") {
		t.Errorf("close with a request in flight: %v", err)
	}
	if _, err := q.Wait(1, nil); !errors.Is(err, hpdi.ErrClosed) {
		t.Errorf("wait after close: %v", err)
	}
	if err := d.Close(); err == nil || !strings.Contains(err.Error(), path) {
		t.Errorf("the device was closed under a request: %v", err)
	}
	if _, err := Open(path, Options{Lock: true}); !errors.Is(err, hpdi.ErrLocked) {
		t.Errorf("the lock was given up: %v", err)
	}
	// The kernel has done with the request once the ring has the result.
	if _, err := unix.Write(pipe[1], make([]byte, BlockSize)); err != nil {
		t.Fatal(err)
	}
	for q.ring.results() == 0 {
		runtime.Gosched()
	}
	openRings.Delete(q)
	for _, fd := range []int{ring, pipe[0], pipe[1], file} {
		_ = unix.Close(fd)
	}
}

// cancel makes the kernel end everything in flight in a ring undone, as it does
// with the work of a thread that exits. It skips the test on old kernels.
func cancel(t *testing.T, r *ring) {
	t.Helper()
	const registerSyncCancel, cancelAny = 24, 4
	c := struct { // struct io_uring_sync_cancel_reg
		addr    uint64
		fd      int32
		flags   uint32
		timeout [2]int64
		_       [4]uint64
	}{fd: -1, flags: cancelAny, timeout: [2]int64{-1, -1}}
	_, _, errno := unix.Syscall6(unix.SYS_IO_URING_REGISTER, uintptr(r.fd), registerSyncCancel, uintptr(unsafe.Pointer(&c)), 1, 0, 0)
	if errno == unix.EINVAL {
		t.Skip("this kernel cannot cancel")
	}
	if errno != 0 {
		t.Fatal(errno)
	}
}

// TestCancelledByTheKernel: a request that the kernel ended undone is handed in
// again, but not for ever.
func TestCancelledByTheKernel(t *testing.T) {
	d := unfixedRingDevice(t)
	q := newQueue(t, d, 4).(*uringQueue)
	defer closeQueue(t, q)
	var pipe [2]int
	if err := unix.Pipe2(pipe[:], unix.O_CLOEXEC); err != nil {
		t.Fatal(err)
	}
	file := d.fd
	t.Cleanup(func() { _, _ = unix.Close(pipe[0]), unix.Close(pipe[1]) })

	d.fd = pipe[0] // nothing comes from there: the read stays in flight
	again := reads(t, 1)[0]
	again.Vec[0][0] = 7
	err := q.Submit(again)
	d.fd = file
	if err != nil {
		t.Fatal(err)
	}
	cancel(t, q.ring)
	if done, err := q.Wait(1, nil); err != nil || len(done) != 1 || again.Err != nil || again.Vec[0][0] != 0 {
		t.Errorf("read that was cancelled once: %v, %v, reads %d", err, again.Err, again.Vec[0][0])
	}

	d.fd = pipe[0]
	never := reads(t, 1)[0]
	err = q.Submit(never)
	var done []*hpdi.Request
	cancels := 0
	for ; err == nil && len(done) == 0 && cancels < 2*maxTries; cancels++ {
		cancel(t, q.ring)
		done, err = q.Wait(0, nil)
	}
	d.fd = file
	if err != nil || !errors.Is(never.Err, unix.ECANCELED) || !strings.Contains(never.Err.Error(), d.info.Name) {
		t.Errorf("read that was cancelled %d times: %v, %v", cancels, err, never.Err)
	}
	if err := hpdi.Do(q, reads(t, 3)...); err != nil {
		t.Errorf("the queue after that: %v", err)
	}
}
