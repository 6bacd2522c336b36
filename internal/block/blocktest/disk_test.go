package blocktest

import (
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

// The curve has the two points of the data sheet, goes on without a step, and never
// comes back.
func TestDiskSeeks(t *testing.T) {
	d := NewDisk(BarracudaES2)
	n := BarracudaES2.Cylinders
	if got := d.seekOver(1); got != BarracudaES2.Settle {
		t.Errorf("to the next cylinder: %v", got)
	}
	var sum float64
	for i, last := int64(1), time.Duration(0); i < n; i++ {
		s := d.seekOver(i)
		if s < last || i > n/100 && s-last > time.Microsecond {
			t.Fatalf("%v over %d cylinders and %v over %d", last, i-1, s, i)
		}
		last = s
		sum += float64(s) * float64(n-i) // so many pairs of cylinders are so far apart
	}
	mean := time.Duration(2 * sum / float64(n) / float64(n-1))
	if diff := mean - BarracudaES2.Average; diff.Abs() > 10*time.Microsecond {
		t.Errorf("the mean of all seeks is %v", mean)
	}
	for _, c := range []struct {
		distance int64
		want     time.Duration
	}{{2, 835_920}, {1000, 1_935_314}, {n / 3, 8_921_041}, {n - 1, 17_042_188}} {
		if got := d.seekOver(c.distance); got != c.want {
			t.Errorf("over %d cylinders: %d ns instead of %d", c.distance, got, c.want)
		}
	}
}

// small is a disk with which one can reckon: a revolution is ten blocks and 10 ms, and
// so is a cylinder; a seek takes 2 ms to the next cylinder and 5 ms at the far end.
var small = DiskType{
	Name: "small", Size: 100 * block.Size, Turn: 10 * time.Millisecond, TurnBytes: 10 * block.Size,
	Cylinders: 10, Settle: 2 * time.Millisecond, Average: 2*time.Millisecond + time.Duration(1.5e6*meanOfCurve),
}

func TestDiskService(t *testing.T) {
	const ms = time.Millisecond
	d := NewDisk(small)
	for i, c := range []struct {
		at, n int64
		want  time.Duration
		count DiskCount // what this request adds
	}{
		{at: 0, n: 4, want: 4 * ms},
		{at: 4, n: 16, want: 16 * ms},                                             // goes on, over the end of a track too
		{at: 23, n: 1, want: 4 * ms, count: DiskCount{Jumps: 1}},                  // three blocks pass
		{at: 23, n: 1, want: 10 * ms, count: DiskCount{Jumps: 1, Seeks: 1}},       // one revolution: 2 ms of seek are in it
		{at: 20, n: 1, want: 7 * ms, count: DiskCount{Jumps: 1, Seeks: 1}},        // from angle 4 to 0, seeking meanwhile
		{at: 34, n: 1, want: 4 * ms, count: DiskCount{Jumps: 1, Seeks: 1}},        // from angle 1, 2 ms of seek, to 4
		{at: 96, n: 2, want: (11 + 2) * ms, count: DiskCount{Jumps: 1, Seeks: 1}}, // 4.2 ms of seek from angle 5, then to 6
		{at: 0, n: 10, want: 22 * ms, count: DiskCount{Jumps: 1, Seeks: 1}},       // 5 ms of seek from angle 8 miss the beginning
		{at: 10, n: 90, want: 90 * ms},
	} {
		before := d.Count()
		if got := d.Service(c.at, c.n); got != c.want {
			t.Errorf("request %d: %v instead of %v", i, got, c.want)
		}
		c.count.Requests, c.count.Blocks, c.count.Busy = 1, c.n, c.want
		if got := d.Count().Minus(before); got != c.count {
			t.Errorf("request %d is counted as %+v instead of %+v", i, got, c.count)
		}
	}
}

// Random reads of a block take what the data sheet says: a mean seek, half a revolution
// and the transfer.
func TestDiskRandomReads(t *testing.T) {
	d := NewDisk(BarracudaES2)
	blocks := BarracudaES2.Size / block.Size
	r := newRand(1, 1)
	const n = 100_000
	for range n {
		d.Service(r.Int64N(blocks), 1)
	}
	mean := d.Count().Busy / n
	if want := BarracudaES2.Average + BarracudaES2.Turn/2 + 39*time.Microsecond; (mean - want).Abs() > 50*time.Microsecond {
		t.Errorf("a random read takes %v instead of %v", mean, want)
	}
	before := d.Count()
	for i := range blocks / 16 / 256 {
		d.Service(i*16, 16)
	}
	c := d.Count().Minus(before)
	if rate := float64(c.Blocks*block.Size) / c.Busy.Seconds() / 1e6; rate < 104.9 || rate > 105.1 || c.Jumps > 1 {
		t.Errorf("in sequence %.1f MB/s with %d jumps", rate, c.Jumps)
	}
}

// A device over the disk costs what the disk says for its reads and writes, in the order
// of their submission, and nothing else.
func TestDiskBelowDevice(t *testing.T) {
	d := NewDisk(small)
	dev := d.Wrap(NewCrash(small.Size, 1))
	if !dev.Info().Rotates {
		t.Error("it does not rotate")
	}
	must(t, write(t, dev, 0, fill(1, 4*block.Size)))
	must(t, flush(t, dev))
	must(t, io(t, dev, &hpdi.Request{Op: hpdi.OpDiscard, Offset: 50 * block.Size, Length: block.Size}))
	must(t, io(t, dev, &hpdi.Request{Op: hpdi.OpWriteZeroes, Offset: 4 * block.Size, Length: block.Size}))
	if err := write(t, dev, small.Size, fill(1, block.Size)); err == nil {
		t.Error("a write behind the end")
	}
	if got := read(t, dev, 7*block.Size, block.Size); len(got) != block.Size {
		t.Errorf("read %d bytes", len(got))
	}
	want := DiskCount{Requests: 3, Jumps: 1, Blocks: 6, Busy: 8 * time.Millisecond}
	if got := d.Count(); got != want {
		t.Errorf("%+v instead of %+v", got, want)
	}
}
