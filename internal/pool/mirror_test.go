package pool

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/mirror"
)

// newMirroredRig returns a rig whose pool lies on one mirror of all devices; the
// newest mirror is what the returned function returns.
func newMirroredRig(t *testing.T, copies int) (*rig, func() *mirror.Mirror) {
	t.Helper()
	r := newBareRig(t, copies, testSize)
	if _, err := mirror.Create(r.devices()); err != nil {
		t.Fatal(err)
	}
	var m *mirror.Mirror
	r.gather = func() []hpdi.Device {
		var devs []hpdi.Device
		for i, d := range r.devs {
			if devs = append(devs, d); r.wrap != nil {
				devs[i] = r.wrap(i, d)
			}
		}
		var err error
		if m, err = mirror.Open(mirror.Options{Devices: devs, Degraded: true, ReadOnly: r.readOnly}); err != nil {
			t.Fatal(err)
		}
		return []hpdi.Device{m}
	}
	made := r.gather()
	if _, err := Create(context.Background(), CreateOptions{Name: "p", Identity: "a", Devices: made, LogBytes: testLog}); err != nil {
		t.Fatal(err)
	}
	if err := m.Close(); err != nil {
		t.Fatal(err)
	}
	r.reopenDevices()
	return r, func() *mirror.Mirror { return m }
}

// A quarter of all blocks of one copy is turned into rubbish, data and metadata
// alike. No client notices, what is met of it is repaired, and the rest by a scrub.
func TestMirrorHealsDecay(t *testing.T) {
	const seed = 1
	for victim := range 2 {
		r, m := newMirroredRig(t, 2)
		r.mustOpen()
		v := r.volume("v", 4<<20)
		for i := range 512 {
			if err := write(v, int64(i)*8192, pattern(byte(i))); err != nil {
				t.Fatal(err)
			}
			if i%128 == 127 { // the log holds no more
				if err := r.Fold(context.Background()); err != nil {
					t.Fatal(err)
				}
			}
		}
		first := r.label.Layout.First
		r.die() // and with it the cache
		rng := rand.New(rand.NewPCG(seed, uint64(victim)))
		for b := first; b < first+4*block.TrackBlocks; b++ {
			if rng.IntN(4) == 0 {
				r.devs[victim].Corrupt(int64(block.TrackBlocks+b)*block.Size+rng.Int64N(block.Size), 0x55)
			}
		}
		r.mustOpen()
		v, _ = r.Volume("v")
		got := make([]byte, block.Size)
		for i := range 512 {
			if err := v.Read(context.Background(), got, int64(i)*8192); err != nil || !bytes.Equal(got, pattern(byte(i))) {
				t.Fatalf("copy %d decayed: block %d: %v", victim, 2*i, err)
			}
		}
		// What was not met is still bad on that copy, and a check says so.
		if report, err := r.Check(context.Background(), CheckOptions{Data: true}); err != nil || len(report.Problems) == 0 ||
			!strings.Contains(report.Problems[0], fmt.Sprintf("copy %d: ", victim+1)) {
			t.Errorf("copy %d decayed: check: %v, %q", victim, err, report.Problems)
		}
		if s := r.scrubAll(); s.Now.Unreadable != 0 {
			t.Errorf("copy %d decayed: scrub: %+v", victim, s)
		}
		r.mustCheck()
		if s := m().Status().Copies[victim]; s.Repaired < 20 || s.State != mirror.InSync {
			t.Errorf("got %+v", s)
		}
		r.shut()
	}
}

// One copy of a pool is lost at any of its requests, in turn; the guest dies and
// the pool opens with what is left, and later with the copy that came back.
// Nothing that was acknowledged is lost, and in the end either copy by itself
// is a whole pool.
func TestMirrorLosesACopy(t *testing.T) {
	long(t)
	step := 7
	if soak {
		step = 1
	}
	for n := 0; loseCopy(t, n); n += step {
	}
}

func loseCopy(t *testing.T, n int) bool {
	r, m := newMirroredRig(t, 2)
	victim := n % 2
	faults := r.faulty()
	r.mustOpen()
	faults[victim].Add(blocktest.Rule{Err: errMedium, Skip: n})
	model := map[int]byte{}
	v := r.volume("v", 1<<20)
	put := func(round, count int) {
		t.Helper()
		for i := range count {
			b := (i*7 + round) % 256
			if err := write(v, int64(b)*block.Size, pattern(byte(round+i+1))); err != nil {
				t.Fatalf("lost at request %d: %v", n, err)
			}
			model[b] = byte(round + i + 1)
		}
		if err := r.Fold(context.Background()); err != nil {
			t.Fatalf("lost at request %d: %v", n, err)
		}
	}
	same := func(when string) {
		t.Helper()
		v, _ = r.Volume("v")
		got := make([]byte, block.Size)
		for b, c := range model {
			if err := v.Read(context.Background(), got, int64(b)*block.Size); err != nil || !bytes.Equal(got, pattern(c)) {
				t.Fatalf("lost at request %d, %s: block %d: %v", n, when, b, err)
			}
		}
	}
	for round := range 3 {
		put(round*10, 20)
	}
	same("before the death")
	hit := faults[victim].Hits() > 0
	r.die()
	r.wrap = nil
	r.mustOpen() // with both: one may lack something
	same("after the death")
	put(50, 5)
	for done := false; !done; {
		var err error
		if done, err = m().Resync(64); err != nil {
			t.Fatal(err)
		}
	}
	r.die()
	alone := n / 2 % 2
	r.devs = r.devs[alone:][:1]
	r.mustOpen()
	same(fmt.Sprintf("with copy %d alone", alone))
	r.shut()
	return hit
}
