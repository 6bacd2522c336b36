package vhostuser

import (
	"bytes"
	"context"
	"flag"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/export/nbd/nbdtest"
	"github.com/pollux-storage/pollux/internal/virtio"
)

var crashSeeds = flag.Int("crash-seeds", 3, "seeds of random rounds for TestCrash, in each layout of queues")

// doomed is a back-end without goroutines, whose test ends it between two stores.
type doomed struct {
	c    *client
	q    *queue
	peer *net.UnixConn
}

// newDoomed takes the machine's first queue, as it is, for a back-end that will die.
func (m *machine) newDoomed() *doomed {
	m.t.Helper()
	// The machine's own connection gives everything to a client that does not run.
	ours, theirs := socketpair(m.t)
	c := newClient(m.server, theirs, 0)
	c.features = m.features
	c.protocol = offeredProtocol
	d := &doomed{c: c, q: c.queues[0], peer: ours}
	fds := m.vqs[0]
	desc, driver, device, _, _ := m.parts()
	at := func(off int) uint64 { return userBase + uint64(fds.base+off) }
	r, err := mapRegion(regionOf(m), m.fd)
	must(m.t, err)
	must(m.t, c.useMemory([]*region{r}))
	must(m.t, d.take(m))
	q := d.q
	q.size, q.hasAddr, q.base = m.size, true, fds.drv.Base()
	q.addr.Desc, q.addr.Avail, q.addr.Used = at(desc), at(driver), at(device)
	must(m.t, q.attach())
	q.features, q.sealed = c.features, c.sealed()
	return d
}

// busy reports whether workers have requests.
func (q *queue) busy() bool {
	q.mu.Lock()
	defer q.mu.Unlock()
	return q.working > 0
}

// die leaves everything as it is.
func (d *doomed) die() {
	d.c.s.count.inflight.Add(int64(-d.q.inflight))
	d.c.s.mu.Lock()
	d.c.s.disownLocked(d.c, 0)
	d.c.s.mu.Unlock()
	d.c.pool.close()
	d.c.dropMemory()
	if s := d.c.inflight.session; s != nil {
		s.Leave()
	}
	unmap(d.c.inflight.mapping)
	_, _ = d.c.conn.Close(), d.peer.Close()
}

// found is what a round panics with.
type found struct{ error }

func (x *model) fail(format string, args ...any) { panic(found{fmt.Errorf(format, args...)}) }

// crashRound puts some requests into the ring and lets a back-end take all of them, do some,
// and die in the middle of completing them.
func crashRound(t testing.TB, m *machine, rng *rand.Rand, model *model) {
	t.Helper()
	q := m.vqs[0]
	n := 1 + rng.IntN(6)
	for range n {
		model.submit(rng)
	}
	q.drv.Publish()
	d := m.newDoomed()
	d.q.done = d.q.done[:0]
	// What an earlier one has left is taken up first, as the queue's goroutine does.
	must(t, d.q.resubmit())
	for d.q.busy() {
		time.Sleep(50 * time.Microsecond)
	}
	taken := rng.IntN(n + 2)
	var did []*request
	for range taken {
		r, err := d.q.fetch()
		must(t, err)
		if r == nil {
			break
		}
		if rng.IntN(4) == 0 {
			continue // dies before it is done
		}
		if r.try() {
			did = append(did, r)
		} else if err := r.do(t.Context(), new(scratch)); err == nil {
			did = append(did, r)
		}
	}
	rng.Shuffle(len(did), func(i, j int) { did[i], did[j] = did[j], did[i] })
	if len(did) > 0 {
		for _, r := range did {
			r.seal()
		}
		c := &d.q.complete
		c.begin(d.q, did)
		steps := rng.IntN(4 + 6*len(did))
		for i := 0; i < steps && c.step(); i++ {
		}
	}
	d.die()
	model.collect()
}

// model is what a driver knows: which blocks it has written, and what it waits for.
type model struct {
	m       *machine
	want    map[uint64]uint32         // of each block, the seed of its newest content
	waiting map[int]func(status byte) // by the number of the chain
	version uint32
	ranges  map[uint64]bool // blocks with a request in flight
	done    int
}

// submit queues a write, a read or a write of zeroes of one block, with no other request on
// it in flight. What a read brings is compared at its completion.
func (x *model) submit(rng *rand.Rand) {
	q := x.m.vqs[0]
	id, ok := q.drv.Next()
	if !ok || q.drv.InFlight() >= x.m.size/2-3 {
		return
	}
	lba := uint64(rng.IntN(8))
	if x.ranges[lba] {
		return
	}
	x.ranges[lba] = true
	b := buffer{dataStart + id*4096, 4096}
	kind := rng.IntN(4)
	switch kind {
	case 0:
		clear(x.m.data(b))
		id = q.queue(virtio.BlkIn, lba*8, true, b)
	case 1:
		r := buffer{b.off, virtio.BlkRangeBytes}
		virtio.BlkRange{Sector: lba * 8, Sectors: 8}.Put(x.m.data(r))
		id = q.queue(virtio.BlkWriteZeroRange, 0, false, r)
	default:
		x.version++
		pattern(x.m.data(b), x.version)
		id = q.queue(virtio.BlkOut, lba*8, false, b)
	}
	version := x.version
	if x.waiting[id] != nil {
		x.fail("chain %d is free before its request is done", id)
	}
	x.waiting[id] = func(status byte) {
		delete(x.ranges, lba)
		if status != virtio.BlkOK {
			x.fail("chain %d, kind %d: status %d", id, kind, status)
		}
		switch kind {
		case 0:
			if !bytes.Equal(x.m.data(b), content(x.want[lba])) {
				x.fail("a read of block %d, whose content is version %d, brought something else", lba, x.want[lba])
			}
		case 1:
			x.want[lba] = 0
		default:
			x.want[lba] = version
		}
		x.done++
	}
}

// content is that of a block of a version, 0 for zeroes.
func content(version uint32) []byte {
	if version == 0 {
		return make([]byte, 4096)
	}
	return patterned(4096, version)
}

// collect takes completions, each of which must be one that is waited for.
func (x *model) collect() {
	q := x.m.vqs[0]
	if _, err := q.tryPop(); err != nil {
		x.fail("%w", err)
	}
	for id, status := range q.status {
		f := x.waiting[id]
		if f == nil {
			x.fail("chain %d is done, for which nobody waits", id)
		}
		delete(q.status, id)
		delete(x.waiting, id)
		f(status)
	}
}

// tally counts how often the change of a submission was made.
type tally struct {
	*nbdtest.Volume
	mu   sync.Mutex
	made map[block.Tag]int // guarded by mu
}

func (v *tally) note(tag block.Tag, err error) error {
	if err == nil {
		v.mu.Lock()
		v.made[tag]++
		v.mu.Unlock()
	}
	return err
}

func (v *tally) TryStage(off int64, n int) (block.Write, error) {
	w, err := v.Volume.TryStage(off, n)
	if w == nil || err != nil {
		return nil, err
	}
	return &tallied{Write: w, v: v}, nil
}

func (v *tally) WriteZeroes(ctx context.Context, off, n int64, punch bool, tag block.Tag) error {
	return v.note(tag, v.Volume.WriteZeroes(ctx, off, n, punch, tag))
}

type tallied struct {
	block.Write
	v   *tally
	tag block.Tag
}

func (w *tallied) SetTag(tag block.Tag) {
	w.tag = tag
	w.Write.SetTag(tag)
}

func (w *tallied) TryCommit() (bool, error) {
	ok, err := w.Write.TryCommit()
	if ok {
		_ = w.v.note(w.tag, err)
	}
	return ok, err
}

// TestCrash ends back-ends between any two stores of a completion, again and again. Each
// request is completed once in the end, and has its effect once.
func TestCrash(t *testing.T) {
	for _, f := range crashLayouts {
		for seed := range *crashSeeds {
			t.Run(fmt.Sprintf("features=%x,seed=%d", uint64(f), seed), func(t *testing.T) {
				stats, err := crashLife(t, f, uint64(seed), 120)
				if err != nil {
					t.Error(err)
				} else if stats.Resubmitted == 0 || stats.Skipped == 0 {
					t.Errorf("nothing was taken up: %+v", stats)
				}
			})
		}
	}
}

var crashLayouts = []virtio.Features{0, virtio.Set(virtio.FIndirectDesc), virtio.Set(virtio.FRingPacked), virtio.Set(virtio.FRingPacked, virtio.FIndirectDesc)}

// crashLife is a life of a machine whose servers die. It returns what they have done, and
// what the machine has found wrong.
func crashLife(t testing.TB, f virtio.Features, seed uint64, rounds int) (stats Stats, err error) {
	rng := rand.New(rand.NewPCG(seed, 1))
	v := &tally{Volume: nbdtest.New("vol", volumeBytes), made: map[block.Tag]int{}}
	var calls atomic.Uint64
	v.Hook = func(_ context.Context, op nbdtest.Op, _, _ int64) error {
		// Some reads are slower than others, so that not all that was done together by one
		// that died is done together by its successor.
		switch op {
		case nbdtest.OpTryRead:
			if calls.Add(1)%3 == 0 {
				return nbdtest.ErrWouldWait
			}
		case nbdtest.OpRead:
			time.Sleep(300 * time.Microsecond)
		}
		return nil
	}
	s, _ := newServer(t, Options{Volume: v, Log: slog.New(slog.DiscardHandler)})
	m := newMachine(t, s, setup{features: f | disk, track: true, size: 32})
	m.disconnect() // with nothing in flight: what is known of the area begins with the first that dies
	x := &model{m: m, want: map[uint64]uint32{}, waiting: map[int]func(byte){}, ranges: map[uint64]bool{}}
	defer func() {
		if p := recover(); p != nil {
			f, ok := p.(found)
			if !ok {
				panic(p)
			}
			err = f.error
		}
	}()
	for round := range rounds {
		crashRound(t, m, rng, x)
		if round%10 == 9 {
			x.serve(rng) // one that lives takes up what is left, and goes on for a while
		}
	}
	if x.done < rounds {
		x.fail("%d requests are done in %d rounds", x.done, rounds)
	}
	for lba, version := range x.want {
		if !bytes.Equal(v.Bytes(int64(lba)*4096, 4096), content(version)) {
			x.fail("block %d is not version %d", lba, version)
		}
	}
	for tag, n := range v.made {
		if n != 1 {
			x.fail("the change of submission %+v was made %d times", tag, n)
		}
	}
	return s.Stats(), nil
}

// serve lets a whole server take up what is in flight, and some requests more; at times it
// stops the queue in good order afterwards.
func (x *model) serve(rng *rand.Rand) {
	m := x.m
	m.disconnect()
	m.connect()
	m.start()
	for range 3 {
		for range 4 {
			x.submit(rng)
		}
		m.vqs[0].publish()
		m.vqs[0].notify()
		deadline := time.Now().Add(5 * time.Second)
		for len(x.waiting) > 0 {
			if x.collect(); time.Now().After(deadline) {
				x.fail("%d requests wait for ever", len(x.waiting))
			}
		}
	}
	if rng.IntN(2) == 0 {
		m.vqs[0].stop()
	}
	m.disconnect()
}

// What a dead server had put behind a completion that it did not publish is not in a packed
// ring any more when its successor publishes that one alone.
func TestUnpublishedTail(t *testing.T) {
	if err := unpublishedTail(t); err != nil {
		t.Error(err)
	}
}

func unpublishedTail(t testing.TB) error {
	s, _ := newServer(t, Options{Log: slog.New(slog.DiscardHandler)})
	m := newMachine(t, s, setup{features: disk | virtio.Set(virtio.FRingPacked), track: true})
	m.disconnect()
	vq := m.vqs[0]
	for i := range 3 {
		vq.queue(virtio.BlkIn, 0, true, buffer{dataStart + i*4096, 4096})
	}
	vq.drv.Publish()
	d := m.newDoomed()
	var did []*request
	for range 3 {
		r, err := d.q.fetch()
		must(t, err)
		r.try()
		r.seal()
		did = append(did, r)
	}
	d.q.complete.begin(d.q, did)
	for d.q.complete.at != publish {
		d.q.complete.step()
	}
	d.die()
	d = m.newDoomed()
	defer d.die()
	first := d.q.subs[0]
	r := d.q.free[len(d.q.free)-1]
	must(t, d.q.dev.Load(&r.chain, first.Slot, first.Descs))
	r.slot, r.counter = first.Slot, first.Counter
	must(t, d.q.took(r))
	r.try()
	d.q.finish([]*request{r})
	if n, err := vq.tryPop(); n != 1 || err != nil {
		return fmt.Errorf("the driver has %d completions of one that was published: %v", n, err)
	}
	return nil
}
