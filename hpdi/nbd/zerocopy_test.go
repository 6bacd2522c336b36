package nbd

import (
	"fmt"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/hpditest"
)

// The kernel takes payload from the application's memory and puts it there, as its system
// calls show.
func TestZeroCopyOfSystemCalls(t *testing.T) {
	program(t, "nbdkit")
	hpditest.ZeroCopy(t, func(t *testing.T) hpdi.Device {
		d, err := Open(t.Context(), serve(t, "nbdkit", "-f", "-U", "SOCKET", "memory", fmt.Sprint(hpditest.MinSize)), Options{})
		must(t, err)
		return d
	})
}
