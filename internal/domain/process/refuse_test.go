package process

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/domain"
)

// onlyFiles lets this process open no more than n files beyond those it has.
func onlyFiles(t *testing.T, n int) (restore func()) {
	t.Helper()
	next, err := unix.Dup(0) // the lowest free number
	if err != nil {
		t.Fatal(err)
	}
	_ = unix.Close(next)
	var old syscall.Rlimit
	if err := syscall.Getrlimit(syscall.RLIMIT_NOFILE, &old); err != nil {
		t.Fatal(err)
	}
	if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &syscall.Rlimit{Cur: uint64(next + n), Max: old.Max}); err != nil {
		t.Fatal(err)
	}
	return func() {
		if err := syscall.Setrlimit(syscall.RLIMIT_NOFILE, &old); err != nil {
			t.Fatal(err)
		}
	}
}

// An agent that is short of file descriptors does not take a guest that lives
// for one that has ended, or for one that never was: it would start another.
func TestFindWithoutDescriptors(t *testing.T) {
	d := driver(t)
	p := start(t, d, "exec sleep 1000")
	for n := range 2 {
		restore := onlyFiles(t, n)
		q, err := d.Find("a")
		restore()
		if !errors.Is(err, unix.EMFILE) || !strings.Contains(err.Error(), "guest a") {
			t.Errorf("%d descriptors: %v, %v", n, q, err)
		}
	}
	q, err := d.Find("a")
	if err != nil {
		t.Fatal(err)
	}
	if err := q.Kill(); err != nil {
		t.Fatal(err)
	}
	ended(t, p)
	ended(t, q)
}

// The recorded number belongs to a thread by now, as after a reboot: the guest
// has ended, and nothing hinders the start of the next.
func TestFindNumberOfThread(t *testing.T) {
	d := driver(t)
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	tid, done := make(chan int), make(chan struct{})
	defer close(done)
	go func() { // of two locked threads one at least is not the first
		runtime.LockOSThread()
		tid <- unix.Gettid()
		<-done
	}()
	n := <-tid
	if n == unix.Getpid() {
		n = unix.Gettid()
	}
	if err := os.WriteFile(d.recordPath("a"), fmt.Appendf(nil, `{"pid": %d, "start_time": 1}`, n), 0o600); err != nil {
		t.Fatal(err)
	}
	q, err := d.Find("a")
	if err != nil {
		t.Fatal(err)
	}
	ended(t, q)
}

// A process is watched even where the runtime's poller refuses to.
func TestWatchWithoutPoller(t *testing.T) {
	d := driver(t)
	p := start(t, d, "exec sleep 1000")
	fd, err := unix.PidfdOpen(p.PID(), 0) // blocking: the poller does not take it
	if err != nil {
		t.Fatal(err)
	}
	w := &proc{name: "a", rec: p.(*proc).rec, pidfd: os.NewFile(uintptr(fd), "pidfd"), ended: make(chan struct{})}
	defer w.pidfd.Close()
	go w.watch(nil)
	select {
	case <-w.Ended():
		t.Error("a living process was taken for dead")
	case <-time.After(50 * time.Millisecond):
	}
	if err := p.Kill(); err != nil {
		t.Fatal(err)
	}
	ended(t, w)
	ended(t, p)
}

// A record that cannot be read names its file; nobody is taken for dead.
func TestDamagedRecord(t *testing.T) {
	d := driver(t)
	for _, text := range []string{"", "{", `{"pid": 0}`, `{"pid": -7}`, `{"pid": "x"}`} {
		if err := os.WriteFile(d.recordPath("a"), []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
		q, err := d.Find("a")
		if err == nil || !strings.Contains(err.Error(), d.recordPath("a")) || !strings.Contains(err.Error(), "remove it") {
			t.Errorf("%q: %v, %v", text, q, err)
		}
	}
	if err := os.Remove(d.recordPath("a")); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(d.recordPath("a"), 0o700); err != nil {
		t.Fatal(err)
	}
	if q, err := d.Find("a"); err == nil || !strings.Contains(err.Error(), d.recordPath("a")) {
		t.Errorf("a folder: %v, %v", q, err)
	}
	if err := os.WriteFile(filepath.Join(d.recordPath("a"), "x"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := d.Forget("a"); err == nil || !strings.Contains(err.Error(), d.recordPath("a")) {
		t.Errorf("forget a folder: %v", err)
	}
}

// A guest that cannot be recorded never begins, and is gone.
func TestStartWithoutRecord(t *testing.T) {
	d := driver(t)
	d.RunDir = filepath.Join(d.RunDir, "missing")
	began := filepath.Join(d.LogDir, "began")
	p, err := d.Start(domain.Spec{Name: "a", Args: []string{"-c", `test "$(head -c 1 | wc -c)" = 1 && touch ` + began}})
	if !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "start guest a") {
		t.Errorf("%v, %v", p, err)
	}
	if _, err := os.Stat(began); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("it began all the same: %v", err)
	}
	if pid, err := unix.Wait4(-1, nil, unix.WNOHANG, nil); !errors.Is(err, unix.ECHILD) {
		t.Errorf("child %d is left: %v", pid, err)
	}

	d = driver(t)
	d.LogDir = filepath.Join(d.LogDir, "missing")
	if _, err := d.Start(domain.Spec{Name: "a", Args: []string{"-c", "true"}}); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "log of guest a") {
		t.Errorf("without a place for its log: %v", err)
	}
}

// A log that cannot be put aside is an error of Tidy, which leaves it as it
// is, and no reason for a guest not to start.
func TestLogCannotBePutAside(t *testing.T) {
	d := driver(t)
	text := strings.Repeat("line\n", 30)
	if err := os.WriteFile(d.logPath("a"), []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink("/dev/full", d.logPath("a")+".1"); err != nil {
		t.Fatal(err)
	}
	if err := d.Tidy("a"); !errors.Is(err, unix.ENOSPC) || !strings.Contains(err.Error(), "log of guest a") {
		t.Errorf("no room: %v", err)
	}
	if err := os.Remove(d.logPath("a") + ".1"); err != nil {
		t.Fatal(err)
	}
	if err := os.Mkdir(d.logPath("a")+".1", 0o700); err != nil {
		t.Fatal(err)
	}
	if err := d.Tidy("a"); !errors.Is(err, unix.EISDIR) || !strings.Contains(err.Error(), d.logPath("a")+".1") {
		t.Errorf("a folder in the way: %v", err)
	}
	p := start(t, d, "echo begun")
	ended(t, p)
	if got, err := os.ReadFile(d.logPath("a")); err != nil || string(got) != text+"begun\n" {
		t.Errorf("the log reads %q, %v", got, err)
	}
}

// What is in the way of a record or an output file is told; what never was there
// is in nobody's way.
func TestForgetAndTidyOfNothing(t *testing.T) {
	d := driver(t)
	if err := errors.Join(d.Forget("a"), d.Tidy("a")); err != nil {
		t.Errorf("of a guest that never ran: %v", err)
	}
	if err := os.Mkdir(d.logPath("a"), 0o700); err != nil {
		t.Fatal(err)
	}
	d.LogMax = 1
	if err := d.Tidy("a"); err == nil || !strings.Contains(err.Error(), "log of guest a") {
		t.Errorf("a folder was tidied: %v", err)
	}
}

func TestParseStat(t *testing.T) {
	const rest = "1 1 0 -1 4194560 1 2 3 4 5 6 7 8 20 0 1 0 "
	st, err := parseStat([]byte("1 (a) b) S 0 " + rest + "4711 1 2"))
	if err != nil || st != (stat{'S', 4711}) {
		t.Errorf("%+v, %v", st, err)
	}
	for text, want := range map[string]string{
		"1 a S 0":                       "without a name",
		"1 (a) S 0 1":                   "too short",
		"1 (a) SS 0 " + rest + "4711 1": "too short",
		"1 (a) S 0 " + rest + "-4711 1": "start time",
	} {
		if _, err := parseStat([]byte(text)); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%q: %v", text, err)
		}
	}
}
