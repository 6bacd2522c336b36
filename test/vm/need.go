package vm

import (
	"errors"
	"io/fs"
	"os"
	"strings"
	"testing"
)

// Programs returns what a test that boots machines needs beside others.
func Programs(more ...string) []string { return append([]string{"qemu-system-x86_64", "ldd"}, more...) }

// NeedKernel returns the kernel for machines, and skips the test where there is none, or
// fails it when POLLUX_REQUIRE_CLIENTS=1 says that all must be there.
func NeedKernel(t testing.TB) Kernel {
	t.Helper()
	k, err := FindKernel()
	switch {
	case errors.Is(err, fs.ErrNotExist) && os.Getenv("POLLUX_REQUIRE_CLIENTS") != "1":
		t.Skip(err)
	case err != nil:
		t.Fatal(err)
	}
	return k
}

// Complaints returns the lines of a kernel's log that tell of a disk or a file system in
// trouble, or of a fault of the kernel.
func Complaints(log string) []string {
	var bad []string
	for line := range strings.Lines(log) {
		for _, word := range []string{"I/O error", "EXT4-fs error", "EXT4-fs warning", "Buffer I/O", "JBD2: ", "Remounting filesystem", "blocked for more than", "BUG:", "Oops", "rejecting I/O", "timed out"} {
			if strings.Contains(line, word) {
				bad = append(bad, strings.TrimSpace(line))
				break
			}
		}
	}
	return bad
}
