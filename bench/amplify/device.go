package main

import (
	"encoding/binary"
	"fmt"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

// pattern is what clients write: it is not zero, and no metadata begin like it.
var pattern = func() (p [block.Size]byte) {
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], 0x9e3779b97f4a7c15*uint64(i+1))
	}
	return p
}()

// counting is a device that counts.
type counting struct {
	size int64
	mem  []byte // of what is not data

	mu    sync.Mutex // guards all below, and mem
	data  []uint64   // a bit for each block that holds the pattern
	bytes counts
	first int64 // what lies before it are label, superblocks, journal and flush log
}

// counts are bytes written.
type counts struct{ data, pages, journal int64 }

func (c counts) minus(d counts) counts {
	return counts{c.data - d.data, c.pages - d.pages, c.journal - d.journal}
}

func newCounting(size int64) (*counting, error) {
	// Without huge pages: metadata lie scattered.
	mem, err := unix.Mmap(-1, 0, int(size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS|unix.MAP_NORESERVE)
	if err != nil {
		return nil, fmt.Errorf("map %d bytes: %w", size, err)
	}
	return &counting{size: size, mem: mem, data: make([]uint64, size/block.Size/64+1)}, nil
}

func (d *counting) count() counts {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.bytes
}

// Info implements hpdi.Device.
func (d *counting) Info() hpdi.Info {
	return hpdi.Info{Name: "counting", Driver: "counting", Size: d.size, BlockSize: block.Size}
}

// NewQueue implements hpdi.Device.
func (d *counting) NewQueue(int) (hpdi.Queue, error) { return &queue{d: d}, nil }

// Register implements hpdi.Device.
func (d *counting) Register([]byte) error { return nil }

// Close implements hpdi.Device.
func (d *counting) Close() error { return unix.Munmap(d.mem) }

// queue carries requests out when they are submitted.
type queue struct {
	d    *counting
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

func (d *counting) do(r *hpdi.Request) {
	d.mu.Lock()
	defer d.mu.Unlock()
	off := r.Offset
	for _, v := range r.Vec {
		for ; len(v) > 0; v, off = v[block.Size:], off+block.Size {
			if r.Op == hpdi.OpRead {
				d.read(v[:block.Size], off)
			} else {
				d.write(v[:block.Size], off)
			}
		}
	}
}

func (d *counting) read(p []byte, off int64) {
	if b := off / block.Size; d.data[b/64]&(1<<(b%64)) != 0 {
		copy(p, pattern[:])
	} else {
		copy(p, d.mem[off:])
	}
}

func (d *counting) write(p []byte, off int64) {
	b := off / block.Size
	if *(*[64]byte)(p) == *(*[64]byte)(pattern[:]) {
		d.data[b/64] |= 1 << (b % 64)
		d.bytes.data += block.Size
		return
	}
	d.data[b/64] &^= 1 << (b % 64)
	copy(d.mem[off:], p)
	if off < d.first {
		d.bytes.journal += block.Size
	} else {
		d.bytes.pages += block.Size
	}
}
