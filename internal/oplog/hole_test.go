package oplog

import (
	"bytes"
	"errors"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
)

// A whole record after the first that is not is found wherever in the ring it is,
// in either copy, beyond the end of the ring's memory, too.
func TestAttachEveryHole(t *testing.T) {
	mem, l, _ := damaged(t)
	before := bytes.Clone(mem)
	for c, ring := range l.geo.ring {
		for seq := l.Head() + 2; seq <= l.Tail()+block.Seq(l.Slots()); seq++ {
			var p [recordSize]byte
			(&Record{Seq: seq, Kind: KindNop}).encode(&p, l.seed)
			storeRecord(l.out, ring+l.slot(seq), &p)
			_, err := Attach(mem)
			var d *DamageError
			if !errors.As(err, &d) || d.First != l.Head()+1 || d.Last != seq {
				t.Fatalf("record %d in copy %d: %v", seq, c, err)
			}
			// Its sequence alone does not make it one.
			mem[ring+l.slot(seq)+40] ^= 1
			if a, err := Attach(mem); err != nil || a.Head() != l.Head() {
				t.Fatalf("torn record %d in copy %d: %v", seq, c, err)
			}
			copy(mem, before)
		}
	}
}
