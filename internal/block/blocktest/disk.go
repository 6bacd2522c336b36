package blocktest

import (
	"fmt"
	"math"
	"math/bits"
	"sync"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

// DiskType is what the data sheet of a rotating disk says.
type DiskType struct {
	Name string
	Size int64 // bytes
	// Turn is the time of one revolution, TurnBytes what is transferred in it.
	Turn      time.Duration
	TurnBytes int64
	Cylinders int64
	// Settle is the seek to the next cylinder, Average the mean of all seeks.
	Settle, Average time.Duration
}

// BarracudaES2 is a Seagate Barracuda ES.2 of 1 TB (ST31000340NS), a disk of its time
// for servers: 7,200 revolutions a minute, a sustained rate of 105 MB/s, reads seek
// 8.5 ms in the mean and 0.8 ms to the next track (Seagate, Barracuda ES.2 Serial ATA
// product manual 100468393 and data sheet DS1600). The sheet does not tell of cylinders;
// the drive itself reports 153,352.
var BarracudaES2 = DiskType{
	Name: "Seagate Barracuda ES.2, 1 TB, 7,200 rpm",
	Size: 1_000_204_886_016,
	// 105 MB/s at 120 revolutions a second.
	Turn: time.Minute / 7200, TurnBytes: 875_000,
	Cylinders: 153_352,
	Settle:    800 * time.Microsecond, Average: 8500 * time.Microsecond,
}

// Disk computes how long a rotating disk takes, in time of its own that passes only
// while it works, so that equal requests in equal order always take the same.
//
// A request that begins where the last one ended goes on at once, as a drive that
// reads ahead does. One that begins less than a revolution further lets what lies
// between pass under the head. For any other the arm moves, and then the disk turns
// until the place comes by. The time of a seek is as Ruemmler and Wilkes measured it
// (An Introduction to Disk Drive Modeling, 1994): it grows with the root of the distance
// while the arm accelerates, and with the distance when it coasts, here from a third of
// all cylinders on, where one goes over into the other without a step in speed. So the
// two times that the data sheet gives determine all others.
//
// All cylinders hold the same, and places follow each other around the disk as if on
// one spiral: what changing heads and tracks costs in a sequential transfer is in the
// sustained rate. Writes take as long as reads, and there is no cache beyond the
// reading ahead.
//
// Its methods may be called concurrently; requests are then served in the order of
// the calls.
type Disk struct {
	t     DiskType
	curve float64 // nanoseconds of a seek over a third of all cylinders, Settle apart

	mu sync.Mutex // guards all below
	at int64      // byte behind the last one that was transferred
	n  DiskCount
}

// DiskCount says what a disk has done.
type DiskCount struct {
	Requests int64
	// Jumps are requests that did not begin where the one before ended, Seeks those
	// of them for which the arm moved.
	Jumps, Seeks int64
	Blocks       int64
	Busy         time.Duration
}

// Minus returns what was done since before.
func (c DiskCount) Minus(before DiskCount) DiskCount {
	return DiskCount{
		Requests: c.Requests - before.Requests, Jumps: c.Jumps - before.Jumps, Seeks: c.Seeks - before.Seeks,
		Blocks: c.Blocks - before.Blocks, Busy: c.Busy - before.Busy,
	}
}

// meanOfCurve is the mean of a seek curve over all pairs of cylinders, Settle apart, when
// a third of all cylinders takes 1. Distances of x of all cylinders occur in proportion
// to 2(1-x), and take sqrt(3x) up to a third and (1+3x)/2 from there on.
var meanOfCurve = 4*math.Sqrt(3)*(math.Pow(3, -1.5)/3-math.Pow(3, -2.5)/5) + 16.0/27

// NewDisk returns a disk whose head is at its beginning.
func NewDisk(t DiskType) *Disk {
	if t.Size <= 0 || t.Turn <= 0 || t.TurnBytes <= 0 || t.Cylinders < 3 || t.Average < t.Settle {
		panic(fmt.Sprintf("blocktest: there is no disk like %+v", t))
	}
	return &Disk{t: t, curve: float64(t.Average-t.Settle) / meanOfCurve}
}

// Count returns what the disk has done so far.
func (d *Disk) Count() DiskCount {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.n
}

// Service transfers n blocks from block at on, and returns the time that it took.
func (d *Disk) Service(at, n int64) time.Duration { return d.serve(at*block.Size, n*block.Size) }

func (d *Disk) serve(off, n int64) time.Duration {
	if off < 0 || n <= 0 || off > d.t.Size-n {
		panic(fmt.Sprintf("blocktest: %d bytes at %d of a disk of %d", n, off, d.t.Size))
	}
	d.mu.Lock()
	defer d.mu.Unlock()
	var took time.Duration
	if off != d.at {
		d.n.Jumps++
		from, to := d.passing(d.at), d.passing(off)
		if ahead := off - d.at; 0 < ahead && ahead < d.t.TurnBytes {
			took = to - from
		} else {
			d.n.Seeks++
			took = d.seek(off)
			// The disk has turned meanwhile, and turns until the place is there.
			took += ((to-from-took)%d.t.Turn + d.t.Turn) % d.t.Turn
		}
	}
	took += d.passing(off+n) - d.passing(off)
	d.at = off + n
	d.n.Requests++
	d.n.Blocks += (n + block.Size - 1) / block.Size
	d.n.Busy += took
	return took
}

// passing returns how long the disk turns, from its first byte on, until the byte at
// off comes by: modulo Turn, the angle of the place.
func (d *Disk) passing(off int64) time.Duration {
	hi, lo := bits.Mul64(uint64(off), uint64(d.t.Turn))
	q, _ := bits.Div64(hi, lo, uint64(d.t.TurnBytes))
	return time.Duration(q)
}

// seek returns how long the arm takes to the cylinder of the byte at off. To a track of
// the same cylinder another head has to settle, which takes as long as the next one.
func (d *Disk) seek(off int64) time.Duration {
	per := (d.t.Size + d.t.Cylinders - 1) / d.t.Cylinders
	distance := off/per - d.at/per
	return d.seekOver(max(distance, -distance, 1))
}

// seekOver returns how long a seek over so many cylinders takes, 1 at least.
func (d *Disk) seekOver(distance int64) time.Duration {
	x := 3 * float64(distance-1) / float64(d.t.Cylinders-2)
	if x < 1 {
		x = math.Sqrt(x)
	} else {
		x = (1 + x) / 2
	}
	return d.t.Settle + time.Duration(math.Round(d.curve*x))
}

// Wrap returns dev with the disk below it: each read, write and write of zeroes that dev
// is asked for, and that is well formed, is served by the disk when it is submitted. The
// disk is not asked for discards and flushes, and the time that passes is its own, not
// that of whoever waits.
func (d *Disk) Wrap(dev hpdi.Device) hpdi.Device {
	if size := dev.Info().Size; size > d.t.Size {
		panic(fmt.Sprintf("blocktest: device of %d bytes on a disk of %d", size, d.t.Size))
	}
	return &driven{Device: dev, rotates: true, submitted: func(reqs []*hpdi.Request) {
		for _, r := range reqs {
			d.serve(r.Offset, r.Bytes())
		}
	}}
}
