package vhostuser

import (
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/virtio"
)

// ErrServerClosed is what Serve returns after Shutdown.
var ErrServerClosed = errors.New("vhost-user server closed")

// Bounds of Options.
const (
	// MaxQueues is the most queues of a connection.
	MaxQueues = 256
	// MaxQueueSize is the most descriptors of a queue.
	MaxQueueSize = 1024
	minQueueSize = 16
)

// Options say what a server serves, and how much a connection may use. What is zero has a
// default.
type Options struct {
	Volume   block.Volume
	Serial   string // what a driver asks for as the disk's identity; at most 20 bytes
	ReadOnly bool   // refuse writes to a volume that could be written to

	Queues    int           // of a connection, at most MaxQueues; default 16
	QueueSize int           // descriptors of a queue, at most MaxQueueSize, a power of two; default 256
	Clients   int           // connections at the same time; default 8
	Workers   int           // requests of a connection that wait for the volume at the same time; default 32
	Memory    int64         // bytes of memory that all connections may share together; default 4 TiB
	Poll      time.Duration // the longest look for further requests before a queue sleeps; default 50 µs, negative is none
	BlockSize int           // bytes that the driver is told as the logical block size, 512 or 4096; default 512

	Log *slog.Logger // default discards
}

func (o *Options) validate() error {
	if o.Volume == nil {
		return fmt.Errorf("vhost-user: no volume: %w", block.ErrInvalid)
	}
	number := func(v *int, def int) {
		if *v == 0 {
			*v = def
		}
	}
	number(&o.Queues, 16)
	number(&o.QueueSize, 256)
	number(&o.Clients, 8)
	number(&o.Workers, 32)
	number(&o.BlockSize, virtio.SectorBytes)
	if o.Memory == 0 {
		o.Memory = 4 << 40
	}
	if o.Poll == 0 {
		o.Poll = 50 * time.Microsecond
	}
	if o.Log == nil {
		o.Log = slog.New(slog.DiscardHandler)
	}
	switch {
	case len(o.Serial) > virtio.BlkIDBytes:
		return fmt.Errorf("vhost-user: a serial of %d bytes, at most %d are possible: %w", len(o.Serial), virtio.BlkIDBytes, block.ErrInvalid)
	case o.Queues < 1 || o.Queues > MaxQueues:
		return fmt.Errorf("vhost-user: %d queues, 1 to %d are possible: %w", o.Queues, MaxQueues, block.ErrInvalid)
	case o.QueueSize < minQueueSize || o.QueueSize > MaxQueueSize || o.QueueSize&(o.QueueSize-1) != 0:
		return fmt.Errorf("vhost-user: a queue size of %d, powers of two from %d to %d are possible: %w", o.QueueSize, minQueueSize, MaxQueueSize, block.ErrInvalid)
	case o.Clients < 1 || o.Workers < 1 || o.Memory < 1:
		return fmt.Errorf("vhost-user: limits of %d connections, %d workers and %d bytes of memory: %w", o.Clients, o.Workers, o.Memory, block.ErrInvalid)
	case o.BlockSize != 512 && o.BlockSize != block.Size:
		return fmt.Errorf("vhost-user: a block size of %d, 512 and %d are possible: %w", o.BlockSize, block.Size, block.ErrInvalid)
	}
	return nil
}

// Stats is what a server has done since it was made, and what there is now.
type Stats struct {
	Clients  int // connections
	Queues   int // queues that run
	InFlight int // requests that the volume has

	Reads, Writes, Flushes, Discards, WriteZeroes uint64 // requests that were completed
	ReadBytes, WrittenBytes                       uint64 // of those that succeeded
	Errors                                        uint64 // requests that ended with an error
	Resubmitted                                   uint64 // requests of a dead back-end that were run again
	Skipped                                       uint64 // those whose change was logged already
	Kicks                                         uint64 // notices of drivers
	Calls                                         uint64 // notices to drivers
	Disconnects                                   uint64 // connections that were cut because the front-end broke a rule
}
