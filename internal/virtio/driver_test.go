package virtio

import (
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"
	"unsafe"
)

// queueMemory is a queue's areas and the driver's side of it.
type queueMemory struct {
	o DriverOptions
	d Driver
}

// words returns n bytes that are aligned to 16.
func words(n int) []byte {
	w := make([]uint64, n/8+3)
	b := unsafe.Slice((*byte)(unsafe.Pointer(&w[0])), 8*len(w))
	for !aligned(b, 16) {
		b = b[8:]
	}
	return b[:n:n]
}

const (
	testChain  = 6
	testTables = 1 << 40 // address of the indirect tables
)

func newQueue(t testing.TB, size int, f Features) *queueMemory {
	t.Helper()
	desc, driver, device := SplitBytes(size)
	if f.Has(FRingPacked) {
		driver, device = EventBytes, EventBytes
	}
	q := &queueMemory{o: DriverOptions{
		Size: size, Features: f, Desc: words(desc), Driver: words(driver), Device: words(device),
		Tables: words(size * testChain * DescBytes), TablesAddr: testTables, Chain: testChain,
	}}
	var err error
	if q.d, err = NewDriver(q.o); err != nil {
		t.Fatal(err)
	}
	return q
}

// peer is a device that keeps to the rules, in the test's own words.
type peer struct {
	q           *queueMemory
	avail, used int // counted without end
}

// take returns the next available chain, and its number and descriptors.
func (p *peer) take() (id, descs int, chain []Buffer) {
	le, o := binary.LittleEndian, p.q.o
	read := func(table []byte, i int) Desc {
		d := ReadSplitDesc(table, i)
		if o.Features.Has(FRingPacked) {
			d.Next, d.Flags = d.Flags, d.Next // they lie the other way round
		}
		return d
	}
	follow := func(table []byte, i int) {
		for {
			d := read(table, i)
			descs++
			if d.Flags&DescIndirect != 0 {
				table = o.Tables[d.Addr-testTables:][:d.Len]
				if o.Features.Has(FRingPacked) {
					for i := range int(d.Len / DescBytes) {
						e := read(table, i)
						chain = append(chain, Buffer{e.Addr, e.Len, e.Flags&DescWrite != 0})
					}
					return
				}
				for i, more := 0, true; more; {
					e := read(table, i)
					chain = append(chain, Buffer{e.Addr, e.Len, e.Flags&DescWrite != 0})
					i, more = int(e.Next), e.Flags&DescNext != 0
				}
				return
			}
			chain = append(chain, Buffer{d.Addr, d.Len, d.Flags&DescWrite != 0})
			if d.Flags&DescNext == 0 {
				id = int(d.Next) // of a packed ring
				return
			}
			if i = int(d.Next); o.Features.Has(FRingPacked) {
				i = (p.avail + descs) % o.Size
			}
		}
	}
	if o.Features.Has(FRingPacked) {
		at := p.avail % o.Size
		if _, flags := LoadPackedWord(o.Desc, at); !PackedAvailable(flags, p.avail/o.Size%2 == 0) {
			return 0, 0, nil
		}
		id0, _ := LoadPackedWord(o.Desc, at)
		follow(o.Desc, at)
		p.avail += descs
		return int(id0), descs, chain
	}
	if uint16(p.avail) == le.Uint16(o.Driver[2:]) {
		return 0, 0, nil
	}
	head := int(le.Uint16(o.Driver[4+2*(p.avail%o.Size):]))
	p.avail++
	follow(o.Desc, head)
	return head, descs, chain
}

// give says that a chain is used, and returns whether the driver wants a notice.
func (p *peer) give(id, descs int, written uint32) bool {
	le, o := binary.LittleEndian, p.q.o
	before := p.used
	if o.Features.Has(FRingPacked) {
		at := p.used % o.Size
		PutPackedBuffer(o.Desc, at, 0, written)
		StorePackedWord(o.Desc, at, uint16(id), PackedUsedFlags(p.used/o.Size%2 == 0)|DescWrite)
		p.used += descs
		return PackedNeedEvent(LoadPackedEvent(o.Driver), o.Size, uint16(p.used%o.Size), uint16(descs), p.used/o.Size%2 == 0)
	}
	e := o.Device[4+8*(p.used%o.Size):]
	le.PutUint32(e, uint32(id))
	le.PutUint32(e[4:], written)
	p.used++
	le.PutUint16(o.Device[2:], uint16(p.used))
	if o.Features.Has(FEventIdx) {
		return NeedEvent(le.Uint16(o.Driver[4+2*o.Size:]), uint16(p.used), uint16(before))
	}
	return le.Uint16(o.Driver)&AvailNoInterrupt == 0
}

// layouts calls f for each combination of features.
func layouts(t *testing.T, f func(t *testing.T, features Features)) {
	for name, features := range map[string]Features{
		"split": 0, "split, events": Set(FEventIdx), "split, indirect": Set(FEventIdx, FIndirectDesc), "packed": Set(FRingPacked),
		"packed, events": Set(FRingPacked, FEventIdx), "packed, indirect": Set(FRingPacked, FEventIdx, FIndirectDesc),
	} {
		t.Run(name, func(t *testing.T) { f(t, features) })
	}
}

// A device that keeps to the rules sees each chain once, as it was added, and the driver
// gets each back once, whatever the order, through many turns of the ring.
func TestDriver(t *testing.T) {
	seed := rand.Uint64()
	if v := os.Getenv("POLLUX_SEED"); v != "" {
		seed, _ = strconv.ParseUint(v, 10, 64)
	}
	t.Logf("seed %d (POLLUX_SEED=%d repeats this run)", seed, seed)
	layouts(t, func(t *testing.T, features Features) {
		rng := rand.New(rand.NewPCG(seed, uint64(features)))
		size := 16
		if features.Has(FRingPacked) {
			size = 13
		}
		q := newQueue(t, size, features)
		p := &peer{q: q}
		type taken struct{ id, descs int }
		var at []taken
		sent := map[int][]Buffer{}
		var order []int
		room := func(chain []Buffer) (n uint32) {
			for _, b := range chain {
				if b.Write {
					n += b.Len
				}
			}
			return n
		}
		popped, full := 0, false
		for step := 0; popped < 40_000; step++ {
			switch rng.IntN(4) {
			case 0, 1:
				for range rng.IntN(4) {
					id, ok := q.d.Next()
					if !ok {
						full = true
						break
					}
					chain := make([]Buffer, 1+rng.IntN(q.d.Longest()))
					for i, out := 0, rng.IntN(len(chain)+1); i < len(chain); i++ {
						chain[i] = Buffer{rng.Uint64() >> 1, rng.Uint32() >> 8, i >= out}
					}
					fits := q.d.Fits(len(chain))
					if added := q.d.Add(chain); added != fits {
						t.Fatalf("step %d: a chain of %d was added: %v, and should fit: %v", step, len(chain), added, fits)
					} else if !added {
						full = true
						break
					}
					if sent[id] != nil {
						t.Fatalf("step %d: chain %d was given out twice", step, id)
					}
					sent[id] = chain
					order = append(order, id)
				}
				if rng.IntN(2) == 0 {
					q.d.Publish()
				}
			case 2:
				for id, descs, chain := p.take(); chain != nil; id, descs, chain = p.take() {
					if id != order[0] || len(chain) != len(sent[id]) {
						t.Fatalf("step %d: the device got chain %d of %d buffers, not %d of %d", step, id, len(chain), order[0], len(sent[order[0]]))
					}
					for i := range chain {
						if chain[i] != sent[id][i] {
							t.Fatalf("step %d: buffer %d of chain %d is %+v, not %+v", step, i, id, chain[i], sent[id][i])
						}
					}
					order = order[1:]
					at = append(at, taken{id, descs})
				}
				rng.Shuffle(len(at), func(i, j int) { at[i], at[j] = at[j], at[i] })
			case 3:
				for range min(len(at), rng.IntN(6)) {
					p.give(at[0].id, at[0].descs, room(sent[at[0].id]))
					at = at[1:]
				}
				for {
					ready := q.d.Ready()
					id, written, ok, err := q.d.Pop()
					if err != nil || ok != ready {
						t.Fatalf("step %d: %v, %v where ready was %v", step, ok, err, ready)
					}
					if !ok {
						break
					}
					if sent[id] == nil || written != room(sent[id]) {
						t.Fatalf("step %d: chain %d came back with %d bytes", step, id, written)
					}
					delete(sent, id)
					popped++
				}
			}
			if q.d.InFlight() != len(sent) {
				t.Fatalf("step %d: %d chains are in flight, not %d", step, q.d.InFlight(), len(sent))
			}
		}
		if !full {
			t.Error("the queue was never full")
		}
	})
}

// Who is asked for a notice gives it, and nobody sleeps over what is there already.
func TestNotices(t *testing.T) {
	layouts(t, func(t *testing.T, features Features) {
		q := newQueue(t, 8, features)
		p := &peer{q: q}
		send := func() {
			if !q.d.Add([]Buffer{{Addr: 1, Len: 2}}) {
				t.Fatal("there is no room")
			}
			q.d.Publish()
		}
		use := func() bool {
			id, descs, chain := p.take()
			if chain == nil {
				t.Fatal("there is no chain")
			}
			return p.give(id, descs, 0)
		}
		pop := func() {
			if _, _, ok, err := q.d.Pop(); !ok || err != nil {
				t.Fatal(ok, err)
			}
		}
		for turn := range 50 {
			send()
			send()
			q.d.Disarm()
			if turn > 0 && use() {
				t.Fatalf("turn %d: a notice that nobody wants", turn)
			} else if turn == 0 {
				use()
			}
			if q.d.Arm(1) {
				t.Fatalf("turn %d: it would sleep over a used chain", turn)
			}
			pop()
			if !q.d.Arm(1) || !use() {
				t.Fatalf("turn %d: no notice", turn)
			}
			pop()
		}
		if features.Has(FEventIdx) && !features.Has(FRingPacked) {
			for range 3 {
				send()
			}
			if !q.d.Arm(3) || use() || use() || !use() {
				t.Error("a notice before the third chain, or none at it")
			}
			for range 3 {
				pop()
			}
		}
		// The other way: what the device says of notices it wants.
		for range 3 {
			q.d.Add([]Buffer{{Addr: 1, Len: 2}})
		}
		switch {
		case features.Has(FRingPacked) && features.Has(FEventIdx):
			StorePackedEvent(q.o.Device, PackedEvent{Flags: EventDesc, Off: uint16(p.avail%8) + 2, Wrap: p.avail/8%2 == 0})
		case features.Has(FRingPacked):
			StorePackedEvent(q.o.Device, PackedEvent{Flags: EventEnable})
		case features.Has(FEventIdx):
			binary.LittleEndian.PutUint16(q.o.Device[4+8*8:], uint16(p.avail)+2)
		}
		if !q.d.Publish() {
			t.Error("the device was to be notified")
		}
		q.d.Add([]Buffer{{Addr: 1, Len: 2}})
		if features.Has(FRingPacked) && !features.Has(FEventIdx) {
			StorePackedEvent(q.o.Device, PackedEvent{Flags: EventDisable})
		} else if !features.Has(FEventIdx) {
			q.o.Device[0] |= byte(UsedNoNotify)
		}
		if q.d.Publish() {
			t.Error("the device was not to be notified")
		}
	})
}

// What breaks a rule is an error that names it, and stays one.
func TestHostileDevice(t *testing.T) {
	layouts(t, func(t *testing.T, features Features) {
		packed := features.Has(FRingPacked)
		for name, lie := range map[string]func(q *queueMemory, p *peer, id, descs int){
			"number out of range": func(q *queueMemory, p *peer, id, descs int) { p.give(8, descs, 0) },
			"not in flight":       func(q *queueMemory, p *peer, id, descs int) { p.give((id+1)%8, descs, 0) },
			"too many bytes":      func(q *queueMemory, p *peer, id, descs int) { p.give(id, descs, 11) },
			"twice":               func(q *queueMemory, p *peer, id, descs int) { p.give(id, descs, 0); p.give(id, descs, 0) },
			"an index that jumps": func(q *queueMemory, p *peer, id, descs int) {
				if packed {
					p.give(id, descs, 0)
					p.give(id+1, descs, 0)
					return
				}
				binary.LittleEndian.PutUint16(q.o.Device[2:], 2)
			},
			"an index that goes back": func(q *queueMemory, p *peer, id, descs int) {
				if packed {
					p.give(0xffff, descs, 0)
					return
				}
				binary.LittleEndian.PutUint16(q.o.Device[2:], 0xffff)
			},
		} {
			q := newQueue(t, 8, features)
			p := &peer{q: q}
			q.d.Add([]Buffer{{Addr: 1, Len: 2}, {Addr: 1, Len: 10, Write: true}})
			q.d.Publish()
			id, descs, _ := p.take()
			lie(q, p, id, descs)
			n := 0
			var err error
			for n < 5 && err == nil {
				var ok bool
				if _, _, ok, err = q.d.Pop(); ok {
					n++
				} else if err == nil {
					break
				}
			}
			if !errors.Is(err, ErrBroken) || n > 1 {
				t.Errorf("%s: %d chains came, %v", name, n, err)
			}
			if _, _, ok, again := q.d.Pop(); ok || again == nil || again.Error() != err.Error() || !q.d.Ready() || q.d.Add([]Buffer{{Addr: 1, Len: 2}}) || q.d.Arm(1) {
				t.Errorf("%s: the queue goes on after %v", name, err)
			}
			q.d.Reset()
			if _, _, ok, err := q.d.Pop(); ok || err != nil || !q.d.Add([]Buffer{{Addr: 1, Len: 2}}) {
				t.Errorf("%s: after a reset: %v, %v", name, ok, err)
			}
		}
	})
}

// FuzzDriver is a device that writes anything anywhere. Each chain comes back at most once
// for each time that it was added, with no more bytes than it has room for.
func FuzzDriver(f *testing.F) {
	for _, features := range []Features{0, Set(FEventIdx), Set(FRingPacked), Set(FRingPacked, FIndirectDesc, FEventIdx)} {
		f.Add(uint8(features>>FIndirectDesc&3|features>>FRingPacked&1<<2), []byte{0, 3, 0, 2, 1, 0, 2, 4, 0, 0, 3, 0, 4, 1, 2, 8, 3, 0})
		f.Add(uint8(features>>FIndirectDesc&3|features>>FRingPacked&1<<2), []byte{0, 6, 0, 1, 0, 1, 1, 0, 2, 2, 1, 3, 14, 0x80, 3, 15, 0x80, 4, 0, 5, 0})
	}
	f.Fuzz(func(t *testing.T, bits uint8, script []byte) {
		var features Features
		for i, bit := range []uint{FIndirectDesc, FEventIdx, FRingPacked} {
			if bits>>i&1 != 0 {
				features |= Set(bit)
			}
		}
		q := newQueue(t, 8, features)
		p := &peer{q: q}
		flying := map[int]uint32{} // with the bytes that may be written
		broken := false
		for len(script) >= 2 {
			op, arg := script[0], script[1]
			script = script[2:]
			switch op % 6 {
			case 0: // a chain
				chain := make([]Buffer, 1+int(arg)%testChain)
				var room uint32
				for i := range chain {
					chain[i] = Buffer{Addr: uint64(i), Len: uint32(arg), Write: i*2 >= len(chain)}
					if chain[i].Write {
						room += uint32(arg)
					}
				}
				id, ok := q.d.Next()
				if q.d.Add(chain) {
					if _, twice := flying[id]; !ok || twice || id < 0 || id >= 8 {
						t.Fatalf("chain %d was given out again, or although there was none (%v)", id, ok)
					}
					flying[id] = room
				}
			case 1:
				q.d.Publish()
			case 2: // a use of any chain
				p.give(int(arg), 1+int(arg)%3, uint32(arg>>4))
			case 3: // any byte of the ring of descriptors or of the device's area
				area := q.o.Device
				if arg&1 != 0 {
					area = q.o.Desc
				}
				if len(script) > 0 {
					area[int(arg>>1)%len(area)] = script[0]
				}
			case 4:
				id, written, ok, err := q.d.Pop()
				if broken && (ok || err == nil) {
					t.Fatal("a broken queue goes on")
				}
				if err != nil {
					if ok || !errors.Is(err, ErrBroken) {
						t.Fatal(ok, err)
					}
					broken = true
				} else if ok {
					room, was := flying[id]
					if !was || written > room {
						t.Fatalf("chain %d came back with %d of %d bytes, in flight: %v", id, written, room, was)
					}
					delete(flying, id)
				}
			case 5:
				if arg&1 != 0 {
					q.d.Arm(int(arg) % 8)
				} else {
					q.d.Disarm()
				}
				q.d.Ready()
				q.d.Base()
			}
			if q.d.InFlight() != len(flying) {
				t.Fatalf("%d in flight, not %d", q.d.InFlight(), len(flying))
			}
		}
	})
}

// Options that do not fit are refused.
func TestDriverOptions(t *testing.T) {
	good := newQueue(t, 8, Set(FIndirectDesc)).o
	for name, change := range map[string]func(o *DriverOptions){
		"size":       func(o *DriverOptions) { o.Size = 7 },
		"short desc": func(o *DriverOptions) { o.Desc = o.Desc[:100] },
		"alignment":  func(o *DriverOptions) { o.Driver = words(100)[1:] },
		"tables":     func(o *DriverOptions) { o.Tables = o.Tables[:8] },
		"no chain":   func(o *DriverOptions) { o.Chain = 0 },
	} {
		o := good
		change(&o)
		if _, err := NewDriver(o); err == nil {
			t.Errorf("%s is taken", name)
		}
	}
}

// Nothing is allocated for a chain.
func TestDriverAllocations(t *testing.T) {
	layouts(t, func(t *testing.T, features Features) {
		q := newQueue(t, 8, features)
		chain := []Buffer{{Addr: 1, Len: 2}, {Addr: 3, Len: 4, Write: true}}
		used := 0
		n := testing.AllocsPerRun(100, func() {
			id, _ := q.d.Next()
			q.d.Add(chain)
			q.d.Publish()
			q.d.Arm(1)
			p := peer{q: q, used: used}
			p.give(id, 2, 4)
			used = p.used
			if _, _, ok, err := q.d.Pop(); !ok || err != nil {
				t.Fatal(ok, err)
			}
			q.d.Disarm()
		})
		if n != 0 {
			t.Errorf("%v allocations", n)
		}
	})
}
