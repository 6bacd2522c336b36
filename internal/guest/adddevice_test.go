package guest

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/partner"
)

// Whether a device with a label may join the pool is the pool's to say, for an
// addition that failed leaves one. Other content is refused before.
func TestAddDeviceContent(t *testing.T) {
	b := newBench(t)
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindServing)
	c := control.NewSocketClient(control.GuestSocket(b.cfg.Dir, "a"))
	defer c.Close()
	dev := filepath.Join(b.cfg.Dir, "more")
	add := func(content string) string {
		t.Helper()
		if err := os.WriteFile(dev, append([]byte(content), make([]byte, 1<<20-len(content))...), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := c.AddDevice(t.Context(), b.storage.last().Name(), control.PoolAdd{Device: dev})
		if err == nil {
			t.Fatal("the store refuses, and yet it was added")
		}
		return err.Error()
	}
	const store = "not supported" // what the store says to everything
	if err := add(""); !strings.Contains(err, store) {
		t.Errorf("a blank device did not reach the store: %s", err)
	}
	if err := add("a file system"); !strings.Contains(err, "holds something that is not Pollux's") {
		t.Errorf("%s", err)
	}
	b.storage.mu.Lock()
	b.storage.labels[dev] = Label{Pool: block.PoolID{9}}
	b.storage.mu.Unlock()
	if err := add("a label"); !strings.Contains(err, store) {
		t.Errorf("a labelled device did not reach the store: %s", err)
	}
}
