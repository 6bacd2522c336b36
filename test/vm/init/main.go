// Command init is the first process of the virtual machines that tests boot. It
// loads the modules of /modules/order, and runs what it is asked to over the
// port of package wire. What it does by itself:
//
//	@mount DEVICE DIRECTORY   mounts an ext4 file system
//	@umount DIRECTORY
//	@log                      the kernel's log
//	@sysfs FILE               what a file of /sys or /proc says
//	@write FILE TEXT          writes to such a file
//	@disk SERIAL              the path of the virtio disk with that serial
//	@probe DISK SECONDS       writes a block and reads it back all the time, and tells of pauses
//	@poweroff
package main

import (
	"bufio"
	"bytes"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/test/vm/wire"
)

func main() {
	fmt.Fprintln(os.Stderr, "init:", run())
	// The end of the first process is a panic of the kernel, which the console shows
	// and which ends the machine.
}

// run returns when nothing can be done for the test any more, and why.
func run() error {
	for _, m := range [][3]string{{"devtmpfs", "/dev", "devtmpfs"}, {"proc", "/proc", "proc"}, {"sysfs", "/sys", "sysfs"}, {"tmpfs", "/tmp", "tmpfs"}, {"tmpfs", "/run", "tmpfs"}} {
		if err := os.MkdirAll(m[1], 0o755); err != nil {
			return err
		}
		if err := unix.Mount(m[0], m[1], m[2], 0, ""); err != nil && !errors.Is(err, unix.EBUSY) {
			return fmt.Errorf("mount %s: %w", m[1], err)
		}
	}
	os.Setenv("PATH", "/usr/sbin:/usr/bin:/sbin:/bin")
	os.Setenv("HOME", "/tmp")
	if err := os.Chdir("/tmp"); err != nil {
		return err
	}
	if err := loadModules(); err != nil {
		return err
	}
	port, err := openPort()
	if err != nil {
		return err
	}
	return serve(port)
}

// loadModules loads the modules of the list, each of which needs only what comes
// before it.
func loadModules() error {
	list, err := os.ReadFile("/modules/order")
	if err != nil {
		return err
	}
	for name := range strings.FieldsSeq(string(list)) {
		f, err := os.Open(filepath.Join("/modules", name))
		if err != nil {
			return err
		}
		err = unix.FinitModule(int(f.Fd()), "", 0)
		f.Close()
		if err != nil && !errors.Is(err, unix.EEXIST) && !errors.Is(err, unix.ENODEV) { // ENODEV: not for this processor
			return fmt.Errorf("load module %s: %w", name, err)
		}
	}
	return nil
}

// openPort waits for the port: devices are found in the background.
func openPort() (*os.File, error) {
	for began := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		names, _ := filepath.Glob("/sys/class/virtio-ports/*/name")
		for _, n := range names {
			if text, _ := os.ReadFile(n); strings.TrimSpace(string(text)) == wire.Port {
				return os.OpenFile("/dev/"+filepath.Base(filepath.Dir(n)), os.O_RDWR, 0)
			}
		}
		if time.Since(began) > 30*time.Second {
			return nil, fmt.Errorf("there is no virtio-serial port %q", wire.Port)
		}
	}
}

// patient reads a port, which says that it has ended while nobody is at its
// other end.
type patient struct{ f *os.File }

func (p patient) Read(b []byte) (int, error) {
	for {
		n, err := p.f.Read(b)
		if n > 0 || err != nil && !errors.Is(err, io.EOF) {
			return n, err
		}
		time.Sleep(5 * time.Millisecond)
	}
}

func serve(port *os.File) error {
	var mu sync.Mutex
	reply := func(r wire.Reply) {
		line, err := json.Marshal(r)
		if err != nil {
			line = fmt.Appendf(nil, `{"id":%d,"status":-1,"error":"reply cannot be encoded"}`, r.ID)
		}
		mu.Lock()
		defer mu.Unlock()
		if _, err := port.Write(append(line, '\n')); err != nil {
			fmt.Fprintln(os.Stderr, "init: reply:", err)
		}
	}
	reply(wire.Reply{})
	in := bufio.NewReader(patient{port})
	for {
		line, err := in.ReadBytes('\n')
		if err != nil {
			return fmt.Errorf("read the port: %w", err)
		}
		var q wire.Request
		if err := json.Unmarshal(line, &q); err != nil {
			return fmt.Errorf("request %q: %w", line, err)
		}
		go func() { reply(answer(q)) }()
	}
}

func answer(q wire.Request) wire.Reply {
	r := wire.Reply{ID: q.ID}
	if len(q.Args) == 0 {
		r.Status, r.Error = -1, "no program"
		return r
	}
	if strings.HasPrefix(q.Args[0], "@") {
		out, err := builtin(q.Args)
		if r.Output = out; err != nil {
			r.Status, r.Error = -1, err.Error()
		}
		return r
	}
	var env []string
	for len(q.Args) > 1 && strings.Contains(q.Args[0], "=") {
		env, q.Args = append(env, q.Args[0]), q.Args[1:]
	}
	cmd := exec.Command(q.Args[0], q.Args[1:]...)
	cmd.Env = append(os.Environ(), env...)
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	err := cmd.Run()
	if b := out.Bytes(); len(b) > wire.OutputLimit {
		r.Output = string(b[len(b)-wire.OutputLimit:])
	} else {
		r.Output = string(b)
	}
	if cmd.ProcessState == nil {
		r.Status, r.Error = -1, err.Error()
	} else if r.Status = cmd.ProcessState.ExitCode(); r.Status < 0 {
		r.Error = cmd.ProcessState.String()
	}
	return r
}

func builtin(args []string) (string, error) {
	need := map[string]int{"@mount": 2, "@umount": 1, "@log": 0, "@sysfs": 1, "@write": 2, "@disk": 1, "@probe": 2, "@poweroff": 0}
	n, ok := need[args[0]]
	if !ok || len(args) != n+1 {
		return "", fmt.Errorf("%q is none of the commands of init", args)
	}
	switch args[0] {
	case "@mount":
		if err := os.MkdirAll(args[2], 0o755); err != nil {
			return "", err
		}
		return "", unix.Mount(args[1], args[2], "ext4", 0, "")
	case "@umount":
		return "", unix.Unmount(args[1], 0)
	case "@log":
		b := make([]byte, wire.OutputLimit)
		n, err := unix.Klogctl(unix.SYSLOG_ACTION_READ_ALL, b)
		return string(b[:max(n, 0)]), err
	case "@sysfs":
		b, err := os.ReadFile(args[1])
		return strings.TrimSpace(string(b)), err
	case "@write":
		return "", os.WriteFile(args[1], []byte(args[2]), 0)
	case "@disk":
		return disk(args[1])
	case "@probe":
		return probe(args[1], args[2])
	}
	unix.Sync()
	return "", unix.Reboot(unix.LINUX_REBOOT_CMD_POWER_OFF)
}

// disk waits for a disk: it is found when its back-end has answered.
func disk(serial string) (string, error) {
	for began := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		names, _ := filepath.Glob("/sys/block/*/serial")
		for _, n := range names {
			if text, _ := os.ReadFile(n); strings.TrimSpace(string(text)) == serial {
				return "/dev/" + filepath.Base(filepath.Dir(n)), nil
			}
		}
		if time.Since(began) > time.Minute {
			return "", fmt.Errorf("there is no disk with serial %q", serial)
		}
	}
}
