package blocktest

import (
	"fmt"
	"sync"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

// SSDType is what the data sheet of a flash drive says, of reads and of writes.
type SSDType struct {
	Name        string
	Size        int64 // bytes
	Read, Write SSDSpeed
}

// SSDSpeed is how fast a flash drive does one of the two.
type SSDSpeed struct {
	// Latency is how long one block takes with nothing beside it.
	Latency time.Duration
	// PerSecond is how many blocks a second there are with many under way at random
	// places, Rate how many bytes with large requests.
	PerSecond, Rate int64
}

// IntelS3700 is an Intel SSD DC S3700 of 400 GB, a drive for servers of 2012, with
// capacitors: a flush has nothing to wait for. It reads 75,000 and writes 36,000 blocks of
// 4 KiB a second at random, 500 and 460 MB/s in sequence, and takes 50 and 65 µs for one,
// as Intel has published it for the series in November 2012.
var IntelS3700 = SSDType{
	Name:  "Intel SSD DC S3700, 400 GB",
	Size:  400_088_457_216,
	Read:  SSDSpeed{Latency: 50 * time.Microsecond, PerSecond: 75_000, Rate: 500_000_000},
	Write: SSDSpeed{Latency: 65 * time.Microsecond, PerSecond: 36_000, Rate: 460_000_000},
}

// SSD computes how long a flash drive takes. Where a request goes does not matter, and
// requests go on beside each other: each takes its latency, and the drive begins one
// after the other at the rate that it has with many under way. So one at a time take
// the latency each, and a deep queue gets what the data sheet promises; how many go on
// beside each other follows from both. Discards and flushes take no time, and nothing is
// slower after much was written: what a drive does about its own garbage is in the
// sustained rates.
//
// Its methods may be called concurrently; requests then begin in the order of the calls.
type SSD struct {
	t SSDType

	mu   sync.Mutex // guards all below
	next time.Duration
	now  time.Duration // when whoever uses a device of Wrap asks next
	n    SSDCount
}

// SSDCount says what a flash drive has done.
type SSDCount struct {
	Requests, Blocks int64
	Busy             time.Duration // that passed for whoever waited
}

// NewSSD returns a drive at rest.
func NewSSD(t SSDType) *SSD {
	for _, s := range []SSDSpeed{t.Read, t.Write} {
		if t.Size <= 0 || s.Latency <= 0 || s.PerSecond <= 0 || s.Rate <= 0 || s.each() > s.Latency {
			panic(fmt.Sprintf("blocktest: there is no drive like %+v", t))
		}
	}
	return &SSD{t: t}
}

// each returns what a block takes from others with many under way.
func (s SSDSpeed) each() time.Duration { return time.Second / time.Duration(s.PerSecond) }

// transfer returns how long bytes take at the rate of large requests.
func (s SSDSpeed) transfer(n int64) time.Duration {
	return time.Duration(float64(n) / float64(s.Rate) * float64(time.Second))
}

// Serve carries out a request of n bytes that is submitted at a time, and returns when
// it is complete. Times of submission must not go back.
func (d *SSD) Serve(at time.Duration, op hpdi.Op, n int64) time.Duration {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.serveLocked(at, op, n)
}

func (d *SSD) serveLocked(at time.Duration, op hpdi.Op, n int64) time.Duration {
	if n <= 0 || n > d.t.Size {
		panic(fmt.Sprintf("blocktest: %d bytes of a drive of %d", n, d.t.Size))
	}
	s := d.t.Write
	if op == hpdi.OpRead {
		s = d.t.Read
	}
	begin := max(at, d.next)
	d.next = begin + max(s.each(), s.transfer(n))
	d.n.Requests++
	d.n.Blocks += (n + block.Size - 1) / block.Size
	// The transfer of the first block is in the latency.
	return begin + s.Latency + max(0, s.transfer(n-block.Size))
}

// Count returns what the drive has done so far.
func (d *SSD) Count() SSDCount {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.n
}

// Wrap returns dev with the drive below it: the reads, writes and writes of zeroes of one
// call of Submit that are well formed go on beside each other, and the next call follows
// when all of them are complete. The time that passes is the drive's own.
func (d *SSD) Wrap(dev hpdi.Device) hpdi.Device {
	if size := dev.Info().Size; size > d.t.Size {
		panic(fmt.Sprintf("blocktest: device of %d bytes on a drive of %d", size, d.t.Size))
	}
	return &driven{Device: dev, submitted: d.submit}
}

// submit carries out the requests of one call.
func (d *SSD) submit(reqs []*hpdi.Request) {
	d.mu.Lock()
	defer d.mu.Unlock()
	end := d.now
	for _, r := range reqs {
		end = max(end, d.serveLocked(d.now, r.Op, r.Bytes()))
	}
	d.n.Busy += end - d.now
	d.now = end
}
