package dirty

import (
	"context"
	"encoding/binary"
	"errors"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/oplog"
	"github.com/pollux-storage/pollux/internal/space"
)

// rig is a Set over a log and a space of its own.
type rig struct {
	*Set
	t     testing.TB
	mem   []byte
	log   *oplog.Log
	space *space.Space
	lost  error // what owned returns
	calls int   // of full
}

// spaceBlocks are enough that the slop is an eighth of them.
const spaceBlocks = 1 << 16

func newRig(t testing.TB, extents int) *rig {
	t.Helper()
	mem, err := hpdi.AllocPrivate(int(oplog.SectionSize(int64(extents) * block.Size)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = hpdi.Free(mem) })
	log, err := oplog.Format(mem, oplog.Config{PayloadBytes: int64(extents) * block.Size, Pool: block.PoolID{1}, Epoch: 1})
	if err != nil {
		t.Fatal(err)
	}
	r := &rig{t: t, mem: mem, log: log, space: space.New()}
	if err := r.space.AddDevice(spaceBlocks, block.TrackBlocks); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(r.space.Close)
	r.Set = r.over(log)
	return r
}

func (r *rig) over(log *oplog.Log) *Set {
	return New(Options{Log: log, Space: r.space,
		Owned: func() error { return r.lost }, Full: func() { r.calls++ }})
}

// attach is a takeover: the same memory, a new log, nothing reserved.
func (r *rig) attach() (*oplog.Log, *Set) {
	r.t.Helper()
	log, err := oplog.Attach(r.mem)
	if err != nil {
		r.t.Fatal(err)
	}
	return log, r.over(log)
}

// fill makes the payload of an extent tell of a number.
func (r *rig) fill(e oplog.Extent, n uint64) {
	p := r.Payload(e, 1)
	clear(p)
	binary.LittleEndian.PutUint64(p, n)
	binary.LittleEndian.PutUint64(p[block.Size-8:], n)
}

func number(p []byte) uint64 {
	if n := binary.LittleEndian.Uint64(p); n == binary.LittleEndian.Uint64(p[block.Size-8:]) {
		return n
	}
	return ^uint64(0)
}

// stage returns a write of n blocks, the first of which tells of tag, the next
// of tag+1 and so on.
func (r *rig) stage(id block.VolumeID, lba block.Logical, n int, tag uint64) ([]oplog.Extent, []oplog.Record) {
	r.t.Helper()
	ext, ok, err := r.TryAcquire(n, nil)
	if err != nil || !ok {
		r.t.Fatalf("no room for %d blocks: %v", n, err)
	}
	recs := make([]oplog.Record, n)
	for i, e := range ext {
		r.fill(e, tag+uint64(i))
		recs[i] = oplog.Record{Kind: oplog.KindWrite, Volume: id, LBA: lba + block.Logical(i), Count: 1, First: e}
		r.log.Sum(&recs[i])
	}
	return ext, recs
}

func (r *rig) write(id block.VolumeID, lba block.Logical, n int, tag uint64) {
	r.t.Helper()
	_, recs := r.stage(id, lba, n, tag)
	r.must(r.Publish(recs, nil))
}

func (r *rig) zero(id block.VolumeID, lba block.Logical, n uint64) {
	r.t.Helper()
	r.must(r.Permit(context.Background(), 1))
	r.must(r.Publish([]oplog.Record{{Kind: oplog.KindZero, Volume: id, LBA: lba, Count: n}}, nil))
}

func (r *rig) must(err error) {
	r.t.Helper()
	if err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) want(err, kind error) {
	r.t.Helper()
	if !errors.Is(err, kind) {
		r.t.Errorf("%v: want %v", err, kind)
	}
}

// What a block can be: a number, or one of these.
const (
	clean = ^uint64(1)
	hole  = ^uint64(2)
)

// get returns what the index knows of a block.
func (r *rig) get(id block.VolumeID, lba block.Logical) uint64 {
	r.t.Helper()
	got := clean
	n := r.Read(id, lba, 1, func(i int, p []byte, sum uint32) {
		if p == nil {
			got = hole
			return
		}
		if got = number(p); ondisk.CRC(p) != sum {
			r.t.Errorf("block %d of volume %d: wrong checksum", lba, id)
		}
	})
	if (n == 1) == (got == clean) {
		r.t.Errorf("block %d of volume %d: found %d, yet %d", lba, id, n, got)
	}
	return got
}

func (r *rig) reads(id block.VolumeID, lba block.Logical, want ...uint64) {
	r.t.Helper()
	for i, w := range want {
		if got := r.get(id, lba+block.Logical(i)); got != w {
			r.t.Errorf("block %d of volume %d is %d instead of %d", int(lba)+i, id, got, w)
		}
	}
}

// settled proves that nothing is held: no permit, extent, slot or reservation.
func (r *rig) settled() {
	r.t.Helper()
	r.ReturnCredit()
	if u := r.space.Usage(); u.Reserved != 0 {
		r.t.Errorf("%d blocks are still reserved", u.Reserved)
	}
	if u := r.Usage(); u.Active != 0 || u.Frozen != 0 || u.Blocks != 0 {
		r.t.Errorf("still dirty: %+v", u)
	}
	if f, n := r.log.ExtentsFree(), r.log.Capacity(); f != n {
		r.t.Errorf("%d extents of %d are free", f, n)
	}
	if f, n := r.log.SlotsFree(), r.log.Slots(); f != n {
		r.t.Errorf("%d slots of %d are free", f, n)
	}
	if n := r.used.Load(); n != 0 {
		r.t.Errorf("%d permits count as used", n)
	}
	if n := r.Capacity(); !r.permits.TryAcquire(int64(n)) {
		r.t.Errorf("not all %d permits are free", n)
	} else {
		r.permits.Release(int64(n))
	}
}

// drain takes everything to the devices, so to speak.
func (r *rig) drain() {
	r.t.Helper()
	for r.Freeze() != nil {
		r.Drop()
	}
}
