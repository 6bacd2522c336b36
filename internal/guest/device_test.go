package guest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
)

// A device that is larger or smaller than when it was opened says so.
func TestDescribeDevice(t *testing.T) {
	path := filepath.Join(t.TempDir(), "disk")
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for size, want := range map[int64]string{64 * testMiB: "as it was", 64*testMiB + 4096: "as it was", 65 * testMiB: "grown to 65MiB", 63 * testMiB: "SHRUNK to 63MiB"} {
		if err := os.Truncate(path, size); err != nil {
			t.Fatal(err)
		}
		d := describeDevice("p", hpdi.Info{Name: path, Size: 64 * testMiB, Note: "as it was"})
		if !strings.Contains(d.Note, want) {
			t.Errorf("%d bytes: %q, want %q", size, d.Note, want)
		}
	}
}
