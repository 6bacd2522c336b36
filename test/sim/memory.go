package sim

import (
	"errors"
	"io/fs"
	"os"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/oplog"
	"github.com/pollux-storage/pollux/internal/region"
)

// privatise replaces a dead guest's mapping of a region by a private copy in
// the same place: whatever its goroutines still store, nobody else sees.
func privatise(r *region.Region) error {
	f, err := os.Open(r.Path())
	if err != nil {
		return err
	}
	defer func() { _ = f.Close() }()
	h := r.Header()
	base := unsafe.Add(unsafe.Pointer(unsafe.SliceData(r.Log())), -int(h.Sections[0].Offset))
	_, err = unix.MmapPtr(int(f.Fd()), 0, base, uintptr(h.Size), unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_FIXED)
	return err
}

// loseRegion ends a region as a power cut does.
func (w *World) loseRegion(pl *pool) error {
	if err := os.Remove(pl.path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}

// scribble leaves in a dead guest's log what publishing one more record would
// have stored up to some instruction. It is a record that changes nothing, so
// that it does not matter whether it counts.
func (w *World) scribble(id string) {
	pl := w.pools[id]
	if pl.region == nil || !w.chance(2) || pl.full() {
		return // a full log has no room for a record that is not counted
	}
	mem := pl.region.Log() // the oracle's, read-only
	after := make([]byte, len(mem)+block.Size)
	after = alignedPart(after, len(mem))
	copy(after, mem)
	l, err := oplog.Attach(after)
	if err != nil {
		return
	}
	before := append([]byte(nil), after...)
	if _, ok := l.Publish([]oplog.Record{{Kind: oplog.KindNop}}); !ok {
		return
	}
	stores := changedWords(before, after)
	if len(stores) == 0 {
		return
	}
	n := w.rng.IntN(len(stores) + 1)
	w.log("the log of %s is left after %d of %d stores of a record", id, n, len(stores))
	r, err := region.Open(pl.path, false)
	if err != nil {
		return // being removed
	}
	defer func() { _ = r.Close() }()
	live := r.Log()
	for _, at := range stores[:n] {
		copy(live[at:at+8], after[at:at+8])
	}
}

// full tells whether the log has no room for one more record.
func (pl *pool) full() bool {
	used := uint64(0)
	for seq := pl.log.Tail() + 1; seq <= pl.log.Head(); seq++ {
		rec, err := pl.log.Get(seq)
		if err != nil {
			return true
		}
		used++
		if rec.Kind == oplog.KindWrite {
			used += rec.Count - 1
		}
	}
	return used >= logBytes/block.Size
}

// changedWords lists the words that a publication stored, in the order in which
// it stores them (package oplog, doc.go): the record in the first ring and in
// the second, each with its first word last, then the positions in the two
// header pages.
func changedWords(before, after []byte) []int {
	var rings [2][]int
	var cells []int
	for at := 0; at < len(after); at += 8 {
		if string(before[at:at+8]) == string(after[at:at+8]) {
			continue
		}
		switch {
		case at < block.Size || at >= len(after)-block.Size:
			cells = append(cells, at)
		case at < len(after)/2:
			rings[0] = append(rings[0], at)
		default:
			rings[1] = append(rings[1], at)
		}
	}
	var all []int
	for _, r := range rings {
		if len(r) > 0 {
			all = append(append(all, r[1:]...), r[0])
		}
	}
	return append(all, cells...)
}

// alignedPart returns n bytes of mem that begin at a multiple of the block size.
func alignedPart(mem []byte, n int) []byte {
	skip := -uintptr(unsafe.Pointer(unsafe.SliceData(mem))) % block.Size
	return mem[skip : int(skip)+n : int(skip)+n]
}

// rot flips a bit in some block of the disk that holds something, behind the
// labels.
func (d *disk) rot(w *World) {
	size := d.medium.Info().Size
	d.medium.Corrupt(1<<20+w.rng.Int64N(size-1<<20), 1<<w.rng.IntN(8))
}
