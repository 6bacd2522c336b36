package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// least is the size from which a copy is counted as one of data.
const least = 2048

// moves counts the bytes that a Go program copies within its memory: perf
// records each call of its copy function that is long enough.
type moves struct {
	probe string // its name, "" when nothing is counted
	data  string
	perf  *child
}

// lengthRegister holds the third argument of runtime.memmove.
var lengthRegister = map[string]string{"amd64": "%cx", "arm64": "%x2"}

// startMoves begins to count where it can be done: in Pollux, with perf, on
// processors whose calling convention is known.
func startMoves(ctx context.Context, s server, dir string) (*moves, error) {
	p, ok := s.(*pollux)
	register := lengthRegister[runtime.GOARCH]
	if _, err := exec.LookPath("perf"); err != nil || !ok || register == "" {
		return &moves{}, nil
	}
	m := &moves{probe: "pollux_bench:memmove", data: filepath.Join(dir, "perf.data")}
	_ = m.remove(ctx) // of a benchmark that was killed
	if _, err := output(ctx, time.Minute, "perf", "probe", "-q", "-x", p.program, m.probe+"=runtime.memmove n="+register); err != nil {
		fmt.Fprintln(os.Stderr, "copies within Pollux are not counted, this kernel takes no probe:", err)
		return &moves{}, nil
	}
	// Only the pair's processes: another pair may run the same program.
	pids := strings.Trim(strings.Join(strings.Fields(fmt.Sprint(p.pids())), ","), "[]")
	argv := []string{"perf", "record", "-v", "-m", "8M", "-e", m.probe, "--filter", fmt.Sprintf("n >= %d", least), "-p", pids, "-o", m.data}
	var err error
	if m.perf, err = start(dir, "perf", argv...); err == nil {
		err = m.perf.awaitText(ctx, "mmap", 1)
	}
	if err != nil {
		return nil, errors.Join(err, m.remove(ctx))
	}
	return m, nil
}

// end returns how many bytes were copied, -1 when nothing was counted.
func (m *moves) end(ctx context.Context) (n int64, err error) {
	if m.probe == "" {
		return -1, nil
	}
	m.perf.interrupt()
	out, err := output(ctx, time.Minute, "perf", "script", "-i", m.data, "-F", "trace")
	if err = errors.Join(err, m.remove(ctx)); err != nil {
		return 0, err
	}
	for line := range bytes.Lines(out) {
		if bytes.Contains(line, []byte("LOST")) {
			return 0, fmt.Errorf("perf lost events: %s", line)
		}
		_, text, ok := strings.Cut(string(line), "n=")
		if !ok {
			continue
		}
		v, err := strconv.ParseInt(strings.TrimSpace(text), 0, 64)
		if err != nil {
			return 0, fmt.Errorf("perf script: %q: %w", line, err)
		}
		n += v
	}
	return n, nil
}

// remove takes the probe out of the kernel, also after an interrupt.
func (m *moves) remove(ctx context.Context) error {
	if m.probe == "" {
		return nil
	}
	_, err := output(context.WithoutCancel(ctx), time.Minute, "perf", "probe", "-q", "-d", m.probe)
	return err
}
