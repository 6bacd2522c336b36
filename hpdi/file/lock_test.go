package file

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
)

// writerEnv makes the test binary the writer that TestLockOutlivesKill kills;
// its value is "engine path".
const writerEnv = "HPDI_FILE_TEST_WRITER"

func TestMain(m *testing.M) {
	if v := os.Getenv(writerEnv); v != "" {
		engine, path, _ := strings.Cut(v, " ")
		fmt.Fprintln(os.Stderr, "writer:", writeForEver(path, Engine(engine)))
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// killBlocks is the number of blocks that the writer overwrites.
const killBlocks = 64

// writeForEver keeps direct writes of killBlocks blocks in flight.
func writeForEver(path string, engine Engine) error {
	d, err := Open(path, Options{Lock: true, Engine: engine})
	if err != nil {
		return err
	}
	q, err := d.NewQueue(killBlocks)
	if err != nil {
		return err
	}
	mem, err := hpdi.Alloc(killBlocks * BlockSize)
	if err != nil {
		return err
	}
	for i := range mem {
		mem[i] = 0xee
	}
	reqs := make([]*hpdi.Request, killBlocks)
	for i := range reqs {
		reqs[i] = &hpdi.Request{Op: hpdi.OpWrite, Offset: int64(i * BlockSize), Vec: [][]byte{mem[i*BlockSize : (i+1)*BlockSize]}}
	}
	fmt.Println("writing")
	for {
		if err := q.Submit(reqs...); err != nil {
			return err
		}
		if reqs, err = q.Wait(1, reqs[:0]); err != nil {
			return err
		}
		for _, r := range reqs {
			if r.Err != nil {
				return r.Err
			}
		}
	}
}

func TestLock(t *testing.T) {
	path := create(t, t.TempDir(), testSize)
	d, err := Open(path, Options{Lock: true})
	if err != nil {
		t.Fatal(err)
	}
	for _, readOnly := range []bool{false, true} {
		if d, err := Open(path, Options{Lock: true, ReadOnly: readOnly}); !errors.Is(err, hpdi.ErrLocked) || !strings.Contains(err.Error(), path) {
			t.Errorf("second lock: %v, %v, want %v", d, err, hpdi.ErrLocked)
		}
	}
	open(t, path, Options{ReadOnly: true}) // asks for no lock and gets in
	q := newQueue(t, d, 1)
	if err := d.Close(); err == nil {
		t.Error("device closed under an open queue")
	}
	if _, err := Open(path, Options{Lock: true}); !errors.Is(err, hpdi.ErrLocked) {
		t.Errorf("a refused close gave up the lock: %v", err)
	}
	closeQueue(t, q)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	// An orderly close gives up the lock at once.
	open(t, path, Options{Lock: true})
}

// TestLockOutlivesKill kills a process in the middle of direct writes, takes
// the lock as soon as it can be had, and then overwrites the blocks: a write of
// the dead process that arrived later would show.
func TestLockOutlivesKill(t *testing.T) {
	rounds := 12
	if testing.Short() {
		rounds = 2
	}
	for _, engine := range engines(t) {
		t.Run(string(engine), func(t *testing.T) {
			path := create(t, t.TempDir(), testSize)
			var longest time.Duration
			for range rounds {
				longest = max(longest, killWriter(t, path, engine))
			}
			t.Logf("from the reaping of the writer to the lock: at most %v", longest)
		})
	}
}

// killWriter returns how long after the writer was reaped the lock came free.
func killWriter(t *testing.T, path string, engine Engine) time.Duration {
	cmd := exec.Command(os.Args[0])
	cmd.Env = append(os.Environ(), writerEnv+"="+string(engine)+" "+path)
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != "writing\n" {
		_ = cmd.Process.Kill() // it may have ended by itself
		_ = cmd.Wait()
		t.Fatalf("the writer said %q: %v", line, err)
	}
	if _, err := Open(path, Options{Lock: true}); !errors.Is(err, hpdi.ErrLocked) {
		t.Errorf("lock while the writer lives: %v", err)
	}
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // "signal: killed"
	reaped := time.Now()
	d, err := Open(path, Options{Lock: true})
	for errors.Is(err, hpdi.ErrLocked) {
		runtime.Gosched()
		d, err = Open(path, Options{Lock: true})
	}
	took := time.Since(reaped)
	if err != nil {
		t.Fatal(err)
	}
	q := newQueue(t, d, 1)
	mem := alloc(t, killBlocks*BlockSize)
	if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpWrite, Vec: [][]byte{mem}}); err != nil {
		t.Fatal(err)
	}
	for range 20 {
		if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpFlush}, &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{mem}}); err != nil {
			t.Fatal(err)
		}
		for i, b := range mem {
			if b != 0 {
				t.Fatalf("a write of the dead process arrived at byte %d after the lock was free", i)
			}
		}
	}
	closeQueue(t, q)
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	return took
}
