package session

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

var pool = block.PoolID{7}

// rig is a table in memory of a test.
type rig struct {
	*Table
	t   testing.TB
	mem []byte
	seq block.Seq // head of the log
}

func section(t testing.TB, size int) []byte {
	t.Helper()
	mem, err := hpdi.AllocPrivate(size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = hpdi.Free(mem) })
	return mem
}

func newRig(t testing.TB, size int) *rig {
	r := &rig{t: t, mem: section(t, size)}
	r.Table = New(func() ([]byte, block.PoolID, block.Epoch, error) { return r.mem, pool, 3, nil })
	return r
}

func anyVolume(block.VolumeID) bool { return true }

// next lets the guest die: another one adopts the memory.
func (r *rig) next() {
	r.t.Helper()
	r.Table = New(nil)
	if err := r.Adopt(r.mem, pool, anyVolume); err != nil {
		r.t.Fatal(err)
	}
}

func (r *rig) open(vol block.VolumeID, id block.SessionID, queues, slots int) (*Session, error) {
	return r.Open(r.t.Context(), block.VolumeInfo{ID: vol, Name: "v"}, id, queues, slots, func() block.Seq { return r.seq })
}

func (r *rig) mustOpen(vol block.VolumeID, id block.SessionID, queues, slots int) *Session {
	r.t.Helper()
	s, err := r.open(vol, id, queues, slots)
	if err != nil {
		r.t.Fatal(err)
	}
	return s
}

// publish makes a change with a tag.
func (r *rig) publish(vol block.VolumeID, tag block.Tag) {
	r.t.Helper()
	if err := r.Begin(vol, tag); err != nil {
		r.t.Fatal(err)
	}
	r.seq += 2
	r.End(tag, true)
}

// is demands an answer.
func (r *rig) is(s *Session, queue, slot int, counter uint64, want bool) {
	r.t.Helper()
	if done, err := s.Done(queue, slot, counter); done != want || err != nil {
		r.t.Errorf("queue %d, slot %d, submission %d: done is %t, %v", queue, slot, counter, done, err)
	}
}

func (r *rig) want(err, kind error, texts ...string) {
	r.t.Helper()
	if !errors.Is(err, kind) {
		r.t.Errorf("%v: want %v", err, kind)
		return
	}
	for _, s := range texts {
		if !strings.Contains(err.Error(), s) {
			r.t.Errorf("%v: does not say %q", err, s)
		}
	}
}

func TestSession(t *testing.T) {
	r := newRig(t, Size)
	if st := r.Stats(); st != (Stats{}) {
		t.Errorf("a table without sessions: %+v", st)
	}
	s := r.mustOpen(1, 11, 2, 4)
	if !s.Fresh() {
		t.Error("a new session is not fresh")
	}
	r.is(s, 0, 0, 1, false)
	r.is(s, 0, 0, 0, false)
	r.publish(1, block.Tag{Session: 11, Queue: 1, Slot: 3, Counter: 5})
	for q := range 2 {
		for slot := range 4 {
			r.is(s, q, slot, 5, q == 1 && slot == 3)
		}
	}
	r.publish(1, block.Tag{Session: 11, Queue: 1, Slot: 3, Counter: 9})
	r.is(s, 1, 3, 5, false) // completed long ago; its slot was used again
	r.is(s, 1, 3, 9, true)
	tag := block.Tag{Session: 11, Counter: 10}
	if err := r.Begin(1, tag); err != nil {
		t.Fatal(err)
	}
	r.End(tag, false)
	r.is(s, 0, 0, 10, false)
	for name, c := range map[string]struct {
		vol  block.VolumeID
		tag  block.Tag
		kind error
	}{
		"no such session": {1, block.Tag{Session: 12, Counter: 1}, block.ErrClosed},
		"another volume":  {2, block.Tag{Session: 11, Counter: 1}, block.ErrInvalid},
		"queue":           {1, block.Tag{Session: 11, Queue: 2, Counter: 1}, block.ErrInvalid},
		"slot":            {1, block.Tag{Session: 11, Slot: 4, Counter: 1}, block.ErrInvalid},
		"no counter":      {1, block.Tag{Session: 11}, block.ErrInvalid},
	} {
		if err := r.Begin(c.vol, c.tag); !errors.Is(err, c.kind) {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, at := range [][2]int{{-1, 0}, {2, 0}, {0, -1}, {0, 4}} {
		_, err := s.Done(at[0], at[1], 1)
		r.want(err, block.ErrInvalid, "000000000000000b")
	}
	if st := r.Stats(); st != (Stats{Sessions: 1, Open: 1, Bytes: Size}) {
		t.Errorf("%+v", st)
	}
}

func TestOpenRefuses(t *testing.T) {
	r := newRig(t, Size)
	r.mustOpen(1, 11, 2, 4)
	for name, c := range map[string]struct {
		vol           block.VolumeID
		id            block.SessionID
		queues, slots int
	}{
		"no id": {1, 0, 1, 1}, "no queue": {1, 1, 0, 1}, "queues": {1, 1, MaxQueues + 1, 1}, "no slot": {1, 1, 1, 0},
		"slots": {1, 1, 1, MaxSlots + 1}, "both": {1, 1, MaxQueues, MaxSlots},
		"another volume": {2, 11, 2, 4}, "another shape": {1, 11, 4, 2},
	} {
		_, err := r.open(c.vol, c.id, c.queues, c.slots)
		if !errors.Is(err, block.ErrInvalid) || !strings.Contains(err.Error(), "volume v") {
			t.Errorf("%s: %v", name, err)
		}
	}
	none := errors.New("no room")
	r.Table = New(func() ([]byte, block.PoolID, block.Epoch, error) { return nil, pool, 1, none })
	_, err := r.open(1, 1, 1, 1)
	r.want(err, none, "volume v")
	r.Shut()
	_, err = r.open(1, 1, 1, 1)
	r.want(err, block.ErrClosed)
	r.want(r.Begin(1, block.Tag{Session: 1, Counter: 1}), block.ErrClosed)
}

// What one guest noted the next one knows, whoever has left or closed what.
func TestNextGuest(t *testing.T) {
	r := newRig(t, Size)
	r.mustOpen(1, 11, 2, 4)
	b := r.mustOpen(2, 12, 1, 8)
	again := r.mustOpen(2, 12, 1, 8)
	if again.Fresh() {
		t.Error("a session that is open is fresh")
	}
	r.publish(1, block.Tag{Session: 11, Queue: 1, Slot: 1, Counter: 3})
	r.publish(2, block.Tag{Session: 12, Slot: 7, Counter: 4})
	b.Leave()
	b.Leave()
	if st := r.Stats(); st.Open != 2 {
		t.Errorf("one of two has left: %+v", st)
	}
	again.Leave()
	if st := r.Stats(); st.Open != 1 || st.Sessions != 2 {
		t.Errorf("both have left: %+v", st)
	}
	r.next()
	if st := r.Stats(); st != (Stats{Sessions: 2, Bytes: Size}) {
		t.Errorf("after a death: %+v", st)
	}
	a := r.mustOpen(1, 11, 2, 4)
	b = r.mustOpen(2, 12, 1, 8)
	if a.Fresh() || b.Fresh() {
		t.Error("a session that was found is fresh")
	}
	r.is(a, 1, 1, 3, true)
	r.is(b, 0, 7, 4, true)
	a.Close()
	a.Close()
	_, err := a.Done(1, 1, 3)
	r.want(err, block.ErrClosed, "000000000000000b")
	r.next()
	a = r.mustOpen(1, 11, 2, 4)
	if !a.Fresh() {
		t.Error("a closed session was found")
	}
	r.is(a, 1, 1, 3, false)
	r.Shut()
	a.Close()
	b.Leave()
	_, err = a.Done(0, 0, 1)
	r.want(err, block.ErrClosed)
}

// The volumes of sessions may be gone: deleted by this guest, or by one that died over it.
func TestForget(t *testing.T) {
	r := newRig(t, Size)
	a, b := r.mustOpen(1, 11, 1, 4), r.mustOpen(2, 12, 1, 4)
	r.Forget(1)
	_, err := a.Done(0, 0, 1)
	r.want(err, block.ErrClosed)
	r.is(b, 0, 0, 1, false)
	r.Table = New(nil)
	if err := r.Adopt(r.mem, pool, func(id block.VolumeID) bool { return id != 2 }); err != nil {
		t.Fatal(err)
	}
	if st := r.Stats(); st.Sessions != 0 || st.Damaged != 0 {
		t.Errorf("%+v", st)
	}
}

// The log tells what a guest that died had no time to note, and nothing of a session that
// had the same number before.
func TestRestore(t *testing.T) {
	r := newRig(t, Size)
	r.seq = 100
	r.mustOpen(1, 11, 1, 4)
	r.next()
	r.Restore(block.Tag{Session: 11, Slot: 1, Counter: 7}, 100) // of before
	r.Restore(block.Tag{Session: 11, Slot: 2, Counter: 8}, 101)
	r.Restore(block.Tag{Session: 11, Slot: 2, Counter: 9}, 103)
	r.Restore(block.Tag{Session: 12, Slot: 2, Counter: 9}, 104)
	r.Restore(block.Tag{Session: 11, Slot: 4, Counter: 9}, 105)
	r.Restore(block.Tag{Session: 11, Queue: 1, Counter: 9}, 106)
	s := r.mustOpen(1, 11, 1, 4)
	for slot, counter := range []uint64{0, 0, 9, 0} {
		r.is(s, 0, slot, 7, false)
		r.is(s, 0, slot, 9, counter == 9)
	}
}

// A tag costs no allocation.
func TestNoAllocation(t *testing.T) {
	r := newRig(t, Size)
	s := r.mustOpen(1, 11, 4, 128)
	n := uint64(0)
	if a := testing.AllocsPerRun(500, func() {
		n++
		tag := block.Tag{Session: 11, Queue: uint16(n % 4), Slot: uint16(n % 128), Counter: n}
		if r.Begin(1, tag) != nil {
			t.Fatal("refused")
		}
		r.End(tag, true)
		if done, err := s.Done(int(n%4), int(n%128), n); !done || err != nil {
			t.Fatal(done, err)
		}
	}); a > 0 {
		t.Errorf("%.1f allocations", a)
	}
}

// Sessions come and go at random, against a plain model.
func TestAgainstModel(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	r := newRig(t, cellsAt+16*block.Size) // 4096 slots, so that nobody goes for another
	type client struct {
		s    *Session
		vol  block.VolumeID
		q, n int
		last map[[2]int]uint64
	}
	model := map[block.SessionID]*client{}
	counter := uint64(0)
	for step := range 3000 {
		id := block.SessionID(1 + rng.IntN(12))
		c := model[id]
		what := fmt.Sprintf("seed %d, step %d, session %d", seed, step, id)
		switch k := rng.IntN(20); {
		case k == 0 && r.Table.mem != nil:
			r.next()
			for id, c := range model {
				c.s = r.mustOpen(c.vol, id, c.q, c.n)
				if c.s.Fresh() {
					t.Fatalf("%s: %d is lost", what, id)
				}
			}
		case c == nil:
			c = &client{vol: block.VolumeID(1 + rng.IntN(3)), q: 1 + rng.IntN(2), n: 1 + rng.IntN(30), last: map[[2]int]uint64{}}
			c.s = r.mustOpen(c.vol, id, c.q, c.n)
			if !c.s.Fresh() {
				t.Fatalf("%s: found", what)
			}
			model[id] = c
		case k == 1:
			c.s.Close()
			delete(model, id)
		case k == 2:
			c.s.Leave()
			c.s = r.mustOpen(c.vol, id, c.q, c.n)
		case k == 3:
			r.Forget(c.vol)
			for id, o := range model {
				if o.vol == c.vol {
					delete(model, id)
				}
			}
		default:
			counter++
			at := [2]int{rng.IntN(c.q), rng.IntN(c.n)}
			r.publish(c.vol, block.Tag{Session: id, Queue: uint16(at[0]), Slot: uint16(at[1]), Counter: counter})
			c.last[at] = counter
		}
		for id, c := range model {
			q, n := rng.IntN(c.q), rng.IntN(c.n)
			last := c.last[[2]int{q, n}]
			if done, err := c.s.Done(q, n, max(last, 1)); err != nil || done != (last > 0) {
				t.Fatalf("%s: slot %d of queue %d of %d, last %d: %t, %v", what, n, q, id, last, done, err)
			}
		}
	}
	v, bad, err := Look(r.mem)
	if err != nil || bad != nil || len(v.Sessions) != len(model) {
		t.Errorf("seed %d: a look shows %d of %d sessions, %v, %v", seed, len(v.Sessions), len(model), bad, err)
	}
}
