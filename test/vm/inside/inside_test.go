// Package inside holds what is tested inside a virtual machine: its tests are built as
// a program, which package vm puts into a machine and runs there. Elsewhere they skip.
package inside

import (
	"os"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/file"
	"github.com/pollux-storage/pollux/hpdi/hpditest"
)

// TestConformance runs the suite of drivers on the block device that
// POLLUX_VM_DISK names, whatever is on it.
func TestConformance(t *testing.T) {
	disk := os.Getenv("POLLUX_VM_DISK")
	if disk == "" {
		t.Skip("runs in a virtual machine")
	}
	for _, engine := range []file.Engine{file.EngineSync, file.EngineURing} {
		t.Run(string(engine), func(t *testing.T) {
			hpditest.Run(t, func(t *testing.T) hpdi.Device {
				d, err := file.Open(disk, file.Options{Engine: engine, Direct: file.DirectOn, Lock: true})
				if err != nil {
					t.Fatal(err)
				}
				return d
			})
		})
	}
}
