package e2e

import (
	"math/rand/v2"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/open"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/test/pair"
)

// ring returns how programs open a volume over a ring.
func (r *rig) ring(volume string) control.VolumeSocket {
	r.t.Helper()
	e := r.export(volume)
	if e.Ring == nil || e.Ring.URI == "" {
		r.t.Fatalf("volume %s has no socket for rings: %+v", volume, e.Ring)
	}
	return *e.Ring
}

// during verifies on queues of a device while f runs, and a while longer.
func (r *rig) during(queues []hpdi.Queue, f func()) {
	r.t.Helper()
	done, ended := make(chan error), make(chan error, len(queues))
	for i, q := range queues {
		go func() { ended <- verify(q, int64(i)<<20, done) }()
	}
	time.Sleep(time.Duration(rand.IntN(50)) * time.Millisecond) // in the middle of writes, whenever that is
	f()
	close(done)
	for range queues {
		if err := <-ended; err != nil {
			r.t.Fatal(err)
		}
	}
}

// A program with rings to two volumes writes and verifies without an error while the guest
// of one is killed, which its partner takes over and gives back, and that of the other, which
// is started again in place; and while the pair goes down and comes up.
func TestRings(t *testing.T) {
	s := small
	s.Policies = map[string]string{"b": config.RestartFirst}
	s.Failover = append(s.Failover[:len(s.Failover):len(s.Failover)], "restart_limit: 20s", "crash_window: 1ms")
	s.More = []string{"exports: {fixed: {read_only: true}}"}
	r := start(t, s)
	queues := map[string][]hpdi.Queue{}
	var first hpdi.Device
	for _, guest := range []string{"a", "b"} {
		volume := "of-" + guest
		r.volume(volume, 64<<20, guest)
		d, err := open.Open(t.Context(), r.ring(volume).URI+"?queues=3&reconnect=1m")
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		if first == nil {
			first = d
		}
		for range 3 {
			q, err := d.NewQueue(16)
			if err != nil {
				t.Fatal(err)
			}
			defer q.Close()
			queues[guest] = append(queues[guest], q)
		}
	}
	for range 2 {
		r.during(queues["a"], func() { r.struck(unix.SIGKILL, "a") })
		if by := r.export("of-a").ServedBy; by != "b" {
			t.Errorf("guest %q serves a, which was killed", by)
		}
		r.during(queues["a"], func() {
			r.must("giveback", "a")
			r.well()
		})
		r.during(queues["b"], func() { r.struck(unix.SIGKILL, "b") })
	}
	if n := pair.Guest(r.status(), "b").Resumed; n != 2 {
		t.Errorf("guest b was started again in place %d times, want 2", n)
	}
	// Killed again and not given back, so that the figures are still those of who took over.
	r.during(queues["a"], func() { r.struck(unix.SIGKILL, "a") })
	if s := r.ring("of-a"); s.Clients != 1 || s.Reads == 0 || s.Writes == 0 || s.Resubmitted+s.Skipped == 0 || s.Errors != 0 {
		t.Errorf("ring of a: %+v", s)
	} else {
		t.Logf("of the requests in flight at the last kill %d were run again, %d were in the log", s.Resubmitted, s.Skipped)
	}
	r.refused("open over rings in 1 program", "volume", "delete", "of-a")
	r.must("volume", "resize", "of-a", "--size", "96MiB")
	for began := time.Now(); first.Info().Size != 96<<20; time.Sleep(time.Millisecond) {
		if time.Since(began) > 10*time.Second {
			t.Fatalf("the program sees %d bytes of a volume that has grown", first.Info().Size)
		}
	}
	r.during(queues["b"], func() {
		r.down()
		if left, err := os.ReadDir(r.Dir + "/ring"); err != nil || len(left) > 0 {
			t.Errorf("left of the sockets: %v, %v", left, err)
		}
		r.up()
	})
	r.volume("fixed", 1<<20, "a")
	d, err := open.Open(t.Context(), r.ring("fixed").URI)
	if err != nil {
		t.Fatal(err)
	}
	if !d.Info().ReadOnly {
		t.Error("a volume that is read-only for clients is not for programs with rings")
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	r.clean()
}
