// Package hpditest holds what every HPDI driver must pass: [Run], one
// conformance suite, and [Bench], one measurement.
//
// The suite knows a device only through the interface. It assumes nothing
// about the contents of a fresh device, about the order of completions, or
// about what discarded blocks read as. Random tests take a seed, print it, and
// repeat a run when POLLUX_SEED is set to it.
package hpditest

import (
	"bytes"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
)

// MinSize is the size in bytes that a device must have for [Run].
const MinSize = 4 << 20

// Run subjects devices to the suite. Each subtest calls open once, for a
// device of at least [MinSize] bytes that may be written to, and closes it.
func Run(t *testing.T, open func(t *testing.T) hpdi.Device) {
	tests := []struct {
		name string
		run  func(t *testing.T, d hpdi.Device)
	}{
		{"Info", testInfo},
		{"Properties", testProperties},
		{"ReadBack", testReadBack},
		{"Vectors", testVectors},
		{"ManyVectors", testManyVectors},
		{"GoHeap", testGoHeap},
		{"Edges", testEdges},
		{"Malformed", testMalformed},
		{"MalformedAmongGood", testMalformedAmongGood},
		{"Empty", testEmpty},
		{"ManyInFlight", testManyInFlight},
		{"WaitBounds", testWaitBounds},
		{"Flush", testFlush},
		{"Durable", testDurable},
		{"MixedInFlight", testMixedInFlight},
		{"Discard", testDiscard},
		{"WriteZeroes", testWriteZeroes},
		{"Queues", testQueues},
		{"QueueMovesBetweenGoroutines", testQueueMoves},
		{"CloseQueue", testCloseQueue},
		{"CloseDevice", testCloseDevice},
		{"Register", testRegister},
		{"Status", testStatus},
		{"Event", testEvent},
		{"Polling", testPolling},
		{"CancelNothing", testCancelNothing},
		{"Cancel", testCancel},
		{"Deadline", testDeadline},
		{"Random", testRandom},
		{"RandomCancel", testRandomCancel},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			d := open(t)
			defer func() {
				if err := d.Close(); err != nil && !errors.Is(err, hpdi.ErrClosed) {
					t.Errorf("close device: %v", err)
				}
			}()
			info := d.Info()
			if info.Size < MinSize {
				t.Fatalf("device has %d bytes, the suite needs %d", info.Size, MinSize)
			}
			tt.run(t, d)
		})
	}
}

// seed returns the seed of a random test and prints it.
func seed(t *testing.T) uint64 {
	s := rand.Uint64()
	if v := os.Getenv("POLLUX_SEED"); v != "" {
		var err error
		if s, err = strconv.ParseUint(v, 10, 64); err != nil {
			t.Fatalf("POLLUX_SEED: %v", err)
		}
	}
	t.Logf("seed %d (POLLUX_SEED=%d repeats this run)", s, s)
	return s
}

// alloc returns n bytes of mapped memory for the length of the test.
func alloc(t testing.TB, n int) []byte {
	t.Helper()
	mem, err := hpdi.Alloc(n)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := hpdi.Free(mem); err != nil {
			t.Error(err)
		}
	})
	return mem
}

// newQueue returns a queue that must be closed by closeQueue.
func newQueue(t testing.TB, d hpdi.Device, depth int) hpdi.Queue {
	t.Helper()
	q, err := d.NewQueue(depth)
	if err != nil {
		t.Fatalf("new queue of depth %d: %v", depth, err)
	}
	return q
}

func closeQueue(t testing.TB, q hpdi.Queue) {
	t.Helper()
	if err := q.Close(); err != nil {
		t.Errorf("close queue: %v", err)
	}
}

// do runs requests to their end and fails the test on an error.
func do(t testing.TB, q hpdi.Queue, reqs ...*hpdi.Request) {
	t.Helper()
	if err := hpdi.Do(q, reqs...); err != nil {
		t.Fatal(err)
	}
}

func read(off int64, vec ...[]byte) *hpdi.Request {
	return &hpdi.Request{Op: hpdi.OpRead, Offset: off, Vec: vec}
}

func write(off int64, vec ...[]byte) *hpdi.Request {
	return &hpdi.Request{Op: hpdi.OpWrite, Offset: off, Vec: vec}
}

// fill makes p the contents that version v of the device has from off on:
// every eight bytes differ from all others.
func fill(p []byte, off int64, v uint64) {
	for i := 0; i+8 <= len(p); i += 8 {
		x := (uint64(off) + uint64(i)) * 0x9e3779b97f4a7c15
		binary.LittleEndian.PutUint64(p[i:], x^v*0xd6e8feb86659fd93)
	}
}

// wantFill fails the test unless p is what fill makes.
func wantFill(t testing.TB, p []byte, off int64, v uint64) {
	t.Helper()
	want := make([]byte, len(p))
	fill(want, off, v)
	wantBytes(t, p, want, off)
}

// wantBytes fails the test at the first byte where got differs from want.
func wantBytes(t testing.TB, got, want []byte, off int64) {
	t.Helper()
	if bytes.Equal(got, want) {
		return
	}
	for i := range want {
		if got[i] != want[i] {
			t.Fatalf("byte %d of the device is %#02x, want %#02x", off+int64(i), got[i], want[i])
		}
	}
}

// collect waits until n requests of q have completed and checks that each is
// one of reqs and comes once.
func collect(t testing.TB, q hpdi.Queue, reqs []*hpdi.Request) {
	t.Helper()
	open := make(map[*hpdi.Request]bool, len(reqs))
	for _, r := range reqs {
		open[r] = true
	}
	var done []*hpdi.Request
	for len(open) > 0 {
		var err error
		if done, err = q.Wait(1, done[:0]); err != nil {
			t.Fatalf("wait: %v", err)
		}
		if len(done) == 0 {
			t.Fatalf("wait for 1 returned none with %d in flight", len(open))
		}
		for _, r := range done {
			if !open[r] {
				t.Fatalf("%s at %d came back twice or was never submitted", r.Op, r.Offset)
			}
			delete(open, r)
		}
	}
}
