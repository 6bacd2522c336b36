// Package fenced stores words into memory that two sides share, each of which stores a word
// of its own and then loads the other's: one of the two must see the other.
//
// On memory of Go's heap the stores of sync/atomic have that order. On other memory the race
// detector makes them plain stores (racecallatomic in the runtime passes such addresses to a
// path without a fence), so that a program built with it could sleep for ever: each side looks
// whether it has to wake the other, and neither is seen. A swap is a fence everywhere, and
// where an atomic store is a swap anyway, as on amd64, it costs nothing.
package fenced

import "sync/atomic"

// Store64 stores v after everything that was written before, and before all loads that follow.
func Store64(w *atomic.Uint64, v uint64) { w.Swap(v) }

// Store32 is Store64 for an aligned word of four bytes.
func Store32(w *uint32, v uint32) { atomic.SwapUint32(w, v) }
