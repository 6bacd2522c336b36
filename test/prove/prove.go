// Package prove is a client of one volume that writes and reads single blocks, one
// request at a time, compares what it reads with what it wrote, and keeps how long it
// waited. It is the volume's only writer. Its connection comes back; behind another
// client that promises to hold it (QEMU, nbdkit) that is counted as an error by whoever
// looks at Connects.
package prove

import (
	"bytes"
	"context"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/pollux-storage/pollux/test/campaign/nbdclient"
)

const (
	blockSize = 4096
	// Size is how many bytes of the volume are used.
	Size   = blocks * blockSize
	blocks = 1024
)

// Client is a client that works until it is stopped.
type Client struct {
	client *nbdclient.Client
	cancel context.CancelFunc
	ended  chan struct{}
	err    error // valid when ended is closed

	mu      sync.Mutex // guards what follows
	ops     int
	last    time.Time
	longest time.Duration // between two replies, since the last look
	fresh   chan struct{} // filled by a reply
}

// Start begins with an empty volume. The seed decides which blocks are used.
func Start(uri string, seed uint64) (*Client, error) {
	n, err := nbdclient.New(nbdclient.Options{URI: uri, Structured: true})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	c := &Client{client: n, cancel: cancel, ended: make(chan struct{}), fresh: make(chan struct{}, 1)}
	go func() {
		defer close(c.ended)
		c.err = c.work(ctx, rand.New(rand.NewPCG(seed, 3)))
	}()
	return c, nil
}

func (c *Client) work(ctx context.Context, rng *rand.Rand) error {
	written := make([]uint64, blocks) // which operation each block holds
	for op := uint64(1); ; op++ {
		n := rng.IntN(blocks)
		r := &nbdclient.Request{Command: nbdclient.Read, Offset: int64(n) * blockSize, Data: make([]byte, blockSize)}
		if op%2 == 1 {
			r.Command, r.FUA, r.Data = nbdclient.Write, op%16 == 1, stamp(n, op)
		}
		err := c.client.Do(ctx, r)
		if ctx.Err() != nil {
			return nil // r is the client's until Close
		}
		if err != nil {
			return fmt.Errorf("block %d, operation %d: %w", n, op, err)
		}
		c.replied()
		if r.Command == nbdclient.Write {
			written[n] = op
		} else if !bytes.Equal(r.Data, stamp(n, written[n])) {
			return fmt.Errorf("block %d does not hold what operation %d wrote, but something that begins with % x", n, written[n], r.Data[:16])
		}
	}
}

func (c *Client) replied() {
	now := time.Now()
	c.mu.Lock()
	if c.ops++; c.ops > 1 {
		c.longest = max(c.longest, now.Sub(c.last))
	}
	c.last = now
	c.mu.Unlock()
	select {
	case c.fresh <- struct{}{}:
	default:
	}
}

// stamp is the content of a block that an operation wrote; before the first it is zero.
func stamp(block int, op uint64) []byte {
	b := make([]byte, 0, blockSize)
	if op == 0 {
		return b[:blockSize]
	}
	for len(b) < blockSize {
		b = binary.LittleEndian.AppendUint64(b, uint64(block)<<32^op)
	}
	return b
}

// Look returns the longest time between two replies since the last look, and the number
// of all replies.
func (c *Client) Look() (longest time.Duration, ops int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	longest, c.longest = c.longest, 0
	return longest, c.ops
}

// Connects returns how often a connection was made.
func (c *Client) Connects() int { return c.client.Stats().Connects }

// Await waits for so many more replies.
func (c *Client) Await(ctx context.Context, n int) error {
	c.mu.Lock()
	want := c.ops + n
	c.mu.Unlock()
	for {
		c.mu.Lock()
		ops := c.ops
		c.mu.Unlock()
		if ops >= want {
			return nil
		}
		select {
		case <-c.fresh:
		case <-c.ended:
			return fmt.Errorf("the client has ended: %w", c.err)
		case <-ctx.Done():
			return fmt.Errorf("no reply (%+v): %w", c.client.Stats(), context.Cause(ctx))
		}
	}
}

// Stop ends the client and returns what went wrong, if anything did.
func (c *Client) Stop() error {
	c.cancel()
	<-c.ended
	c.client.Close()
	return c.err
}
