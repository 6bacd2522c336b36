package guest

import (
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
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
		d := describeDevice("p", hpdi.Info{Name: path, Size: 64 * testMiB, Note: "as it was"}, "")
		if !strings.Contains(d.Note, want) {
			t.Errorf("%d bytes: %q, want %q", size, d.Note, want)
		}
	}
}

// A device that has failed requests is an alert, and one that has lost blocks is
// another: they call for something else.
func TestFaults(t *testing.T) {
	for _, test := range []struct {
		errs control.DeviceErrors
		want []string
	}{
		{control.DeviceErrors{}, nil},
		{control.DeviceErrors{ReadErrors: 1}, []string{"/dev/x of pool p has failed"}},
		{control.DeviceErrors{WriteErrors: 1}, []string{"/dev/x of pool p has failed"}},
		{control.DeviceErrors{Corrupt: 1}, []string{"/dev/x of pool p has lost"}},
		{control.DeviceErrors{ReadErrors: 3, Corrupt: 1}, []string{"/dev/x of pool p has failed", "/dev/x of pool p has lost"}},
	} {
		got := faults("/dev/x", "p", test.errs)
		if !slices.EqualFunc(got, test.want, strings.HasPrefix) {
			t.Errorf("%+v: %q", test.errs, got)
		}
	}
}

// A pool that fills up is an alert at the first and another at the second limit.
func TestFullness(t *testing.T) {
	limits := config.Alerts{FullWarning: 80, FullCritical: 95}
	for free, want := range map[int64]string{1000: "", 201: "", 200: "full to 80 %", 51: "full to 80 %", 50: "full to 95 %", 0: "full to 95 %"} {
		got := fullness(control.PoolStatus{Name: "p", Capacity: 1000, Free: free}, limits)
		if (got == "") != (want == "") || !strings.Contains(got, want) {
			t.Errorf("%d of 1000 free: %q, want %q", free, got, want)
		}
	}
	if got := fullness(control.PoolStatus{}, limits); got != "" {
		t.Errorf("a pool that is not known yet: %q", got)
	}
}
