package volume

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"math/rand/v2"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

// slow is a device on which a read takes 200 µs and 1 ms for each MiB, in
// virtual time, and which counts.
type slow struct {
	hpdi.Device
	mu    sync.Mutex // guards what follows
	calls int        // reads that were waited for together
	reads int
	bytes int64
}

func (d *slow) NewQueue(depth int) (hpdi.Queue, error) {
	q, err := d.Device.NewQueue(depth)
	return &slowQueue{q, d}, err
}

func (d *slow) take() (reads int, bytes int64) {
	d.mu.Lock()
	defer d.mu.Unlock()
	reads, bytes = d.reads, d.bytes
	d.calls, d.reads, d.bytes = 0, 0, 0
	return reads, bytes
}

type slowQueue struct {
	hpdi.Queue
	d *slow
}

func (q *slowQueue) Wait(least int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	before := len(done)
	done, err := q.Queue.Wait(least, done)
	longest := time.Duration(0)
	if len(done) > before && done[before].Op == hpdi.OpRead {
		q.d.mu.Lock()
		q.d.calls++
		q.d.mu.Unlock()
	}
	for _, r := range done[before:] {
		if r.Op == hpdi.OpRead {
			q.d.mu.Lock()
			q.d.reads++
			q.d.bytes += r.Bytes()
			q.d.mu.Unlock()
			longest = max(longest, 200*time.Microsecond+time.Duration(r.Bytes())*time.Millisecond>>20)
		}
	}
	time.Sleep(longest)
	return done, err
}

const aheadSize = 16 << 20

// aheadRig is a volume whose blocks are all on the device and in no cache.
// Block i begins with the number i + 1.
func aheadRig(t *testing.T) (*rig, *slow) {
	dev := &slow{}
	r := newRig(t, options{size: aheadSize, extents: aheadSize/block.Size + 64, cache: 2 * aheadSize,
		wrap: func(d hpdi.Device) hpdi.Device { dev.Device = d; return dev }})
	for off := int64(0); off < aheadSize; off += 1 << 20 {
		w, err := r.Stage(t.Context(), off, 1<<20)
		r.must(err)
		at := off / block.Size
		for _, b := range w.Buffers() {
			for ; len(b) > 0; b = b[block.Size:] {
				clear(b[:block.Size])
				at++
				binary.LittleEndian.PutUint64(b, uint64(at))
			}
		}
		r.must(w.Commit(t.Context()))
	}
	r.drain()
	dev.take()
	return r, dev
}

// get reads as an export does.
func (r *rig) get(p []byte, off int64) {
	r.t.Helper()
	ok, err := r.TryRead(p, off)
	if err == nil && !ok {
		err = r.Read(r.t.Context(), p, off)
	}
	r.must(err)
	for i := 0; i < len(p); i += block.Size {
		want := uint64(off+int64(i))/block.Size + 1
		if got := binary.LittleEndian.Uint64(p[i:]); got != want || !bytes.Equal(p[i+8:i+16], make([]byte, 8)) {
			r.t.Fatalf("at %d there is block %d", off+int64(i), got)
		}
	}
}

// settle waits until nothing is fetched any more.
func settle() {
	time.Sleep(time.Second)
	synctest.Wait()
}

// A reader in order has the device's speed although it asks for little at a
// time, and the device has few and large requests.
func TestReadAheadOfOneStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, dev := aheadRig(t)
		p := make([]byte, 16<<10)
		begin := time.Now()
		for off := int64(0); off < aheadSize; off += int64(len(p)) {
			r.get(p, off)
		}
		took := time.Since(begin)
		settle()
		calls := dev.calls
		_, n := dev.take()
		if least := int64(aheadSize); n < least || n > least+512<<10 {
			t.Errorf("%d bytes were read for %d", n, least)
		}
		// Counted by piece: the rig scatters blocks over tracks, so that one may
		// be several requests.
		if most := aheadSize/aheadPiece + 16; calls > most {
			t.Errorf("%d pieces for %d bytes, want at most %d", calls, n, most)
		}
		// One request at a time would take 200 µs for each of 1024, and the
		// transfer of 16 MiB beside it: 220 ms.
		if took > 40*time.Millisecond {
			t.Errorf("reading took %v of the device's time", took)
		}
	})
}

// Random reads are what they are: nothing more is read.
func TestNoReadAheadAtRandom(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, dev := aheadRig(t)
		rng := rand.New(rand.NewPCG(1, 2))
		p := make([]byte, block.Size)
		wanted := map[int64]bool{}
		for range 1000 {
			off := rng.Int64N(aheadSize/block.Size) * block.Size
			r.get(p, off)
			wanted[off] = true
		}
		settle()
		if reads, n := dev.take(); reads != len(wanted) || n != int64(len(wanted))*block.Size {
			t.Errorf("%d requests, %d bytes for %d blocks", reads, n, len(wanted))
		}
	})
}

// As many streams as there is room for are followed at once, and one that
// stops has cost its window at most.
func TestReadAheadOfManyStreams(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, dev := aheadRig(t)
		const part, stop = aheadSize / streams, aheadSize / streams / 4
		var wg sync.WaitGroup
		for i := range int64(streams) {
			wg.Go(func() {
				p := make([]byte, 8<<10)
				for off := int64(0); off < stop; off += int64(len(p)) {
					r.get(p, i*part+off)
				}
			})
		}
		wg.Wait()
		settle()
		reads, n := dev.take()
		if n < streams*stop || n > streams*min(part, stop+windowMost) || reads > int(n/(32<<10)) {
			t.Errorf("%d requests, %d bytes for %d streams of %d bytes", reads, n, streams, stop)
		}
		if v := r.filling.Load(); v != 0 {
			t.Errorf("%d goroutines are left", v)
		}
		// Nobody goes on: reads elsewhere make them forgotten.
		if r.ahead.active.Load() != streams {
			t.Errorf("%d streams of %d are followed", r.ahead.active.Load(), streams)
		}
		p := make([]byte, block.Size)
		for range 2 * patience {
			r.get(p, 0)
		}
		if n := r.ahead.active.Load(); n != 0 {
			t.Errorf("%d streams that stand still are remembered", n)
		}
	})
}

// A pool that closes waits for what is being fetched, and no more is begun.
func TestReadAheadEndsWithTheGate(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, dev := aheadRig(t)
		p := make([]byte, 64<<10)
		for i := range int64(8) {
			r.get(p, i*int64(len(p)))
		}
		if r.filling.Load() == 0 {
			t.Fatal("nothing is fetched")
		}
		<-r.Gate.Close()
		settle()
		if n := r.filling.Load(); n != 0 {
			t.Errorf("%d goroutines after the end", n)
		}
		if _, n := dev.take(); n > windowMost+8*int64(len(p)) {
			t.Errorf("%d bytes were read", n)
		}
	})
}

// Whoever wants a block that is under way waits for it, unless called off.
func TestReadAwaitsWhatIsUnderWay(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, dev := aheadRig(t)
		p := make([]byte, 64<<10)
		for i := range int64(3) {
			r.get(p, i*int64(len(p)))
		}
		synctest.Wait() // the piece after them is under way
		ctx, cancel := context.WithCancel(t.Context())
		cancel()
		at := int64(3 * len(p))
		if r.ahead.under(at, 1) == nil {
			t.Fatal("nothing is under way")
		}
		if err := r.ahead.await(ctx, at, 1); !errors.Is(err, context.Canceled) {
			t.Errorf("a read that was called off waits: %v", err)
		}
		r.must(r.Read(t.Context(), p, at))
		settle()
		if _, n := dev.take(); n != at+windowLeast {
			t.Errorf("%d bytes were read, want %d", n, at+windowLeast)
		}
	})
}
