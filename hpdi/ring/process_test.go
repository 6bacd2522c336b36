package ring

import (
	"bufio"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/file"
	"github.com/pollux-storage/pollux/hpdi/hpditest"
	"github.com/pollux-storage/pollux/hpdi/mem"
)

// backEnv makes the test binary a back-end: "SOCKET|DEVICE|POLL", the device memory, or a
// file.
const backEnv = "POLLUX_RING_BACK"

// frontEnv makes it a front-end of a socket, which has requests in flight until it is killed.
const frontEnv = "POLLUX_RING_FRONT"

func TestMain(m *testing.M) {
	if v := os.Getenv(backEnv); v != "" {
		if err := beBack(v); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	if v := os.Getenv(frontEnv); v != "" {
		fmt.Fprintln(os.Stderr, beFront(v))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// beBack serves until it is killed.
func beBack(v string) error {
	var path, what string
	var poll time.Duration
	if _, err := fmt.Sscanf(v, "%s %s %d", &path, &what, &poll); err != nil {
		return err
	}
	var dev hpdi.Device
	var err error
	if what == "memory" {
		dev, err = mem.New("memory", hpditest.MinSize)
	} else {
		dev, err = file.Open(what, file.Options{Direct: file.DirectOff})
	}
	if err != nil {
		return err
	}
	s, err := NewServer(dev, ServeOptions{Poll: poll})
	if err != nil {
		return err
	}
	if st, err := os.Stat(path); err == nil && st.Mode().IsRegular() {
		fmt.Println("ready")
		return s.ServeFile(path, 0)
	}
	l, err := Listen(path)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	return s.Serve(l)
}

// process is a back-end in another process.
type process struct {
	cmd  *exec.Cmd
	path string
}

// startBack starts a back-end for a device, and returns when it listens.
func startBack(t testing.TB, path, what string, poll time.Duration) *process {
	t.Helper()
	return start(t, path, fmt.Sprintf("%s=%s %s %d", backEnv, path, what, poll))
}

// start starts this program as something else, and returns when it says that it is ready.
func start(t testing.TB, path, env string) *process {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), env)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &process{cmd: cmd, path: path}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		p.kill()
		t.Fatalf("the process says %q, %v", line, err)
	}
	return p
}

// kill kills the process and waits until it is gone.
func (p *process) kill() {
	_ = p.cmd.Process.Kill()
	_ = p.cmd.Wait()
}

// The suite with the back-end in another process.
func TestConformanceProcess(t *testing.T) {
	hpditest.Run(t, func(t *testing.T) hpdi.Device {
		p := startBack(t, filepath.Join(t.TempDir(), "ring.sock"), "memory", 20*time.Microsecond)
		t.Cleanup(p.kill)
		return open(t, p.path, Options{Queues: 8, Entries: 64, Poll: 20 * time.Microsecond, Reconnect: time.Minute})
	})
}
