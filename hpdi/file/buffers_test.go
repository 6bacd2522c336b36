package file

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
)

// lastEntries returns the n entries that the queue gave to the kernel last, oldest first.
func lastEntries(q hpdi.Queue, n int) []sqe {
	r := q.(*uringQueue).ring
	var es []sqe
	for at := r.sqTail - uint32(n); at != r.sqTail; at++ {
		es = append(es, r.sqes[at&uint32(len(r.sqes)-1)])
	}
	return es
}

// never is a deadline that no test reaches.
var never = time.Now().Add(time.Hour)

func address(p []byte) uint64 { return uint64(uintptr(unsafe.Pointer(&p[0]))) }

// pinned returns how many bytes of this process's memory are pinned.
func pinned(t *testing.T) int {
	t.Helper()
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		t.Skip(err)
	}
	for line := range strings.Lines(string(status)) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "VmPin:" {
			n, err := strconv.Atoi(f[1])
			if err != nil {
				t.Fatal(err)
			}
			return n << 10
		}
	}
	t.Skip("the kernel does not tell what is pinned")
	return 0
}

// twice maps the same memory at two places.
func twice(t *testing.T, n int) (a, b []byte) {
	t.Helper()
	fd, err := unix.MemfdCreate("hpdi-file-test", unix.MFD_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, int64(n)); err != nil {
		t.Fatal(err)
	}
	for _, mem := range []*[]byte{&a, &b} {
		if *mem, err = unix.Mmap(fd, 0, n, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = unix.Munmap(*mem) })
	}
	return a, b
}

// TestKernelSeesTheApplicationsMemory: memory that the program itself must not touch can
// be given to the kernel alone. A driver that copied would crash; one that passes the
// address on is told that the address is bad.
func TestKernelSeesTheApplicationsMemory(t *testing.T) {
	const n = 4 * BlockSize
	for _, engine := range engines(t) {
		for name, dir := range map[string]string{"disk": t.TempDir(), "memory": memoryDir(t)} {
			t.Run(fmt.Sprintf("%s/%s", engine, name), func(t *testing.T) {
				d := open(t, create(t, dir, testSize), Options{Engine: engine})
				defer os.Remove(d.Info().Name)
				q := newQueue(t, d, 4)
				defer closeQueue(t, q)
				mem := alloc(t, n)
				if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpWrite, Vec: [][]byte{mem}}); err != nil {
					t.Fatal(err)
				}
				if err := unix.Mprotect(mem, unix.PROT_NONE); err != nil {
					t.Fatal(err)
				}
				for _, op := range []hpdi.Op{hpdi.OpRead, hpdi.OpWrite} {
					for _, vec := range [][][]byte{{mem}, {mem[2*BlockSize:], mem[:BlockSize]}} {
						if err := hpdi.Do(q, &hpdi.Request{Op: op, Vec: vec}); !errors.Is(err, unix.EFAULT) {
							t.Errorf("%s of %d vectors that only the kernel sees: %v", op, len(vec), err)
						}
					}
				}
			})
		}
	}
}

// TestRegisteredMemoryReachesTheKernel: what is said of registered memory to the kernel is
// its number and the application's address, and what moves the data are the pages that
// were pinned: they are reached though nothing can be read or written at their address
// any more.
func TestRegisteredMemoryReachesTheKernel(t *testing.T) {
	ringEngine(t)
	const n = 16 * BlockSize
	for name, dir := range map[string]string{"disk": t.TempDir(), "memory": memoryDir(t)} {
		t.Run(name, func(t *testing.T) {
			d := open(t, create(t, dir, testSize), Options{Engine: EngineURing})
			defer os.Remove(d.Info().Name)
			before := newQueue(t, d, 4)
			defer closeQueue(t, before)
			mem, seen := twice(t, n)
			other := alloc(t, n)
			for _, m := range [][]byte{other, mem, mem} {
				if err := d.Register(m); err != nil {
					t.Fatal(err)
				}
			}
			if note := d.Info().Note; strings.Contains(note, "registered") {
				t.Skip(note)
			}
			if err := d.Unregister(mem); err != nil { // once is left
				t.Fatal(err)
			}
			after := newQueue(t, d, 4)
			defer closeQueue(t, after)
			for i := range seen {
				seen[i] = byte(i / BlockSize)
			}
			if err := unix.Mprotect(mem, unix.PROT_NONE); err != nil {
				t.Fatal(err)
			}
			for _, q := range []hpdi.Queue{before, after} {
				vec := mem[BlockSize : 9*BlockSize]
				w := &hpdi.Request{Op: hpdi.OpWrite, Vec: [][]byte{vec[:BlockSize], vec[BlockSize:]}} // neighbours are one
				r := &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{mem[:8*BlockSize]}, Deadline: never}
				var entries []sqe
				for _, do := range []*hpdi.Request{w, r} {
					if err := hpdi.Do(q, do); err != nil {
						t.Fatalf("%s by pinned pages: %v", do.Op, err)
					}
					entries = append(entries, lastEntries(q, 1+len(entries))[0])
				}
				for i, want := range []sqe{
					{opcode: ringOpReadFixed + 1, addr: address(vec), len: uint32(len(vec)), bufIndex: 1},
					{opcode: ringOpReadFixed, addr: address(mem), len: 8 * BlockSize, bufIndex: 1, flags: ringLink},
				} {
					got := entries[i]
					if got.flags |= ringFixedFile; got.opcode != want.opcode || got.addr != want.addr || got.len != want.len || got.bufIndex != want.bufIndex || got.flags != want.flags|ringFixedFile {
						t.Errorf("the kernel was given %+v, want %+v", got, want)
					}
				}
				for i := range 8 {
					if seen[i*BlockSize] != byte(i+1) {
						t.Fatalf("block %d is %d", i, seen[i*BlockSize])
					}
				}
				for i := range seen {
					seen[i] = byte(i / BlockSize)
				}
			}
			// Several vectors in one piece; in two; partly in none.
			vec := [][]byte{mem[4*BlockSize : 5*BlockSize], mem[:BlockSize], mem[8*BlockSize : 10*BlockSize]}
			many := &hpdi.Request{Op: hpdi.OpRead, Vec: vec}
			err := hpdi.Do(after, many)
			if after.(*uringQueue).ring.knows.vectorsFixed {
				if e := lastEntries(after, 1)[0]; err != nil || e.opcode != ringOpReadvFixed || e.bufIndex != 1 || e.len != 3 {
					t.Errorf("three vectors: %v, the kernel was given %+v", err, e)
				}
			} else if !errors.Is(err, unix.EFAULT) {
				t.Errorf("three vectors: %v", err)
			}
			if err := unix.Mprotect(mem, unix.PROT_READ|unix.PROT_WRITE); err != nil {
				t.Fatal(err)
			}
			for _, vec := range [][][]byte{{mem[:BlockSize], other[:BlockSize]}, {other[:BlockSize], alloc(t, BlockSize)}} {
				if err := hpdi.Do(after, &hpdi.Request{Op: hpdi.OpRead, Vec: vec}); err != nil {
					t.Error(err)
				}
				if e := lastEntries(after, 1)[0]; e.opcode != ringOpReadv {
					t.Errorf("vectors in different pieces: the kernel was given %+v", e)
				}
			}
			// Taken back, it is memory like other.
			if err := d.Unregister(mem); err != nil {
				t.Fatal(err)
			}
			if err := hpdi.Do(after, &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{mem}}); err != nil {
				t.Error(err)
			}
			if e := lastEntries(after, 1)[0]; e.opcode != ringOpRead {
				t.Errorf("memory that was taken back: the kernel was given %+v", e)
			}
		})
	}
}

// TestUnregisterUnpins: registered memory is pinned once for each queue, and not any
// more when it is taken back or the queue is closed.
func TestUnregisterUnpins(t *testing.T) {
	d := ringDevice(t)
	q := newQueue(t, d, 4)
	mem := alloc(t, 4<<20)
	base := pinned(t)
	want := func(what string, times int) {
		t.Helper()
		if got := pinned(t) - base; got != times*len(mem) {
			t.Errorf("%s: %d bytes are pinned, want %d", what, got, times*len(mem))
		}
	}
	if err := d.Register(mem); err != nil {
		t.Fatal(err)
	}
	if note := d.Info().Note; strings.Contains(note, "registered") {
		t.Skip(note)
	}
	want("registered", 1)
	second := newQueue(t, d, 4)
	want("with two queues", 2)
	closeQueue(t, q)
	want("with one of two queues", 1)
	if err := d.Unregister(mem); err != nil {
		t.Fatal(err)
	}
	want("unregistered", 0)
	if err := errors.Join(d.Unregister(mem), d.Register(nil), d.Register(mem)); err != nil {
		t.Error(err)
	}
	want("registered again", 1)
	closeQueue(t, second)
	want("without queues", 0)
}

// TestRegisterRefuses what overlaps, and everything after Close.
func TestRegisterRefuses(t *testing.T) {
	for _, engine := range engines(t) {
		path := create(t, t.TempDir(), testSize)
		d, err := Open(path, Options{Engine: engine})
		if err != nil {
			t.Fatal(err)
		}
		mem := alloc(t, 8*BlockSize)
		if err := d.Register(mem[2*BlockSize : 6*BlockSize]); err != nil {
			t.Fatal(err)
		}
		for _, p := range [][]byte{mem, mem[:3*BlockSize], mem[3*BlockSize : 4*BlockSize], mem[5*BlockSize:]} {
			if err := d.Register(p); err == nil || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "overlap") {
				t.Errorf("%s: memory that overlaps: %v", engine, err)
			}
		}
		if err := errors.Join(d.Register(mem[:2*BlockSize]), d.Register(mem[6*BlockSize:])); err != nil {
			t.Errorf("%s: neighbours: %v", engine, err)
		}
		if err := d.Close(); err != nil {
			t.Error(err)
		}
		if err := d.Register(mem); !errors.Is(err, hpdi.ErrClosed) {
			t.Errorf("%s: register with a closed device: %v", engine, err)
		}
	}
}

// TestMemoryThatCannotBeRegistered is used all the same, and Info says so until it is taken
// back.
func TestMemoryThatCannotBeRegistered(t *testing.T) {
	ringEngine(t)
	d := open(t, create(t, memoryDir(t), testSize), Options{Engine: EngineURing}) // which has a note already
	q := newQueue(t, d, 4)
	defer closeQueue(t, q)
	mem := alloc(t, 4*BlockSize)
	mem[0] = 9
	if err := unix.Mprotect(mem, unix.PROT_READ); err != nil { // the kernel demands memory that it may write
		t.Fatal(err)
	}
	had := d.Info().Note
	if err := d.Register(mem); err != nil {
		t.Fatal(err)
	}
	if note := d.Info().Note; !strings.HasPrefix(note, had+"; ") || !strings.Contains(note, "16384 bytes of memory are not registered with io_uring") {
		t.Errorf("the note is %q", note)
	}
	if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpWrite, Vec: [][]byte{mem}}); err != nil {
		t.Error(err)
	}
	if e := lastEntries(q, 1)[0]; e.opcode != ringOpWrite {
		t.Errorf("the kernel was given %+v", e)
	}
	if err := d.Unregister(mem); err != nil {
		t.Error(err)
	}
	if note := d.Info().Note; note != had {
		t.Errorf("afterwards the note is %q", note)
	}
}

// TestLockedMemoryIsLimited: who may not lock as much does without, also for those pieces
// that there would have been room for.
func TestLockedMemoryIsLimited(t *testing.T) {
	var limit unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_MEMLOCK, &limit); err != nil {
		t.Fatal(err)
	}
	if limit.Cur > 64<<20 {
		t.Skip("more memory may be locked than a test should take")
	}
	d := ringDevice(t)
	var q hpdi.Queue
	onThread(t, func() { // who makes the ring is who may lock
		if err := dropCapability(unix.CAP_IPC_LOCK); err != nil {
			t.Error(err)
		}
		q = newQueue(t, d, 4)
	})
	defer closeQueue(t, q)
	mem := alloc(t, int(limit.Cur)+BlockSize)
	base := pinned(t)
	if err := d.Register(mem); err != nil {
		t.Fatal(err)
	}
	if note := d.Info().Note; !strings.Contains(note, "ulimit -l") {
		t.Errorf("the note is %q", note)
	}
	if got := pinned(t); got != base {
		t.Errorf("%d bytes are pinned, before %d", got, base)
	}
}

// TestNoTableOfBuffers: an old kernel has none, and a container may forbid it.
func TestNoTableOfBuffers(t *testing.T) {
	d := ringDevice(t)
	q := newQueue(t, d, 4)
	defer closeQueue(t, q)
	mem := alloc(t, 2*BlockSize)
	for i, want := range []struct {
		errno unix.Errno
		note  string
	}{{unix.EINVAL, "it takes Linux 5.13"}, {unix.EPERM, "not permitted"}} {
		p := mem[i*BlockSize : (i+1)*BlockSize]
		filtered := false
		onThread(t, func() {
			if filtered = filter(unix.SYS_IO_URING_REGISTER, want.errno, nil) == nil; filtered {
				if err := d.Register(p); err != nil {
					t.Error(err)
				}
			}
		})
		if !filtered {
			t.Skip("system calls cannot be filtered here")
		}
		if note := d.Info().Note; !strings.Contains(note, want.note) {
			t.Errorf("the note is %q, want it to say %q", note, want.note)
		}
		if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpWrite, Vec: [][]byte{p}}); err != nil {
			t.Error(err)
		}
	}
}

// TestFixedOff: nothing is registered, however much the application asks for it.
func TestFixedOff(t *testing.T) {
	d := unfixedRingDevice(t)
	mem := alloc(t, BlockSize)
	if err := d.Register(mem); err != nil {
		t.Fatal(err)
	}
	q := newQueue(t, d, 4)
	defer closeQueue(t, q)
	if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{mem}}); err != nil {
		t.Error(err)
	}
	if e := lastEntries(q, 1)[0]; e.opcode != ringOpRead || e.flags != 0 || e.fd != int32(d.fd) {
		t.Errorf("the kernel was given %+v", e)
	}
}

// dropCapability takes a right of root away from this thread.
func dropCapability(n uint) error {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return err
	}
	data[n/32].Effective &^= 1 << (n % 32)
	return unix.Capset(&header, &data[0])
}

// TestPieces: what is longer than the kernel takes is registered in pieces, and what goes
// beyond the table is not.
func TestPieces(t *testing.T) {
	if unsafe.Sizeof(uintptr(0)) < 8 {
		t.Skip("not enough addresses")
	}
	const n = 2*maxPiece + 3*BlockSize
	mem, err := unix.Mmap(-1, 0, n, unix.PROT_NONE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		t.Skip(err)
	}
	defer func() { _ = unix.Munmap(mem) }()
	d := ringDevice(t).(*device)
	small := alloc(t, (maxPieces+1)*BlockSize)
	if err := errors.Join(d.Register(small[:BlockSize]), d.Register(mem)); err != nil {
		t.Fatal(err)
	}
	got := d.memory[1].pieces
	base := uintptr(unsafe.Pointer(&mem[0]))
	want := pieces{{base, maxPiece, 1}, {base + maxPiece, maxPiece, 2}, {base + 2*maxPiece, 3 * BlockSize, 3}}
	if fmt.Sprint(got) != fmt.Sprint(want) {
		t.Errorf("pieces %v, want %v", got, want)
	}
	for _, tt := range []struct {
		at, n uintptr
		want  int
	}{
		{0, 1, 1}, {0, maxPiece, 1}, {0, maxPiece + 1, -1}, {maxPiece - 1, 2, -1}, {maxPiece, 1, 2}, {maxPiece, maxPiece, 2},
		{2 * maxPiece, 3 * BlockSize, 3}, {2*maxPiece + 3*BlockSize - 1, 1, 3}, {2*maxPiece + 3*BlockSize, 1, -1},
		{2*maxPiece + BlockSize, ^uintptr(0), -1}, {^uintptr(0), 1, -1},
	} {
		index, ok := want.find(base+tt.at, tt.n)
		if !ok && tt.want >= 0 || ok && int(index) != tt.want {
			t.Errorf("%d bytes from %#x on are in piece %d, %v, want %d", tt.n, tt.at, index, ok, tt.want)
		}
	}
	if _, ok := pieces(nil).find(base, 1); ok {
		t.Error("memory was found in none")
	}
	for i := 1; i <= maxPieces-3; i++ {
		if err := d.Register(small[i*BlockSize : (i+1)*BlockSize]); err != nil {
			t.Fatal(err)
		}
	}
	if note := d.Info().Note; !strings.Contains(note, "more than 1024 pieces") {
		t.Errorf("the note is %q", note)
	}
	if err := d.Unregister(mem); err != nil {
		t.Fatal(err)
	}
	if err := d.Register(small[maxPieces*BlockSize:]); err != nil {
		t.Fatal(err)
	}
	if got := d.memory[len(d.memory)-1].pieces; len(got) != 1 || got[0].index != 1 {
		t.Errorf("a piece whose place came free is %v", got)
	}
}

// TestRegisterBesideRequests registers memory and takes it back while others use the same
// queues, with that memory and with other.
func TestRegisterBesideRequests(t *testing.T) {
	const size, rounds = 8 * BlockSize, 200
	d := ringDevice(t)
	var wg sync.WaitGroup
	for w := range 2 {
		mem := alloc(t, 2*size)
		wg.Go(func() {
			q, err := d.NewQueue(4)
			if err != nil {
				t.Error(err)
				return
			}
			defer closeQueue(t, q)
			for round := range rounds {
				own := mem[:size]
				if round%2 == 0 { // ours to register: nobody else uses it
					if err := d.Register(own); err != nil {
						t.Error(err)
						return
					}
				}
				for i := range own {
					own[i] = byte(round + w)
				}
				off := int64(w * 2 * size)
				for _, r := range []*hpdi.Request{
					{Op: hpdi.OpWrite, Offset: off, Vec: [][]byte{own}},
					{Op: hpdi.OpRead, Offset: off, Vec: [][]byte{mem[size:]}},
				} {
					if err := hpdi.Do(q, r); err != nil {
						t.Error(err)
						return
					}
				}
				if round%2 == 0 {
					if err := d.Unregister(own); err != nil {
						t.Error(err)
						return
					}
				}
				if mem[size] != byte(round+w) || mem[2*size-1] != byte(round+w) {
					t.Errorf("round %d: read back %d", round, mem[size])
					return
				}
			}
		})
	}
	wg.Wait()
}
