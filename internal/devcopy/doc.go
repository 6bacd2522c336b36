// Package devcopy copies one device to another by the device interface alone.
//
// # How it goes
//
// One goroutine keeps a number of pieces in flight on one queue of each device. The source
// is asked what it is made of, as far as it can tell: data is read and written; for what
// reads as zero the target is asked, and what is a hole there already is left alone, the
// rest is zeroed, by writes of zeroes where the target has no better way. At the end the
// target is flushed. A second pass, if it is wanted, reads both and compares.
//
// A target that is larger than the source keeps what lies behind.
package devcopy
