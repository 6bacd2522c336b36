package pool

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/oplog"
	"github.com/pollux-storage/pollux/internal/region"
	"github.com/pollux-storage/pollux/internal/session"
)

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
