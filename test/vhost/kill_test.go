package vhost

import (
	"errors"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	driver "github.com/pollux-storage/pollux/hpdi/vhostuser"
)

// A server that is killed with full virtqueues leaves them so that the next one goes on, again
// and again. Its volume is memory: what is proved is that no request is lost, comes twice or
// breaks a queue, and not what is on the disk.
func TestKilled(t *testing.T) {
	dir, err := os.MkdirTemp("", "vu") // a socket's path is short
	must(t, err)
	defer func() { must(t, os.RemoveAll(dir)) }()
	program, sock := filepath.Join(dir, "ceiling"), filepath.Join(dir, "s")
	out, err := exec.Command("go", "build", "-o", program, "github.com/pollux-storage/pollux/bench/ceiling").CombinedOutput()
	if err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	said, err := os.Create(filepath.Join(dir, "said"))
	must(t, err)
	defer func() {
		if b, err := os.ReadFile(said.Name()); t.Failed() && err == nil {
			t.Logf("the servers said: %s", b)
		}
		must(t, said.Close())
	}()
	start := func() *exec.Cmd {
		_ = os.Remove(sock) // of the one before
		cmd := exec.Command(program, "-vhost-user", "-socket", sock, "-size", "4194304")
		cmd.Stdout, cmd.Stderr = said, said
		cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
		must(t, cmd.Start())
		return cmd
	}
	for name, o := range layouts {
		t.Run(name, func(t *testing.T) {
			o.QueueSize, o.Queues, o.Reconnect = 16, 2, 20*time.Second
			cmd := start()
			kill := func() {
				_ = cmd.Process.Kill()
				_ = cmd.Wait() // it was killed
			}
			defer func() { kill() }()
			var d hpdi.Device
			for begun := time.Now(); ; time.Sleep(time.Millisecond) { // another program starts
				if d, err = driver.Open(t.Context(), sock, o); err == nil {
					break
				}
				if time.Since(begun) > 20*time.Second {
					t.Fatal(err)
				}
			}
			const depth, part, kills = 24, 16 << 10, 8
			mem, err := hpdi.Alloc(2 * depth * part)
			must(t, err)
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			stop := make(chan struct{})
			work := func(n int) error {
				rng := rand.New(rand.NewPCG(seed, uint64(n)))
				q, err := d.NewQueue(depth)
				if err != nil {
					return err
				}
				var ready, done []*hpdi.Request
				for i := range depth {
					ready = append(ready, &hpdi.Request{Vec: [][]byte{mem[(n*depth+i)*part:][:part]}})
				}
				for over := false; !over && err == nil; {
					for _, r := range ready {
						r.Op = hpdi.OpRead + hpdi.Op(rng.IntN(3))
						r.Vec[0] = r.Vec[0][:(1+rng.IntN(4))*4096]
						r.Offset = rng.Int64N(1000) * 4096
					}
					if err = q.Submit(ready...); err == nil {
						done, err = q.Wait(1+rng.IntN(8), done[:0])
					}
					for _, r := range done {
						err = errors.Join(err, r.Err)
					}
					ready = append(ready[:0], done...)
					select {
					case <-stop:
						over = true
					default:
					}
				}
				return errors.Join(err, q.Close())
			}
			ended := make(chan error, 2)
			for n := range 2 {
				go func() { ended <- work(n) }()
			}
			rng := rand.New(rand.NewPCG(seed, 3))
			for range kills {
				time.Sleep(time.Duration(10+rng.IntN(30)) * time.Millisecond) // it works
				kill()
				cmd = start()
			}
			close(stop)
			must(t, errors.Join(<-ended, <-ended, d.Close(), hpdi.Free(mem)))
		})
	}
}
