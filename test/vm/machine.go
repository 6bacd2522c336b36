package vm

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/pollux-storage/pollux/test/vm/wire"
)

// Spec says how a machine is.
type Spec struct {
	Dir       string // for its files; the caller's, with a short path: sockets are in it
	Kernel    Kernel
	Initramfs string   // as [Image.Write] makes it
	Memory    int      // MiB
	CPUs      int      // 1 if 0
	Args      []string // more arguments of QEMU: its disks
}

// bootLimit is how long a machine may take until its first process answers. It takes
// some seconds alone, and others may use the processors.
const bootLimit = 90 * time.Second

// Machine is a running one. Its methods may be called concurrently.
type Machine struct {
	dir  string
	cmd  *exec.Cmd
	conn net.Conn
	end  chan struct{} // closed when QEMU has ended
	why  error         // of that end; set before
	up   chan struct{} // closed when the first process has answered

	mu      sync.Mutex // guards what follows
	next    uint64
	waiting map[uint64]chan wire.Reply
}

// Boot starts a machine and returns when it takes commands. Stop must be called.
func Boot(ctx context.Context, s Spec) (*Machine, error) {
	port := filepath.Join(s.Dir, "port")
	ln, err := net.Listen("unix", port)
	if err != nil {
		return nil, err
	}
	defer ln.Close()
	args := []string{
		"-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
		"-machine", "q35,memory-backend=mem",
		// One thread for all processors: with one each, QEMU 7.2 now and then takes what a
		// processor writes to a device for another device's, while a third is being
		// mapped, and ends with a failed assertion.
		"-accel", "tcg,thread=single", "-cpu", "max,cx16=off",
		"-smp", fmt.Sprint(max(s.CPUs, 1)), "-m", fmt.Sprint(s.Memory),
		// A vhost-user back-end maps the machine's memory.
		"-object", fmt.Sprintf("memory-backend-memfd,id=mem,size=%dM,share=on", s.Memory),
		"-kernel", s.Kernel.Image, "-initrd", s.Initramfs,
		"-append", "console=ttyS0 panic=-1 loglevel=5 tsc=reliable mitigations=off random.trust_cpu=on",
		"-serial", "file:" + filepath.Join(s.Dir, "console"),
		"-device", "virtio-serial-pci", "-chardev", "socket,id=port,path=" + port, "-device", "virtserialport,chardev=port,name=" + wire.Port,
	}
	m := &Machine{dir: s.Dir, end: make(chan struct{}), up: make(chan struct{}), waiting: map[uint64]chan wire.Reply{}}
	m.cmd = exec.Command("qemu-system-x86_64", append(args, s.Args...)...)
	m.cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	said, err := os.Create(filepath.Join(s.Dir, "qemu"))
	if err != nil {
		return nil, err
	}
	defer said.Close()
	m.cmd.Stdout, m.cmd.Stderr = said, said
	if err := m.cmd.Start(); err != nil {
		return nil, err
	}
	go func() {
		m.why = m.cmd.Wait()
		close(m.end)
		_ = ln.Close() // whoever waits for it to connect
	}()
	if m.conn, err = ln.Accept(); err != nil {
		m.Stop()
		return nil, m.trouble(errors.New("QEMU ended at once"))
	}
	go m.read()
	limit := time.NewTimer(bootLimit)
	defer limit.Stop()
	select {
	case <-m.up:
		return m, nil
	case <-m.end:
		err = errors.New("the machine ended while it booted")
	case <-limit.C:
		err = fmt.Errorf("the machine does not come up in %v", bootLimit)
	case <-ctx.Done():
		err = ctx.Err()
	}
	m.Stop()
	return nil, m.trouble(err)
}

// trouble adds to an error what QEMU and the console said last.
func (m *Machine) trouble(err error) error {
	qemu, _ := os.ReadFile(filepath.Join(m.dir, "qemu"))
	console := m.Console()
	return fmt.Errorf("%w\nQEMU: %s\nconsole: %s", err, qemu, console[max(0, len(console)-4000):])
}

// read hands replies to those who wait for them.
func (m *Machine) read() {
	in := bufio.NewReader(m.conn)
	for first := true; ; first = false {
		line, err := in.ReadBytes('\n')
		if err != nil {
			if !errors.Is(err, io.EOF) {
				_ = m.conn.Close()
			}
			return // the machine has ended, of which those who wait hear
		}
		var r wire.Reply
		if err := json.Unmarshal(line, &r); err != nil {
			r = wire.Reply{Status: -1, Error: fmt.Sprintf("reply %q: %v", line, err)}
		}
		if first {
			close(m.up)
			continue
		}
		m.mu.Lock()
		ch := m.waiting[r.ID]
		delete(m.waiting, r.ID)
		m.mu.Unlock()
		if ch != nil {
			ch <- r
		}
	}
}

// Error is a command that failed in a machine.
type Error struct {
	Args  []string
	Reply wire.Reply
}

// Error shows the command and what it said.
func (e *Error) Error() string {
	return fmt.Sprintf("in the machine, %s: status %d %s\n%s", strings.Join(e.Args, " "), e.Reply.Status, e.Reply.Error, e.Reply.Output)
}

// Do runs a command in the machine and returns what it printed; see the package
// init for what is no program. A command that fails is an *[Error].
func (m *Machine) Do(ctx context.Context, args ...string) (string, error) {
	ch := make(chan wire.Reply, 1)
	m.mu.Lock()
	m.next++
	q := wire.Request{ID: m.next, Args: args}
	m.waiting[q.ID] = ch
	line, err := json.Marshal(q)
	if err == nil {
		_, err = m.conn.Write(append(line, '\n'))
	}
	m.mu.Unlock()
	if err != nil {
		return "", m.trouble(fmt.Errorf("command %q: %w", args, err))
	}
	select {
	case r := <-ch:
		if r.Status != 0 || r.Error != "" {
			return r.Output, &Error{args, r}
		}
		return r.Output, nil
	case <-m.end:
		return "", m.trouble(fmt.Errorf("command %q: the machine has ended", args))
	case <-ctx.Done():
		return "", m.trouble(fmt.Errorf("command %q: %w", args, context.Cause(ctx)))
	}
}

// Console returns what the kernel said on the console since the machine was started.
func (m *Machine) Console() string {
	text, _ := os.ReadFile(filepath.Join(m.dir, "console"))
	return string(text)
}

// Stop ends the machine at once, as the loss of its power would.
func (m *Machine) Stop() {
	_ = m.cmd.Process.Kill()
	<-m.end
	if m.conn != nil {
		_ = m.conn.Close()
	}
}
