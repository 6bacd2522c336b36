package pool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

// The ways in which a pool may have been left before a bit of it decays.
const (
	leftClosed  = "closed"
	leftDead    = "guest died"
	leftNoPower = "power cut"
)

// One bit of any block of the devices decays: label, superblock, journal, flush
// log, page or data. The pool opens or says what is wrong; a read returns what
// was written or an error; check says what reads have found.
func TestDecayOfAnyBlock(t *testing.T) {
	long(t)
	for _, left := range []string{leftNoPower, leftDead, leftClosed}[:few(3)] {
		t.Run(left, func(t *testing.T) { decay(t, left) })
	}
}

func decay(t *testing.T, left string) {
	ctx := context.Background()
	rng := rand.New(rand.NewPCG(1, 11))
	r := newRig(t, 2, 32<<20)
	r.mustOpen()
	v := r.volume("v", 4<<20)
	m := blocktest.NewModel(1)
	if err := exercise(r, v, m, rng, 60); err != nil {
		t.Fatal(err)
	}
	if err := r.Fold(ctx); err != nil {
		t.Fatal(err)
	}
	if err := exercise(r, v, m, rng, 20); err != nil {
		t.Fatal(err)
	}
	if err := r.Pool.Commit(ctx); err != nil {
		t.Fatal(err)
	}
	covers := m.FlushStart()
	if err := v.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	m.FlushDone(covers)
	switch left {
	case leftClosed:
		r.shut()
	case leftDead:
		if err := exercise(r, v, m, rng, 5); err != nil {
			t.Fatal(err)
		}
		fallthrough
	default:
		r.stop()
		if err := r.Pool.free(); err != nil {
			t.Fatal(err)
		}
	}
	regionFile, _ := os.ReadFile(r.region)
	x := &decayed{t: t, r: r, m: m, left: left, region: regionFile, devs: slices.Clone(r.devs)}
	x.findPages()
	for dev := range x.devs {
		for _, b := range usedBlocks(t, x.devs[dev].CutTo(blocktest.NewClock(), blocktest.KeepAll, 1)) {
			if !soak && rng.IntN(12) > 0 && b > 256 && !x.pages[block.At(dev, uint64(b))] {
				continue
			}
			x.try(dev, b, rng)
			if t.Failed() {
				return
			}
		}
	}
	// A fold that comes first replaces a page whose twin is bad.
	if x.mended < len(x.pages)/2 || left == leftClosed && x.mended != len(x.pages) {
		t.Errorf("%d of %d pages of metadata were mended", x.mended, len(x.pages))
	}
	t.Logf("%d blocks: %d times the pool did not open, %d times a read failed, %d times only check noticed, %d times nobody", x.tries, x.refused, x.errors, x.noticed, x.unused)
	if soak && x.refused == 0 && left != leftClosed || x.errors == 0 || x.noticed < 3 {
		t.Error("not every kind of damage was seen")
	}
}

// usedBlocks returns the blocks of a device that are not zero.
func usedBlocks(t *testing.T, dev *blocktest.Crash) (used []int64) {
	q, err := dev.NewQueue(1)
	if err != nil {
		t.Fatal(err)
	}
	defer q.Close()
	buf, err := hpdi.AllocPrivate(block.Size)
	if err != nil {
		t.Fatal(err)
	}
	defer hpdi.Free(buf)
	zero := make([]byte, block.Size)
	for b := range dev.Info().Size / block.Size {
		if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Offset: b * block.Size, Vec: [][]byte{buf}}); err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(buf, zero) {
			used = append(used, b)
		}
	}
	return used
}

type decayed struct {
	t      *testing.T
	r      *rig
	m      *blocktest.Model
	left   string
	region []byte
	devs   []*blocktest.Crash

	// pages are the blocks of pages of metadata, and of their twins.
	pages map[block.Physical]bool

	tries, refused, errors, noticed, unused, mended int
}

// findPages looks for all pages of metadata: each has a twin.
func (x *decayed) findPages() {
	clock := blocktest.NewClock()
	for i, d := range x.devs {
		x.r.devs[i] = d.CutTo(clock, blocktest.KeepAll, 1)
	}
	v, err := OpenView(ViewOptions{Devices: x.r.devices()})
	if err != nil {
		x.t.Fatal(err)
	}
	pages, err := pagesOf(v.p)
	if err = errors.Join(err, v.Close()); err != nil {
		x.t.Fatal(err)
	}
	x.pages = map[block.Physical]bool{}
	for _, p := range pages {
		x.pages[p.Phys], x.pages[p.Second().Phys] = true, true
		if p.Twin == 0 {
			x.t.Errorf("the page at %v has no twin", p)
		}
	}
}

// try opens a copy of the pool in which one bit of one block has changed.
func (x *decayed) try(dev int, b int64, rng *rand.Rand) {
	x.tries++
	r := x.r
	what := fmt.Sprintf("%s, block %d:%d", x.left, dev, b)
	clock := blocktest.NewClock()
	for i, d := range x.devs {
		r.devs[i] = d.CutTo(clock, blocktest.KeepAll, 1)
	}
	isCopy := b == int64(labelBlocks[0]) || b == int64(labelBlocks[1])
	within := int64(block.Size)
	if isCopy || rng.IntN(2) == 0 {
		within = 140 // the part of a label that has a meaning, and headers
	}
	r.devs[dev].Corrupt(b*block.Size+rng.Int64N(within), 1<<rng.IntN(8))
	r.boot = 1
	if err := os.Remove(r.region); err != nil && !errors.Is(err, os.ErrNotExist) {
		x.t.Fatal(err)
	}
	switch x.left {
	case leftNoPower:
		r.boot = 2
	case leftDead:
		if err := os.WriteFile(r.region, x.region, 0o600); err != nil {
			x.t.Fatal(err)
		}
	}
	r.newCache()
	looked, lookErr := r.look()
	silent := lookErr == nil && len(looked.Problems) == 0
	page := x.pages[block.At(dev, uint64(b))]
	if err := r.open(); err != nil {
		if x.refused++; page {
			x.t.Errorf("%s: does not open because of one page: %v", what, err)
		}
		if silent {
			x.t.Errorf("%s: does not open, and an offline check found nothing: %v", what, err)
		}
		if !errors.Is(err, block.ErrCorrupt) {
			x.t.Errorf("%s: does not open, and not because of damage: %v", what, err)
		}
		return
	}
	defer func() {
		r.stop()
		if err := r.Pool.free(); err != nil {
			x.t.Error(err)
		}
	}()
	bad := x.verify(what)
	report, err := r.Check(context.Background(), CheckOptions{Data: true})
	problems := len(report.Problems)
	if errors.Is(err, block.ErrCorrupt) {
		problems++ // the counts themselves are damaged
	} else if err != nil {
		x.t.Errorf("%s: check: %v", what, err)
	}
	if page && (bad > 0 || silent) {
		x.t.Errorf("%s: %d reads failed because of one page, found offline: %v", what, bad, !silent)
	}
	if page {
		x.scrub(what)
	}
	if bad > 0 && silent {
		x.t.Errorf("%s: an offline check found nothing although a read failed", what)
	}
	switch {
	case bad > 0 && problems == 0:
		x.t.Errorf("%s: check found nothing although a read failed", what)
	case bad > 0:
		x.errors++
	case problems > 0:
		x.noticed++
	default:
		x.unused++
	}
	if isCopy && problems == 0 {
		x.t.Errorf("%s: check did not notice", what)
	}
}

// scrub makes a page whole again, in whichever place it is bad, if nothing has yet.
func (x *decayed) scrub(what string) {
	x.r.scrubAll()
	if report, err := x.r.Check(context.Background(), CheckOptions{}); err != nil || len(report.Problems) > 0 {
		x.t.Errorf("%s: after a scrub: %v, %v", what, report.Problems, err)
		return
	}
	if x.r.Stats().Mended == 1 {
		x.mended++
	}
}

// verify reads the volume and returns how many blocks could not be read.
func (x *decayed) verify(what string) (bad int) {
	v, err := x.r.Volume("v")
	if err != nil {
		x.t.Errorf("%s: %v", what, err)
		return 0
	}
	read := blockReader(v)
	if x.left != leftNoPower {
		for lba := range block.Logical(v.Info().Size / block.Size) {
			got, err := read(lba)
			switch {
			case errors.Is(err, block.ErrCorrupt):
				bad++
			case err != nil:
				x.t.Errorf("%s: %v", what, err)
			case !bytes.Equal(got, x.m.Content(lba, x.m.Len())):
				x.t.Errorf("%s: block %d reads as %s", what, lba, blocktest.Describe(got))
			}
		}
		return bad
	}
	// The last record of journal or flush log may be gone: nobody can tell
	// such damage from the tear of a power cut. But nothing is invented.
	_, err = x.m.CheckPrefix(read, 0)
	if errors.Is(err, block.ErrCorrupt) {
		return 1
	} else if err != nil {
		x.t.Errorf("%s: %v", what, err)
	}
	return 0
}
