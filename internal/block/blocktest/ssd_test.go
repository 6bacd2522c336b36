package blocktest

import (
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

// near reports whether two numbers differ by less than a hundredth.
func near(got, want float64) bool { return got > 0.99*want && got < 1.01*want }

// One request at a time takes the latency of the data sheet, many at once come to its
// rate of small requests, and large ones to that of bytes; for reads and for writes.
func TestSSDMeetsItsDataSheet(t *testing.T) {
	for op, want := range map[hpdi.Op]SSDSpeed{hpdi.OpRead: IntelS3700.Read, hpdi.OpWrite: IntelS3700.Write, hpdi.OpWriteZeroes: IntelS3700.Write} {
		d := NewSSD(IntelS3700)
		var now time.Duration
		for range 1000 {
			now = d.Serve(now, op, block.Size)
		}
		if got := now / 1000; got != want.Latency {
			t.Errorf("%s: one at a time takes %v each", op, got)
		}
		// Each of 32 that are under way is followed by another one when it is complete.
		d, now = NewSSD(IntelS3700), 0
		var under []time.Duration
		const n = 100_000
		for range n {
			if len(under) == 32 {
				now, under = under[0], under[1:] // they end in the order in which they began
			}
			under = append(under, d.Serve(now, op, block.Size))
		}
		if got := n / under[len(under)-1].Seconds(); !near(got, float64(want.PerSecond)) {
			t.Errorf("%s: %.0f a second", op, got)
		}
		d, now = NewSSD(IntelS3700), 0
		for range 1000 {
			now = d.Serve(now, op, 8<<20)
		}
		if got := 1000 * (8 << 20) / now.Seconds(); !near(got, float64(want.Rate)) {
			t.Errorf("%s: %.0f bytes a second", op, got)
		}
		if c := d.Count(); c.Requests != 1000 || c.Blocks != 1000*2048 {
			t.Errorf("%s: counted %+v", op, c)
		}
	}
}

// As few as the latency holds go on beside each other.
func TestSSDParallelism(t *testing.T) {
	d := NewSSD(SSDType{Name: "small", Size: 1 << 30, Read: SSDSpeed{Latency: 100, PerSecond: 25_000_000, Rate: 1 << 40}, Write: SSDSpeed{Latency: 100, PerSecond: 10_000_000, Rate: 1 << 40}})
	for i, want := range []time.Duration{100, 140, 180, 220} {
		if got := d.Serve(0, hpdi.OpRead, block.Size); got != want {
			t.Errorf("read %d is complete at %d, not %d", i, got, want)
		}
	}
	// A write that is submitted later begins when the reads have begun.
	if got := d.Serve(50, hpdi.OpWrite, block.Size); got != 260 {
		t.Errorf("the write is complete at %d", got)
	}
	if got := d.Serve(1000, hpdi.OpRead, block.Size); got != 1100 {
		t.Errorf("a read of a drive at rest is complete at %d", got)
	}
}

// Below a device the requests of one call go on beside each other.
func TestSSDWrap(t *testing.T) {
	d := NewSSD(IntelS3700)
	dev := d.Wrap(NewCrash(1<<30, 1))
	if dev.Info().Rotates {
		t.Error("it rotates")
	}
	q, err := dev.NewQueue(8)
	must(t, err)
	p := make([]byte, block.Size)
	read := func(off int64) *hpdi.Request {
		return &hpdi.Request{Op: hpdi.OpRead, Offset: off, Vec: [][]byte{p}}
	}
	for range 4 {
		must(t, hpdi.Do(q, read(1<<20)))
	}
	if c := d.Count(); c.Busy != 200*time.Microsecond {
		t.Errorf("one at a time: %+v", c)
	}
	before := d.Count().Busy
	must(t, hpdi.Do(q, read(0), read(1<<29), read(1<<20), &hpdi.Request{Op: hpdi.OpFlush}, &hpdi.Request{Op: hpdi.OpDiscard, Length: 1 << 20}))
	if took := d.Count().Busy - before; took != 50*time.Microsecond+2*IntelS3700.Read.each() {
		t.Errorf("three at once took %v", took)
	}
	_ = hpdi.Do(q, read(1)) // malformed
	if c := d.Count(); c.Requests != 7 || c.Blocks != 7 {
		t.Errorf("counted %+v", c)
	}
	must(t, q.Close())
}

func TestSSDRefused(t *testing.T) {
	for name, change := range map[string]func(*SSDType){
		"size": func(t *SSDType) { t.Size = 0 }, "latency": func(t *SSDType) { t.Read.Latency = 0 },
		"rate": func(t *SSDType) { t.Write.Rate = 0 }, "slower than one at a time": func(t *SSDType) { t.Read.PerSecond = 1000 },
	} {
		func() {
			defer func() {
				if recover() == nil {
					t.Errorf("%s: there is such a drive", name)
				}
			}()
			x := IntelS3700
			change(&x)
			NewSSD(x)
		}()
	}
}
