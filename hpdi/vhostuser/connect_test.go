package vhostuser

import (
	"context"
	"errors"
	"net/url"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/vhost"
	"github.com/pollux-storage/pollux/internal/virtio"
)

func openFiles(t testing.TB) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	must(t, err)
	return len(entries)
}

// say answers a message with this payload, and with so many descriptors that nobody wants.
func say(payload []byte, files int) answer {
	return func(p *peer, _ *vhost.Message) ([]byte, []int, bool) {
		var fds []int
		for range files {
			fd, err := unix.Eventfd(0, unix.EFD_CLOEXEC)
			must(p.f.t, err)
			fds = append(fds, fd)
		}
		return payload, fds, false
	}
}

// What a back-end offers or answers that cannot be is an error of Open that says what it is,
// and leaves nothing open.
func TestRefusedBackends(t *testing.T) {
	number := func(n uint64) []byte { return vhost.AppendU64(nil, n) }
	for name, c := range map[string]struct {
		change func(f *fake)
		o      Options
		want   string
	}{
		"no virtio 1":      {func(f *fake) { f.features &^= virtio.Set(virtio.FVersion1) }, Options{}, "VIRTIO 1.0"},
		"no configuration": {func(f *fake) { f.proto &^= vhost.ProtocolSet(vhost.PConfig) }, Options{}, "device's size"},
		"short configuration": {func(f *fake) {
			f.answers[vhost.GetConfig] = say(vhost.Config{Size: 8, Data: make([]byte, 8)}.Append(nil), 0)
		}, Options{}, "configuration space of 8 bytes"},
		"half a number":    {func(f *fake) { f.answers[vhost.GetFeatures] = say(make([]byte, 4), 1) }, Options{}, "GET_FEATURES"},
		"odd blocks":       {func(f *fake) { f.config.BlockSize = 3000 }, Options{}, "blocks of 3000 bytes"},
		"huge blocks":      {func(f *fake) { f.config.BlockSize = 1 << 30 }, Options{}, "blocks of"},
		"too large":        {func(f *fake) { f.config.Capacity = 1 << 60 }, Options{}, "more than can be addressed"},
		"small segments":   {func(f *fake) { f.features |= virtio.Set(virtio.BlkSizeMax); f.config.SizeMax = 100 }, Options{}, "segments of 100 bytes"},
		"no queues":        {func(f *fake) { f.queues = 0 }, Options{}, "no queues"},
		"no slots":         {func(f *fake) { f.slots = 1 }, Options{}, "1 pieces of memory"},
		"no packed queues": {func(f *fake) { f.features &^= virtio.Set(virtio.FRingPacked) }, Options{Packed: On}, "packed=on"},
		"no odd size":      {func(f *fake) { f.features &^= virtio.Set(virtio.FRingPacked) }, Options{QueueSize: 100}, "no power of two"},
		"always cached":    {func(f *fake) { f.features &^= virtio.Set(virtio.BlkConfigWCE) }, Options{Writeback: Off}, "writeback=off"},
		"never cached":     {func(f *fake) { f.features &^= virtio.Set(virtio.BlkFlush) }, Options{Writeback: On}, "writeback=on"},
		"another answer": {func(f *fake) {
			f.answers[vhost.GetQueueNum] = func(p *peer, _ *vhost.Message) ([]byte, []int, bool) {
				_ = p.conn.Send(vhost.GetVringBase, vhost.FlagReply, number(1))
				return nil, nil, false
			}
		}, Options{}, "GET_VRING_BASE to GET_QUEUE_NUM"},
		"a request": {func(f *fake) {
			f.answers[vhost.GetQueueNum] = func(p *peer, _ *vhost.Message) ([]byte, []int, bool) {
				_ = p.conn.Send(vhost.GetQueueNum, 0, number(1))
				return nil, nil, false
			}
		}, Options{}, "only answers may come"},
		"no answer": {func(f *fake) {
			f.answers[vhost.GetQueueNum] = func(*peer, *vhost.Message) ([]byte, []int, bool) { return nil, nil, false }
		}, Options{Timeout: 20 * time.Millisecond}, "not answered GET_QUEUE_NUM within 20ms"},
		"an end": {func(f *fake) {
			f.answers[vhost.SetVringAddr] = func(*peer, *vhost.Message) ([]byte, []int, bool) { return nil, nil, true }
		}, Options{}, "the connection has ended"},
		"memory refused": {func(f *fake) { f.answers[vhost.AddMemReg] = say(number(1), 2) }, Options{}, "ADD_MEM_REG: the back-end says 1"},
		"no area": {func(f *fake) {
			f.proto |= vhost.ProtocolSet(vhost.PInflightSHMFD)
			f.answers[vhost.GetInflightFD] = say(make([]byte, 24), 0)
		}, Options{}, "record of what is in flight"},
		"areas": {func(f *fake) {
			f.proto |= vhost.ProtocolSet(vhost.PInflightSHMFD)
			f.answers[vhost.GetInflightFD] = say(vhost.Inflight{Size: 4096, Queues: 1, QueueSize: 256}.Append(nil), 2)
		}, Options{}, "with 2 descriptors"},
		"an enormous area": {func(f *fake) {
			f.proto |= vhost.ProtocolSet(vhost.PInflightSHMFD)
			f.answers[vhost.GetInflightFD] = say(vhost.Inflight{Size: 1 << 50, Queues: 1, QueueSize: 256}.Append(nil), 1)
		}, Options{}, "record of what is in flight"},
		"too many queues":   {func(*fake) {}, Options{Queues: 65}, "65 queues"},
		"a queue too long":  {func(*fake) {}, Options{QueueSize: 2048}, "2048 descriptors"},
		"a negative time":   {func(*fake) {}, Options{Poll: -1}, "negative"},
		"a length of three": {func(*fake) {}, Options{Packed: Off, QueueSize: 7}, "no power of two"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			f.set(c.change)
			before := openFiles(t)
			d, err := Open(t.Context(), f.sock, c.o)
			if err == nil {
				_ = d.Close()
				t.Fatal("it was opened")
			}
			if !strings.Contains(err.Error(), c.want) || !strings.Contains(err.Error(), f.sock) {
				t.Errorf("%v, want %q", err, c.want)
			}
			f.refuse()
			if n := openFiles(t); n != before-1 { // the listener
				t.Errorf("%d descriptors are open, %d were", n, before)
			}
		})
	}
	ctx, cancel := context.WithCancel(t.Context())
	f := newFake(t)
	f.set(func(f *fake) {
		f.answers[vhost.GetConfig] = func(*peer, *vhost.Message) ([]byte, []int, bool) { cancel(); return nil, nil, false }
	})
	if _, err := Open(ctx, f.sock, Options{}); !errors.Is(err, context.Canceled) {
		t.Errorf("opened with a context that ends: %v", err)
	}
}

// What was chosen is what the back-end is told.
func TestChosen(t *testing.T) {
	f := newFake(t)
	d, q, _ := setup(t, f, Options{Queues: 8, Writeback: Off, NoEventIdx: true, ReadOnly: false})
	p := f.connected(1)
	info := d.Info()
	if !info.Durable || !strings.Contains(info.Note, "4 of 8 queues") || !strings.Contains(info.Note, "no record") || info.Size != fakeBlocks*512 || !info.SharedMemory || !info.Discard || !info.Zeroes {
		t.Errorf("the device is %+v", info)
	}
	if !p.features.Has(virtio.FRingPacked) || p.features.Has(virtio.FEventIdx) || len(p.rings) != 4 || !slices.Equal(p.writes, []byte{0}) {
		t.Errorf("features %#x, %d queues, writes %v", p.features, len(p.rings), p.writes)
	}
	must(t, q.Submit(&hpdi.Request{Op: hpdi.OpFlush})) // there is nothing to be flushed
	must(t, one(t, q).Err)
	f2 := newFake(t)
	d2, _, _ := setup(t, f2, Options{ReadOnly: true})
	if info := d2.Info(); !info.ReadOnly || info.Discard || info.Zeroes || info.Durable {
		t.Errorf("a device for reading is %+v", info)
	}
}

// A back-end that has gone leaves its queues and its record to the next one, with what is in
// flight; what is submitted meanwhile waits, and can be cancelled.
func TestRecordKept(t *testing.T) {
	eachLayout(t, func(t *testing.T, o Options) {
		f := newFake(t)
		f.set(func(f *fake) { f.proto |= vhost.ProtocolSet(vhost.PInflightSHMFD) })
		o.Reconnect = 3 * time.Second
		d, q, mem := setup(t, f, o)
		p := f.connected(1)
		dev := p.device(0)
		reqs := []*hpdi.Request{write(0, mem[:512]), write(512, mem[512:1024]), write(1024, mem[1024:1536])}
		must(t, q.Submit(reqs...))
		first := p.next(dev)
		p.next(dev) // it is in its hands when it dies
		p.give(0, dev, first, virtio.BlkOK)
		base := dev.Base()
		f.refuse()
		if r := one(t, q); r != reqs[0] || r.Err != nil {
			t.Fatalf("%v came, with %v", r.Offset, r.Err)
		}
		for d.(*device).linked() { // until it has noticed
			time.Sleep(time.Millisecond)
		}
		later, cancelled := write(2048, mem[2048:2560]), write(2560, mem[2560:3072])
		must(t, q.Submit(later, cancelled))
		q.Cancel(append(reqs, cancelled)...)
		if r := one(t, q); r != cancelled || !errors.Is(r.Err, hpdi.ErrCanceled) {
			t.Fatalf("%v came, with %v", r.Offset, r.Err)
		}
		f.listen()
		p2 := f.connected(2)
		// The first has given its area, and got it back as all do.
		if len(p.inflight) != 2 || p.inflight[0] != p.inflight[1] || !slices.Equal(p.inflight[1:], p2.inflight) || p2.sawRequest(vhost.GetInflightFD) != 0 {
			t.Errorf("the first had area %v, the second %v", p.inflight, p2.inflight)
		}
		// What it is told of its place is after what was used.
		want := uint32(1)
		if o.Packed == On {
			want = base>>16 | base&^0xffff
		}
		if got := p2.rings[0].base; got != want {
			t.Errorf("the second begins at %#x, want %#x", got, want)
		}
		dev = p2.device(0)
		for _, want := range []*hpdi.Request{reqs[1], reqs[2], later} {
			c := p2.next(dev)
			if got := virtio.ReadBlkHeader(c.Out[0]); got.Sector != uint64(want.Offset/512) {
				t.Fatalf("the second got %+v, not %d", got, want.Offset)
			}
			p2.give(0, dev, c, virtio.BlkOK)
			if r := one(t, q); r != want || r.Err != nil {
				t.Fatalf("%v came, with %v", r.Offset, r.Err)
			}
		}
		none(t, q)
	})
}

func (d *device) linked() bool {
	d.mu.Lock()
	defer d.mu.Unlock()
	return d.link != nil
}

// Without a record all that was not completed is sent again, in its order, and can be taken
// back while there is nobody.
func TestNoRecord(t *testing.T) {
	eachLayout(t, func(t *testing.T, o Options) {
		f := newFake(t)
		f.set(func(f *fake) { f.config.SegMax = 2 })
		o.QueueSize, o.Reconnect = 16, 3*time.Second
		d, q, mem := setup(t, f, o)
		p := f.connected(1)
		dev := p.device(0)
		part := func(i int) []byte { return mem[i*1024:][:512] }
		// Two commands each, of which some have no room.
		var reqs []*hpdi.Request
		for i := range 12 {
			reqs = append(reqs, write(int64(i)*4096, part(i), part(i+1), part(i+2), part(i+3)))
		}
		must(t, q.Submit(reqs...))
		p.next(dev)
		p.give(0, dev, p.next(dev), virtio.BlkOK) // the second half of the first
		f.refuse()
		for d.(*device).linked() {
			time.Sleep(time.Millisecond)
		}
		gone := []*hpdi.Request{reqs[1], reqs[11]}
		q.Cancel(gone...)
		for _, r := range many(t, q, len(gone)) {
			if !slices.Contains(gone, r) || !errors.Is(r.Err, hpdi.ErrCanceled) {
				t.Fatalf("%v came, with %v", r.Offset, r.Err)
			}
		}
		reqs = slices.DeleteFunc(reqs, func(r *hpdi.Request) bool { return slices.Contains(gone, r) })
		f.listen()
		p = f.connected(2)
		dev = p.device(0)
		for i, r := range reqs {
			for half := range 2 {
				if i == 0 && half == 1 {
					continue // it was done
				}
				c := p.next(dev)
				if got := virtio.ReadBlkHeader(c.Out[0]); got.Sector != uint64(r.Offset/512+int64(2*half)) {
					t.Fatalf("half %d of request %d came as %+v", half, i, got)
				}
				p.give(0, dev, c, virtio.BlkOK)
			}
			if got := one(t, q); got != r || r.Err != nil {
				t.Fatalf("%v came, with %v", got.Offset, got.Err)
			}
		}
	})
}

// Requests wait for a back-end as long as they are to, and fail then; those that come
// later fail at once, until there is one again.
func TestGiveUp(t *testing.T) {
	f := newFake(t)
	const wait = 60 * time.Millisecond
	_, q, mem := setup(t, f, Options{Reconnect: wait, QueueSize: 4, NoIndirect: true})
	f.connected(1)
	reqs := []*hpdi.Request{write(0, mem[:512]), write(512, mem[512:1024])} // one has no room
	must(t, q.Submit(reqs...))
	begun := time.Now()
	f.refuse()
	for _, r := range many(t, q, len(reqs)) {
		if !errors.Is(r.Err, hpdi.ErrDisconnected) || !strings.Contains(r.Err.Error(), f.sock) {
			t.Errorf("it ended with %v", r.Err)
		}
	}
	if took := time.Since(begun); took < wait || took > wait+5*time.Second {
		t.Errorf("they waited for %v", took)
	}
	must(t, q.Submit(reqs[0]))
	if done, err := q.Wait(0, nil); err != nil || len(done) != 1 || !errors.Is(done[0].Err, hpdi.ErrDisconnected) {
		t.Fatalf("%d requests came, %v", len(done), err)
	}
	f.listen()
	p := f.connected(2)
	for {
		must(t, q.Submit(reqs[0]))
		if done, err := q.Wait(0, nil); err != nil || len(done) == 0 {
			must(t, err)
			break
		}
		time.Sleep(time.Millisecond) // it is coming up
	}
	dev := p.device(0)
	p.give(0, dev, p.next(dev), virtio.BlkOK)
	must(t, one(t, q).Err)
}

// Without a time to wait a connection that ends is the end.
func TestNoReconnect(t *testing.T) {
	f := newFake(t)
	_, q, mem := setup(t, f, Options{})
	f.connected(1)
	must(t, q.Submit(write(0, mem[:512])))
	f.refuse()
	f.listen()
	if r := one(t, q); !errors.Is(r.Err, hpdi.ErrDisconnected) {
		t.Errorf("it ended with %v", r.Err)
	}
	must(t, q.Submit(write(0, mem[:512])))
	if r := one(t, q); !errors.Is(r.Err, hpdi.ErrDisconnected) {
		t.Errorf("it ended with %v", r.Err)
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.conns) != 1 {
		t.Errorf("%d connections were made", len(f.conns))
	}
}

// A back-end that is not what was opened is not taken, and the error says why.
func TestAnotherDevice(t *testing.T) {
	for want, change := range map[string]func(f *fake){
		"features":        func(f *fake) { f.features &^= virtio.Set(virtio.FEventIdx) },
		"read-only now":   func(f *fake) { f.features |= virtio.Set(virtio.BlkReadOnly) },
		"blocks of 512":   func(f *fake) { f.config.BlockSize = 4096 },
		"bytes and has":   func(f *fake) { f.config.Capacity /= 2 },
		"queues now":      func(f *fake) { f.config.Queues = 1 },
		"memory now":      func(f *fake) { f.slots = 2 },
		"segments of":     func(f *fake) { f.config.SegMax = 3 },
		"to less at once": func(f *fake) { f.config.DiscardSectors = 1 },
	} {
		f := newFake(t)
		d, q, mem := setup(t, f, Options{Reconnect: 30 * time.Millisecond, Queues: 2})
		other, err := hpdi.Alloc(4096)
		must(t, err)
		must(t, d.Register(other))
		f.connected(1)
		must(t, q.Submit(write(0, mem[:512])))
		f.refuse()
		f.set(change)
		f.listen()
		if r := one(t, q); !errors.Is(r.Err, hpdi.ErrDisconnected) || !strings.Contains(r.Err.Error(), want) {
			t.Errorf("%s: it ended with %v", want, r.Err)
		}
		must(t, hpdi.Free(other))
	}
}

// The back-end has the memory that it needs, and not what was taken from it or freed.
func TestMemory(t *testing.T) {
	for _, slots := range []bool{true, false} {
		f := newFake(t)
		most := 4
		f.set(func(f *fake) {
			if f.slots = 4; !slots {
				f.proto &^= vhost.ProtocolSet(vhost.PConfigureMemSlots)
				most = baseRegions
			}
		})
		d, q, mem := setup(t, f, Options{})
		p := f.connected(1)
		has := func() (at []uint64) {
			p.f.mu.Lock()
			defer p.f.mu.Unlock()
			for _, s := range p.slots[1:] { // without the queues
				at = append(at, s.Guest)
			}
			return at
		}
		var all [][]byte
		for range most - 2 {
			m, err := hpdi.Alloc(8192)
			must(t, err)
			all = append(all, m)
			must(t, errors.Join(d.Register(m[:4096]), d.Register(m[:4096]), d.Register(m[4096:])))
		}
		want := []uint64{pointer(mem)}
		for _, m := range all {
			want = append(want, pointer(m))
		}
		if got := has(); !slices.Equal(got, want) {
			t.Errorf("it has memory at %x, not %x", got, want)
		}
		if err := d.Register(all[0][512:8192]); err == nil || !strings.Contains(err.Error(), "overlap") {
			t.Errorf("memory that overlaps: %v", err)
		}
		more, err := hpdi.Alloc(4096)
		must(t, err)
		if err := d.Register(more); !errors.Is(err, hpdi.ErrMemory) || !strings.Contains(err.Error(), "fewer and larger") {
			t.Errorf("more memory than there are slots: %v", err)
		}
		must(t, q.Submit(write(0, more[:512])))
		if r := one(t, q); !errors.Is(r.Err, hpdi.ErrMemory) {
			t.Errorf("a request there: %v", r.Err)
		}
		for range 2 {
			must(t, errors.Join(d.Unregister(all[0][:4096]), d.Unregister(all[0]))) // the second is not registered
			if got := has(); len(got) != len(want) {
				t.Errorf("memory was taken away that is registered")
			}
		}
		must(t, d.Unregister(all[0][4096:]))
		if got := has(); len(got) != len(want)-1 || slices.Contains(got, pointer(all[0])) {
			t.Errorf("it has memory at %x", got)
		}
		must(t, q.Submit(write(0, more[:512]))) // there is a place now
		dev := p.device(0)
		p.give(0, dev, p.next(dev), virtio.BlkOK)
		must(t, one(t, q).Err)
		// What is freed is gone with the next request, also when something else is at its address.
		must(t, hpdi.Free(more))
		again, err := hpdi.Alloc(4096)
		must(t, err)
		must(t, q.Submit(write(0, again[:512])))
		p.f.mu.Lock()
		last := p.slots[len(p.slots)-1]
		again[100] = 77
		if last.Guest != pointer(again) || last.Mem[100] != 77 || len(p.slots) != most {
			t.Errorf("the back-end has other memory at %#x than the driver at %#x, %d pieces", last.Guest, pointer(again), len(p.slots))
		}
		p.f.mu.Unlock()
		must(t, d.Register(nil))
		own := d.(*device).own
		must(t, q.Submit(write(0, own[:512])))
		if r := one(t, q); !errors.Is(r.Err, hpdi.ErrMemory) {
			t.Errorf("a request of the queues' memory: %v", r.Err)
		}
		f.refuse()
		one(t, q)
		for _, m := range append(all, again) {
			must(t, hpdi.Free(m))
		}
	}
}

// A table of memory that queues may be reading does not change when several pieces go.
func TestTablesDoNotChange(t *testing.T) {
	f := newFake(t)
	f.set(func(f *fake) { f.slots = 8 })
	dev, q, _ := setup(t, f, Options{})
	d := dev.(*device)
	p := f.connected(1)
	var all [][]byte
	for range 4 {
		m, err := hpdi.Alloc(4096)
		must(t, err)
		all = append(all, m)
		must(t, d.Register(m))
	}
	full := slices.Clone(d.mem.Load().regions)
	var seen [][]*region // while a piece is being taken away
	f.set(func(f *fake) { f.removing = func() { seen = append(seen, slices.Clone(d.mem.Load().regions)) } })
	must(t, errors.Join(hpdi.Free(all[0]), hpdi.Free(all[2])))
	must(t, q.Submit(write(0, all[3][:512])))
	own := p.device(0)
	p.give(0, own, p.next(own), virtio.BlkOK)
	must(t, one(t, q).Err)
	f.set(func(f *fake) {
		f.removing = nil
		less := slices.DeleteFunc(slices.Clone(full), func(r *region) bool { return uint64(r.begin) == pointer(all[0]) })
		if len(seen) != 2 || !slices.Equal(seen[0], full) || !slices.Equal(seen[1], less) {
			t.Errorf("queues have seen %v, not %v and %v", seen, full, less)
		}
	})
	f.refuse()
	must(t, errors.Join(hpdi.Free(all[1]), hpdi.Free(all[3])))
}

func TestOptions(t *testing.T) {
	o, err := ParseOptions(url.Values{})
	must(t, err)
	if want := (Options{Queues: 1, QueueSize: 256, Packed: Auto, Writeback: Auto, Reconnect: 30 * time.Second, Poll: 50 * time.Microsecond, Timeout: 10 * time.Second}); o != want {
		t.Errorf("the defaults are %+v", o)
	}
	o, err = ParseOptions(url.Values{
		"queues": {"4"}, "queue-size": {"64"}, "packed": {"on"}, "event-idx": {"off"}, "indirect": {"off"}, "writeback": {"off"},
		"read-only": {"on"}, "reconnect": {"1m"}, "poll": {"0s"}, "timeout": {"1s"},
	})
	must(t, err)
	if want := (Options{Queues: 4, QueueSize: 64, Packed: On, NoEventIdx: true, NoIndirect: true, Writeback: Off, ReadOnly: true, Reconnect: time.Minute, Timeout: time.Second}); o != want {
		t.Errorf("they are %+v", o)
	}
	for _, bad := range []url.Values{{"queues": {"0"}}, {"packed": {"perhaps"}}, {"poll": {"1h"}}, {"colour": {"red"}}} {
		if _, err := ParseOptions(bad); !errors.Is(err, hpdi.ErrProperty) {
			t.Errorf("%v: %v", bad, err)
		}
	}
}

// A device that was opened without a write cache completes a flush by itself, so no back-end
// may have one later: it is turned off, or the back-end is not taken.
func TestCacheAgain(t *testing.T) {
	wce := virtio.Set(virtio.BlkConfigWCE)
	for name, c := range map[string]struct {
		first, second func(f *fake)
		notice        bool   // the second is a change of the same back-end
		want          string // in the error; empty: it is taken
	}{
		"turned off":    {func(*fake) {}, func(f *fake) { f.config.Writeback = true }, false, ""},
		"by itself":     {func(*fake) {}, func(f *fake) { f.config.Writeback = true }, true, ""},
		"disobedient":   {func(*fake) {}, func(f *fake) { f.config.Writeback, f.answers[vhost.SetConfig] = true, say(make([]byte, 8), 0) }, false, "write cache on"},
		"new":           {func(f *fake) { f.features &^= wce | virtio.Set(virtio.BlkFlush) }, func(f *fake) { f.features |= virtio.Set(virtio.BlkFlush) }, false, "write cache now"},
		"new, with WCE": {func(f *fake) { f.features &^= wce | virtio.Set(virtio.BlkFlush) }, func(f *fake) { f.features |= wce | virtio.Set(virtio.BlkFlush) }, false, "write cache now"},
	} {
		t.Run(name, func(t *testing.T) {
			f := newFake(t)
			f.set(func(f *fake) { f.config.Writeback = false; c.first(f) })
			wait := 10 * time.Second
			if c.want != "" {
				wait = 30 * time.Millisecond
			}
			d, q, mem := setup(t, f, Options{Reconnect: wait})
			p := f.connected(1)
			if !d.Info().Durable {
				t.Fatalf("the device is %+v", d.Info())
			}
			must(t, q.Submit(&hpdi.Request{Op: hpdi.OpFlush}))
			must(t, one(t, q).Err)
			must(t, q.Submit(write(0, mem[:512])))
			if c.notice {
				f.set(c.second)
				must(t, p.tell(vhost.BackendConfigChange, 0))
			} else {
				f.refuse()
				f.set(c.second)
				f.listen()
			}
			if c.want != "" {
				if r := one(t, q); !errors.Is(r.Err, hpdi.ErrDisconnected) || !strings.Contains(r.Err.Error(), c.want) {
					t.Errorf("it ended with %v", r.Err)
				}
				return
			}
			p = f.connected(2)
			if !slices.Equal(p.writes, []byte{0}) {
				t.Errorf("the second was told %v of its cache", p.writes)
			}
			dev := p.device(0)
			p.give(0, dev, p.next(dev), virtio.BlkOK)
			must(t, one(t, q).Err)
		})
	}
}

// A back-end that takes its time with each message is not waited for without end.
func TestSlowBackend(t *testing.T) {
	f := newFake(t)
	f.set(func(f *fake) {
		slow := func(p *peer, m *vhost.Message) ([]byte, []int, bool) {
			time.Sleep(300 * time.Millisecond) // it is what is tested
			payload, files := p.answer(m)
			return payload, files, false
		}
		f.answers[vhost.SetVringNum], f.answers[vhost.SetVringBase], f.answers[vhost.SetVringAddr] = slow, slow, slow
	})
	d, err := Open(t.Context(), f.sock, Options{Queues: 4, Timeout: time.Second})
	if err == nil {
		_ = d.Close()
		t.Fatal("it was opened")
	}
	if !errors.Is(err, os.ErrDeadlineExceeded) || !strings.Contains(err.Error(), "not brought the device up within 2s") {
		t.Errorf("it ended with %v", err)
	}
}

// A new back-end that says nothing holds nobody up for longer than requests wait for one.
func TestSilentBackend(t *testing.T) {
	f := newFake(t)
	_, q, mem := setup(t, f, Options{Reconnect: 50 * time.Millisecond, Timeout: time.Minute})
	f.connected(1)
	must(t, q.Submit(write(0, mem[:512])))
	f.refuse()
	f.set(func(f *fake) {
		f.answers[vhost.GetFeatures] = func(*peer, *vhost.Message) ([]byte, []int, bool) { return nil, nil, false }
	})
	begun := time.Now()
	f.listen()
	r := one(t, q)
	if took := time.Since(begun); took > 20*time.Second || !errors.Is(r.Err, hpdi.ErrDisconnected) {
		t.Errorf("it ended after %v with %v", took, r.Err)
	}
}
