package vhostuser

import (
	"encoding/binary"
	"errors"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/vhost"
	"github.com/pollux-storage/pollux/internal/virtio"
)

// setup opens a device on a fake back-end, with a queue and memory that it knows.
func setup(t testing.TB, f *fake, o Options) (hpdi.Device, hpdi.Queue, []byte) {
	t.Helper()
	d, err := Open(t.Context(), f.sock, o)
	must(t, err)
	q, err := d.NewQueue(8)
	must(t, err)
	mem, err := hpdi.Alloc(64 << 10)
	must(t, err)
	must(t, d.Register(mem))
	t.Cleanup(func() {
		if t.Failed() {
			f.refuse() // nobody serves what is in flight
		}
		must(t, errors.Join(q.Close(), d.Unregister(mem), d.Close(), hpdi.Free(mem)))
	})
	return d, q, mem
}

// eachLayout runs a test with packed and with split queues, with and without tables of
// descriptors.
func eachLayout(t *testing.T, test func(t *testing.T, o Options)) {
	for name, o := range map[string]Options{
		"packed": {Packed: On}, "split": {Packed: Off}, "packed, direct": {Packed: On, NoIndirect: true, NoEventIdx: true}, "split, direct": {Packed: Off, NoIndirect: true, NoEventIdx: true},
	} {
		t.Run(name, func(t *testing.T) { test(t, o) })
	}
}

func write(off int64, vec ...[]byte) *hpdi.Request {
	return &hpdi.Request{Op: hpdi.OpWrite, Offset: off, Vec: vec}
}

func read(off int64, vec ...[]byte) *hpdi.Request {
	return &hpdi.Request{Op: hpdi.OpRead, Offset: off, Vec: vec}
}

// one waits for a request and returns it.
func one(t testing.TB, q hpdi.Queue) *hpdi.Request {
	t.Helper()
	done, err := q.Wait(1, nil)
	must(t, err)
	if len(done) != 1 {
		t.Fatalf("%d requests came", len(done))
	}
	return done[0]
}

// many waits for n requests and returns them.
func many(t testing.TB, q hpdi.Queue, n int) []*hpdi.Request {
	t.Helper()
	done, err := q.Wait(n, nil)
	must(t, err)
	if len(done) != n {
		t.Fatalf("%d requests came, not %d", len(done), n)
	}
	return done
}

// none fails the test if a request is there.
func none(t testing.TB, q hpdi.Queue) {
	t.Helper()
	if done, err := q.Wait(0, nil); err != nil || len(done) != 0 {
		t.Fatalf("%d requests came, %v", len(done), err)
	}
}

// What a descriptor points at is the application's memory, whatever a request's vectors.
func TestZeroCopy(t *testing.T) {
	eachLayout(t, func(t *testing.T, o Options) {
		f := newFake(t)
		_, q, mem := setup(t, f, o)
		p := f.connected(1)
		dev := p.device(0)
		for _, vec := range [][][]byte{
			{mem[512:1024]}, {mem[4096:8192], mem[:512]}, {mem[1024:1536], nil, mem[:512], mem[4096:4608], mem[2048:2560], mem[512:1024], mem[8192:16384]},
		} {
			for _, op := range []hpdi.Op{hpdi.OpRead, hpdi.OpWrite} {
				must(t, q.Submit(&hpdi.Request{Op: op, Offset: 1024, Vec: vec}))
				c := p.next(dev)
				want := virtio.BlkHeader{Type: virtio.BlkIn, Sector: 2}
				payload := c.In[:len(c.In)-1] // without the status
				if op == hpdi.OpWrite {
					want.Type, payload = virtio.BlkOut, c.Out[1:]
				}
				if got := virtio.ReadBlkHeader(c.Out[0]); got != want || len(c.Out[0]) != virtio.BlkHeaderBytes {
					t.Fatalf("the header is %+v", got)
				}
				for i, v := range vec {
					if len(v) == 0 {
						continue
					}
					if len(payload) == 0 || p.guest(payload[0]) != pointer(v) || len(payload[0]) != len(v) {
						t.Fatalf("vector %d of a %v is not what the back-end got: %d bytes at %#x", i, op, len(v), pointer(v))
					}
					payload[0][len(v)-1] = byte(7 + i)
					payload = payload[1:]
				}
				if len(payload) > 0 {
					t.Errorf("a %v has %d pieces too many", op, len(payload))
				}
				p.give(0, dev, c, virtio.BlkOK)
				must(t, one(t, q).Err)
				for i, v := range vec {
					if len(v) > 0 && v[len(v)-1] != byte(7+i) {
						t.Errorf("vector %d does not hold what the back-end wrote", i)
					}
				}
			}
		}
	})
}

// Ranges have their place in the payload, and long requests come in the pieces that the
// back-end takes.
func TestCommands(t *testing.T) {
	f := newFake(t)
	f.set(func(f *fake) {
		f.features |= virtio.Set(virtio.BlkSizeMax)
		f.config.SizeMax, f.config.SegMax, f.config.WriteZeroesMayUnmap = 4096+100, 2, true
	})
	_, q, mem := setup(t, f, Options{})
	p := f.connected(1)
	dev := p.device(0)
	for _, r := range []struct {
		r    *hpdi.Request
		want []virtio.BlkHeader
		n    []int // bytes, or sectors of a range
	}{
		{write(512, mem[:9*1024]), []virtio.BlkHeader{{Type: virtio.BlkOut, Sector: 1}, {Type: virtio.BlkOut, Sector: 17}}, []int{8192, 1024}},
		{read(0, mem[:512], mem[4096:4608], mem[1024:1536]), []virtio.BlkHeader{{}, {Sector: 2}}, []int{1024, 512}},
		{&hpdi.Request{Op: hpdi.OpFlush}, []virtio.BlkHeader{{Type: virtio.BlkFlushCache}}, []int{0}},
		{&hpdi.Request{Op: hpdi.OpDiscard, Offset: 1024, Length: 66 * 512}, []virtio.BlkHeader{{Type: virtio.BlkDiscardRange}, {Type: virtio.BlkDiscardRange}}, []int{64, 2}},
		{&hpdi.Request{Op: hpdi.OpWriteZeroes, Offset: 1024, Length: 512}, []virtio.BlkHeader{{Type: virtio.BlkWriteZeroRange}}, []int{1}},
	} {
		must(t, q.Submit(r.r))
		sector := uint64(r.r.Offset / 512)
		for i, want := range r.want {
			none(t, q) // it comes with its last command
			c := p.next(dev)
			if got := virtio.ReadBlkHeader(c.Out[0]); got != want {
				t.Errorf("command %d of a %v is %+v, not %+v", i, r.r.Op, got, want)
			}
			n := int(c.OutBytes+c.InBytes) - virtio.BlkHeaderBytes - 1
			if r.r.Op == hpdi.OpDiscard || r.r.Op == hpdi.OpWriteZeroes {
				got := virtio.ReadBlkRange(c.Out[1])
				if n = int(got.Sectors); got.Sector != sector || got.Flags&virtio.BlkUnmap != 0 != (r.r.Op == hpdi.OpWriteZeroes) {
					t.Errorf("a range of a %v is %+v", r.r.Op, got)
				}
				sector += uint64(n)
			}
			if n != r.n[i] {
				t.Errorf("command %d of a %v is of %d, not %d", i, r.r.Op, n, r.n[i])
			}
			p.give(0, dev, c, virtio.BlkOK)
		}
		must(t, one(t, q).Err)
	}
}

// The status that the back-end gives is the error of the request alone, of the right kind;
// the first bad one counts.
func TestStatus(t *testing.T) {
	f := newFake(t)
	f.set(func(f *fake) { f.config.SegMax = 1 })
	_, q, mem := setup(t, f, Options{})
	p := f.connected(1)
	dev := p.device(0)
	for _, c := range []struct {
		status []byte
		want   error
	}{
		{[]byte{virtio.BlkIOError, virtio.BlkOK}, hpdi.ErrIO}, {[]byte{virtio.BlkOK, virtio.BlkUnsupported}, hpdi.ErrUnsupported},
		{[]byte{virtio.BlkUnsupported, virtio.BlkIOError}, hpdi.ErrUnsupported}, {[]byte{noStatus, virtio.BlkOK}, hpdi.ErrIO}, {[]byte{virtio.BlkOK, 17}, hpdi.ErrIO},
		{[]byte{virtio.BlkOK, virtio.BlkOK}, nil},
	} {
		must(t, q.Submit(read(0, mem[:512], mem[1024:1536])))
		for _, status := range c.status {
			p.give(0, dev, p.next(dev), status)
		}
		if r := one(t, q); !errors.Is(r.Err, c.want) {
			t.Errorf("with status %d: %v", c.status, r.Err)
		}
	}
}

// Whatever a back-end writes to a queue that cannot be ends the device with an error that
// says what it was. Each request comes back once.
func TestHostileQueue(t *testing.T) {
	for name, lie := range map[string]func(p *peer, r *ring, packed bool){
		"number out of range": func(p *peer, r *ring, packed bool) { p.use(r, packed, 0, 5000, 0) },
		"not in flight":       func(p *peer, r *ring, packed bool) { p.use(r, packed, 0, 77, 0) },
		"too many bytes":      func(p *peer, r *ring, packed bool) { p.use(r, packed, 0, p.first(packed), 1<<30) },
		"twice": func(p *peer, r *ring, packed bool) {
			id := p.first(packed)
			p.use(r, packed, 0, id, 1)
			p.use(r, packed, 1, id, 1)
		},
	} {
		for _, packed := range []Choice{On, Off} {
			t.Run(name+", packed "+string(packed), func(t *testing.T) {
				f := newFake(t)
				d, q, mem := setup(t, f, Options{Packed: packed, Queues: 2, Reconnect: 10 * time.Second})
				other, err := d.NewQueue(1)
				must(t, err)
				defer func() { must(t, other.Close()) }()
				p := f.connected(1)
				reqs := []*hpdi.Request{read(0, mem[:512]), read(512, mem[512:1024])}
				must(t, q.Submit(reqs...))
				must(t, other.Submit(read(0, mem[1024:1536])))
				lie(p, p.rings[0], packed == On)
				p.call(0)
				seen := map[*hpdi.Request]int{}
				bad := 0
				for len(seen) < len(reqs) {
					for _, r := range some(t, q) {
						if seen[r]++; seen[r] > 1 {
							t.Fatal("a request came twice")
						}
						if r.Err != nil && !errors.Is(r.Err, hpdi.ErrIO) { // without a status
							bad++
							if !errors.Is(r.Err, virtio.ErrBroken) || !errors.Is(r.Err, hpdi.ErrDisconnected) {
								t.Errorf("it ended with %v", r.Err)
							}
						}
					}
				}
				if bad == 0 {
					t.Error("nothing was wrong")
				}
				if r := one(t, other); !errors.Is(r.Err, virtio.ErrBroken) {
					t.Errorf("a request in the other queue: %v", r.Err)
				}
				for _, q := range []hpdi.Queue{q, other} {
					must(t, q.Submit(reqs[0]))
					if r := one(t, q); !errors.Is(r.Err, virtio.ErrBroken) {
						t.Errorf("a later request: %v", r.Err)
					}
				}
			})
		}
	}
}

// some waits for requests.
func some(t testing.TB, q hpdi.Queue) []*hpdi.Request {
	t.Helper()
	done, err := q.Wait(1, nil)
	must(t, err)
	if len(done) == 0 {
		t.Fatal("a wait returned none")
	}
	return done
}

// first is the number of the first chain in a new queue.
func (p *peer) first(packed bool) uint32 {
	c := &virtio.Chain{}
	ok, err := p.device(0).Next(c)
	must(p.f.t, err)
	if !ok {
		p.f.t.Fatal("there is no request")
	}
	return uint32(c.Head)
}

// use writes any use of a chain to a new queue, as its use number i.
func (p *peer) use(r *ring, packed bool, i int, id, written uint32) {
	p.f.mu.Lock()
	defer p.f.mu.Unlock()
	m, err := virtio.NewMemory(p.slots)
	must(p.f.t, err)
	le := binary.LittleEndian
	if packed {
		i *= 3 // descriptors of a chain
		area, err := m.User(r.addr.Desc, uint64(virtio.DescBytes*r.size))
		must(p.f.t, err)
		virtio.PutPackedBuffer(area, i, 0, written)
		virtio.StorePackedWord(area, i, uint16(id), virtio.PackedUsedFlags(true)|virtio.DescWrite)
		return
	}
	area, err := m.User(r.addr.Used, uint64(4+8*r.size))
	must(p.f.t, err)
	le.PutUint32(area[4+8*i:], id)
	le.PutUint32(area[8+8*i:], written)
	virtio.Store(area, 0, uint32(i+1)<<16)
}

// What has no room in the virtqueue can be cancelled and has deadlines, and what is in it
// has not; all of it comes back, and what was ended never reaches the back-end.
func TestCancelQueued(t *testing.T) {
	f := newFake(t)
	d, q, mem := setup(t, f, Options{QueueSize: 4, NoIndirect: true})
	if d.Info().Cancel != hpdi.CancelQueued {
		t.Error("what can be cancelled is not said")
	}
	p := f.connected(1)
	dev := p.device(0)
	part := func(i int) []byte { return mem[i*512:][:512] }
	inside, cancelled, late, last := read(0, part(0)), read(512, part(1)), read(1024, part(2)), read(1536, part(3))
	begun := time.Now()
	late.Deadline = begun.Add(30 * time.Millisecond)
	must(t, q.Submit(inside, cancelled, late, last))
	q.Cancel(inside, cancelled, write(0, part(0)))
	if r := one(t, q); r != cancelled || !errors.Is(r.Err, hpdi.ErrCanceled) {
		t.Errorf("%v came, with %v", r.Offset, r.Err)
	}
	if r := one(t, q); r != late || !errors.Is(r.Err, hpdi.ErrDeadline) || time.Since(begun) < 30*time.Millisecond {
		t.Errorf("%v came after %v, with %v", r.Offset, time.Since(begun), r.Err)
	}
	expired := read(0, part(1))
	expired.Deadline = begun
	must(t, q.Submit(expired))
	if r := one(t, q); r != expired || !errors.Is(r.Err, hpdi.ErrDeadline) {
		t.Errorf("%v came, with %v", r.Offset, r.Err)
	}
	none(t, q)
	for _, want := range []*hpdi.Request{inside, last} {
		c := p.next(dev)
		if got := virtio.ReadBlkHeader(c.Out[0]); got.Sector != uint64(want.Offset/512) {
			t.Errorf("the back-end got %+v", got)
		}
		p.give(0, dev, c, virtio.BlkOK)
		if r := one(t, q); r != want || r.Err != nil {
			t.Errorf("%v came, with %v", r.Offset, r.Err)
		}
	}
}

// Two queues of the application on one virtqueue each get what is theirs, whoever looks.
func TestSharedQueue(t *testing.T) {
	eachLayout(t, func(t *testing.T, o Options) {
		f := newFake(t)
		d, q, mem := setup(t, f, o)
		second, err := d.NewQueue(8)
		must(t, err)
		defer func() { must(t, second.Close()) }()
		p := f.connected(1)
		dev := p.device(0)
		const rounds = 200
		ended := make(chan error, 2)
		for i, q := range []hpdi.Queue{q, second} {
			r := read(int64(i)*512, mem[i*512:][:512])
			go func() {
				for range rounds {
					if err := q.Submit(r); err != nil {
						ended <- err
						return
					}
					done, err := q.Wait(1, nil)
					if err == nil && (len(done) != 1 || done[0] != r || r.Err != nil) {
						err = errors.New("another request came")
					}
					if err != nil {
						ended <- err
						return
					}
				}
				ended <- nil
			}()
		}
		for range 2 * rounds {
			p.give(0, dev, p.next(dev), virtio.BlkOK)
		}
		must(t, errors.Join(<-ended, <-ended))
		// The descriptor of one tells also of what the other has found.
		fd := second.Event()
		must(t, second.Submit(read(512, mem[512:1024])))
		if readable(t, fd, 0) {
			none(t, second)
		}
		must(t, q.Submit(read(0, mem[:512])))
		a, b := p.next(dev), p.next(dev)
		p.give(0, dev, a, virtio.BlkOK)
		p.give(0, dev, b, virtio.BlkOK)
		must(t, one(t, q).Err)
		if !readable(t, fd, 5000) {
			t.Error("there is no event of what the other queue has found")
		}
		must(t, one(t, second).Err)
		if readable(t, fd, 0) {
			none(t, second)
			if readable(t, fd, 0) {
				t.Error("the event stays")
			}
		}
	})
}

func readable(t testing.TB, fd, milliseconds int) bool {
	t.Helper()
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	n, err := unix.Poll(fds, milliseconds)
	must(t, err)
	return n == 1
}

// A notice of the back-end changes the size that the device says to have.
func TestResize(t *testing.T) {
	f := newFake(t)
	d, q, mem := setup(t, f, Options{})
	p := f.connected(1)
	must(t, q.Submit(read(fakeBlocks*512, mem[:512])))
	if r := one(t, q); !errors.Is(r.Err, hpdi.ErrRange) {
		t.Errorf("a read behind the end: %v", r.Err)
	}
	f.set(func(f *fake) { f.config.Capacity *= 2 })
	must(t, p.tell(vhost.BackendConfigChange, vhost.FlagNeedReply))
	for begun := time.Now(); d.Info().Size != 2*fakeBlocks*512; time.Sleep(time.Millisecond) { // a message comes
		if time.Since(begun) > 10*time.Second {
			t.Fatalf("the device has %d bytes", d.Info().Size)
		}
	}
	reply := make([]byte, 20)
	p.f.mu.Lock()
	_, err := p.backend.Read(reply)
	p.f.mu.Unlock()
	must(t, err)
	if le := binary.LittleEndian; le.Uint32(reply) != uint32(vhost.BackendConfigChange) || le.Uint32(reply[4:]) != vhost.FlagReply|1 || le.Uint64(reply[12:]) != 0 {
		t.Errorf("the answer is %x", reply)
	}
	must(t, q.Submit(read(fakeBlocks*512, mem[:512])))
	dev := p.device(0)
	p.give(0, dev, p.next(dev), virtio.BlkOK)
	must(t, one(t, q).Err)
	must(t, p.tell(77, vhost.FlagNeedReply)) // what is not known is answered, and no more
	p.f.mu.Lock()
	_, err = p.backend.Read(reply)
	p.f.mu.Unlock()
	must(t, err)
	if binary.LittleEndian.Uint64(reply[12:]) == 0 {
		t.Error("an unknown request was answered well")
	}
}

// What a back-end without a record had has its deadline again when that has gone, also for
// somebody who has gone to sleep before.
func TestDeadlineOfTheGone(t *testing.T) {
	eachLayout(t, func(t *testing.T, o Options) {
		f := newFake(t)
		o.Reconnect = 15 * time.Second
		_, q, mem := setup(t, f, o)
		p := f.connected(1)
		r := read(0, mem[:512])
		begun := time.Now()
		r.Deadline = begun.Add(100 * time.Millisecond)
		must(t, q.Submit(r))
		gone := make(chan struct{})
		go func() {
			defer close(gone)
			for v := q.(*queue).v; ; time.Sleep(time.Millisecond) { // until it sleeps
				v.mu.Lock()
				asleep := v.leader != nil && v.leader.asleep
				v.mu.Unlock()
				if asleep {
					break
				}
			}
			f.refuse()
		}()
		if got := one(t, q); got != r || !errors.Is(r.Err, hpdi.ErrDeadline) || time.Since(begun) > 10*time.Second {
			t.Errorf("it came after %v, with %v", time.Since(begun), got.Err)
		}
		<-gone
		if p.sawRequest(vhost.GetInflightFD) != 0 {
			t.Error("there was a record")
		}
	})
}

// A queue's own event descriptor is written to once until somebody takes what there is, and
// not for what its owner is about to be given.
func TestEventsOnce(t *testing.T) {
	f := newFake(t)
	d, q, mem := setup(t, f, Options{})
	other, err := d.NewQueue(8)
	must(t, err)
	defer func() { must(t, other.Close()) }()
	p := f.connected(1)
	dev := p.device(0)
	fd := q.Event()
	told := func() uint64 {
		var n [8]byte
		if _, err := unix.Read(q.(*queue).told, n[:]); err != nil {
			return 0
		}
		q.(*queue).rung = false
		return binary.LittleEndian.Uint64(n[:])
	}
	none(t, q)
	told()
	send := func() {
		var reqs []*hpdi.Request
		for i := range 3 {
			reqs = append(reqs, read(int64(i)*512, mem[i*512:][:512]))
		}
		must(t, q.Submit(reqs...))
		for range reqs {
			p.give(0, dev, p.next(dev), virtio.BlkOK)
		}
	}
	send()
	many(t, q, 3)
	if n := told(); n != 0 {
		t.Errorf("%d notices of what was taken", n)
	}
	send()
	none(t, other) // it finds them
	if !readable(t, fd, 0) {
		t.Error("there is no event")
	}
	if n := told(); n != 1 {
		t.Errorf("%d notices of three requests", n)
	}
	many(t, q, 3)
	if readable(t, fd, 0) {
		t.Error("the event stays")
	}
}

// Behind a request for which there is no room nothing is tried until there is some, be that
// because another one is complete or because it was taken back itself.
func TestNoRoom(t *testing.T) {
	f := newFake(t)
	_, q, mem := setup(t, f, Options{QueueSize: 8, NoIndirect: true})
	p := f.connected(1)
	dev := p.device(0)
	part := func(i int) []byte { return mem[i*1024:][:512] }
	v := q.(*queue).v
	inside, large := read(0, part(0)), read(512, part(1), part(2), part(3), part(4))
	small, last := read(4096, part(5)), read(8192, part(6), part(7))
	must(t, q.Submit(inside, large)) // 3 descriptors of 8, and 6
	v.mu.Lock()
	order := v.order
	v.mu.Unlock()
	must(t, q.Submit(small))
	must(t, q.Submit(last))
	none(t, q)
	v.mu.Lock()
	if v.order != order {
		t.Errorf("%d commands were made for which there is no room", v.order-order)
	}
	v.mu.Unlock()
	first := p.next(dev)
	q.Cancel(large)
	if r := one(t, q); r != large || !errors.Is(r.Err, hpdi.ErrCanceled) {
		t.Errorf("%v came, with %v", r.Offset, r.Err)
	}
	second := p.next(dev) // without a Wait
	if got := virtio.ReadBlkHeader(second.Out[0]); got.Sector != uint64(small.Offset/512) {
		t.Errorf("the back-end got %+v", got)
	}
	for _, c := range []*virtio.Chain{first, second} {
		p.give(0, dev, c, virtio.BlkOK)
	}
	many(t, q, 2)
	p.give(0, dev, p.next(dev), virtio.BlkOK)
	if r := one(t, q); r != last || r.Err != nil {
		t.Errorf("%v came, with %v", r.Offset, r.Err)
	}
	// A deadline makes room as well.
	must(t, q.Submit(inside))
	large.Deadline = time.Now().Add(20 * time.Millisecond)
	must(t, q.Submit(large, small))
	first = p.next(dev)
	if r := one(t, q); r != large || !errors.Is(r.Err, hpdi.ErrDeadline) {
		t.Errorf("%v came, with %v", r.Offset, r.Err)
	}
	second = p.next(dev)
	for _, c := range []*virtio.Chain{first, second} {
		p.give(0, dev, c, virtio.BlkOK)
	}
	many(t, q, 2)
}
