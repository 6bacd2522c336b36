//go:build !planted

package planted

import "testing"

// TestOff: a program that is built for use has no planted fault, and whether
// it has one takes no code.
func TestOff(t *testing.T) {
	t.Setenv("POLLUX_PLANTED", string(DataSyncMissing))
	if Has(DataSyncMissing) {
		t.Error("a build without the tag has a planted fault")
	}
}
