package volume

import (
	"context"
	"encoding/binary"
	"errors"
	"maps"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/oplog"
)

// What was lost of the log's memory is an error, whoever wants it, and is not
// taken into new blocks under a good checksum.
func TestDamagedLog(t *testing.T) {
	ctx := context.Background()
	const size = 16 * block.Size
	r := newRig(t, options{size: size, extents: 32, cache: 1 << 20})
	good := pattern(1, size)
	r.must(r.write(0, good))
	g := r.Dirty.Freeze()
	slots := maps.Collect(g.Blocks(1))
	r.log.Payload(slots[5].Extent, 1)[99] ^= 2
	got := make([]byte, size)
	for name, err := range map[string]error{
		"read":     r.Read(ctx, got, 0),
		"try read": func() error { _, err := r.TryRead(got[:100], 5*block.Size); return err }(),
	} {
		if !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), "block 5 of volume vol") {
			t.Errorf("%s: %v", name, err)
		}
	}
	r.reads(0, good[:5*block.Size])
	r.reads(6*block.Size, good[6*block.Size:])
	for _, try := range []bool{true, false} {
		w, err := r.Stage(ctx, 5*block.Size+1, 10)
		r.must(err)
		receive(t, w, pattern(2, 10))
		if try {
			ok, e := w.TryCommit()
			if err = e; ok {
				t.Error("committed")
			}
		} else {
			err = w.Commit(ctx)
		}
		r.want(err, block.ErrCorrupt)
	}
	r.want(r.Trim(ctx, 5*block.Size+1, 10, block.Tag{}), block.ErrCorrupt)
	// Other blocks of it can be written in part, and this one as a whole.
	r.must(r.write(4*block.Size+1, pattern(2, 10)))
	r.must(r.write(5*block.Size, pattern(3, block.Size)))
	r.reads(5*block.Size, pattern(3, block.Size))
	r.settled()
}

var errBroken = errors.New("broken")

// Device errors come out as they are; damage says where it is.
func TestDeviceErrors(t *testing.T) {
	ctx := context.Background()
	const size = 2048 * block.Size
	r := newRig(t, options{size: size, extents: 64, cache: 0})
	r.must(r.write(0, pattern(1, 16*block.Size)))
	r.must(r.write(300*block.Size, pattern(1, block.Size)))
	r.drain()
	bad := r.where(3)
	r.fault.Add(blocktest.Rule{Op: hpdi.OpRead, Err: errBroken, Offset: int64(bad.Phys.Block()) * block.Size, Length: block.Size})
	p := make([]byte, 3*block.Size)
	r.want(r.Read(ctx, p, 2*block.Size), errBroken)
	r.want(r.write(3*block.Size+1, pattern(2, 10)), errBroken)
	r.want(r.Trim(ctx, 3*block.Size+1, 2*block.Size, block.Tag{}), errBroken)
	r.fault.Clear()
	r.reads(0, pattern(1, 16*block.Size)) // nothing of what failed was written

	r.crash.Corrupt(int64(bad.Phys.Block())*block.Size, 1)
	err := r.Read(ctx, p, 2*block.Size)
	if r.want(err, block.ErrCorrupt); err == nil || !strings.Contains(err.Error(), "volume vol: bytes [8192, 20480)") {
		t.Errorf("%v does not say where", err)
	}
	r.want(r.write(3*block.Size+1, pattern(2, 10)), block.ErrCorrupt)
	r.must(r.write(3*block.Size, pattern(2, block.Size)))
	r.reads(3*block.Size, pattern(2, block.Size))
	r.drain()

	// A page of the map.
	r.Fold()
	r.fault.Add(blocktest.Rule{Op: hpdi.OpRead, Err: errBroken})
	r.want(r.Read(ctx, p, 0), errBroken)
	_, err = r.Status(ctx, 0, size, 9, nil)
	r.want(err, errBroken)
	w, err := r.Stage(ctx, 1, 1)
	r.must(err)
	if ok, err := w.TryCommit(); ok || err != nil {
		t.Errorf("a page that is not in memory: %v %v", ok, err)
	}
	r.want(w.Commit(ctx), errBroken)
	r.fault.Clear()
	root := r.Map.Trees()[1].Root
	r.crash.Corrupt(int64(root.Phys.Block())*block.Size, 1)
	r.want(r.Read(ctx, p, 0), block.ErrCorrupt)
	r.want(r.write(1, []byte{1}), block.ErrCorrupt)
	r.settled()
}

// A log that lacks extents although it has permits: a trim with partial ends
// fails and keeps nothing.
func TestExtentsLost(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, options{size: 1 << 20, extents: 2})
	r.must(r.write(0, pattern(1, 2*block.Size)))
	for at := block.Size; at < len(r.mem)-block.Size; at += 64 {
		// Both copies of the record: it is number 1 and a write.
		if binary.LittleEndian.Uint64(r.mem[at:]) == 1 && r.mem[at+24] == byte(oplog.KindWrite) {
			r.mem[at] ^= 0xff
		}
	}
	r.drain()
	if n := r.log.ExtentsFree(); n != 0 {
		t.Fatalf("%d extents are free; the damage missed its aim", n)
	}
	r.want(r.Trim(ctx, 100, 2*block.Size-100, block.Tag{}), block.ErrCorrupt)
	_, err := r.TryStage(0, 1)
	r.want(err, block.ErrCorrupt)
	_, err = r.Stage(ctx, 0, 1)
	r.want(err, block.ErrCorrupt)
	r.must(r.Trim(ctx, 0, 2*block.Size, block.Tag{})) // needs no extent
	r.reads(0, make([]byte, 2*block.Size))
	if n := r.Gate.n.Load(); n != 0 {
		t.Errorf("%d requests in the gate", n)
	}
}
