package cp

import (
	"errors"
	"math/rand/v2"
	"reflect"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/devices"
	"github.com/pollux-storage/pollux/internal/oplog"
)

// Through many laps, with records of all sizes, replay from any place that is
// not folded yields what was appended after it, and never what an earlier lap
// has left.
func TestJournalLaps(t *testing.T) {
	for seed := range uint64(10) {
		rng := rand.New(rand.NewPCG(seed, 9))
		set := devices.NewSet([]hpdi.Device{blocktest.NewCrash(64*block.Size, seed)})
		j := &journal{set: set, pool: testPool, start: 8, size: 16 * block.Size, next: JournalPos{Number: 1}}
		type entry struct {
			pos JournalPos // before it
			rec *record
		}
		var live []entry
		laps := map[uint64]bool{}
		for step := range 150 {
			r := &record{Epoch: 1, Type: typeCommit, Commit: commit{CP: block.CP(step + 1), Flush: oplog.DiskPos{Batch: 1}, Runs: []mapRun{}}}
			sums := make([]uint32, 1+rng.IntN(3000))
			r.Commit.Runs = append(r.Commit.Runs, mapRun{Volume: 1, LBA: 5, At: block.At(0, 9), Sums: sums})
			size := len(r.encode(testPool))
			room := j.roomForCommit(size)
			pos := j.next
			err := j.append(r)
			switch {
			case err == nil:
				live = append(live, entry{pos, r})
			case !errors.Is(err, errJournalFull):
				t.Fatalf("seed %d, step %d: %v", seed, step, err)
			case room:
				t.Fatalf("seed %d, step %d: no place for %d bytes, of which it was said that there is room", seed, step, size)
			}
			if j.used() > j.size {
				t.Fatalf("seed %d, step %d: %d bytes of %d in use", seed, step, j.used(), j.size)
			}
			laps[j.next.Offset/j.size] = true
			if err != nil || rng.IntN(3) == 0 { // a fold
				live = live[rng.IntN(len(live)+1):]
				j.tail = j.next.Offset
				if len(live) > 0 {
					j.tail = live[0].pos.Offset
				}
			}
			from, want := j.next, live[len(live):]
			if len(live) > 0 {
				i := rng.IntN(len(live))
				from, want = live[i].pos, live[i:]
			}
			k := &journal{set: set, pool: testPool, start: j.start, size: j.size}
			err = k.replay(from, func(r *record) error {
				if len(want) == 0 || !reflect.DeepEqual(r, want[0].rec) {
					t.Fatalf("seed %d, step %d: record %d does not belong there", seed, step, r.Number)
				}
				want = want[1:]
				return nil
			})
			if err != nil || len(want) != 0 || k.next != j.next {
				t.Fatalf("seed %d, step %d: %d records are missing, %+v instead of %+v: %v", seed, step, len(want), k.next, j.next, err)
			}
			if err := k.damaged(); err != nil {
				t.Fatalf("seed %d, step %d: %v", seed, step, err)
			}
		}
		if len(laps) < 5 {
			t.Errorf("seed %d: only %d laps", seed, len(laps))
		}
	}
}
