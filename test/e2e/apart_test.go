package e2e

import (
	"context"
	"encoding/binary"
	"fmt"
	"slices"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/test/campaign/nbdclient"
	"github.com/pollux-storage/pollux/test/pair"
)

// steady is a client that writes and reads all the time, in a part of the volume
// that nobody else uses.
type steady struct {
	base   int64
	client *nbdclient.Client
	done   chan struct{}
	stop   context.CancelFunc
	rounds chan int // the newest count of rounds
	err    error
}

// part is how much of a volume a steady client uses.
const part = 4 << 20

// steadily attaches a client that uses the part of a volume from base on.
func steadily(t *testing.T, uri string, base int64) *steady {
	t.Helper()
	c, err := nbdclient.New(nbdclient.Options{URI: uri})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.WithoutCancel(t.Context()))
	s := &steady{base: base, client: c, done: make(chan struct{}), stop: cancel, rounds: make(chan int)}
	go func() { defer close(s.done); s.err = s.run(ctx) }()
	t.Cleanup(func() {
		cancel()
		c.Close()
		<-s.done
	})
	return s
}

func (s *steady) run(ctx context.Context) error {
	put, got := make([]byte, 4096), make([]byte, 4096)
	for n := 0; ; n++ {
		at := s.base + int64(n)*4096%part
		binary.LittleEndian.PutUint64(put, uint64(n))
		for _, r := range []*nbdclient.Request{
			{Command: nbdclient.Write, Offset: at, Data: put, FUA: n%16 == 0},
			{Command: nbdclient.Read, Offset: at, Data: got},
		} {
			if err := s.client.Do(ctx, r); err != nil {
				return err
			}
		}
		if string(put) != string(got) {
			return fmt.Errorf("round %d reads back something else", n)
		}
		select {
		case s.rounds <- n:
		case <-ctx.Done():
			return ctx.Err()
		default:
		}
	}
}

// goesOn waits until the client has done some more.
func (s *steady) goesOn(t *testing.T) {
	t.Helper()
	timeout := time.After(30 * time.Second)
	for range 50 {
		select {
		case <-s.rounds:
		case <-s.done:
			t.Fatal(s.err)
		case <-timeout:
			t.Fatal("a client gets no answers: ", s.client.Stats())
		}
	}
}

// uninterrupted demands that the client's first connection is still its only one.
func (s *steady) uninterrupted(t *testing.T) {
	t.Helper()
	s.goesOn(t)
	if st := s.client.Stats(); st.Connects != 1 || st.Failed != 0 {
		t.Errorf("the client was interrupted: %+v", st)
	}
}

func (r *rig) pids() (pids []int) {
	r.t.Helper()
	for _, g := range r.status().Guests {
		pids = append(pids, g.PID)
	}
	return pids
}

// Two pairs on one host know nothing of each other.
func TestPairsApart(t *testing.T) {
	one, two := start(t, small), start(t, small)
	const size = 2 * part
	mine, theirs := one.volume("disk", size, "a"), two.volume("disk", size, "a")
	if mine.NBD == theirs.NBD || mine.NBDUnix == theirs.NBDUnix {
		t.Fatalf("two pairs share an address: %s %s", mine.NBD, mine.NBDUnix)
	}
	overTCP, overUnix := steadily(t, theirs.NBD, 0), steadily(t, theirs.NBDUnix, part)
	disturbed := steadily(t, mine.NBD, 0)
	pids := two.pids()

	disturbed.goesOn(t)
	one.must("guest", "kill", "a", "--yes")
	disturbed.goesOn(t)
	one.well()
	one.must("giveback", "a")
	disturbed.goesOn(t)
	overTCP.uninterrupted(t)
	overUnix.uninterrupted(t)
	disturbed.stop()
	one.clean()
	one.down()
	if left := one.Processes(); len(left) > 0 {
		t.Errorf("processes are left: %v", left)
	}
	overTCP.uninterrupted(t)
	overUnix.uninterrupted(t)
	if now := two.pids(); !slices.Equal(now, pids) {
		t.Errorf("the guests of the other pair were %v and are %v", pids, now)
	}
	two.well()

	// The first comes again, where its clients know it, beside the other.
	one.up()
	if again := one.export("disk"); again.NBD != mine.NBD {
		t.Errorf("the volume was at %s and is at %s", mine.NBD, again.NBD)
	}
	overTCP.uninterrupted(t)
	two.clean()
}

// Clients do not notice that the agent dies and comes again.
func TestAgentDiesAndComesAgain(t *testing.T) {
	r := start(t, small)
	disk := r.volume("disk", 2*part, "a")
	other := r.volume("other", 2*part, "b")
	clients := []*steady{steadily(t, disk.NBD, 0), steadily(t, disk.NBDUnix, part), steadily(t, other.NBD, 0)}
	pids := r.pids()
	for range 3 {
		agent, err := r.HoldAgent(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		defer agent.Close()
		if err := agent.Signal(unix.SIGKILL); err != nil {
			t.Fatal(err)
		}
		for _, c := range clients {
			c.uninterrupted(t)
		}
		if st := r.status(); st.Agent.Running || st.Protected {
			t.Errorf("the agent is dead, and status says: running %v, protected %v", st.Agent.Running, st.Protected)
		}
		r.up()
		if now := r.pids(); !slices.Equal(now, pids) {
			t.Fatalf("the guests were %v and are %v", pids, now)
		}
		for _, c := range clients {
			c.uninterrupted(t)
		}
	}
	// It does its work as the first one did.
	r.must("guest", "kill", "a", "--yes")
	clients[0].goesOn(t)
	clients[2].uninterrupted(t)
	r.well()
	r.clean()
	if alive := r.Processes(); len(alive) != 3 {
		t.Errorf("a pair is an agent and two guests: processes %v", alive)
	}
	if by := pair.Guest(r.status(), "a").ServedBy; by != "b" {
		t.Errorf("guest %q serves the volumes of a", by)
	}
}
