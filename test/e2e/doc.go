// Package e2e tests whole pairs from the outside: the program itself, real
// guests, and the NBD clients that people have. Whatever a test does to a pair,
// at its end the pools recount clean and nothing is left behind.
//
// Tests skip where a client is missing; POLLUX_REQUIRE_CLIENTS=1 makes that a
// failure. POLLUX_SOAK=1 takes a real Debian root file system where otherwise
// files of the host must do. The flag -race-guests builds the program with the
// race detector.
package e2e
