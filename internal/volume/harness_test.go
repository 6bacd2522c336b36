package volume

import (
	"bytes"
	"context"
	"errors"
	"sync"
	"sync/atomic"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/blockio"
	"github.com/pollux-storage/pollux/internal/blockmap"
	"github.com/pollux-storage/pollux/internal/cache"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/dirty"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/oplog"
	"github.com/pollux-storage/pollux/internal/session"
	"github.com/pollux-storage/pollux/internal/space"
)

// rig is one volume over the real lower layers, with consistency points and
// folds that do what those of a pool do, without journal and superblock.
type rig struct {
	*Volume
	t     testing.TB
	crash *blocktest.Crash
	fault *blocktest.Fault
	set   *devices.Set
	mem   []byte
	log   *oplog.Log
	space *space.Space
	point sync.Mutex // a consistency point or fold is under way
	cp    block.CP
	fold  block.CP // last fold
	buf   []byte

	lost    error        // what owned returns
	full    atomic.Int64 // calls of full
	relieve func() error // nil: relieves nothing
}

type options struct {
	size    int64                         // of the volume
	extents int                           // of the log
	cache   int                           // bytes
	device  int64                         // blocks; 0: 16384
	wrap    func(hpdi.Device) hpdi.Device // nil: the device as it is
}

const firstBlock = block.TrackBlocks

func newRig(t testing.TB, o options) *rig {
	t.Helper()
	if o.device == 0 {
		o.device = 16384
	}
	r := &rig{t: t}
	r.crash = blocktest.NewCrashWith(blocktest.CrashOptions{Size: o.device * block.Size, Direct: true})
	r.fault = blocktest.NewFault(r.crash, 1)
	if o.wrap == nil {
		o.wrap = func(d hpdi.Device) hpdi.Device { return d }
	}
	r.set = devices.NewSet([]hpdi.Device{o.wrap(r.fault)})
	r.space = space.New()
	r.must(r.space.AddDevice(uint64(o.device), firstBlock))
	t.Cleanup(r.space.Close)
	var err error
	if r.buf, err = hpdi.AllocPrivate(block.Size); err != nil {
		t.Fatal(err)
	}
	payload := int64(o.extents) * block.Size
	if r.mem, err = hpdi.AllocPrivate(int(oplog.SectionSize(payload))); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = errors.Join(hpdi.Free(r.buf), hpdi.Free(r.mem)) })
	r.log, err = oplog.Format(r.mem, oplog.Config{PayloadBytes: payload, Epoch: 1})
	r.must(err)
	reader, err := blockio.New(r.set, cache.New(make([]byte, o.cache)))
	r.must(err)
	t.Cleanup(func() {
		if err := errors.Join(reader.Close(), r.set.Close()); err != nil {
			t.Error(err)
		}
	})
	s := &Store{Map: blockmap.NewMap(reader), Reader: reader, Gate: &Gate{}}
	s.Map.AddVolume(1, blockmap.Tree{})
	s.Sessions = session.New(func() ([]byte, block.PoolID, block.Epoch, error) {
		return make([]byte, session.Size), block.PoolID{}, 1, nil
	})
	s.Dirty = dirty.New(dirty.Options{Log: r.log, Space: r.space, Tags: s.Sessions,
		Owned: func() error { return r.lost }, Full: func() { r.full.Add(1) }})
	s.Flush = func(context.Context) error { return errFlush }
	s.Relieve = func(context.Context) error {
		if r.relieve == nil {
			return nil
		}
		return r.relieve()
	}
	r.Volume = New(s, 1, "vol", o.size)
	return r
}

var errFlush = errors.New("flushed")

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

// store writes a block or page to a free place.
func (r *rig) store(p []byte) (block.Pointer, error) {
	runs, err := r.space.Alloc(1, nil)
	if err != nil {
		return block.Pointer{}, err
	}
	copy(r.buf, p)
	err = r.set.Do([]*devices.IO{{Op: hpdi.OpWrite, At: runs[0].At, Vec: [][]byte{r.buf}}})
	return block.Pointer{Phys: runs[0].At, Birth: r.cp, Sum: ondisk.CRC(p)}, err
}

func (r *rig) drop(p block.Pointer) {
	if err := r.space.Dec(space.Run{At: p.Phys, N: 1}); err != nil {
		r.t.Error(err)
	}
}

// Point is a consistency point.
func (r *rig) Point() {
	r.t.Helper()
	r.point.Lock()
	defer r.point.Unlock()
	g := r.Dirty.Freeze()
	if g == nil {
		return
	}
	r.cp++
	for _, id := range g.Volumes() {
		ptrs := map[block.Logical]block.Pointer{}
		for lba, s := range g.Blocks(id) {
			ptrs[lba] = block.Pointer{}
			if !s.IsHole() {
				var err error
				if ptrs[lba], err = r.store(r.log.Payload(s.Extent, 1)); err != nil {
					r.t.Error(err)
				}
			}
		}
		r.Map.Update(func(o *blockmap.Overlay) {
			for _, h := range g.Holes(id) {
				o.Punch(id, h, r.drop)
			}
			for lba, p := range ptrs {
				if old := o.Set(id, lba, p); !old.IsHole() {
					r.drop(old)
				}
			}
		})
	}
	r.Dirty.Drop()
}

// drain takes all generations to the device.
func (r *rig) drain() {
	r.t.Helper()
	for u := r.Dirty.Usage(); u.Active+u.Frozen > 0; u = r.Dirty.Usage() {
		r.Point()
	}
}

// folding stores the pages of a fold; what it frees is free when it ends.
type folding struct {
	*rig
	freed []block.Pointer
}

func (f *folding) WritePage(page []byte, _ bool) (block.Pointer, error) { return f.store(page) }

func (f *folding) FreePage(p block.Pointer) error {
	f.freed = append(f.freed, p)
	return nil
}

func (f *folding) Added(p block.Pointer) {
	if err := f.space.Inc(space.Run{At: p.Phys, N: 1}); err != nil {
		f.t.Error(err)
	}
}

func (f *folding) Dropped(p block.Pointer) { f.freed = append(f.freed, p) }

// Fold merges the overlay into the tree.
func (r *rig) Fold() {
	r.t.Helper()
	r.point.Lock()
	defer r.point.Unlock()
	w := &folding{rig: r}
	r.cp++
	if err := r.Map.OverlayPointers(func(p block.Pointer) error { w.freed = append(w.freed, p); return nil }); err != nil {
		r.t.Error(err)
	}
	frozen := r.Map.BeginFold()
	trees, budget := map[block.VolumeID]blockmap.Tree{}, 1000
	for _, id := range frozen.Volumes() {
		v, err := frozen.Fold(id, r.fold, &budget, r.Reader, w, w)
		for done := false; err == nil && !done; {
			done, err = v.Step()
		}
		if err == nil {
			trees[id], err = v.Finish()
		}
		if err != nil {
			r.t.Error(err)
		}
	}
	r.Map.EndFold(trees)
	r.fold = r.cp
	for _, p := range w.freed {
		r.drop(p)
	}
}

// forget makes the cache empty as far as this pool goes.
func (r *rig) forget() { r.Reader.Forget(0, 16384) }

// write stages and commits.
func (r *rig) write(off int64, p []byte) error {
	w, err := r.Stage(context.Background(), off, len(p))
	if err != nil {
		return err
	}
	receive(r.t, w, p)
	return w.Commit(context.Background())
}

func receive(t testing.TB, w block.Write, p []byte) {
	t.Helper()
	for _, b := range w.Buffers() {
		p = p[copy(b, p):]
	}
	if len(p) > 0 {
		t.Errorf("the buffers lack %d bytes", len(p))
	}
}

// reads proves bytes of the volume.
func (r *rig) reads(off int64, want []byte) {
	r.t.Helper()
	got := bytes.Repeat([]byte{0xee}, len(want))
	if err := r.Read(context.Background(), got, off); err != nil {
		r.t.Errorf("read %d bytes at %d: %v", len(want), off, err)
		return
	}
	if i := mismatch(got, want); i >= 0 {
		r.t.Errorf("read %d bytes at %d: byte %d is %d instead of %d", len(want), off, off+int64(i), got[i], want[i])
	}
}

// mismatch returns where two slices of one length differ first, or -1.
func mismatch(a, b []byte) int {
	for i := range a {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// pattern returns n bytes that differ from place to place, and from another
// seed's.
func pattern(seed byte, n int) []byte {
	p := make([]byte, n)
	for i := range p {
		p[i] = byte(i)*7 + byte(i>>8)*13 + seed | 1
	}
	return p
}

// where returns the pointer of a block.
func (r *rig) where(lba block.Logical) block.Pointer {
	r.t.Helper()
	var p [1]block.Pointer
	r.must(r.Map.Lookup(1, lba, p[:]))
	return p[0]
}

// settled takes all to the device and proves that nothing is held then.
func (r *rig) settled() {
	r.t.Helper()
	r.drain()
	r.Dirty.ReturnCredit()
	if u := r.space.Usage(); u.Reserved != 0 {
		r.t.Errorf("%d blocks are still reserved", u.Reserved)
	}
	if f, n := r.log.ExtentsFree(), r.log.Capacity(); f != n {
		r.t.Errorf("%d extents of %d are free", f, n)
	}
	if ext, ok, err := r.Dirty.TryAcquire(r.Dirty.Capacity(), nil); !ok || err != nil {
		r.t.Errorf("not all permits are free: %v", err)
	} else {
		r.Dirty.Give(ext)
	}
	if n := r.Gate.n.Load(); n != 0 {
		r.t.Errorf("%d requests are still in the gate", n)
	}
}
