package oplog

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

// attachRefuses attaches to mem, which must fail, name what it is about and
// leave every byte as it is, and looks at it.
func attachRefuses(t *testing.T, name string, mem []byte, kind error, want ...string) {
	t.Helper()
	before := bytes.Clone(mem)
	_, err := Attach(mem)
	says(t, name, err, kind, want...)
	if !bytes.Equal(before, mem) {
		t.Errorf("%s: the memory was changed", name)
	}
}

// Memory that holds something else than one whole log is refused.
func TestAttachWrongMemory(t *testing.T) {
	mem, l, _ := damaged(t)
	attachRefuses(t, "half a page", mem[:100], block.ErrInvalid, "100 bytes")
	attachRefuses(t, "a part of it", mem[:len(mem)-pageSize], block.ErrCorrupt, "header", "bytes in memory of")
	page := bytes.Clone(mem[:pageSize])
	second := mem[len(mem)-pageSize:]
	reset := func() { copy(mem, page); copy(second, page) }
	header := func(change func(h *logHeader)) {
		h := l.hdr
		change(&h)
		h.encode((*[logHeaderLen]byte)(mem))
		h.encode((*[logHeaderLen]byte)(second))
	}

	// A header that was copied from another log, beside the right one.
	h := l.hdr
	h.identity[3]++
	h.encode((*[logHeaderLen]byte)(second))
	attachRefuses(t, "two logs", mem, block.ErrCorrupt, "header", "different logs")
	reset()

	header(func(h *logHeader) { h.extents *= 2; h.slots = slotsFor(h.extents) })
	attachRefuses(t, "too many extents", mem, block.ErrCorrupt, "header", "32 extents")
	header(func(h *logHeader) { h.slots++ })
	attachRefuses(t, "slots", mem, block.ErrCorrupt, "header", "slots")
	ondisk.Seal(mem, ondisk.Header{Kind: KindLog, Version: logVersion, Length: 2 * logHeaderLen})
	ondisk.Seal(second, ondisk.Header{Kind: KindLog, Version: logVersion, Length: ondisk.HeaderSize})
	attachRefuses(t, "header of another length", mem, block.ErrCorrupt, "operation log")
	ondisk.Seal(mem, ondisk.Header{Kind: KindLog, Version: logVersion + 1, Length: logHeaderLen})
	ondisk.Seal(second, ondisk.Header{Kind: KindLog, Version: logVersion + 1, Length: logHeaderLen})
	attachRefuses(t, "a later release", mem, ondisk.ErrVersion, "operation log", fmt.Sprint("version ", logVersion+1))
	reset()

	// Positions whose checksums hold and that cannot be.
	for name, c := range map[string]struct{ tail, head block.Seq }{
		"published before released":     {l.Head(), l.Tail()},
		"more than the ring holds":      {l.Tail(), l.Tail() + block.Seq(l.Slots()) + 1},
		"at the end of all numbers":     {1<<64 - 5, 1<<64 - 4},
		"released that never were sent": {l.Head() + 9, l.Head()},
	} {
		storeCell(l.out, &l.geo, tailCellAt, c.tail, l.seed)
		storeCell(l.out, &l.geo, headCellAt, c.head, l.seed)
		attachRefuses(t, name, mem, block.ErrCorrupt, "positions", "released", "slots")
		if _, lost := view(t, mem).Damage(); !errors.Is(lost, block.ErrCorrupt) {
			t.Errorf("%s: a view finds %v", name, lost)
		}
	}
	reset()
	if _, err := Attach(mem); err != nil {
		t.Errorf("the log itself: %v", err)
	}
	v := view(t, mem)
	clear(mem[:pageSize])
	clear(second)
	if _, err := v.Header(); !errors.Is(err, ondisk.ErrMagic) {
		t.Errorf("header of a log that is gone: %v", err)
	}
}

// Two copies that are both whole and disagree: none can be trusted.
func TestTwoDifferentCopies(t *testing.T) {
	mem, l, live := damaged(t)
	r := live[2]
	r.LBA++
	var p [recordSize]byte
	r.encode(&p, l.seed)
	storeRecord(l.out, l.geo.ring[1]+l.slot(r.Seq), &p)
	attachRefuses(t, "attach", mem, block.ErrCorrupt, "differ")
	var d *DamageError
	if _, err := Attach(mem); !errors.As(err, &d) || d.First != r.Seq || d.Last != l.Head() {
		t.Errorf("attach: %v", err)
	}
	_, bad, err := view(t, mem).Look(r.Seq)
	says(t, "view", err, block.ErrCorrupt, "differ", "log record")
	if len(bad) != 1 {
		t.Errorf("bad copies: %v", bad)
	}
}

// A record that is whole and makes no sense is shown as damage, for each kind.
func TestViewOfImpossibleRecords(t *testing.T) {
	mem, l, live := damaged(t)
	at := live[0].Seq
	for name, r := range map[string]Record{
		"zero of no blocks":    {Kind: KindZero},
		"unknown kind(77)":     {Kind: 77},
		"write of 0 blocks":    {Kind: KindWrite},
		"extents 15+2 of 16":   {Kind: KindWrite, First: 15, Count: 2},
		"blocks 9+18446744073": {Kind: KindZero, LBA: 9, Count: 1<<64 - 1},
	} {
		r.Seq = at
		var p [recordSize]byte
		r.encode(&p, l.seed)
		for _, ring := range l.geo.ring {
			storeRecord(l.out, ring+l.slot(at), &p)
		}
		_, err := view(t, mem).Get(at)
		says(t, name, err, block.ErrCorrupt, name, "log record")
		attachRefuses(t, name, mem, block.ErrCorrupt, name)
	}
}

// A record behind the stored head that is bad in both copies, with a whole one
// after it, was acknowledged: that is a hole and not the end of the log.
func TestAttachHole(t *testing.T) {
	mem, l, live := damaged(t)
	last := live[len(live)-1].Seq
	storeCell(l.out, &l.geo, headCellAt, last-2, l.seed)
	for _, ring := range l.geo.ring {
		mem[ring+l.slot(last-1)+30] ^= 2
	}
	attachRefuses(t, "hole", mem, block.ErrCorrupt, "a whole record follows a bad one")
	var d *DamageError
	if _, err := Attach(mem); !errors.As(err, &d) || d.First != last-1 || d.Last != last {
		t.Errorf("lost are %d to %d: %v", d.First, d.Last, err)
	}
}

func TestKindNames(t *testing.T) {
	for k, want := range map[Kind]string{KindWrite: "write", KindZero: "zero", KindNop: "nop", 0: "kind(0)", 9: "kind(9)"} {
		if k.String() != want {
			t.Errorf("kind %d is %q", k, k)
		}
	}
}

// What a device or the log in memory refuses leaves the flush log as it was:
// nothing counts as flushed, and the same can be tried again.
func TestAppendFails(t *testing.T) {
	f := fourBatches(t)
	mustPublish(t, f.l, write(t, f.l, 0, 20, 5))
	head := f.l.Head()
	same := func(when string) {
		t.Helper()
		if f.d.Flushed() != 4 || f.d.Position(0) != f.start {
			t.Errorf("%s: flushed %d, position %+v", when, f.d.Flushed(), f.d.Position(0))
		}
		if used, size := f.d.Used(); used != f.at[4] || size != f.area.Length {
			t.Errorf("%s: %d bytes of %d used", when, used, size)
		}
	}
	for _, op := range []hpdi.Op{hpdi.OpWrite, hpdi.OpFlush} {
		remove := f.dev.Add(blocktest.Rule{Op: op, Err: unix.ENOSPC})
		says(t, op.String(), f.d.Append(f.l, 4, head), unix.ENOSPC, "flush log")
		remove()
		same("after a failed " + op.String())
	}
	// A record that is lost in memory is not flushed, nor what stands after it.
	for _, ring := range f.l.geo.ring {
		f.l.mem[ring+f.l.slot(head)] ^= 1
	}
	says(t, "lost record", f.d.Append(f.l, 4, head), block.ErrCorrupt, "operation log is damaged from position 7")
	says(t, "replay", f.l.Replay(4, head, func(*Record) error { return nil }), block.ErrCorrupt, "position 7")
	stop := errors.New("enough")
	if err := f.l.Replay(4, head, func(*Record) error { return stop }); err != stop {
		t.Errorf("replay gave %v", err)
	}
	same("after a lost record")
	for _, ring := range f.l.geo.ring {
		f.l.mem[ring+f.l.slot(head)] ^= 1
	}
	if err := f.d.Append(f.l, 4, head); err != nil {
		t.Fatal(err)
	}
	if n, err := f.scan(t); err != nil || block.Seq(n) != head {
		t.Errorf("%d records of %d, %v", n, head, err)
	}
	// A commit that was under way during a Reset says nothing of the new chain.
	old := f.d.Position(head)
	pos := f.d.Reset(4, 100)
	mustPublish(t, f.l, []Record{{Kind: KindNop}})
	if err := f.d.Append(f.l, head, head+1); err != nil {
		t.Fatal(err)
	}
	f.d.Committed(head, old)
	if used, _ := f.d.Used(); used != block.Size || f.d.Position(head) != pos {
		t.Errorf("%d bytes used, position %+v", used, f.d.Position(head))
	}
	if le := binary.LittleEndian; le.Uint64(f.block(t, 0)[64:]) != 100 {
		t.Error("the new chain is not at the start")
	}
}
