package hpditest

import (
	"bytes"
	"math/rand/v2"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
)

// model is what the device must hold: for each block the version that fill
// wrote, or one of the marks below.
type model struct {
	version []uint64
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
func testRandom(t *testing.T, d hpdi.Device) {
	info := d.Info()
	rng := rand.New(rand.NewPCG(seed(t), 1))
	bs := info.BlockSize
	const blocks, span, depth, requests = 512, 24, 16, 3000
	m := &model{version: make([]uint64, blocks), busy: make([]bool, blocks)}
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
			batch = append(batch, &p.Request)
			started++
		}
		if err := q.Submit(batch...); err != nil {
			t.Fatal(err)
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
			m.finish(t, p, buf[p], bs)
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
func (m *model) finish(t *testing.T, p *pending, buf []byte, bs int) {
	t.Helper()
	if p.Err != nil {
		t.Fatalf("%s of %d blocks at block %d: %v", p.Op, p.n, p.first, p.Err)
	}
	want := make([]byte, bs)
	for i := range p.n {
		b := p.first + i
		m.busy[b] = false
		if p.Op != hpdi.OpRead {
			m.version[b] = p.version
			continue
		}
		switch v := m.version[b]; v {
		case unknown:
			continue
		case zero:
			clear(want)
		default:
			fill(want, int64(b*bs), v)
		}
		if !bytes.Equal(want, buf[i*bs:(i+1)*bs]) {
			t.Fatalf("block %d, read with %d blocks at block %d: not version %d", b, p.n, p.first, m.version[b])
		}
	}
}
