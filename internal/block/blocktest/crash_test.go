package blocktest

import (
	"bytes"
	"errors"
	"fmt"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

func fill(b byte, n int) []byte { return bytes.Repeat([]byte{b}, n) }

// io does one request on a queue of its own.
func io(t testing.TB, d hpdi.Device, r *hpdi.Request) error {
	t.Helper()
	q, err := d.NewQueue(1)
	if err != nil {
		return err
	}
	defer q.Close()
	return hpdi.Do(q, r)
}

func write(t testing.TB, d hpdi.Device, off int64, p []byte) error {
	t.Helper()
	return io(t, d, &hpdi.Request{Op: hpdi.OpWrite, Offset: off, Vec: [][]byte{p}})
}

func read(t testing.TB, d hpdi.Device, off int64, n int) []byte {
	t.Helper()
	p := make([]byte, n)
	if err := io(t, d, &hpdi.Request{Op: hpdi.OpRead, Offset: off, Vec: [][]byte{p}}); err != nil {
		t.Fatal(err)
	}
	return p
}

func flush(t testing.TB, d hpdi.Device) error {
	t.Helper()
	return io(t, d, &hpdi.Request{Op: hpdi.OpFlush})
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// TestCrashFlushedSurvives: what a flush covered is there after every cut.
func TestCrashFlushedSurvives(t *testing.T) {
	for seed := uint64(0); seed < 200; seed++ {
		d := NewCrash(1<<40, seed)
		must(t, write(t, d, 1<<39, fill(1, 8192)))
		must(t, flush(t, d))
		must(t, write(t, d, 1<<39, fill(2, 4096)))
		after := d.Cut(seed)
		got := read(t, after, 1<<39, 8192)
		if !bytes.Equal(got[4096:], fill(1, 4096)) {
			t.Fatalf("seed %d: block beside an unflushed write changed", seed)
		}
		for s := 0; s < 4096; s += SectorSize {
			if sec := got[s : s+SectorSize]; !bytes.Equal(sec, fill(1, SectorSize)) && !bytes.Equal(sec, fill(2, SectorSize)) {
				t.Fatalf("seed %d: sector at %d is neither version", seed, s)
			}
		}
		if err := write(t, d, 0, fill(1, 4096)); !errors.Is(err, ErrPowerCut) {
			t.Fatalf("old handle after the cut: %v", err)
		}
		must(t, write(t, after, 0, fill(3, 4096)))
		must(t, flush(t, after))
	}
}

// TestCrashOutcomes: kept, dropped, torn, and the loss of a later of two
// overlapping writes all occur.
func TestCrashOutcomes(t *testing.T) {
	seen := map[string]int{}
	for seed := uint64(0); seed < 300; seed++ {
		d := NewCrash(1<<20, 1)
		must(t, write(t, d, 0, fill(1, 4096)))
		must(t, write(t, d, 0, fill(2, 4096)))
		got := read(t, d.Cut(seed), 0, 4096)
		key := ""
		for b := byte(0); b < 3; b++ {
			if bytes.IndexByte(got, b) >= 0 {
				key += fmt.Sprint(b)
			}
		}
		seen[key]++
	}
	for _, want := range []string{"0", "1", "2", "01", "02", "12", "012"} {
		if seen[want] == 0 {
			t.Errorf("no seed left sectors of versions %q: %v", want, seen)
		}
	}
}

// TestCrashFlushCoversCompletedOnly: a flush in flight together with a write
// does not cover it.
func TestCrashFlushCoversCompletedOnly(t *testing.T) {
	d := NewCrash(1<<20, 1)
	q, err := d.NewQueue(4)
	must(t, err)
	w := &hpdi.Request{Op: hpdi.OpWrite, Vec: [][]byte{fill(1, 4096)}}
	must(t, hpdi.Do(q, w, &hpdi.Request{Op: hpdi.OpFlush}))
	if n := d.Unflushed(); n != 1 {
		t.Fatalf("%d unflushed after write and flush in one batch, want 1", n)
	}
	must(t, hpdi.Do(q, &hpdi.Request{Op: hpdi.OpFlush}))
	if n := d.Unflushed(); n != 0 {
		t.Fatalf("%d unflushed after a second flush, want 0", n)
	}
	after := d.CutTo(NewClock(), DropAll, 0)
	if !bytes.Equal(read(t, after, 0, 4096), fill(1, 4096)) {
		t.Fatal("flushed write lost")
	}
}

// TestCrashDurableWrite: a durable write survives every cut once its end was
// seen, and takes no other write with it; before that it is like any other.
func TestCrashDurableWrite(t *testing.T) {
	d := NewCrash(1<<20, 1)
	must(t, write(t, d, 0, fill(1, 8192)))
	durable := &hpdi.Request{Op: hpdi.OpWrite, Offset: 4096, Vec: [][]byte{fill(2, 4096)}, Durable: true}
	must(t, io(t, d, durable))
	must(t, write(t, d, 8192, fill(3, 4096)))
	q, err := d.NewQueue(1)
	must(t, err)
	unseen := &hpdi.Request{Op: hpdi.OpWrite, Offset: 12288, Vec: [][]byte{fill(4, 4096)}, Durable: true}
	must(t, q.Submit(unseen))
	after := d.CutTo(NewClock(), DropAll, 0)
	got := read(t, after, 0, 16384)
	for i, want := range []byte{1, 2, 0, 0} { // the first overlaps the durable one, and so went with it
		if part := got[i*4096:][:4096]; !bytes.Equal(part, fill(want, 4096)) {
			t.Errorf("block %d has version %d, want %d", i, part[0], want)
		}
	}
	// The power goes during the write: nothing was promised.
	clock := NewClock()
	d = clock.NewCrash(1<<20, 1)
	clock.CutAfter(1)
	if err := io(t, d, durable); !errors.Is(err, ErrPowerCut) {
		t.Fatalf("a durable write at the cut: %v", err)
	}
	if got := read(t, d.CutTo(NewClock(), DropAll, 0), 4096, 4096); !bytes.Equal(got, fill(0, 4096)) {
		t.Error("a durable write that failed cannot be undone")
	}
}

// TestCrashClock: the n-th operation over all devices fails, and all later.
func TestCrashClock(t *testing.T) {
	workload := func(a, b *Crash) (done int) {
		steps := []func() error{
			func() error { return write(t, a, 0, fill(1, 4096)) },
			func() error { return write(t, b, 0, fill(1, 4096)) },
			func() error { return flush(t, a) },
			func() error { return flush(t, b) },
			func() error { return io(t, a, &hpdi.Request{Op: hpdi.OpDiscard, Length: 4096}) },
			func() error { return io(t, b, &hpdi.Request{Op: hpdi.OpWriteZeroes, Length: 4096}) },
		}
		for _, s := range steps {
			if err := s(); err != nil {
				if !errors.Is(err, ErrPowerCut) {
					t.Fatal(err)
				}
				return done
			}
			done++
		}
		return done
	}
	for n := int64(1); n <= 7; n++ {
		clk := NewClock()
		a, b := clk.NewCrash(1<<20, 1), clk.NewCrash(1<<20, 2)
		clk.CutAfter(n)
		if done := workload(a, b); int64(done) != min(n-1, 6) {
			t.Fatalf("cut at %d: %d operations done", n, done)
		}
		if n <= 6 && clk.Ops() != n {
			t.Fatalf("cut at %d: counted %d", n, clk.Ops())
		}
		clk2 := NewClock()
		a2, b2 := a.CutTo(clk2, CutRandom, 1), b.CutTo(clk2, CutRandom, 2)
		ga, gb := read(t, a2, 0, 4096), read(t, b2, 0, 4096)
		if n == 4 && !bytes.Equal(ga, fill(1, 4096)) {
			t.Fatal("a lost a flushed write")
		}
		if n == 5 && !bytes.Equal(gb, fill(1, 4096)) {
			t.Fatal("b lost a flushed write")
		}
	}
}

// TestCrashSeeds: the same seeds give the same state.
func TestCrashSeeds(t *testing.T) {
	state := func(seed uint64) []byte {
		d := NewCrash(1<<20, 7)
		for i := range 32 {
			must(t, write(t, d, int64(i*2048)&^4095, fill(byte(i), 8192)))
		}
		return read(t, d.Cut(seed), 0, 1<<20)
	}
	if !bytes.Equal(state(3), state(3)) {
		t.Error("one seed, two states")
	}
	if bytes.Equal(state(3), state(4)) {
		t.Error("two seeds, one state")
	}
}

// TestCrashDiscard: a discarded range reads as zero or as before, also when it
// is the whole of a large device, and a flush keeps what was seen.
func TestCrashDiscard(t *testing.T) {
	d := NewCrash(1<<44, 5)
	for i := range 64 {
		must(t, write(t, d, int64(i)*block.Size, fill(9, block.Size)))
	}
	must(t, io(t, d, &hpdi.Request{Op: hpdi.OpDiscard, Length: 1 << 44}))
	must(t, flush(t, d))
	seen := read(t, d, 0, 64*block.Size)
	zero := 0
	for i := range 64 {
		switch b := seen[i*block.Size : (i+1)*block.Size]; {
		case bytes.Equal(b, make([]byte, block.Size)):
			zero++
		case !bytes.Equal(b, fill(9, block.Size)):
			t.Fatalf("block %d is neither", i)
		}
	}
	if zero == 0 || zero == 64 {
		t.Errorf("%d of 64 discarded blocks read as zero, want a mixture", zero)
	}
	if !bytes.Equal(read(t, d.CutTo(NewClock(), DropAll, 0), 0, 64*block.Size), seen) {
		t.Error("a flush kept something else than reads saw")
	}
}

// TestCrashReopen: a new process sees what the dead one wrote.
func TestCrashReopen(t *testing.T) {
	d := NewCrash(1<<20, 1)
	must(t, write(t, d, 4096, fill(1, 4096)))
	e := d.Reopen()
	if err := write(t, d, 0, fill(2, 4096)); !errors.Is(err, hpdi.ErrClosed) {
		t.Fatalf("old handle: %v", err)
	}
	if !bytes.Equal(read(t, e, 4096, 4096), fill(1, 4096)) || e.Unflushed() != 1 {
		t.Fatal("write of the old handle is not visible and unflushed")
	}
	must(t, flush(t, e))
	if !bytes.Equal(read(t, e.CutTo(NewClock(), DropAll, 0), 4096, 4096), fill(1, 4096)) {
		t.Fatal("flush did not cover the old handle's write")
	}
}

// TestCrashCorrupt: decay survives flush and cut, and is seen by reads.
func TestCrashCorrupt(t *testing.T) {
	d := NewCrash(1<<20, 1)
	must(t, write(t, d, 0, fill(1, 4096)))
	must(t, flush(t, d))
	d.Corrupt(100, 0x80)
	seen := func(d *Crash) {
		t.Helper()
		if got := read(t, d, 0, 4096); got[100] != 0x81 || got[99] != 1 {
			t.Fatalf("bytes 99 and 100 are %#x and %#x", got[99], got[100])
		}
	}
	seen(d)
	d = d.Reopen()
	seen(d)
	seen(d.Cut(1))
}

// What a durable write takes along, since it overlaps it, takes along in turn what is
// older: a flush later does not bring that back.
func TestCrashOverlapsInARow(t *testing.T) {
	d := NewCrash(1<<20, 1)
	must(t, write(t, d, 2*4096, fill(1, 4*4096)))
	must(t, write(t, d, 4096, fill(2, 2*4096)))
	must(t, io(t, d, &hpdi.Request{Op: hpdi.OpWrite, Offset: 0, Vec: [][]byte{fill(3, 2*4096)}, Durable: true}))
	must(t, flush(t, d))
	if got := read(t, d.CutTo(NewClock(), DropAll, 1), 2*4096, 4096); got[0] != 2 {
		t.Errorf("a flush brought back what was overwritten: %d", got[0])
	}
}
