package hpditest

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
)

// model is what the device must hold: for each block the version that fill
// wrote, or one of the marks below.
type model struct {
	version []uint64
	// perhaps are versions that writes which were cancelled since may have brought, or may
	// still bring.
	perhaps [][]uint64
	busy    []bool // a request in flight touches the block
}

const (
	unknown = 0 // never written, or discarded
	zero    = 1 // zeroes were written
)

// pending is a request in flight and what it does to the model.
type pending struct {
	hpdi.Request
	first, n int    // blocks
	version  uint64 // that a write or write-zeroes brings
}

// testRandom keeps random requests in flight on one queue, none overlapping
// another, and compares every read with the model.
func testRandom(t *testing.T, d hpdi.Device) { random(t, d, 3000, false) }

// testRandomCancel does the same and cancels some of them, or gives them deadlines. What a
// write brings that was cancelled is not known; but nothing that completes after it is ever
// undone by it.
func testRandomCancel(t *testing.T, d hpdi.Device) { random(t, d, 1500, true) }

func random(t *testing.T, d hpdi.Device, requests int, cancel bool) {
	info := d.Info()
	rng := rand.New(rand.NewPCG(seed(t), 1))
	bs := info.BlockSize
	const blocks, span, depth = 512, 24, 16
	m := &model{version: make([]uint64, blocks), perhaps: make([][]uint64, blocks), busy: make([]bool, blocks)}
	q := newQueue(t, d, depth)
	defer closeQueue(t, q)

	ops := []hpdi.Op{hpdi.OpRead, hpdi.OpRead, hpdi.OpRead, hpdi.OpWrite, hpdi.OpWrite, hpdi.OpWrite, hpdi.OpFlush}
	if info.Discard {
		ops = append(ops, hpdi.OpDiscard)
	}
	if info.Zeroes {
		ops = append(ops, hpdi.OpWriteZeroes)
	}
	mem := alloc(t, depth*span*bs)
	free := make([]*pending, depth)
	buf := map[*pending][]byte{}
	for i := range free {
		free[i] = &pending{}
		free[i].User = free[i]
		buf[free[i]] = mem[i*span*bs : (i+1)*span*bs]
	}
	var done []*hpdi.Request
	for started := 0; started < requests || len(free) < depth; {
		var batch []*hpdi.Request
		for len(free) > 0 && started < requests && rng.IntN(4) > 0 {
			p := free[len(free)-1]
			free = free[:len(free)-1]
			m.start(rng, p, ops[rng.IntN(len(ops))], started, buf[p], bs)
			if p.Deadline = (time.Time{}); cancel && rng.IntN(8) == 0 {
				p.Deadline = time.Now().Add(time.Duration(rng.IntN(200)) * time.Microsecond)
			}
			batch = append(batch, &p.Request)
			started++
		}
		if err := q.Submit(batch...); err != nil {
			t.Fatal(err)
		}
		for _, r := range batch {
			if cancel && rng.IntN(4) == 0 {
				q.Cancel(r)
			}
		}
		var err error
		least := 0
		if len(free) == 0 || started == requests {
			least = 1
		}
		if done, err = q.Wait(least, done[:0]); err != nil {
			t.Fatal(err)
		}
		for _, r := range done {
			p := r.User.(*pending)
			m.finish(t, p, buf[p], bs, cancel)
			free = append(free, p)
		}
	}
}

// start makes p a request on blocks that no other request touches.
func (m *model) start(rng *rand.Rand, p *pending, op hpdi.Op, serial int, buf []byte, bs int) {
	p.Op, p.Offset, p.Length, p.Vec, p.n = op, 0, 0, p.Vec[:0], 0
	if op == hpdi.OpFlush {
		return
	}
	p.first = rng.IntN(len(m.version))
	for m.busy[p.first] {
		p.first = (p.first + 1) % len(m.version)
	}
	most := 1 + rng.IntN(len(buf)/bs)
	for p.n < most && p.first+p.n < len(m.busy) && !m.busy[p.first+p.n] {
		m.busy[p.first+p.n] = true
		p.n++
	}
	p.Offset = int64(p.first * bs)
	switch op {
	case hpdi.OpDiscard:
		p.Length, p.version = int64(p.n*bs), unknown
		return
	case hpdi.OpWriteZeroes:
		p.Length, p.version = int64(p.n*bs), zero
		return
	case hpdi.OpWrite:
		p.version = uint64(serial) + 2
		fill(buf[:p.n*bs], p.Offset, p.version)
	case hpdi.OpRead:
		clear(buf)
	}
	for rest := buf[:p.n*bs]; len(rest) > 0; {
		n := bs * (1 + rng.IntN(len(rest)/bs))
		p.Vec = append(p.Vec, rest[:n])
		rest = rest[n:]
	}
}

// finish checks p against the model and brings the model up to date.
func (m *model) finish(t *testing.T, p *pending, buf []byte, bs int, cancel bool) {
	t.Helper()
	if cancel && (errors.Is(p.Err, hpdi.ErrCanceled) || errors.Is(p.Err, hpdi.ErrDeadline)) {
		for b := p.first; b < p.first+p.n; b++ {
			if m.busy[b] = false; p.Op != hpdi.OpRead {
				m.perhaps[b] = append(m.perhaps[b], p.version)
			}
		}
		return
	}
	if p.Err != nil {
		t.Fatalf("%s of %d blocks at block %d: %v", p.Op, p.n, p.first, p.Err)
	}
	want := make([]byte, bs)
	for i := range p.n {
		b := p.first + i
		m.busy[b] = false
		if p.Op != hpdi.OpRead {
			m.version[b], m.perhaps[b] = p.version, m.perhaps[b][:0]
			continue
		}
		right := false
		for _, v := range append(m.perhaps[b], m.version[b]) {
			switch v {
			case unknown:
				right = true
				continue
			case zero:
				clear(want)
			default:
				fill(want, int64(b*bs), v)
			}
			right = right || bytes.Equal(want, buf[i*bs:(i+1)*bs])
		}
		if !right {
			t.Fatalf("block %d, read with %d blocks at block %d: neither version %d nor one of %d that were cancelled since", b, p.n, p.first, m.version[b], m.perhaps[b])
		}
	}
}
