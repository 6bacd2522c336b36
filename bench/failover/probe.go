package main

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
	blockSize   = 4096
	probeBlocks = 16 << 10
)

// probe writes and reads one volume, one request at a time, and keeps the
// times of the replies. It is the volume's only writer, so it knows what
// every block holds.
type probe struct {
	client *nbdclient.Client
	gate   gate
	cancel context.CancelFunc
	tick   chan struct{} // filled by each reply
	ended  chan struct{} // closed when err is final
	err    error

	mu    sync.Mutex // guards watch
	watch watch
}

// watch is what the replies showed since it began.
type watch struct {
	last     time.Time // of the newest reply
	connects int       // of the client, at that reply
	began    int       // connects at the beginning
	replies  int
	longest  time.Duration // between any two replies
	first    string        // what that reply answered
	pause    time.Duration // that ended with the first reply on another connection
	after    time.Duration // the longest since that reply
}

// reply takes in a reply.
func (w *watch) reply(now time.Time, connects int, command nbdclient.Command) {
	gap := now.Sub(w.last)
	w.longest = max(w.longest, gap)
	switch {
	case w.pause > 0:
		w.after = max(w.after, gap)
	case connects > w.began:
		w.pause, w.first = gap, "write"
		if command == nbdclient.Read {
			w.first = "read"
		}
	}
	w.last, w.connects = now, connects
	w.replies++
}

// startProbe begins with an empty volume, at rest.
func startProbe(uri string, seed uint64) (*probe, error) {
	c, err := nbdclient.New(nbdclient.Options{URI: uri, Structured: true})
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	p := &probe{client: c, cancel: cancel, tick: make(chan struct{}, 1), ended: make(chan struct{})}
	p.gate.shut()
	go func() {
		defer close(p.ended)
		p.err = p.work(ctx, rand.New(rand.NewPCG(seed, 1)))
	}()
	return p, nil
}

// gate lets workers pass while it is open, as it is at first. One goroutine shuts
// and opens it.
type gate struct {
	mu sync.RWMutex // held while it is shut
}

func (g *gate) shut() { g.mu.Lock() }
func (g *gate) open() { g.mu.Unlock() }

func (g *gate) pass() {
	g.mu.RLock()
	defer g.mu.RUnlock()
}

// stop ends a probe that rests and returns what went wrong, if anything did.
func (p *probe) stop() error {
	p.cancel()
	p.gate.open()
	<-p.ended
	p.client.Close()
	return p.err
}

// work alternates writes and reads until ctx ends.
func (p *probe) work(ctx context.Context, rng *rand.Rand) error {
	written := make([]uint64, probeBlocks) // which write each block holds
	want := make([]byte, blockSize)
	r := &nbdclient.Request{Data: make([]byte, blockSize)}
	for op := uint64(1); ; op++ {
		p.gate.pass()
		n := rng.IntN(probeBlocks)
		r.Offset = int64(n) * blockSize
		r.Command = nbdclient.Read
		if op%2 == 1 {
			r.Command = nbdclient.Write
			fill(r.Data, n, op)
		}
		err := p.client.Do(ctx, r)
		if ctx.Err() != nil {
			return nil // r is the client's until Close
		}
		if err != nil {
			return fmt.Errorf("block %d, operation %d: %w", n, op, err)
		}
		p.replied(r.Command)
		if r.Command == nbdclient.Write {
			written[n] = op
		} else if fill(want, n, written[n]); !bytes.Equal(r.Data, want) {
			return fmt.Errorf("block %d does not hold what operation %d wrote, but something that begins with % x", n, written[n], r.Data[:16])
		}
	}
}

// replied notes a reply and wakes whoever waits for it.
func (p *probe) replied(command nbdclient.Command) {
	now := time.Now()
	connects := p.client.Stats().Connects
	p.mu.Lock()
	p.watch.reply(now, connects, command)
	p.mu.Unlock()
	select {
	case p.tick <- struct{}{}:
	default:
	}
}

// fill makes the content of a block: zeroes before the first write, then
// block, operation and a sequence that follows from them.
func fill(b []byte, block int, op uint64) {
	if op == 0 {
		clear(b)
		return
	}
	le := binary.LittleEndian
	le.PutUint64(b, uint64(block))
	le.PutUint64(b[8:], op)
	x := op<<16 ^ uint64(block)
	for i := 16; i < len(b); i += 8 {
		x = x*6364136223846793005 + 1442695040888963407
		le.PutUint64(b[i:], x)
	}
}

// begin forgets what was seen, but not the last reply.
func (p *probe) begin() {
	p.mu.Lock()
	defer p.mu.Unlock()
	w := &p.watch
	*w = watch{last: w.last, connects: w.connects, began: w.connects}
}

// seen returns what was seen since begin.
func (p *probe) seen() watch {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.watch
}

// await waits until enough has been seen.
func (p *probe) await(ctx context.Context, enough func(watch) bool) error {
	for !enough(p.seen()) {
		select {
		case <-p.tick:
		case <-p.ended:
			return fmt.Errorf("the probe ended: %w", p.err)
		case <-ctx.Done():
			return fmt.Errorf("waiting for the probe's replies (%+v): %w", p.client.Stats(), context.Cause(ctx))
		}
	}
	return nil
}

// awaitReplies waits for so many more replies.
func (p *probe) awaitReplies(ctx context.Context, n int) error {
	n += p.seen().replies
	return p.await(ctx, func(w watch) bool { return w.replies >= n })
}
