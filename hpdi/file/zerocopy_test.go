package file_test

import (
	"path/filepath"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/file"
	"github.com/pollux-storage/pollux/hpdi/hpditest"
)

// What preadv and pwritev are given is the application's own memory.
func TestZeroCopyOfSystemCalls(t *testing.T) {
	hpditest.ZeroCopy(t, func(t *testing.T) hpdi.Device {
		path := filepath.Join(t.TempDir(), "disk")
		if err := file.Create(path, hpditest.MinSize); err != nil {
			t.Fatal(err)
		}
		d, err := file.Open(path, file.Options{Engine: file.EngineSync})
		if err != nil {
			t.Fatal(err)
		}
		return d
	})
}
