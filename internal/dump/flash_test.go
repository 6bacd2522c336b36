package dump

import (
	"context"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/hpdi/file"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/flashmap"
	"github.com/pollux-storage/pollux/internal/pool"
)

// TestFlash shows a flash device, and what is wrong with one whose table, or policy, is
// damaged.
func TestFlash(t *testing.T) {
	ctx := context.Background()
	r := newRig(t)
	path := filepath.Join(filepath.Dir(r.paths[0]), "flash")
	r.must(os.WriteFile(path, nil, 0o600))
	r.must(os.Truncate(path, 16<<20))
	d, err := file.Open(path, file.Options{Lock: true})
	r.must(err)
	r.must(r.held.AddFlash(ctx, d, flashmap.MinSetBytes))
	_, err = r.held.ChangeFlash(ctx, pool.FlashChange{Classes: map[string]string{r.paths[1]: "sata"}})
	r.must(err)
	if _, err := ReadFlash([]string{path}, all); err == nil {
		t.Error("a device that a guest has locked is shown")
	}
	r.die()
	f, err := ReadFlash([]string{path}, all)
	r.damaged(f.Found, err, "")
	if f.SetBytes != flashmap.MinSetBytes || f.Slots < 100 || f.Used != 0 || len(f.Primaries) != 2 || f.Primaries[1].Number != 2 || f.Primaries[1].Sets != 1024 || !strings.Contains(f.Policy, "sata") {
		t.Errorf("%+v", f)
	}
	if _, err := ReadFlash(r.paths[:1], all); err == nil {
		t.Error("a disk is shown as a flash device")
	}
	if f, err := ReadFlash([]string{path}, Options{Limit: 1}); err != nil || len(f.Primaries) != 1 || f.More != 1 {
		t.Errorf("%+v, %v", f, err)
	}
	// Both places of the policy, wherever it is.
	b, err := os.ReadFile(path)
	r.must(err)
	for at := int64(0); at < 256; at++ {
		if strings.Contains(string(b[at*block.Size:][:block.Size]), "sata") {
			r.flip(path, at*block.Size+3)
		}
	}
	f, err = ReadFlash([]string{path}, all)
	r.damaged(f.Found, err, "the policy")
}
