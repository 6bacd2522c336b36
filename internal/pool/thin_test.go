package pool

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
)

const thinSize = 100 << 30

// thin is a huge volume with few blocks in it, and what they must hold.
type thin struct {
	r     *rig
	v     block.Volume
	rng   *rand.Rand
	holds map[int64]byte // by block; what is not in it is a hole
	next  byte
}

func newThin(r *rig, seed uint64) *thin {
	return &thin{r: r, v: r.volume("thin", thinSize), rng: rand.New(rand.NewPCG(seed, 7)), holds: map[int64]byte{}}
}

func pattern(c byte) []byte { return bytes.Repeat([]byte{c}, block.Size) }

// scatter writes n blocks at random places, or beside those that exist.
func (x *thin) scatter(n int) {
	x.r.t.Helper()
	for range n {
		at := x.rng.Int64N(thinSize / block.Size)
		if x.rng.IntN(4) == 0 {
			for b := range x.holds {
				at = min(b+x.rng.Int64N(3), thinSize/block.Size-1)
				break
			}
		}
		x.write(at)
	}
}

func (x *thin) write(at int64) {
	x.r.t.Helper()
	if x.next++; x.next == 0 {
		x.next = 1
	}
	if x.r.dirty.Usage().Active > 200 {
		x.commit()
	}
	if err := write(x.v, at*block.Size, pattern(x.next)); err != nil {
		x.r.t.Fatal(err)
	}
	x.holds[at] = x.next
}

func (x *thin) trim(from, to int64) {
	x.r.t.Helper()
	if err := x.v.Trim(context.Background(), from*block.Size, (to-from)*block.Size, block.Tag{}); err != nil {
		x.r.t.Fatal(err)
	}
	for b := range x.holds {
		if b >= from && b < to {
			delete(x.holds, b)
		}
	}
}

func (x *thin) commit() {
	x.r.t.Helper()
	if err := x.r.Pool.Commit(context.Background()); err != nil {
		x.r.t.Fatal(err)
	}
}

func (x *thin) fold() {
	x.r.t.Helper()
	if err := x.r.Fold(context.Background()); err != nil {
		x.r.t.Fatal(err)
	}
}

func (x *thin) restart() {
	x.r.t.Helper()
	x.r.die()
	x.r.mustOpen()
	x.v, _ = x.r.Volume("thin")
}

// verify compares the whole volume, by its status and by its blocks.
func (x *thin) verify(when string) {
	x.r.t.Helper()
	got := make([]byte, block.Size)
	for b, c := range x.holds {
		if err := x.v.Read(context.Background(), got, b*block.Size); err != nil {
			x.r.t.Fatalf("%s: block %d: %v", when, b, err)
		}
		if !bytes.Equal(got, pattern(c)) {
			x.r.t.Fatalf("%s: block %d holds %d instead of %d", when, b, got[0], c)
		}
	}
	// Around each of them, where status must show exactly the blocks there.
	for b := range x.holds {
		from, to := max(0, b-40), min(b+40, thinSize/block.Size)
		ext, err := x.v.Status(context.Background(), from*block.Size, (to-from)*block.Size, 1000, nil)
		if err != nil {
			x.r.t.Fatal(err)
		}
		for _, e := range ext {
			for i := e.Offset; i < e.Offset+e.Length; i += block.Size {
				if _, data := x.holds[i/block.Size]; data == e.Hole {
					x.r.t.Fatalf("%s: status says hole=%v of block %d", when, e.Hole, i/block.Size)
				}
			}
		}
	}
	for range 200 {
		b := x.rng.Int64N(thinSize / block.Size)
		if err := x.v.Read(context.Background(), got, b*block.Size); err != nil {
			x.r.t.Fatal(err)
		}
		if got[0] != x.holds[b] {
			x.r.t.Fatalf("%s: block %d holds %d instead of %d", when, b, got[0], x.holds[b])
		}
	}
}

// What is written into a range that was trimmed shortly before stays, although
// the range takes several folds to be freed.
func TestWriteIntoPendingTrim(t *testing.T) {
	r := newRig(t, 1, testSize)
	r.mustOpen()
	x := newThin(r, 1)
	const parent = 65536 // blocks below a level-1 page
	for i := range int64(thinSize / block.Size / parent) {
		x.write(i * parent)
	}
	x.commit()
	x.fold()
	x.trim(0, thinSize/block.Size)
	last := int64(thinSize/block.Size/parent - 1)
	x.commit()
	x.write(last * parent) // above a leaf that exists
	x.write(last*parent + 9*256)
	x.write(last*parent - 5) // in a leaf that does not
	x.commit()
	for i := range 4 {
		x.verify(fmt.Sprintf("before fold %d", i))
		x.fold()
		r.mustCheck()
	}
	x.restart()
	x.verify("after a restart")
	r.shut()
}

// Large trims and deletes of a thin volume, in the middle of which pages and
// ranges wait for several folds and guests die.
func TestThinVolume(t *testing.T) {
	for seed := range uint64(few(4)) {
		t.Run(fmt.Sprint("seed ", seed), func(t *testing.T) {
			r := newRig(t, 1, testSize)
			r.mustOpen()
			x := newThin(r, seed)
			for range 12 {
				x.scatter(20 + x.rng.IntN(150))
				for range x.rng.IntN(3) {
					from := x.rng.Int64N(thinSize / block.Size)
					x.trim(from, from+x.rng.Int64N(thinSize/block.Size-from)+1)
					x.scatter(x.rng.IntN(30))
				}
				switch x.rng.IntN(6) {
				case 0:
					x.restart()
				case 1, 2:
					x.fold()
				case 3:
					x.commit()
				case 4:
					for range x.rng.IntN(100) { // some steps
						if err := r.do(context.Background(), func() error { _, err := r.machine.Fold(); return err }); err != nil {
							t.Fatal(err)
						}
					}
				}
				x.verify("in a round")
			}
			r.mustCheck()
			if err := r.DeleteVolume(context.Background(), "thin"); err != nil {
				t.Fatal(err)
			}
			x.v, x.holds = r.volume("thin", thinSize), map[int64]byte{}
			x.scatter(50)
			x.verify("after it was deleted and made anew")
			for i := 0; r.bmap.Unfinished(); i++ {
				x.fold()
				if i%2 == 0 {
					x.restart()
				}
				r.mustCheck()
			}
			if n := len(r.catalogue.All()); n != 1 {
				t.Errorf("%d volumes are left", n)
			}
			x.verify("at the end")
			r.shut()
		})
	}
}
