// Package counting has a device for measurements of large pools on small
// machines: it keeps metadata in memory and of data, whose content follows from a
// number, that number for each block; and it counts what is written to it. Its pools run
// in the benchmark's own process, on that device or another one.
package counting

import (
	"encoding/binary"
	"fmt"
	"sync"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

// Pattern is what clients write where all blocks may have the same content: it is not
// zero, and no metadata begin like it.
var Pattern = func() (p [block.Size]byte) {
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], 0x9e3779b97f4a7c15*uint64(i+1))
	}
	return p
}()

// numberAt is where Content keeps the number; what lies in front of it tells data.
const numberAt = 56

// Content fills a block with what follows from a number: Pattern from 0, and from no two
// numbers the same.
func Content(b []byte, number uint64) {
	copy(b, Pattern[:])
	binary.LittleEndian.PutUint64(b[numberAt:], number^patternNumber)
}

var patternNumber = binary.LittleEndian.Uint64(Pattern[numberAt:])

// Device is the device.
type Device struct {
	size int64
	mem  []byte // of what is not data

	mu       sync.Mutex // guards all below, mem and numbers
	data     []uint64   // a bit for each block that holds data
	numbers  []uint64   // of Content in each block, 0 where it holds no data
	numbered bool       // some are not 0
	done     Counts
	end      int64    // of the last write of data
	log      [2]int64 // where the flush log lies, from and to
	first    int64    // what lies before it and is no flush log are label, superblocks and journal
}

// Counts are what was written.
type Counts struct {
	Data, Pages, Journal int64 // bytes
	Log                  int64 // bytes of the flush log
	Requests             int64 // writes of data
	Jumps                int64 // those that did not begin where the one before had ended
}

// Minus returns what was written since d.
func (c Counts) Minus(d Counts) Counts {
	return Counts{c.Data - d.Data, c.Pages - d.Pages, c.Journal - d.Journal, c.Log - d.Log, c.Requests - d.Requests, c.Jumps - d.Jumps}
}

// New returns a device of size bytes. What it keeps lies in memory, or in a file in
// dir, which has no name, if dir is not empty.
func New(size int64, dir string) (*Device, error) {
	// Without huge pages: metadata lie scattered.
	all := size + size/block.Size*8 // with a number for each block
	fd, flags := -1, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE
	if dir != "" {
		var err error
		if fd, err = unix.Open(dir, unix.O_TMPFILE|unix.O_RDWR|unix.O_CLOEXEC, 0o600); err != nil {
			return nil, fmt.Errorf("a file in %s: %w", dir, err)
		}
		defer unix.Close(fd) // what is mapped stays
		if err := unix.Ftruncate(fd, all); err != nil {
			return nil, fmt.Errorf("a file of %d bytes in %s: %w", all, dir, err)
		}
		flags = unix.MAP_SHARED
	}
	mem, err := unix.Mmap(fd, 0, int(all), unix.PROT_READ|unix.PROT_WRITE, flags)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes: %w", all, err)
	}
	numbers := unsafe.Slice((*uint64)(unsafe.Pointer(&mem[size])), size/block.Size)
	return &Device{size: size, mem: mem, data: make([]uint64, size/block.Size/64+1), numbers: numbers}, nil
}

// SetFirst says where the space begins that a pool allocates from.
func (d *Device) SetFirst(off int64) { d.first = off }

// SetLog says which bytes are the flush log's.
func (d *Device) SetLog(from, to int64) { d.log = [2]int64{from, to} }

// Count returns what was written so far.
func (d *Device) Count() Counts {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.done
}

// Info implements hpdi.Device.
func (d *Device) Info() hpdi.Info {
	return hpdi.Info{Name: "counting", Driver: "counting", Size: d.size, BlockSize: block.Size}
}

// NewQueue implements hpdi.Device.
func (d *Device) NewQueue(int) (hpdi.Queue, error) { return &queue{d: d}, nil }

// Register implements hpdi.Device.
func (d *Device) Register([]byte) error { return nil }

// Unregister implements hpdi.Device.
func (d *Device) Unregister([]byte) error { return nil }

// Close implements hpdi.Device. What the device holds stays, for whoever opens
// its pool again.
func (d *Device) Close() error { return nil }

// queue carries requests out when they are submitted.
type queue struct {
	hpdi.Plain
	d    *Device
	done []*hpdi.Request
}

// Submit implements hpdi.Queue.
func (q *queue) Submit(reqs ...*hpdi.Request) error {
	for _, r := range reqs {
		if r.Err = r.Check(q.d.Info()); r.Err == nil {
			q.d.do(r)
		}
		q.done = append(q.done, r)
	}
	return nil
}

// Wait implements hpdi.Queue.
func (q *queue) Wait(_ int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	done = append(done, q.done...)
	q.done = q.done[:0]
	return done, nil
}

// Close implements hpdi.Queue.
func (q *queue) Close() error { return nil }

func (d *Device) do(r *hpdi.Request) {
	d.mu.Lock()
	defer d.mu.Unlock()
	off, before := r.Offset, d.done.Data
	for _, v := range r.Vec {
		for ; len(v) > 0; v, off = v[block.Size:], off+block.Size {
			if r.Op == hpdi.OpRead {
				d.read(v[:block.Size], off)
			} else {
				d.write(v[:block.Size], off)
			}
		}
	}
	if d.done.Data > before {
		if d.done.Requests++; d.end != r.Offset {
			d.done.Jumps++
		}
		d.end = off
	}
}

func (d *Device) read(p []byte, off int64) {
	if b := off / block.Size; d.data[b/64]&(1<<(b%64)) != 0 {
		n := uint64(0)
		if d.numbered {
			n = d.numbers[b]
		}
		Content(p, n)
	} else {
		copy(p, d.mem[off:d.size])
	}
}

func (d *Device) write(p []byte, off int64) {
	b := off / block.Size
	data := *(*[numberAt]byte)(p) == *(*[numberAt]byte)(Pattern[:])
	number := uint64(0)
	if data {
		d.data[b/64] |= 1 << (b % 64)
		number = binary.LittleEndian.Uint64(p[numberAt:]) ^ patternNumber
	} else {
		d.data[b/64] &^= 1 << (b % 64)
		copy(d.mem[off:d.size], p)
	}
	// Where all data are Pattern, numbers are never touched, and take no memory.
	if d.numbered = d.numbered || number != 0; d.numbered {
		d.numbers[b] = number
	}
	switch {
	case off >= d.log[0] && off < d.log[1]:
		d.done.Log += block.Size // data too: a flush writes them once more
	case data:
		d.done.Data += block.Size
	case off < d.first:
		d.done.Journal += block.Size
	default:
		d.done.Pages += block.Size
	}
}
