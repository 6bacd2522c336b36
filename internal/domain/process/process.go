// Package process runs guests as processes of this program.
//
// They get sessions of their own, so that neither the end of the agent nor of
// its terminal ends them. What runs is recorded in a file for each guest; a
// restarted agent believes the record only if a process of that number with
// the recorded start time lives, and from then on holds it by a pidfd, which
// cannot come to mean another process.
//
// A process that nobody recorded would be out of every agent's reach. So a
// process must do nothing until it has read a byte from its standard input,
// which it is sent once the record is written; if the agent dies in between,
// it reads the end of the file and must end.
//
// A file of its own is made for what a process writes as it dies. A process that ends in
// good order removes it; so one that is left tells of a failure, also to an agent that
// is not the parent of the process or came later.
package process

import (
	"bytes"
	"cmp"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/crash"
	"github.com/pollux-storage/pollux/internal/domain"
)

// Driver runs guests as processes.
type Driver struct {
	// Program is what runs, with the arguments of the Spec, where that names no other.
	Program string
	// RunDir is where records are kept, LogDir where the guests' output goes.
	RunDir, LogDir string
	// LogMax is the size at which an output file is moved to .1.
	LogMax int64
}

var _ domain.Driver = (*Driver)(nil)

// record is what is kept of a process.
type record struct {
	PID       int       `json:"pid"`
	StartTime uint64    `json:"start_time"` // field 22 of /proc/PID/stat
	Inc       uint64    `json:"incarnation"`
	Started   time.Time `json:"started"`
	Program   string    `json:"program,omitempty"`
}

func (d *Driver) recordPath(name string) string {
	return filepath.Join(d.RunDir, "guest-"+name+".json")
}

func (d *Driver) logPath(name string) string { return filepath.Join(d.LogDir, "guest-"+name+".log") }

// proc is a domain.
type proc struct {
	name   string
	rec    record
	pidfd  *os.File
	ended  chan struct{}
	reason string // valid when ended is closed
}

// Start begins a process and records it before it does anything.
func (d *Driver) Start(s domain.Spec) (domain.Domain, error) {
	d.makeLastWords(s.Name, s.Inc)
	p, release, err := d.begin(s)
	if err != nil {
		return nil, err
	}
	defer release.Close()
	if err := d.name(p, s.Inc); err != nil {
		_ = p.Kill()
		<-p.ended
		return nil, err
	}
	// A process that has ended meanwhile does not read; the watch tells.
	_, _ = release.Write([]byte{1})
	return p, nil
}

// begin begins a process, which reads from the other end of release before it does
// anything.
func (d *Driver) begin(s domain.Spec) (p *proc, release *os.File, err error) {
	// A full log directory must not keep a guest from serving. Whoever calls
	// Tidy from time to time learns of it.
	_ = d.Tidy(s.Name)
	log, err := os.OpenFile(d.logPath(s.Name), os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o600)
	if err != nil {
		return nil, nil, fmt.Errorf("log of guest %s: %w", s.Name, err)
	}
	defer log.Close()
	program := cmp.Or(s.Program, d.Program)
	cmd := exec.Command(program, s.Args...)
	cmd.Dir = "/" // keep no file system of the caller's busy
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = s.Files
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	cmd.Env = append(os.Environ(), "GOTRACEBACK=all")
	await, release, err := os.Pipe()
	if err != nil {
		return nil, nil, fmt.Errorf("start guest %s: %w", s.Name, err)
	}
	cmd.Stdin = await
	err = cmd.Start()
	await.Close()
	if err != nil {
		_ = release.Close()
		return nil, nil, fmt.Errorf("start guest %s: %w", s.Name, err)
	}
	p = &proc{name: s.Name, rec: record{PID: cmd.Process.Pid, Program: program}, ended: make(chan struct{})}
	// Not yet waited for, the process keeps its number even if it has ended.
	st, err := readStat(p.rec.PID)
	if err == nil {
		p.rec.StartTime = st.startTime
		p.pidfd, err = openPidfd(p.rec.PID)
	}
	if err != nil {
		_ = release.Close()
		_ = cmd.Process.Kill()
		_ = cmd.Wait()
		return nil, nil, fmt.Errorf("start guest %s: %w", s.Name, err)
	}
	go p.watch(cmd)
	return p, release, nil
}

// makeLastWords makes the file for what a run of a guest writes as it dies. Without it
// the guest serves all the same.
func (d *Driver) makeLastWords(name string, inc uint64) {
	_ = os.WriteFile(config.LastWordsPath(d.RunDir, name, inc), nil, 0o600)
}

// name records a process as a run of its guest.
func (d *Driver) name(p *proc, inc uint64) error {
	p.rec.Inc, p.rec.Started = inc, time.Now()
	if err := config.WriteRunJSON(d.recordPath(p.name), p.rec); err != nil {
		return fmt.Errorf("start guest %s: %w", p.name, err)
	}
	return nil
}

// Find returns the recorded process of a guest.
func (d *Driver) Find(name string) (domain.Domain, error) {
	b, err := os.ReadFile(d.recordPath(name))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, fmt.Errorf("record of guest %s: %w", name, err)
	}
	p := &proc{name: name, ended: make(chan struct{})}
	if err = json.Unmarshal(b, &p.rec); err == nil && p.rec.PID <= 0 {
		err = fmt.Errorf("process number %d", p.rec.PID)
	}
	if err != nil {
		return nil, fmt.Errorf("record of guest %s in %s: %w; remove it if no process of this guest runs", name, d.recordPath(name), err)
	}
	lives, err := p.find()
	if err != nil {
		return nil, fmt.Errorf("process %d of guest %s: %w", p.rec.PID, name, err)
	}
	if !lives {
		p.reason = "it ended while there was no agent"
		close(p.ended)
		return p, nil
	}
	go p.watch(nil)
	return p, nil
}

// find opens the recorded process and says whether it lives. What cannot be
// found out is an error: a guest that is taken for dead is replaced.
func (p *proc) find() (lives bool, err error) {
	p.pidfd, err = openPidfd(p.rec.PID)
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) || errors.Is(err, unix.EINVAL) {
		// Nothing has the number, or, as kernels say in two ways, a thread has
		// it that is no process: the recorded one ended, and the number was
		// given out again.
		return false, nil
	}
	if err != nil {
		return false, err
	}
	// The start time is read after the pidfd was opened: if it is the recorded
	// one, the pidfd is of the recorded process.
	st, err := readStat(p.rec.PID)
	if err == nil && st.startTime == p.rec.StartTime && st.state != 'Z' {
		return true, nil
	}
	_ = p.pidfd.Close()
	p.pidfd = nil
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return false, nil // it ended between the two looks
	}
	return false, err
}

// Forget removes the record of a guest.
func (d *Driver) Forget(name string) error {
	left, _ := filepath.Glob(config.LastWordsPath(d.RunDir, name, 0) + "*")
	var errs []error
	for _, path := range append(left, d.recordPath(name)) {
		if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(errs...)
}

// Remains returns what a process that has ended left, unless it ended in good order.
func (d *Driver) Remains(dom domain.Domain, limit int64) (*domain.Remains, error) {
	path := config.LastWordsPath(d.RunDir, dom.Name(), dom.Inc())
	said, size, err := head(path, limit)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, nil
	}
	// The log has it, too, and what is looked for is what came before.
	log, lerr := crash.Tail(d.logPath(dom.Name()), limit+min(size, mostSaid))
	log = without(log, said, size)
	return &domain.Remains{Said: said, Log: log[max(0, int64(len(log))-limit):]}, errors.Join(err, lerr, os.Remove(path))
}

// mostSaid bounds what is read of a log to find what came before a process's last words;
// the runtime writes about 1 KiB for each goroutine.
const mostSaid = 16 << 20

// without returns a log without a piece of so many bytes that begins like said.
func without(log, said []byte, size int64) []byte {
	i := bytes.LastIndex(log, said[:min(len(said), 512)])
	if i < 0 || len(said) == 0 {
		return log
	}
	return append(log[:i:i], log[min(int64(i)+size, int64(len(log))):]...)
}

// head returns the first bytes of a file, at most limit of them, and how many it has.
func head(path string, limit int64) ([]byte, int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, 0, err
	}
	p, err := io.ReadAll(io.LimitReader(f, limit))
	return p, st.Size(), err
}

// Tidy copies an output file that has grown too large aside and empties it.
// The guest goes on writing at its end, which O_APPEND makes the beginning;
// what it writes between the two steps is lost.
func (d *Driver) Tidy(name string) error {
	path := d.logPath(name)
	st, err := os.Stat(path)
	if err != nil || d.LogMax <= 0 || st.Size() < d.LogMax {
		return nil
	}
	in, err := os.Open(path)
	if err != nil {
		return fmt.Errorf("log of guest %s: %w", name, err)
	}
	defer in.Close()
	out, err := os.OpenFile(path+".1", os.O_WRONLY|os.O_CREATE|os.O_TRUNC, 0o600)
	if err != nil {
		return fmt.Errorf("log of guest %s: %w", name, err)
	}
	if _, err := in.Seek(max(0, st.Size()-d.LogMax), io.SeekStart); err == nil {
		_, err = io.Copy(out, io.LimitReader(in, d.LogMax))
		if err != nil {
			_ = out.Close()
			return fmt.Errorf("log of guest %s: %w", name, err)
		}
	}
	if err := errors.Join(out.Close(), os.Truncate(path, 0)); err != nil {
		return fmt.Errorf("log of guest %s: %w", name, err)
	}
	return nil
}

// openPidfd returns a pidfd that the runtime's poller can wait on.
func openPidfd(pid int) (*os.File, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK)
	if err != nil {
		return nil, fmt.Errorf("pidfd of %d: %w", pid, err)
	}
	return os.NewFile(uintptr(fd), "pidfd"), nil
}

// watch waits for the end of the process, reaps it when it is a child, and
// closes ended. The pidfd becomes readable when the last thread has gone.
func (p *proc) watch(cmd *exec.Cmd) {
	p.reason = "its process ended"
	if rc, err := p.pidfd.SyscallConn(); err == nil {
		if rc.Read(func(fd uintptr) bool { return readable(fd, 0) }) != nil {
			// The poller does not take the pidfd, which says nothing of the
			// process: a thread waits for it.
			_ = rc.Control(func(fd uintptr) {
				for !readable(fd, -1) {
				}
			})
		}
	}
	if cmd != nil {
		_ = cmd.Wait() // its error says the same as the state
		p.reason = describe(cmd.ProcessState)
	}
	close(p.ended)
}

// readable waits up to so many milliseconds, -1 for ever.
func readable(pidfd uintptr, wait int) bool {
	fds := []unix.PollFd{{Fd: int32(pidfd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, wait)
	return err == nil && n == 1
}

func describe(st *os.ProcessState) string {
	if st == nil {
		return "its process ended"
	}
	if ws, ok := st.Sys().(syscall.WaitStatus); ok && ws.Signaled() {
		return "killed by " + unix.SignalName(ws.Signal())
	}
	switch st.ExitCode() {
	case 0:
		return "it ended by itself"
	case domain.ExitStuck:
		return "its watchdog ended it, because it did nothing any more"
	}
	return fmt.Sprintf("it ended with status %d; see its log", st.ExitCode())
}

func (p *proc) Name() string           { return p.name }
func (p *proc) Inc() uint64            { return p.rec.Inc }
func (p *proc) PID() int               { return p.rec.PID }
func (p *proc) Program() string        { return p.rec.Program }
func (p *proc) Started() time.Time     { return p.rec.Started }
func (p *proc) Ended() <-chan struct{} { return p.ended }
func (p *proc) Reason() string         { return p.reason }
func (p *proc) Kill() error            { return p.signal(unix.SIGKILL) }
func (p *proc) Terminate() error       { return p.signal(unix.SIGTERM) }
func (p *proc) Pause() error           { return p.signal(unix.SIGSTOP) }
func (p *proc) Resume() error          { return p.signal(unix.SIGCONT) }

// signal reaches this process or none: the pidfd never means another one.
func (p *proc) signal(sig unix.Signal) error {
	select {
	case <-p.ended:
		return fmt.Errorf("guest %s has ended: %w", p.name, os.ErrProcessDone)
	default:
	}
	var err error
	rc, cerr := p.pidfd.SyscallConn()
	if cerr == nil {
		cerr = rc.Control(func(fd uintptr) { err = unix.PidfdSendSignal(int(fd), sig, nil, 0) })
	}
	if err = errors.Join(cerr, err); err != nil {
		return fmt.Errorf("%s to guest %s (process %d): %w", unix.SignalName(sig), p.name, p.rec.PID, err)
	}
	return nil
}

type stat struct {
	state     byte
	startTime uint64
}

func readStat(pid int) (stat, error) {
	b, err := os.ReadFile("/proc/" + strconv.Itoa(pid) + "/stat")
	if err != nil {
		return stat{}, err
	}
	return parseStat(b)
}

// parseStat reads fields 3 and 22. The second field is the program's name in
// parentheses and may hold anything, parentheses too.
func parseStat(b []byte) (stat, error) {
	i := bytes.LastIndexByte(b, ')')
	if i < 0 {
		return stat{}, errors.New("process statistics without a name")
	}
	f := strings.Fields(string(b[i+1:]))
	if len(f) < 20 || len(f[0]) != 1 {
		return stat{}, errors.New("process statistics are too short")
	}
	t, err := strconv.ParseUint(f[19], 10, 64)
	if err != nil {
		return stat{}, fmt.Errorf("start time of a process: %w", err)
	}
	return stat{state: f[0][0], startTime: t}, nil
}
