package virtio

import (
	"encoding/hex"
	"testing"
)

// Bytes are where the specification puts them.
func TestLayout(t *testing.T) {
	table := make([]byte, 3*DescBytes)
	d := Desc{Addr: 0x1122334455667788, Len: 0x99aabbcc, Flags: DescNext | DescWrite, Next: 0x0d0e}
	PutSplitDesc(table, 1, d)
	if got := hex.EncodeToString(table[16:32]); got != "8877665544332211ccbbaa9903000e0d" {
		t.Errorf("a descriptor of a split ring is %s", got)
	}
	if got := ReadSplitDesc(table, 1); got != d {
		t.Errorf("it reads as %+v", got)
	}
	clear(table)
	PutPackedBuffer(table, 2, 0x1122334455667788, 0x99aabbcc)
	StorePackedWord(table, 2, 0x0d0e, DescUsed|DescWrite)
	if got := hex.EncodeToString(table[32:]); got != "8877665544332211ccbbaa990e0d0280" {
		t.Errorf("a descriptor of a packed ring is %s", got)
	}
	addr, n := ReadPackedBuffer(table, 2)
	id, flags := LoadPackedWord(table, 2)
	if addr != d.Addr || n != d.Len || id != 0x0d0e || flags != DescUsed|DescWrite {
		t.Errorf("it reads as %#x, %#x, %#x, %#x", addr, n, id, flags)
	}
	e := PackedEvent{Off: 0x1234, Wrap: true, Flags: EventDesc}
	StorePackedEvent(table, e)
	if got := hex.EncodeToString(table[:4]); got != "34920200" {
		t.Errorf("an event structure is %s", got)
	}
	if got := LoadPackedEvent(table); got != e {
		t.Errorf("it reads as %+v", got)
	}
}

// The functions of an event say the same as counting step by step.
func TestNeedEvent(t *testing.T) {
	for _, old := range []uint16{0, 1, 7, 65530, 65535} {
		for steps := uint16(0); steps < 10; steps++ {
			for event := old - 3; event != old+14; event++ {
				want := false
				for i := uint16(0); i < steps; i++ {
					want = want || old+i == event
				}
				if NeedEvent(event, old+steps, old) != want {
					t.Fatalf("event %d, from %d on %d steps: not %v", event, old, steps, want)
				}
			}
		}
	}
	const n = 6 // a packed ring's size need not be a power of two
	for start := range uint16(2 * n) {
		for steps := range uint16(n + 1) {
			for event := range uint16(2 * n) {
				want := false
				for i := range steps {
					want = want || (start+i)%(2*n) == event
				}
				end := (start + steps) % (2 * n)
				e := PackedEvent{Off: event % n, Wrap: event < n, Flags: EventDesc}
				if got := PackedNeedEvent(e, n, end%n, steps, end < n); got != want && (event+2*n-start)%(2*n) < n {
					t.Fatalf("event %d, from %d on %d steps: %v", event, start, steps, got)
				}
			}
		}
	}
	for flags, want := range map[uint16]bool{EventEnable: true, EventDisable: false, 3: true} {
		if PackedNeedEvent(PackedEvent{Flags: flags}, n, 3, 1, true) != want {
			t.Errorf("with flags %d: not %v", flags, want)
		}
	}
}

// A descriptor is available or used by its wrap counter's flags alone.
func TestPackedFlags(t *testing.T) {
	for _, wrap := range []bool{false, true} {
		a, u := PackedAvailFlags(wrap), PackedUsedFlags(wrap)
		for _, c := range []struct {
			name       string
			flags      uint16
			avail, use bool
		}{{"available", a, true, false}, {"used", u, false, true}, {"available a turn ago", PackedAvailFlags(!wrap), false, false}, {"used a turn ago", PackedUsedFlags(!wrap), false, false}} {
			if PackedAvailable(c.flags, wrap) != c.avail || PackedUsed(c.flags, wrap) != c.use {
				t.Errorf("wrap %v, %s: %v, %v", wrap, c.name, PackedAvailable(c.flags, wrap), PackedUsed(c.flags, wrap))
			}
		}
	}
}

func TestCheckSize(t *testing.T) {
	for _, c := range []struct {
		n      int
		packed bool
		ok     bool
	}{{2, false, true}, {256, false, true}, {32768, true, true}, {3, false, false}, {3, true, true}, {1, true, false}, {0, false, false}, {65536, false, false}, {-2, true, false}} {
		if err := CheckSize(c.n, c.packed); err == nil != c.ok {
			t.Errorf("%d, packed %v: %v", c.n, c.packed, err)
		}
	}
}

// The configuration space is what section 5.2.4 says, and what is too short is refused.
func TestBlkConfig(t *testing.T) {
	c := BlkConfig{
		Capacity: 0x0102030405060708, SizeMax: 0x11121314, SegMax: 0x21222324, BlockSize: 4096, PhysicalExp: 3, AlignmentOffset: 1,
		MinIO: 0x3132, OptIO: 0x41424344, Writeback: true, Queues: 0x5152, DiscardSectors: 0x61626364, DiscardSegments: 1, DiscardAlign: 8,
		WriteZeroesSectors: 0x71727374, WriteZeroesSegments: 2, WriteZeroesMayUnmap: true,
	}
	b := make([]byte, BlkConfigBytes)
	c.Put(b)
	want := "0807060504030201" + "14131211" + "24232221" + "00000000" + "00100000" + "03013231" + "44434241" + "01005251" +
		"64636261" + "01000000" + "08000000" + "74737271" + "02000000" + "01000000"
	if got := hex.EncodeToString(b); got != want {
		t.Errorf("the configuration is\n%s, not\n%s", got, want)
	}
	if got, err := ReadBlkConfig(b); err != nil || got != c {
		t.Errorf("it reads as %+v, %v", got, err)
	}
	if _, err := ReadBlkConfig(b[:BlkConfigBytes-1]); err == nil {
		t.Error("one that is too short is taken")
	}
	h := make([]byte, BlkHeaderBytes)
	BlkHeader{Type: BlkOut, Sector: 0x0102030405060708}.Put(h)
	if got := hex.EncodeToString(h); got != "01000000000000000807060504030201" || ReadBlkHeader(h) != (BlkHeader{BlkOut, 0x0102030405060708}) {
		t.Errorf("a header is %s", got)
	}
	r := make([]byte, BlkRangeBytes)
	BlkRange{Sector: 0x0102030405060708, Sectors: 0x11121314, Flags: BlkUnmap}.Put(r)
	if got := hex.EncodeToString(r); got != "08070605040302011413121101000000" || ReadBlkRange(r) != (BlkRange{0x0102030405060708, 0x11121314, BlkUnmap}) {
		t.Errorf("a range is %s", got)
	}
}
