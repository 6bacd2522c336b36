package pool

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

// Clients write, trim and fold while a scrub runs: it reports nothing.
func TestScrubBesideClients(t *testing.T) {
	for seed := range uint64(6) {
		rng := rand.New(rand.NewPCG(seed, 3))
		r, m := newMirroredRig(t, 2)
		r.mustOpen()
		level(t, m())
		v := r.volume("v", 4<<20)
		fillBlocks(r, v, 1024)
		if err := r.Scrub(context.Background(), ScrubStart); err != nil {
			t.Fatal(err)
		}
		for s := r.Pool.scrub.Stats(); s.State == ScrubRunning; s = r.Pool.scrub.Stats() {
			for range rng.IntN(40) {
				b := rng.Int64N(1024)
				var err error
				if rng.IntN(5) == 0 {
					err = v.Trim(context.Background(), b*block.Size, min(1024-b, rng.Int64N(30))*block.Size, block.Tag{})
				} else {
					err = write(v, b*block.Size, pattern(byte(rng.IntN(256))))
				}
				if err != nil {
					t.Fatal(err)
				}
			}
			var err error
			switch rng.IntN(6) {
			case 0:
				err = r.Pool.Commit(context.Background())
			case 1:
				err = r.Fold(context.Background())
			}
			if err := errors.Join(err, r.scrubStep()); err != nil {
				t.Fatal(err)
			}
		}
		if s := r.Pool.scrub.Stats(); s.Now.Repaired != 0 || s.Now.Unreadable != 0 || s.State != ScrubDone {
			t.Errorf("seed %d: %+v", seed, s)
		}
		r.shut()
	}
}

// A scrub goes on where it was after a takeover, whose owner it is told nothing.
func TestScrubGoesOnAfterTakeover(t *testing.T) {
	r, m := newMirroredRig(t, 2)
	r.mustOpen()
	level(t, m())
	v := r.volume("v", 32<<20)
	fillBlocks(r, v, 4096)
	whole := r.scrubAll().Now
	at := blocksOf(r, v)
	r.rot(0, at["label"])
	r.rot(1, at["data"])
	ctx := context.Background()
	if err := r.Scrub(ctx, ScrubStart); err != nil {
		t.Fatal(err)
	}
	for r.Pool.scrub.rec.place.leaf < 8 {
		if err := r.scrubStep(); err != nil {
			t.Fatal(err)
		}
	}
	if err := r.Scrub(ctx, ScrubPause); err != nil {
		t.Fatal(err)
	}
	if err := r.Scrub(ctx, ScrubStart); !errors.Is(err, block.ErrInvalid) {
		t.Error(err)
	}
	before := r.Pool.scrub.Stats()
	if err := r.scrubStep(); err != nil || before.State != ScrubPaused || before.Now.Repaired != 2 {
		t.Fatalf("%v: %+v", err, before)
	}
	r.stop()
	if err := r.Release(ctx); err != nil {
		t.Fatal(err)
	}
	r.reopen()
	r.mustOpen()
	level(t, m())
	if err := r.scrubStep(); err != nil {
		t.Fatal(err)
	}
	after := r.Pool.scrub.Stats()
	if after.State != ScrubPaused || after.Now.Blocks != before.Now.Blocks || after.Now.Repaired != 2 || !after.Last.Ended.Equal(whole.Ended) {
		t.Errorf("before %+v, after %+v", before, after)
	}
	if err := r.Scrub(ctx, ScrubResume); err != nil {
		t.Fatal(err)
	}
	if s := r.scrubRest(); s.State != ScrubDone || s.Now.Repaired != 2 || s.Now.Unreadable != 0 || s.Now.Blocks != whole.Blocks {
		t.Errorf("got %+v, a scrub without takeover %+v", s, whole)
	}
	r.shut()
}

// The power is cut in the middle of a scrub that repairs: nothing is wrong then,
// and the scrub goes on or is forgotten.
func TestScrubPowerCut(t *testing.T) {
	for seed := range uint64(few(8)) {
		rng := rand.New(rand.NewPCG(seed, 8))
		r, m := newMirroredRig(t, 2)
		r.mustOpen()
		level(t, m())
		v := r.volume("v", 8<<20)
		fillBlocks(r, v, 1000)
		for _, at := range blocksOf(r, v) {
			r.rot(int(seed%2), at)
		}
		if err := r.Scrub(context.Background(), ScrubStart); err != nil {
			t.Fatal(err)
		}
		for range rng.IntN(12) {
			if err := r.scrubStep(); err != nil {
				t.Fatal(err)
			}
		}
		r.cutPower(blocktest.CutRandom, seed)
		r.mustOpen()
		level(t, m())
		v, _ = r.Volume("v")
		got := make([]byte, block.Size)
		for i := range 1000 {
			if err := v.Read(context.Background(), got, int64(i)*block.Size); err != nil || !bytes.Equal(got, pattern(byte(i))) {
				t.Fatalf("seed %d: block %d: %v", seed, i, err)
			}
		}
		if err := r.scrubStep(); err != nil {
			t.Fatal(err)
		}
		if s := r.Pool.scrub.Stats(); s.State == ScrubRunning {
			r.scrubRest()
		}
		if s := r.scrubAll(); s.Now.Unreadable != 0 {
			t.Errorf("seed %d: %+v", seed, s)
		}
		if s := r.scrubAll(); s.Now.Unreadable != 0 || s.Now.Repaired != 0 {
			t.Errorf("seed %d: %+v", seed, s)
		}
		r.shut()
	}
}

// A pool whose label or superblock is bad on the copy that is read first opens.
func TestOpenReadsOtherCopies(t *testing.T) {
	for victim := range 2 {
		r, m := newMirroredRig(t, 2)
		r.mustOpen()
		level(t, m())
		r.shut()
		for i, d := range r.devs {
			r.devs[i] = d.Reopen()
			if i == victim {
				for _, b := range []uint64{0, 128, 1, 2, 129, 130} {
					r.rot(i, block.At(0, b))
				}
			}
		}
		r.mustOpen()
		level(t, m())
		if s := m().Status().Copies[victim]; s.Repaired < 1 {
			t.Errorf("copy %d: %+v", victim, s)
		}
		if s := r.scrubAll(); s.Now.Unreadable != 0 {
			t.Errorf("copy %d: %+v", victim, s)
		}
		r.shut()
	}
}

// Scrubs begin by themselves when they are due, from the first look at the pool or
// the end of the one before, also of one that another owner made.
func TestScrubBeginsWhenDue(t *testing.T) {
	r := newRig(t, 1, testSize)
	r.scrubbing.Every = 24 * time.Hour
	r.mustOpen()
	r.volume("v", 1<<20)
	look := func(now time.Time) (st ScrubStats) {
		t.Helper()
		if err := r.do(context.Background(), func() error { r.Pool.scrub.work(now); return nil }); err != nil {
			t.Fatal(err)
		}
		return r.Pool.scrub.Stats()
	}
	made := time.Now().Add(-25 * time.Hour)
	if st := look(made); st.State != ScrubNever || !st.Next.Equal(made.Add(24*time.Hour)) {
		t.Fatalf("%+v", st)
	}
	r.die()
	r.mustOpen()
	if st := look(made.Add(23 * time.Hour)); st.State != ScrubNever {
		t.Fatalf("%+v", st)
	}
	if st := look(made.Add(24 * time.Hour)); st.State != ScrubRunning {
		t.Fatalf("%+v", st)
	}
	st := r.scrubRest()
	if st.State != ScrubDone || !st.Next.Equal(st.Now.Ended.Add(24*time.Hour)) {
		t.Errorf("%+v", st)
	}
	next := st.Next.Add(time.Hour)
	r.die()
	r.scrubbing.Off = true
	r.mustOpen()
	if st := look(next); st.State != ScrubDone || !st.Next.IsZero() {
		t.Errorf("%+v", st)
	}
	r.shut()
}

// Scrubs follow one another while many clients write and trim and Run makes its
// consistency points and folds: none of them reports anything.
func TestScrubUnderRun(t *testing.T) {
	for seed := range uint64(2) {
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Minute) // only a hang needs it
		defer cancel()
		r, _ := newMirroredRig(t, 2)
		r.scrubbing = ScrubOptions{Rate: 1 << 40, Tell: func(e ScrubEvent) {
			if e.Kind != "scrub-begin" && e.Kind != "scrub-end" {
				t.Errorf("seed %d: %+v", seed, e)
			}
		}}
		r.interval = 8 * time.Millisecond
		stop := r.run()
		v := r.volume("v", 4<<20)
		var work sync.WaitGroup
		for n := range uint64(4) {
			work.Go(func() {
				rng := rand.New(rand.NewPCG(seed, n))
				for range 1500 {
					b := rng.Int64N(1024)
					var err error
					if rng.IntN(8) == 0 {
						err = v.Trim(ctx, b*block.Size, min(1024-b, 1+rng.Int64N(30))*block.Size, block.Tag{})
					} else {
						err = write(v, b*block.Size, pattern(byte(rng.IntN(256))))
					}
					if err != nil {
						t.Errorf("seed %d: %v", seed, err)
						return
					}
				}
			})
		}
		done := make(chan struct{})
		go func() { work.Wait(); close(done) }()
		scrubs := 0
		for busy := true; busy || scrubs == 0; {
			select {
			case <-done:
				busy = false
			default:
			}
			if s := r.Pool.Stats().Scrub; s.State != ScrubRunning {
				if s.State == ScrubDone {
					scrubs++
				}
				if err := r.Scrub(ctx, ScrubStart); err != nil {
					t.Fatal(err)
				}
			}
			if err := r.Fold(ctx); err != nil {
				t.Fatal(err)
			}
		}
		t.Logf("seed %d: %d scrubs", seed, scrubs)
		stop()
		if err := r.Pool.Close(ctx); err != nil {
			t.Error(err)
		}
	}
}

// A scrub reads at its rate.
func TestScrubPace(t *testing.T) {
	r := newRig(t, 1, testSize)
	r.mustOpen()
	v := r.volume("v", 8<<20)
	fillBlocks(r, v, 1024)
	if err := r.Scrub(context.Background(), ScrubStart); err != nil {
		t.Fatal(err)
	}
	s := r.Pool.scrub
	for s.rec.place.part != scrubVolumes {
		if err := r.scrubStep(); err != nil {
			t.Fatal(err)
		}
	}
	err := r.do(context.Background(), func() error {
		now := time.Now().Add(time.Hour)
		before := s.rec.now.bytes
		s.work(now)
		read := s.rec.now.bytes - before
		want := time.Duration(read) * time.Second / DefaultScrubRate
		if got := s.next.Sub(now); read < 4<<20 || got < want-time.Millisecond || got > want+time.Millisecond {
			t.Errorf("%d bytes, and then a pause of %v", read, got)
		}
		if s.work(now.Add(want - 2*time.Millisecond)); s.rec.now.bytes != before+read {
			t.Error("it did not wait")
		}
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	r.shut()
}
