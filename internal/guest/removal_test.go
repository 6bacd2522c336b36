package guest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/file"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/pool"
)

// A device that is being removed may be missing or without a label, and then it is for
// the pool to say whether it needs it; with its label it is a device like others.
func TestDisksRemoving(t *testing.T) {
	for _, copies := range []int{1, 2} {
		t.Run(fmt.Sprint(copies), func(t *testing.T) {
			dir := t.TempDir()
			set := config.Pool{Copies: copies}
			for i := range 2 * copies {
				path := filepath.Join(dir, fmt.Sprint(i))
				if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, 64<<20)); err != nil {
					t.Fatal(err)
				}
				set.Devices = append(set.Devices, path)
			}
			var removed []hpdi.Device
			o := opening{open: func(path string) (hpdi.Device, error) { return file.Open(path, file.Options{Lock: true}) },
				without: func(path string, why error) { t.Error(path, why) }, removed: func(d hpdi.Device) { removed = append(removed, d) }}
			devs, err := disks(&set, o)
			if err == nil {
				devs, err = makeMirrors(devs, copies, memory{})
			}
			if err == nil {
				_, err = pool.Create(context.Background(), pool.CreateOptions{Name: "p", Identity: "a", Devices: devs, LogBytes: 1 << 20})
			}
			if err != nil {
				t.Fatal(err)
			}
			closeAll(devs)
			set.Removing = set.Devices[copies:]
			if devs, err = disks(&set, o); err != nil || len(devs) != 2 || len(removed) > 0 {
				t.Fatalf("with its label: %v, %d devices", err, len(devs))
			}
			q, err := devs[1].NewQueue(1)
			if err != nil {
				t.Fatal(err)
			}
			zero := make([]byte, block.Size)
			for _, b := range []int64{0, 128} {
				mem, err := hpdi.AllocPrivate(len(zero))
				if err == nil {
					err = hpdi.Do(q, &hpdi.Request{Op: hpdi.OpWrite, Offset: b * block.Size, Vec: [][]byte{mem}})
				}
				if err = errors.Join(err, hpdi.Free(mem)); err != nil {
					t.Fatal(err)
				}
			}
			_ = q.Close()
			closeAll(devs)
			if devs, err = disks(&set, o); err != nil || len(devs) != 1 || len(removed) != 1 {
				t.Fatalf("without a label: %v, %d devices", err, len(devs))
			}
			closeAll(devs)
			g := &Guest{log: quiet()}
			if err := g.discard(removed[0]); err != nil {
				t.Fatal(err)
			}
			for _, path := range set.Removing {
				d, err := o.open(path)
				if err == nil {
					err = errors.Join(blank(d), d.Close())
				}
				if err != nil {
					t.Errorf("it was removed: %v", err)
				}
			}
			if devs, err = disks(&set, o); err != nil || len(devs) != 1 {
				t.Fatalf("blank: %v, %d devices", err, len(devs))
			}
			closeAll(devs)
			for _, path := range set.Removing {
				if err := os.Remove(path); err != nil {
					t.Fatal(err)
				}
			}
			if devs, err = disks(&set, o); err != nil || len(devs) != 1 {
				t.Fatalf("missing: %v, %d devices", err, len(devs))
			}
			closeAll(devs)
			set.Removing = nil
			o.without = func(string, error) {}
			if _, err = disks(&set, o); err == nil {
				t.Error("a device is missing that nobody removes")
			}
		})
	}
}
