package pool

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"strings"
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

// TestSessionsOfVolume: what becomes of sessions with their volume, their pool and its region.
func TestSessionsOfVolume(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, testSize)
	r.byRecord = false
	r.mustOpen()
	r.volume("v", 1<<20)
	w := r.volume("w", 1<<20)
	c := &resubmit{r: r}
	if st := r.Sessions(); st != (session.Stats{}) {
		t.Errorf("nobody has a session: %+v", st)
	}
	c.connect()
	if !c.s.Fresh() {
		t.Error("the session was found")
	}
	if _, err := w.OpenSession(ctx, clientID, clientQueues, clientSlots); !errors.Is(err, block.ErrInvalid) || !strings.Contains(err.Error(), "volume w") {
		t.Errorf("session of another volume: %v", err)
	}
	other, err := w.OpenSession(ctx, 78, 1, 1)
	if err != nil {
		t.Fatal(err)
	}
	f := &flight{counter: 1, data: []byte("x"), n: 1}
	if err := c.run(0, 0, f); err != nil {
		t.Fatal(err)
	}
	// A tag that is no open session's changes nothing.
	c.v = w
	if err := c.run(0, 0, f); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("tag of another volume's session: %v", err)
	}
	c.v = r.mustVolume("v")
	if err := c.v.Trim(ctx, 0, block.Size, block.Tag{Session: 5, Counter: 1}); !errors.Is(err, block.ErrClosed) {
		t.Errorf("tag of no session: %v", err)
	}
	if err := r.DeleteVolume(ctx, "w"); err != nil {
		t.Fatal(err)
	}
	if _, err := other.Done(0, 0, 1); !errors.Is(err, block.ErrClosed) {
		t.Errorf("session of a deleted volume: %v", err)
	}
	old := c.s
	r.die()
	if _, err := old.Done(0, 0, 1); err == nil {
		t.Error("a dead guest answers")
	}
	// The table is lost with its section: the pool opens, and the session is fresh.
	var told []string
	o := r.options()
	o.Tell = keep(TellKept, &told)
	lose := func(n int) {
		r.changeRegion(func(q *region.Region) {
			mem, err := q.MapSection(q.Sections(region.SectionSessions)[0])
			if err != nil {
				t.Fatal(err)
			}
			clear(mem[:min(n, len(mem))])
		})
	}
	lose(block.Size)
	if err := r.openWith(o); err != nil {
		t.Fatal(err)
	}
	if len(told) != 1 || !strings.Contains(told[0], "sessions of pool p are lost") {
		t.Errorf("told %q", told)
	}
	c.connect()
	if !c.s.Fresh() {
		t.Error("a session was found in a table that was lost")
	}
	if done, err := c.s.Done(0, 0, 1); done || err != nil {
		t.Errorf("done %t, %v", done, err)
	}
	c.s.Leave()
	r.die()
	// A guest has died that had just got the memory: nothing is lost.
	told = nil
	lose(session.Size)
	o = r.options()
	o.Tell = keep(TellKept, &told)
	if err := r.openWith(o); err != nil {
		t.Fatal(err)
	}
	if len(told) > 0 {
		t.Errorf("told %q", told)
	}
	c.connect()
	r.die()
	// Of a damaged entry the pool says how many.
	told = nil
	o = r.options()
	o.Tell = keep(TellKept, &told)
	r.changeRegion(func(q *region.Region) {
		mem, err := q.MapSection(q.Sections(region.SectionSessions)[0])
		if err != nil {
			t.Fatal(err)
		}
		binary.LittleEndian.PutUint16(mem[block.Size+12:], 9)
	})
	if err := r.openWith(o); err != nil {
		t.Fatal(err)
	}
	if len(told) != 1 || !strings.Contains(told[0], "1 sessions of pool p are damaged") {
		t.Errorf("told %q", told)
	}
	// Closed in good order: the next region has none.
	c.connect()
	s := c.s
	r.shut()
	if _, err := s.Done(0, 0, 1); !errors.Is(err, block.ErrClosed) {
		t.Errorf("a session of a closed pool: %v", err)
	}
	r.reopen()
	r.mustOpen()
	if c.connect(); !c.s.Fresh() {
		t.Error("a session has survived an end in good order")
	}
	r.shut()
}

// TestTagsAndPowerCut: a power cut takes sessions along; what was flushed of tagged changes
// is there, also when the log was full of small ones.
func TestTagsAndPowerCut(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, testSize)
	r.byRecord = false
	r.mustOpen()
	v := r.volume("v", 64<<20)
	if err := r.Pool.Commit(ctx); err != nil {
		t.Fatal(err)
	}
	if err := v.Flush(ctx); err != nil { // begins the chain
		t.Fatal(err)
	}
	c := &resubmit{r: r}
	c.connect()
	n := 0
	for {
		w, err := v.TryStage(int64(n)*block.Size, block.Size)
		if err != nil {
			t.Fatal(err)
		}
		if w == nil {
			break // the log is full
		}
		for _, b := range w.Buffers() {
			binary.LittleEndian.PutUint64(b, uint64(n)+1)
		}
		w.SetTag(block.Tag{Session: clientID, Queue: uint16(n % 2), Slot: uint16(n % 4), Counter: uint64(n) + 1})
		if err := w.Commit(ctx); err != nil {
			t.Fatal(err)
		}
		n++
	}
	if err := v.Flush(ctx); err != nil {
		t.Fatal(err)
	}
	r.cutPower(blocktest.DropAll, 1)
	r.mustOpen()
	if c.connect(); !c.s.Fresh() {
		t.Error("a session has survived a power cut")
	}
	p := make([]byte, block.Size)
	for i := range n {
		if err := c.v.Read(ctx, p, int64(i)*block.Size); err != nil || binary.LittleEndian.Uint64(p) != uint64(i)+1 {
			t.Fatalf("block %d of %d: %x, %v", i, n, p[:8], err)
		}
	}
	t.Logf("%d changes", n)
	r.shut()
}

// pretended is a log with records that no guest publishes.
type pretended []oplog.Record

func (l pretended) Head() block.Seq                         { return block.Seq(len(l)) }
func (l pretended) Get(seq block.Seq) (oplog.Record, error) { return l[seq-1], nil }
func (l pretended) VerifyPayload(rec *oplog.Record) []int   { return nil }

// A check proves tags and sessions, of a pool that is served and of one that is not.
func TestCheckOfSessions(t *testing.T) {
	r := newRig(t, 1, testSize)
	r.byRecord = false
	r.mustOpen()
	r.volume("v", 1<<20)
	c := &resubmit{r: r}
	c.connect()
	for i := range 3 {
		if err := c.run(0, i, &flight{counter: uint64(i) + 1, data: bytes.Repeat([]byte{1}, 3*block.Size)}); err != nil {
			t.Fatal(err)
		}
	}
	r.mustCheck()
	problems := func(report CheckReport, err error) string {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return strings.Join(report.Problems, "\n")
	}
	offline := func() string {
		t.Helper()
		v, err := OpenView(ViewOptions{Devices: r.devices(), RegionPath: r.region, BootID: fmt.Sprint(r.boot)})
		if err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := v.Close(); err != nil {
				t.Error(err)
			}
			r.reopenDevices()
		}()
		return problems(v.Check(t.Context(), CheckOptions{}))
	}
	tag := oplog.TagRecord(1, block.Tag{Session: 1, Counter: 1}, 2)
	zero := oplog.Record{Kind: oplog.KindZero, Volume: 1, Count: 1}
	for n, l := range []pretended{{tag, zero, zero}, {tag, zero}, {tag, zero, tag, zero, zero}} {
		for i := range l {
			l[i].Seq = block.Seq(i + 1)
		}
		x := &checker{Pool: r.Pool, log: l}
		x.records()
		if got := strings.Join(x.report.Problems, "\n"); strings.Contains(got, "the tag of 2 records") != (n > 0) {
			t.Errorf("log %d: %q", n, got)
		}
	}
	r.die()
	if got := offline(); got != "" {
		t.Errorf("of nothing that is wrong: %s", got)
	}
	r.changeRegion(func(q *region.Region) {
		mem, err := q.MapSection(q.Sections(region.SectionSessions)[0])
		if err != nil {
			t.Fatal(err)
		}
		mem[block.Size+64*session.MaxSessions+16]++ // the second cell
	})
	const want = "table of sessions: session 000000000000004d: 1 of 8 slots are damaged"
	if got := offline(); got != want {
		t.Errorf("%s", got)
	}
	r.mustOpen()
	if err := r.Pool.Commit(t.Context()); err != nil {
		t.Fatal(err)
	}
	// The log has brought it up again; what the log has no more stays damaged.
	r.mustCheck()
	r.die()
	r.changeRegion(func(q *region.Region) {
		mem, err := q.MapSection(q.Sections(region.SectionSessions)[0])
		if err != nil {
			t.Fatal(err)
		}
		mem[block.Size+64*session.MaxSessions+16]++
	})
	r.mustOpen()
	if got := problems(r.Check(t.Context(), CheckOptions{})); got != want {
		t.Errorf("%s", got)
	}
	c.connect()
	if _, err := c.s.Done(0, 1, 2); !errors.Is(err, block.ErrCorrupt) {
		t.Errorf("%v", err)
	}
	if err := c.run(0, 1, &flight{counter: 9, zero: true, n: block.Size}); err != nil {
		t.Fatal(err)
	}
	r.shut()
}
