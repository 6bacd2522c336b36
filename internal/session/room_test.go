package session

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
)

// kept demands which sessions are in the table.
func (r *rig) kept(ids ...block.SessionID) {
	r.t.Helper()
	for _, id := range ids {
		if r.live[id] == nil {
			r.t.Errorf("session %d is forgotten", id)
		}
	}
	if len(r.live) != len(ids) {
		r.t.Errorf("there are %d sessions, want %d", len(r.live), len(ids))
	}
}

// When memory is short those go that were left first, and none that is open.
func TestEviction(t *testing.T) {
	r := newRig(t, cellsAt+block.Size) // 256 slots, 64 of them for a volume
	var s []*Session
	for i := range 4 {
		s = append(s, r.mustOpen(block.VolumeID(i+1), block.SessionID(i+1), 1, 64))
	}
	_, err := r.open(9, 9, 1, 64)
	r.want(err, block.ErrNoSpace, "4 sessions are open")
	s[2].Leave()
	s[0].Leave()
	r.mustOpen(9, 9, 1, 64).Leave()
	if st := r.Stats(); st.Sessions != 4 || st.Evicted != 1 || st.Open != 2 {
		t.Errorf("%+v", st)
	}
	if _, err := s[2].Done(0, 0, 1); !errors.Is(err, block.ErrClosed) {
		t.Errorf("the one that was left first: %v", err)
	}
	if r.mustOpen(1, 1, 1, 64).Fresh() {
		t.Error("the one that was left second is gone")
	}
	// After a death: 1 was open, as were 2 and 4; 9 was left.
	r.next()
	r.mustOpen(10, 10, 1, 64)
	r.kept(1, 2, 4, 10)
	// Room of several, of which only those go that are in the way, and that can be had.
	r = newRig(t, cellsAt+4*block.Size) // 1024 slots
	for i := range 16 {
		r.mustOpen(block.VolumeID(i+1), block.SessionID(i+1), 1, 64).Leave()
	}
	r.mustOpen(8, 8, 1, 64)
	_, err = r.open(20, 20, 3, 100)
	r.want(err, block.ErrInvalid, "at most 256 slots")
	if st := r.Stats(); st.Sessions != 16 || st.Evicted != 0 {
		t.Errorf("sessions went for one that cannot be: %+v", st)
	}
	r.mustOpen(20, 20, 2, 100)
	r.kept(5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 20)
	for i := range 16 { // a session of each is open but of 9 to 11
		if id := block.SessionID(i + 1); i >= 4 && (i < 8 || i > 10) {
			r.mustOpen(block.VolumeID(id), id, 1, 64)
		}
	}
	_, err = r.open(21, 21, 1, 256)
	r.want(err, block.ErrNoSpace, "256 slots more")
	if st := r.Stats(); st.Sessions != 13 {
		t.Errorf("sessions went for one that does not fit all the same: %+v", st)
	}
	r.mustOpen(21, 21, 1, 129)
	r.kept(5, 6, 7, 8, 12, 13, 14, 15, 16, 20, 21)
}

// A volume has its share of sessions and slots. What is beyond that is taken from its own
// sessions, and its clients get no more than that, whatever they do.
func TestShare(t *testing.T) {
	r := newRig(t, cellsAt+4*block.Size) // 1024 slots, 256 of them for a volume
	var s []*Session
	for i := range 4 {
		s = append(s, r.mustOpen(1, block.SessionID(i+1), 1, 64))
	}
	_, err := r.open(1, 9, 1, 1)
	r.want(err, block.ErrNoSpace, "volume v", "5 sessions open", "256 are possible")
	r.mustOpen(2, 20, 1, 64).Leave()
	s[1].Leave()
	r.mustOpen(1, 9, 1, 64)
	r.kept(1, 3, 4, 9, 20)
	// Sessions of a guest that died are their clients', unless one of the same volume needs
	// the room: then they go after those that were left.
	r.mustOpen(1, 9, 1, 64).Leave()
	r.next()
	r.mustOpen(1, 9, 1, 64).Leave()
	r.mustOpen(1, 9, 1, 64).Leave()
	r.mustOpen(1, 10, 1, 64)
	r.kept(1, 3, 4, 10, 20)
	r.mustOpen(1, 11, 1, 64)
	r.kept(3, 4, 10, 11, 20)
	// Connections without an end.
	r = newRig(t, Size)
	r.mustOpen(2, 5000, 1, 1).Leave()
	for i := range 2 * MaxSessions {
		r.mustOpen(1, block.SessionID(i+1), 1, 1).Leave()
	}
	if st := r.Stats(); st.Sessions != 1+MaxSessions/shares || r.mustOpen(2, 5000, 1, 1).Fresh() {
		t.Errorf("the session of another volume has gone: %+v", st)
	}
}

// After a takeover the clients that have not come back yet keep their sessions, however many
// others come, and for as long as clients may need.
func TestAwaited(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r := newRig(t, cellsAt+block.Size) // 256 slots
		for i := range 4 {
			r.mustOpen(block.VolumeID(i+1), block.SessionID(i+1), 1, 64)
		}
		r.next()
		for id := range 50 {
			_, err := r.open(9, block.SessionID(100+id), 1, 64)
			r.want(err, block.ErrNoSpace, "4 sessions are open or awaited")
		}
		time.Sleep(awaited - time.Second)
		if _, err := r.open(9, 9, 1, 64); err == nil {
			t.Error("a session went that is awaited")
		}
		if r.mustOpen(1, 1, 1, 64).Fresh() {
			t.Error("session 1 is forgotten")
		}
		time.Sleep(time.Second)
		r.mustOpen(9, 9, 1, 64)
		r.kept(1, 3, 4, 9)
	})
}

// All places may be taken before all slots are.
func TestManySessions(t *testing.T) {
	r := newRig(t, Size)
	var first *Session
	for i := range MaxSessions {
		s := r.mustOpen(block.VolumeID(i%shares+1), block.SessionID(i+1), 4, 126)
		if first == nil {
			first = s
		}
	}
	if st := r.Stats(); st.Open != MaxSessions {
		t.Fatalf("%+v", st)
	}
	_, err := r.open(9, 5000, 1, 1)
	r.want(err, block.ErrNoSpace)
	first.Leave()
	r.mustOpen(9, 5000, 1, 1)
	v, bad, err := Look(r.mem)
	if err != nil || bad != nil || len(v.Sessions) != MaxSessions {
		t.Errorf("%d sessions, %v, %v", len(v.Sessions), bad, err)
	}
}

// Whoever comes and goes, the table stays right, no volume has more than its share, and one
// that is open, or awaited by another volume's client, is not forgotten.
func TestRoomAtRandom(t *testing.T) {
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 1))
	r := newRig(t, cellsAt+4*block.Size) // 1024 slots
	open := map[block.SessionID]*Session{}
	refused := 0
	for step := range 1500 {
		what := fmt.Sprintf("seed %d, step %d", seed, step)
		vol, id := block.VolumeID(1+rng.IntN(8)), block.SessionID(step+1)
		sacred := map[block.SessionID]block.VolumeID{} // what must not go for this one
		for old, s := range r.live {
			if s.holders > 0 || s.left == 0 && s.volume != vol {
				sacred[old] = s.volume
			}
		}
		s, err := r.open(vol, id, 1+rng.IntN(4), 1+rng.IntN(64))
		switch {
		case err == nil:
			open[id] = s
		case errors.Is(err, block.ErrNoSpace):
			refused++
		default:
			t.Fatalf("%s: %v", what, err)
		}
		for old, of := range sacred {
			if r.live[old] == nil {
				t.Fatalf("%s: session %d of volume %d went for one of volume %d", what, old, of, vol)
			}
		}
		slots := map[block.VolumeID]uint64{}
		for _, s := range r.live {
			if slots[s.volume] += s.cells(); slots[s.volume] > 256 {
				t.Fatalf("%s: volume %d has %d slots", what, s.volume, slots[s.volume])
			}
		}
		if v, bad, err := Look(r.mem); err != nil || bad != nil || len(v.Sessions) != len(r.live) {
			t.Fatalf("%s: a look shows %d of %d sessions, %v, %v", what, len(v.Sessions), len(r.live), bad, err)
		}
		for id, s := range open {
			if rng.IntN(8) > 0 {
				continue
			}
			if delete(open, id); rng.IntN(2) > 0 {
				s.Leave()
			} else {
				s.Close()
			}
		}
		if rng.IntN(100) == 0 {
			clear(open)
			r.next()
		}
	}
	if st := r.Stats(); refused == 0 || st.Evicted == 0 {
		t.Errorf("seed %d: %d were refused, of this guest %d were forgotten", seed, refused, st.Evicted)
	}
}
