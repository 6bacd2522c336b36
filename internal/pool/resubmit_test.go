package pool

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/oplog"
	"github.com/pollux-storage/pollux/internal/region"
	"github.com/pollux-storage/pollux/internal/session"
)

const (
	clientID     = 77
	clientQueues = 2
	clientSlots  = 4
)

// resubmit is a client that sends requests again which its guest has left in flight.
type resubmit struct {
	r       *rig
	v       block.Volume
	s       block.Session
	m       *blocktest.Model
	counter uint64
	busy    [clientQueues][clientSlots]*flight
	skipped int // were done already
	again   int // were run once more
}

// flight is a request in a slot.
type flight struct {
	counter uint64
	id      int // of the model
	zero    bool
	off, n  int64
	data    []byte
	logged  bool // its change is in the log: what Done must answer
}

func (c *resubmit) connect() {
	c.r.t.Helper()
	c.v = c.r.mustVolume("v")
	var err error
	if c.s, err = c.v.OpenSession(context.Background(), clientID, clientQueues, clientSlots); err != nil {
		c.r.t.Fatal(err)
	}
}

func (c *resubmit) tag(q, slot int, f *flight) block.Tag {
	return block.Tag{Session: clientID, Queue: uint16(q), Slot: uint16(slot), Counter: f.counter}
}

// run carries a request out; it is not completed.
func (c *resubmit) run(q, slot int, f *flight) error {
	ctx := context.Background()
	tag := c.tag(q, slot, f)
	if c.r.dirty.Usage().Active > 100 { // nobody else makes room
		if err := c.r.Pool.Commit(ctx); err != nil {
			return err
		}
	}
	if f.zero {
		if f.counter%2 == 0 {
			return c.v.Trim(ctx, f.off, f.n, tag)
		}
		return c.v.WriteZeroes(ctx, f.off, f.n, false, tag)
	}
	w, err := c.v.Stage(ctx, f.off, len(f.data))
	if err != nil {
		return err
	}
	rest := f.data
	for _, b := range w.Buffers() {
		rest = rest[copy(b, rest):]
	}
	w.SetTag(tag)
	return w.Commit(ctx)
}

// submit puts a new request into a slot.
func (c *resubmit) submit(rng *rand.Rand, q, slot int) *flight {
	c.counter++
	f := &flight{counter: c.counter, off: rng.Int64N(64) * block.Size, n: (1 + rng.Int64N(24)) * block.Size}
	if rng.IntN(3) == 0 { // partial blocks
		f.off += rng.Int64N(block.Size)
		f.n -= rng.Int64N(block.Size)
	}
	f.zero = rng.IntN(4) == 0
	c.busy[q][slot] = f
	return f
}

// begin notes in the model that the request takes effect now.
func (c *resubmit) begin(f *flight) {
	if f.zero {
		f.id = c.m.Zero(f.off, f.n)
	} else {
		f.id, f.data = c.m.Write(f.off, int(f.n))
	}
}

// recover does what a server does for a client that comes back.
func (c *resubmit) recover(what string) {
	c.r.t.Helper()
	c.connect()
	if c.s.Fresh() && c.counter > 0 {
		c.r.t.Fatalf("%s: the session is gone", what)
	}
	for q := range c.busy {
		for slot, f := range c.busy[q] {
			if f == nil {
				continue
			}
			done, err := c.s.Done(q, slot, f.counter)
			if err != nil || done != f.logged {
				c.r.t.Fatalf("%s: submission %d in slot %d of queue %d: done is %t, it was logged: %t; %v", what, f.counter, slot, q, done, f.logged, err)
			}
			if done {
				c.skipped++
			} else {
				c.again++
				c.begin(f)
				if err := c.run(q, slot, f); err != nil {
					c.r.t.Fatalf("%s: %v", what, err)
				}
			}
			c.m.Ack(f.id)
			c.busy[q][slot] = nil
		}
	}
}

// TestExactlyOnce lets a client with overlapping writes in flight lose its guest again and
// again: by death, twice in a row, by giving the pool back, over consistency points and folds.
// What was logged is never run again, everything else is.
func TestExactlyOnce(t *testing.T) {
	long(t)
	for seed := range uint64(max(2, few(8))) {
		rng := rand.New(rand.NewPCG(seed, 41))
		r := newRig(t, 1+int(seed%2), testSize)
		r.battery = seed%4 == 3
		r.mustOpen()
		r.volume("v", 1<<20)
		c := &resubmit{r: r, m: blocktest.NewModel(seed)}
		c.connect()
		for round := range 12 {
			what := fmt.Sprintf("seed %d round %d", seed, round)
			for range 30 {
				q, slot := rng.IntN(clientQueues), rng.IntN(clientSlots)
				switch f := c.busy[q][slot]; {
				case f == nil:
					f = c.submit(rng, q, slot)
					if rng.IntN(3) > 0 { // else it waits in its ring
						c.begin(f)
						if err := c.run(q, slot, f); err != nil {
							t.Fatalf("%s: %v", what, err)
						}
						f.logged = true
					}
				case f.logged: // completed
					c.m.Ack(f.id)
					c.busy[q][slot] = nil
				}
				switch rng.IntN(10) {
				case 0:
					if err := r.Pool.Commit(t.Context()); err != nil {
						t.Fatal(err)
					}
				case 1:
					if err := r.do(t.Context(), func() error { _, err := r.machine.Fold(); return err }); err != nil {
						t.Fatal(err)
					}
				}
			}
			switch rng.IntN(4) {
			case 0:
				r.stop()
				if err := r.Release(t.Context()); err != nil {
					t.Fatal(err)
				}
				r.reopen()
			case 1:
				r.die()
				r.mustOpen()
				r.die()
			case 2:
				if r.battery {
					r.cutPower(blocktest.KeepAll, 0)
					break
				}
				r.die()
			default:
				r.die()
			}
			r.mustOpen()
			c.recover(what)
			if _, err := c.m.CheckPrefix(blockReader(c.v), c.m.Acked()); err != nil {
				t.Fatalf("%s: %v", what, err)
			}
			r.mustCheck()
		}
		if c.skipped == 0 || c.again == 0 {
			t.Errorf("seed %d: %d requests were done, %d were not", seed, c.skipped, c.again)
		}
		r.shut()
	}
}

// TestEveryStoreOfTaggedChange ends a guest after each store of a tagged change, in the log
// and in the table: Done tells whether the change is there, and all of it is or none.
func TestEveryStoreOfTaggedChange(t *testing.T) {
	long(t)
	r := newRig(t, 1, testSize)
	r.byRecord = false
	r.mustOpen()
	v := r.volume("v", 1<<20)
	old := bytes.Repeat([]byte{1}, 4*block.Size)
	if err := write(v, 0, old); err != nil {
		t.Fatal(err)
	}
	c := &resubmit{r: r}
	c.connect()
	if err := c.run(0, 3, &flight{counter: 5, zero: true, off: 8 * block.Size, n: block.Size}); err != nil {
		t.Fatal(err)
	}
	r.die()
	before, err := os.ReadFile(r.region)
	if err != nil {
		t.Fatal(err)
	}
	log, filled, stores, table := storesOf(r, before, block.Tag{Session: clientID, Queue: 1, Slot: 2, Counter: 9})
	done, undone := 0, 0
	for n := range len(stores) + len(table) + 1 {
		if n%oneIn(6) != 0 && n < len(stores)-2 {
			continue
		}
		now := bytes.Clone(before)
		copy(now[log.Offset:log.Offset+log.Length], filled)
		for _, s := range stores[:min(n, len(stores))] {
			copy(now[int(log.Offset)+s.Off:], s.Word[:])
		}
		for _, s := range table[:max(0, n-len(stores))] {
			copy(now[s.at:], s.word[:])
		}
		if err := os.WriteFile(r.region, now, 0o600); err != nil {
			t.Fatal(err)
		}
		r.mustOpen()
		c.connect()
		got, err := c.s.Done(1, 2, 9)
		if err != nil {
			t.Fatalf("%d stores: %v", n, err)
		}
		want := old
		if got {
			done++
			want = bytes.Repeat([]byte{2}, 4*block.Size)
		} else {
			undone++
		}
		p := make([]byte, 4*block.Size)
		if err := c.v.Read(t.Context(), p, 0); err != nil || !bytes.Equal(p, want) {
			t.Fatalf("%d stores: done is %t, the volume has %x %x %x %x, %v", n, got, p[0], p[4096], p[8192], p[12288], err)
		}
		if got, err := c.s.Done(0, 3, 5); !got || err != nil {
			t.Fatalf("%d stores: the change before is forgotten: %v", n, err)
		}
		if n%16 == 0 {
			r.mustCheck()
		}
		r.die()
	}
	if done == 0 || undone == 0 {
		t.Errorf("done %d times, not %d times", done, undone)
	}
}

// aligned returns a copy in memory of whole pages.
func aligned(t testing.TB, p []byte) []byte {
	t.Helper()
	mem, err := hpdi.AllocPrivate(len(p))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = hpdi.Free(mem) })
	copy(mem, p)
	return mem
}

// place is a word of a region's file.
type place struct {
	at   int
	word [8]byte
}

// storesOf returns the stores by which a guest would publish four blocks of twos, one record
// each, and note their tag. The payload is in place, in filled.
func storesOf(r *rig, file []byte, tag block.Tag) (log region.Section, filled []byte, stores []oplog.Store, table []place) {
	t := r.t
	t.Helper()
	var at, length int64
	var pool block.PoolID
	r.changeRegion(func(q *region.Region) {
		log, pool = q.Header().Sections[0], q.Header().Pool
		s := q.Sections(region.SectionSessions)[0]
		at, length = s.Offset, s.Length
	})
	mem := aligned(t, file[log.Offset:log.Offset+log.Length])
	l, err := oplog.Attach(mem)
	if err != nil {
		t.Fatal(err)
	}
	ext, ok := l.Alloc(4, nil)
	if !ok {
		t.Fatal("no room")
	}
	const id = 1 // the first volume
	recs := []oplog.Record{oplog.TagRecord(id, tag, 4)}
	for i, e := range ext {
		copy(l.Payload(e, 1), bytes.Repeat([]byte{2}, block.Size))
		rec := oplog.Record{Kind: oplog.KindWrite, Volume: id, LBA: block.Logical(i), Count: 1, First: e}
		l.Sum(&rec)
		recs = append(recs, rec)
	}
	filled = bytes.Clone(mem)
	stores = l.Stores(recs)
	// What the table stores is what changes in it.
	was := aligned(t, file[at:at+length])
	now := aligned(t, was)
	x := session.New(nil)
	if err := x.Adopt(now, pool, func(block.VolumeID) bool { return true }); err != nil {
		t.Fatal(err)
	}
	if err := x.Begin(id, tag); err != nil {
		t.Fatal(err)
	}
	x.End(tag, true)
	for i := 0; i < len(now); i += 8 {
		if !bytes.Equal(was[i:i+8], now[i:i+8]) {
			table = append(table, place{int(at) + i, [8]byte(now[i:])})
		}
	}
	if len(table) != 2 {
		t.Fatalf("%d words of the table change", len(table))
	}
	return log, filled, stores, table
}
