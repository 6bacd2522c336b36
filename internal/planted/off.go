//go:build !planted

package planted

// Has reports whether the program has the fault: never in this build.
func Has(Fault) bool { return false }
