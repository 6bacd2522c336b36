// Package devbench measures a device by the device interface alone.
//
// Each queue has a goroutine of its own, which keeps a number of requests in flight on its
// part of the range. A part is not shared, so that what was written can be proved: with
// Options.Verify each block that is written says where it belongs and which write it is
// of, and is read back at the end. Latency is from Submit until Wait has returned the
// request, in a histogram whose steps are less than 1/32 of their value.
package devbench
