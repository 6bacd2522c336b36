package guest

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/config"
)

// A spare process has done what takes long and does not depend on the moment when it
// is needed. It holds nothing of the pair, reads its settings when it is told its
// number, and ends when its input does.

// maxNumber is the longest line with a number.
const maxNumber = 21

// awaitNumber returns the number that a spare process is told, or 0 when it is not
// needed.
func awaitNumber(stdin io.Reader) (uint64, error) {
	line, err := bufio.NewReader(io.LimitReader(stdin, maxNumber)).ReadString('\n')
	if errors.Is(err, io.EOF) && line == "" {
		return 0, nil
	}
	if err != nil {
		return 0, fmt.Errorf("number of this start: %w", err)
	}
	inc, err := strconv.ParseUint(strings.TrimSuffix(line, "\n"), 10, 64)
	if err == nil && inc == 0 {
		err = errors.New("it is 0")
	}
	if err != nil {
		return 0, fmt.Errorf("number of this start: %w", err)
	}
	return inc, nil
}

// letGo closes the sockets that a spare process has inherited. A process may take a
// while to end, and the next agent, which opens them when no guest is left, shall find
// their addresses free.
func letGo() {
	for fd := firstFD; fd < firstFD+mostFDs; fd++ {
		var st unix.Stat_t
		if unix.Fstat(fd, &st) == nil && st.Mode&unix.S_IFMT == unix.S_IFSOCK {
			_ = unix.Close(fd) // nothing was written to it
		}
	}
}

// warm does once what this process will do when it is needed, so that its code and
// tables are in place. Nothing of it has to succeed.
func warm(dir string) {
	if cfg, err := config.ReadEffective(dir); err == nil {
		_, _ = PlanMemory(cfg)
	}
	maps, err := os.ReadFile("/proc/self/maps")
	if err != nil {
		return
	}
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		return
	}
	for line := range strings.Lines(string(maps)) {
		var from, to uintptr
		if _, err := fmt.Sscanf(line, "%x-%x r", &from, &to); err != nil || !strings.HasSuffix(strings.TrimSpace(line), exe) {
			continue
		}
		// The program's text and constants: each page that is touched for the first
		// time costs a fault. Written to, they would be this process's own.
		_, _, _ = unix.Syscall(unix.SYS_MADVISE, from, to-from, unix.MADV_POPULATE_READ)
	}
}
