package nbd

import (
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/hpditest"
)

// foreign is a server that others have made, which a test stops, lets go on, kills and
// starts again.
type foreign struct {
	t      *testing.T
	argv   []string
	socket string
	cmd    *exec.Cmd
}

// start runs the server and waits until it listens.
func (f *foreign) start() {
	_ = os.Remove(f.socket) // of the one before
	f.cmd = exec.Command(f.argv[0], f.argv[1:]...)
	must(f.t, f.cmd.Start())
	for end := time.Now().Add(20 * time.Second); ; {
		if c, err := net.Dial("unix", f.socket); err == nil {
			must(f.t, c.Close())
			return
		}
		if time.Now().After(end) {
			f.t.Fatalf("%s does not listen", f.argv[0])
		}
		time.Sleep(time.Millisecond) // another program starts
	}
}

func (f *foreign) signal(s os.Signal) { must(f.t, f.cmd.Process.Signal(s)) }

// hold stops the server and returns when all its threads rest.
func (f *foreign) hold() {
	f.signal(syscall.SIGSTOP)
	var status syscall.WaitStatus
	for {
		_, err := syscall.Wait4(f.cmd.Process.Pid, &status, syscall.WUNTRACED, nil)
		if err == syscall.EINTR {
			continue
		}
		if must(f.t, err); !status.Stopped() {
			f.t.Fatalf("%s has ended with %#x in place of being stopped", f.argv[0], status)
		}
		return
	}
}

// kill ends the server at once.
func (f *foreign) kill() {
	_ = f.cmd.Process.Kill() // it may have ended
	_ = f.cmd.Wait()         // it was killed
}

// What must hold while things go wrong holds with servers that others have made, which are
// stopped in the middle of anything, killed and started again.
func TestFaultsOfServers(t *testing.T) {
	for name, argv := range map[string][]string{
		"nbdkit":   {"nbdkit", "-f", "-U", "SOCKET", "file", "IMAGE"},
		"qemu-nbd": {"qemu-nbd", "-k", "SOCKET", "-f", "raw", "-t", "-e", "8", "IMAGE"},
	} {
		for _, recovers := range []bool{false, true} {
			run := name
			var o Options
			if recovers {
				run += ", started again"
				o = Options{Connections: 2, Reconnect: time.Minute}
			}
			t.Run(run, func(t *testing.T) {
				path := program(t, argv[0])
				hpditest.RunFaults(t, func(t *testing.T) (hpdi.Device, hpditest.Faults) {
					dir := t.TempDir()
					f := &foreign{t: t, socket: filepath.Join(dir, "s")}
					for _, a := range argv {
						f.argv = append(f.argv, strings.NewReplacer("SOCKET", f.socket, "IMAGE", filepath.Join(dir, "image")).Replace(a))
					}
					f.argv[0] = path
					must(t, os.WriteFile(filepath.Join(dir, "image"), nil, 0o600))
					must(t, os.Truncate(filepath.Join(dir, "image"), hpditest.MinSize))
					f.start()
					t.Cleanup(f.kill)
					d, err := Open(t.Context(), "nbd+unix:///?socket="+f.socket, o)
					must(t, err)
					killed := false
					return d, hpditest.Faults{
						Hold: f.hold,
						Release: func() {
							if !killed {
								f.signal(syscall.SIGCONT)
							}
						},
						Disconnect: func() {
							f.kill()
							if killed = true; recovers {
								f.start()
							}
						},
						Recovers: recovers,
					}
				})
			})
		}
	}
}
