package hpditest

import (
	"encoding/binary"
	"errors"
	"fmt"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// watcher follows the system calls of a program and all its threads.
type watcher struct {
	threads map[int]*call // by thread: the call that it is in
	base, n uint64        // of the vectors
	phase   int
	moves   [markEnd]*moves // by phase
	marks   int
}

// moves are what system calls have moved in one phase.
type moves struct {
	times   []uint8 // how often each byte of the vectors was moved
	wrong   int     // bytes of them in the wrong direction
	outside int     // bytes from or to other memory
	largest int     // of those, by one piece of one call
	where   string  // which that was
}

// call is a system call that has begun.
type call struct {
	known bool // it is one that was stopped at its beginning
	nr    uint64
	args  [6]uint64
}

// info is ptrace_syscall_info of the kernel.
type info struct {
	op   uint8
	_    [3]uint8
	arch uint32
	ip   uint64
	sp   uint64
	data [8]uint64 // number and arguments, or the result
}

const (
	ptraceSyscallInfo = 0x420e
	infoEntry         = 1
	infoExit          = 2
)

// watch runs a program that stands at its first instruction to its end, and returns how
// it ended. The calling thread has started it.
func (w *watcher) watch(pid int) (unix.WaitStatus, error) {
	for first := true; ; first = false {
		var status unix.WaitStatus
		from := pid
		if !first {
			from = -1
		}
		// Other threads of this process have children of their own.
		id, err := unix.Wait4(from, &status, unix.WALL|unix.WNOTHREAD, nil)
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("wait: %w", err)
		}
		if status.Exited() || status.Signaled() {
			if delete(w.threads, id); id == pid {
				return status, nil
			}
			continue
		}
		deliver := 0
		switch sig := status.StopSignal(); {
		case first:
			// The whole dies with who watches it.
			const exitKill = 1 << 20
			if err := unix.PtraceSetOptions(pid, unix.PTRACE_O_TRACESYSGOOD|unix.PTRACE_O_TRACECLONE|exitKill); err != nil {
				return 0, fmt.Errorf("options: %w", err)
			}
		case sig == unix.SIGTRAP|0x80:
			if err := w.stopped(id); err != nil && !errors.Is(err, unix.ESRCH) {
				return 0, err
			}
		case sig == unix.SIGTRAP: // a thread was made
		case sig == unix.SIGSTOP && w.threads[id] == nil: // and begins
			w.threads[id] = &call{}
		default:
			deliver = int(sig)
		}
		if err := unix.PtraceSyscall(id, deliver); err != nil && !errors.Is(err, unix.ESRCH) {
			return 0, fmt.Errorf("go on: %w", err)
		}
	}
}

// stopped takes note of a system call that begins or ends.
func (w *watcher) stopped(id int) error {
	var i info
	if _, _, errno := unix.Syscall6(unix.SYS_PTRACE, ptraceSyscallInfo, uintptr(id), unsafe.Sizeof(i), uintptr(unsafe.Pointer(&i)), 0, 0); errno != 0 {
		return fmt.Errorf("system call: %w", errno)
	}
	c := w.threads[id]
	if c == nil {
		c = &call{}
		w.threads[id] = c
	}
	switch i.op {
	case infoEntry:
		c.known, c.nr = true, i.data[0]
		copy(c.args[:], i.data[1:])
		if c.nr == unix.SYS_PRCTL && c.args[0] == mark {
			w.marked(c.args)
		}
	case infoExit:
		if n := int64(i.data[0]); c.known && n > 0 && w.moves[w.phase%markEnd] != nil {
			c.known = false
			return w.moved(id, c, int(n))
		}
		c.known = false
	}
	return nil
}

func (w *watcher) marked(args [6]uint64) {
	w.marks++
	switch what := int(args[1]); what {
	case markMemory:
		w.base, w.n = args[2], args[3]
	case markWrite, markRead:
		w.phase = what
		w.moves[what] = &moves{times: make([]uint8, w.n)}
	default:
		w.phase = 0
	}
}

// moved takes note of n bytes that a call has moved, if it is one that moves any.
func (w *watcher) moved(id int, c *call, n int) error {
	out := true
	var vec []byte // of iovecs
	switch c.nr {
	case unix.SYS_READ, unix.SYS_PREAD64, unix.SYS_RECVFROM:
		out = false
		fallthrough
	case unix.SYS_WRITE, unix.SYS_PWRITE64, unix.SYS_SENDTO:
		vec = binary.NativeEndian.AppendUint64(nil, c.args[1])
		vec = binary.NativeEndian.AppendUint64(vec, c.args[2])
	case unix.SYS_READV, unix.SYS_PREADV, unix.SYS_PREADV2:
		out = false
		fallthrough
	case unix.SYS_WRITEV, unix.SYS_PWRITEV, unix.SYS_PWRITEV2:
		vec = make([]byte, 16*c.args[2])
		if err := peek(id, c.args[1], vec); err != nil {
			return err
		}
	case unix.SYS_RECVMSG:
		out = false
		fallthrough
	case unix.SYS_SENDMSG:
		var h [56]byte
		if err := peek(id, c.args[1], h[:]); err != nil {
			return err
		}
		vec = make([]byte, 16*binary.NativeEndian.Uint64(h[24:]))
		if err := peek(id, binary.NativeEndian.Uint64(h[16:]), vec); err != nil {
			return err
		}
	default:
		return nil
	}
	for ; len(vec) > 0 && n > 0; vec = vec[16:] {
		addr, size := binary.NativeEndian.Uint64(vec), min(int(binary.NativeEndian.Uint64(vec[8:])), n)
		n -= size
		w.piece(c.nr, out, addr, size)
	}
	return nil
}

func (w *watcher) piece(nr uint64, out bool, addr uint64, n int) {
	m := w.moves[w.phase]
	outside := 0
	for a := addr; a < addr+uint64(n); a++ {
		switch at := a - w.base; {
		case at >= w.n:
			outside++
		case out != (w.phase == markWrite):
			m.wrong++
		default:
			m.times[at]++
		}
	}
	m.outside += outside
	if outside > m.largest {
		m.largest, m.where = outside, fmt.Sprintf("system call %d with memory at %#x", nr, addr)
	}
}

// peek reads memory of the program.
func peek(id int, addr uint64, p []byte) error {
	if len(p) == 0 {
		return nil
	}
	local := []unix.Iovec{{Base: &p[0]}}
	local[0].SetLen(len(p))
	n, err := unix.ProcessVMReadv(id, local, []unix.RemoteIovec{{Base: uintptr(addr), Len: len(p)}}, 0)
	if err != nil || n != len(p) {
		return fmt.Errorf("read %d bytes of the program's memory: %d, %w", len(p), n, err)
	}
	return nil
}

// judge returns what speaks against all having gone between the vectors and the kernel.
func (w *watcher) judge(t *testing.T) (problems []string) {
	t.Helper()
	if w.marks != 5 || w.n == 0 {
		t.Fatalf("the program made %d of 5 marks, with %d bytes of memory: it has not done what it was started for", w.marks, w.n)
	}
	for phase, what := range []string{markWrite: "written", markRead: "read"} {
		if what == "" {
			continue
		}
		m := w.moves[phase]
		bad := 0
		for _, n := range m.times {
			if n != 1 {
				bad++
			}
		}
		t.Logf("%s: %d bytes between the vectors and the kernel, %d beside them, %d at most at once", what, len(m.times)-bad, m.outside, m.largest)
		if bad > 0 || m.wrong > 0 {
			problems = append(problems, fmt.Sprintf("%d of %d bytes that were %s did not go between the vectors and the kernel once; %d went the other way", bad, w.n, what, m.wrong))
		}
		if m.largest >= 4096 || m.outside >= int(w.n)/4 {
			problems = append(problems, fmt.Sprintf("while %d bytes were %s, %d went from or to other memory, %d of them by %s", w.n, what, m.outside, m.largest, m.where))
		}
	}
	return problems
}
