package virtio

import (
	"encoding/binary"
	"errors"
	"strings"
	"testing"
	"unsafe"
)

// Where a device's test memory is for the driver: two slots that meet, in memory apart.
const (
	testGuest = 0x10000
	testUser  = 0x7f0000000000
	testSlot  = 32 << 10
)

// deviceMemory returns memory in two slots.
func deviceMemory(t testing.TB) (*Memory, [2][]byte) {
	t.Helper()
	var parts [2][]byte
	var slots []Slot
	for i := range parts {
		b := make([]uint64, testSlot/8+2)
		m := unsafe.Slice((*byte)(unsafe.Pointer(unsafe.SliceData(b))), len(b)*8)
		for uintptr(unsafe.Pointer(unsafe.SliceData(m)))%16 != 0 {
			m = m[8:]
		}
		parts[i] = m[:testSlot:testSlot]
		slots = append(slots, Slot{Guest: testGuest + uint64(i)*testSlot, User: testUser + uint64(i)<<32, Mem: parts[i]})
	}
	m, err := NewMemory(slots)
	if err != nil {
		t.Fatal(err)
	}
	return m, parts
}

func TestMemory(t *testing.T) {
	m, parts := deviceMemory(t)
	if b := m.Guest(testGuest+testSlot-8, 100); len(b) != 8 || &b[0] != &parts[0][testSlot-8] || cap(b) != 8 {
		t.Errorf("%d bytes at the end of a slot", len(b))
	}
	if b := m.Guest(testGuest+testSlot, 100); len(b) != 100 || &b[0] != &parts[1][0] {
		t.Errorf("%d bytes at the beginning of a slot", len(b))
	}
	for _, addr := range []uint64{0, testGuest - 1, testGuest + 2*testSlot, 1<<64 - 1} {
		if b := m.Guest(addr, 1); b != nil {
			t.Errorf("there is memory at %#x", addr)
		}
	}
	if b, err := m.User(testUser+1<<32, testSlot); err != nil || &b[0] != &parts[1][0] {
		t.Errorf("the second slot: %v", err)
	}
	if at, ok := m.ToGuest(testUser + 1<<32 + 5); !ok || at != testGuest+testSlot+5 {
		t.Errorf("a user address of the second slot is guest address %#x, %t", at, ok)
	}
	for _, user := range []uint64{0, testUser - 1, testUser + testSlot} {
		if at, ok := m.ToGuest(user); ok {
			t.Errorf("user address %#x, where there is no memory, is guest address %#x", user, at)
		}
	}
	for _, n := range []uint64{testSlot + 1, 1<<64 - 1} {
		if _, err := m.User(testUser, n); err == nil {
			t.Errorf("%d bytes of a slot of %d", n, testSlot)
		}
	}
	if _, err := m.User(testUser-1, 1); err == nil {
		t.Error("memory before the first slot")
	}
	for name, slots := range map[string][]Slot{
		"overlap": {{Guest: 0, User: 0, Mem: parts[0]}, {Guest: testSlot - 1, User: 1 << 40, Mem: parts[1]}},
		"past":    {{Guest: 1<<64 - 8, User: 0, Mem: parts[0]}},
		"bytes":   {{Guest: 0, User: 0}},
	} {
		if _, err := NewMemory(slots); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// loop connects the driver's side of a queue to the device's.
func loop(t *testing.T, f Features, size int) (Driver, Device, [2][]byte) {
	m, parts := deviceMemory(t)
	d, err := NewDriver(DriverOptions{
		Size: size, Features: f, Desc: parts[0][:4096], Driver: parts[0][4096:8192], Device: parts[0][8192:12288],
		Tables: parts[0][12288 : 12288+size*8*DescBytes], TablesAddr: testGuest + 12288, Chain: 8,
	})
	if err != nil {
		t.Fatal(err)
	}
	return d, newDevice(t, m, f, size, d.Base()), parts
}

func newDevice(t testing.TB, m *Memory, f Features, size int, base uint32) Device {
	t.Helper()
	var x Device
	var err error
	if f.Has(FRingPacked) {
		x, err = NewDevicePacked(m, size, f, testUser, testUser+4096, testUser+8192, base)
	} else {
		x, err = NewDeviceSplit(m, size, f, testUser, testUser+4096, testUser+8192, uint16(base))
	}
	if err != nil {
		t.Fatal(err)
	}
	return x
}

// Both sides of a queue agree, over many laps, with completions out of order and in
// batches, and the driver hears of each that it waits for.
func TestBothSides(t *testing.T) {
	layouts(t, func(t *testing.T, f Features) {
		const size = 16
		drv, dev, parts := loop(t, f, size)
		free := make([]*Chain, size)
		for i := range free {
			free[i] = &Chain{}
		}
		var held []*Chain
		waiting := map[int]uint32{}
		sent, done := 0, 0
		for step := range 4000 {
			switch step % 4 {
			case 0, 1:
				id, ok := drv.Next()
				n := 1 + step/4%6
				chain := []Buffer{{Addr: testGuest + testSlot - 8, Len: 16}} // in both slots
				for i := 1; i < n; i++ {
					chain = append(chain, Buffer{Addr: testGuest + testSlot + uint64(i)*64, Len: 64, Write: true})
				}
				if ok && drv.Add(chain) {
					binary.LittleEndian.PutUint64(parts[1], uint64(sent))
					waiting[id] = uint32(64 * (n - 1))
					sent++
				}
				drv.Publish()
			case 2:
				c := free[len(free)-1]
				ok, err := dev.Next(c)
				if err != nil {
					t.Fatal(err)
				}
				if ok {
					if len(c.Out) != 2 || c.OutBytes != 16 || c.InBytes != int64(64*len(c.In)) {
						t.Fatalf("a request of %d and %d pieces, %d and %d bytes", len(c.Out), len(c.In), c.OutBytes, c.InBytes)
					}
					free = free[:len(free)-1]
					held = append(held, c)
				}
			default:
				for len(held) > size/2 || len(held) > 0 && step%5 == 0 {
					at := step % len(held)
					dev.Put(held[at], uint32(held[at].InBytes))
					free = append(free, held[at])
					held = append(held[:at], held[at+1:]...)
				}
				if !drv.Arm(1) {
					drv.Disarm()
				}
				before := drv.Ready()
				dev.Publish()
				if notice := dev.NeedNotice(); !before && drv.Ready() && !notice {
					t.Fatalf("step %d: a driver that waits is not notified", step)
				}
				for {
					id, wrote, ok, err := drv.Pop()
					if err != nil {
						t.Fatal(err)
					}
					if !ok {
						break
					}
					if want, ok := waiting[id]; !ok || wrote != want {
						t.Fatalf("chain %d with %d bytes, %d are right (%t)", id, wrote, want, ok)
					}
					delete(waiting, id)
					done++
				}
			}
		}
		if sent < 800 || done < sent-size {
			t.Errorf("%d requests were sent, %d are done", sent, done)
		}
	})
}

// A device that asks for notices hears of the first request that comes, and one that does
// not ask does not.
func TestDeviceNotices(t *testing.T) {
	layouts(t, func(t *testing.T, f Features) {
		drv, dev, _ := loop(t, f, 16)
		var c Chain
		add := func() bool {
			if !drv.Add([]Buffer{{Addr: testGuest, Len: 1}}) {
				t.Fatal("the ring is full")
			}
			return drv.Publish()
		}
		for round := range 50 {
			if dev.WantNotice(true) {
				t.Fatalf("round %d: a request in an empty ring", round)
			}
			if !add() {
				t.Fatalf("round %d: no notice of the first request", round)
			}
			dev.WantNotice(false)
			if round%3 > 0 && add() {
				t.Fatalf("round %d: a notice that nobody wants", round)
			}
			if !dev.WantNotice(true) {
				t.Fatalf("round %d: nothing is there for a device that wants to sleep", round)
			}
			dev.WantNotice(false)
			for {
				ok, err := dev.Next(&c)
				if err != nil {
					t.Fatal(err)
				}
				if !ok {
					break
				}
				dev.Put(&c, 0)
				dev.Publish()
			}
			for {
				if _, _, ok, err := drv.Pop(); !ok || err != nil {
					break
				}
			}
		}
	})
}

// FuzzDevice: whatever is in a ring, the device's side returns requests whose memory is the
// driver's, or an error that says what is wrong, and ends.
func FuzzDevice(f *testing.F) {
	good := make([]byte, 12288)
	PutSplitDesc(good, 0, Desc{Addr: testGuest, Len: 16, Flags: DescNext, Next: 1})
	PutSplitDesc(good, 1, Desc{Addr: testGuest + testSlot - 4, Len: 8, Flags: DescWrite})
	binary.LittleEndian.PutUint16(good[4096+2:], 3)
	f.Add(uint8(0), uint32(0), good)
	packed := make([]byte, 12288)
	for i := range 4 {
		PutPackedBuffer(packed, i, testGuest+16, 16)
		binary.LittleEndian.PutUint16(packed[i*16+14:], DescAvail)
	}
	f.Add(uint8(1), uint32(0x80008000), packed)
	table := make([]byte, 16384)
	PutSplitDesc(table, 0, Desc{Addr: testGuest + 12288, Len: 64, Flags: DescIndirect})
	PutSplitDesc(table[12288:], 0, Desc{Addr: testGuest, Len: 16, Flags: DescNext, Next: 3})
	PutSplitDesc(table[12288:], 3, Desc{Addr: testGuest, Len: 16})
	binary.LittleEndian.PutUint16(table[4096+2:], 1)
	f.Add(uint8(6), uint32(0), table)
	f.Fuzz(func(t *testing.T, kind uint8, base uint32, b []byte) {
		m, parts := deviceMemory(t)
		copy(parts[0], b)
		if len(b) > testSlot {
			copy(parts[1], b[testSlot:])
		}
		features := Features(0)
		for i, bit := range []uint{FRingPacked, FIndirectDesc, FEventIdx} {
			if kind>>i&1 != 0 {
				features |= Set(bit)
			}
		}
		const size = 16
		var dev Device
		var err error
		if features.Has(FRingPacked) {
			dev, err = NewDevicePacked(m, size, features, testUser, testUser+4096, testUser+8192, base)
		} else {
			dev, err = NewDeviceSplit(m, size, features, testUser, testUser+4096, testUser+8192, uint16(base))
		}
		if err != nil {
			return
		}
		within := func(p []byte) bool {
			at := uintptr(unsafe.Pointer(unsafe.SliceData(p)))
			for _, part := range parts {
				begin := uintptr(unsafe.Pointer(unsafe.SliceData(part)))
				if at >= begin && at+uintptr(len(p)) <= begin+testSlot {
					return true
				}
			}
			return false
		}
		held := make([]Chain, 0, size+1)
		for range 3 * size {
			held = append(held, Chain{})
			c := &held[len(held)-1]
			ok, err := dev.Next(c)
			if err != nil {
				if !errors.Is(err, ErrBroken) {
					t.Fatal(err)
				}
				return
			}
			if !ok {
				return
			}
			var out, in int64
			for _, p := range c.Out {
				out += int64(len(p))
				if len(p) == 0 || !within(p) {
					t.Fatal("memory that is not the driver's")
				}
			}
			for _, p := range c.In {
				in += int64(len(p))
				if len(p) == 0 || !within(p) {
					t.Fatal("memory that is not the driver's")
				}
			}
			if out != c.OutBytes || in != c.InBytes || len(c.Out)+len(c.In) > MaxChain {
				t.Fatalf("%d and %d bytes in %d pieces, not %d and %d", out, in, len(c.Out)+len(c.In), c.OutBytes, c.InBytes)
			}
			if len(held) > size {
				t.Fatalf("%d requests in a queue of %d", len(held), size)
			}
			if kind>>3&1 != 0 {
				dev.Put(c, uint32(in))
				dev.Publish()
				dev.NeedNotice()
				dev.WantNotice(kind>>4&1 != 0)
				held = held[:len(held)-1]
			}
		}
	})
}

// Requests take no memory of the heap.
func TestDeviceAllocations(t *testing.T) {
	layouts(t, func(t *testing.T, f Features) {
		drv, dev, _ := loop(t, f, 16)
		var c Chain
		chain := []Buffer{{Addr: testGuest, Len: 16}, {Addr: testGuest + 64, Len: 64, Write: true}, {Addr: testGuest + 128, Len: 64, Write: true},
			{Addr: testGuest + 192, Len: 64, Write: true}, {Addr: testGuest + 256, Len: 64, Write: true}, {Addr: testGuest + 512, Len: 1, Write: true}}
		if n := testing.AllocsPerRun(100, func() {
			drv.Add(chain)
			drv.Publish()
			if ok, err := dev.Next(&c); !ok || err != nil {
				t.Fatal(ok, err)
			}
			dev.Put(&c, 1)
			dev.Publish()
			dev.NeedNotice()
			if _, _, ok, err := drv.Pop(); !ok || err != nil {
				t.Fatal(ok, err)
			}
		}); n != 0 {
			t.Errorf("%v allocations a request", n)
		}
	})
}
