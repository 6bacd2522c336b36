package devcopy

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/mem"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

const size = 4 << 20

func memory(t *testing.T, name string, n int64) hpdi.Device {
	t.Helper()
	d, err := mem.New(name, n)
	must(t, err)
	t.Cleanup(func() { must(t, d.Close()) })
	return d
}

// less hides what a device can do.
type less struct {
	hpdi.Device
	hide func(*hpdi.Info)
}

func (d less) Info() hpdi.Info {
	i := d.Device.Info()
	d.hide(&i)
	return i
}

func (d less) NewQueue(depth int) (hpdi.Queue, error) {
	q, err := d.Device.NewQueue(depth)
	if err == nil && !d.Info().Event {
		q = quiet{q}
	}
	return q, err
}

// quiet is a queue without a descriptor.
type quiet struct{ hpdi.Queue }

func (quiet) Event() int { return -1 }

func write(t *testing.T, d hpdi.Device, off int64, p []byte) {
	t.Helper()
	b, err := hpdi.NewBlocking(d, 1)
	must(t, err)
	must(t, b.Write(t.Context(), p, off))
	must(t, b.Close())
}

func content(t *testing.T, d hpdi.Device) []byte {
	t.Helper()
	p := make([]byte, d.Info().Size)
	b, err := hpdi.NewBlocking(d, 1)
	must(t, err)
	must(t, b.Read(t.Context(), p, 0))
	must(t, b.Close())
	return p
}

// scatter writes data to some places of a device.
func scatter(t *testing.T, rng *rand.Rand, d hpdi.Device) {
	t.Helper()
	bs := d.Info().BlockSize
	for range 12 {
		p := make([]byte, (1+rng.IntN(64))*bs)
		for i := range p {
			p[i] = byte(rng.Uint32())
		}
		write(t, d, rng.Int64N((d.Info().Size-int64(len(p)))/int64(bs)+1)*int64(bs), p)
	}
}

// Whatever both devices can do or not, the target becomes what the source is.
func TestCopy(t *testing.T) {
	seed := rand.Uint64()
	if v := os.Getenv("POLLUX_SEED"); v != "" {
		var err error
		seed, err = strconv.ParseUint(v, 10, 64)
		must(t, err)
	}
	t.Logf("seed %d (POLLUX_SEED=%d repeats this run)", seed, seed)
	rng := rand.New(rand.NewPCG(seed, 1))
	for _, hidden := range []struct {
		name string
		hide func(*hpdi.Info)
	}{
		{"nothing", func(*hpdi.Info) {}},
		{"status", func(i *hpdi.Info) { i.Status = false }},
		{"zeroes", func(i *hpdi.Info) { i.Zeroes = false }},
		{"both", func(i *hpdi.Info) { i.Status, i.Zeroes = false, false }},
		{"events", func(i *hpdi.Info) { i.Event = false }},
	} {
		for _, fine := range []bool{false, true} {
			var src, dst hpdi.Device = memory(t, "from", size), memory(t, "to", size+1<<20)
			if fine { // blocks of 512 bytes, and no status
				src = blocktest.NewCrashWith(blocktest.CrashOptions{Name: "from", Size: size, BlockSize: 512, Seed: seed})
			}
			scatter(t, rng, src)
			scatter(t, rng, dst)
			before, want := content(t, dst), content(t, src)
			var steps []int64
			o := Options{Depth: 1 + rng.IntN(8), Piece: 4096 << rng.IntN(6), Verify: true, Progress: func(verifying bool, done, total int64) {
				if total != size {
					t.Errorf("%d bytes in all", total)
				}
				steps = append(steps, done)
			}}
			r, err := Copy(t.Context(), less{src, hidden.hide}, less{dst, hidden.hide}, o)
			if err != nil {
				t.Fatalf("%s hidden, %+v: %v", hidden.name, o, err)
			}
			got := content(t, dst)
			if !bytes.Equal(got[:size], want) || !bytes.Equal(got[size:], before[size:]) {
				t.Fatalf("%s hidden, %+v: the target holds something else", hidden.name, o)
			}
			if r.Copied+r.Zeroed+r.Skipped != size || r.Verified != size || steps[len(steps)-1] != size {
				t.Errorf("%s hidden: %+v, last step %d", hidden.name, r, steps[len(steps)-1])
			}
			knows := hidden.name != "status" && hidden.name != "both" && !fine
			if knows != (r.Copied < size) || knows && r.Skipped == 0 || knows && r.Zeroed == 0 {
				t.Errorf("%s hidden, fine %v: %+v", hidden.name, fine, r)
			}
		}
	}
}

// What makes no sense is said before anything is written.
func TestRefused(t *testing.T) {
	src, dst := memory(t, "from", size), memory(t, "to", size)
	readOnly := less{dst, func(i *hpdi.Info) { i.ReadOnly = true }}
	for _, x := range []struct {
		src, dst hpdi.Device
		o        Options
		want     string
	}{
		{src, memory(t, "little", size/2), Options{}, "from has 4194304 bytes, and little has 2097152: no space left"},
		{src, readOnly, Options{}, "to: device is open for reading only"},
		{src, dst, Options{Depth: MaxDepth + 1}, "257 pieces in flight: from 1 to 256"},
		{src, dst, Options{Depth: -1}, "-1 pieces"},
		{src, dst, Options{Piece: 4097}, "pieces of 4097 bytes: a multiple of 4096"},
		{src, dst, Options{Piece: MaxPiece + 4096}, "pieces of"},
		{blocktest.NewCrashWith(blocktest.CrashOptions{Name: "odd", Size: 512 * 9, BlockSize: 512}), dst, Options{}, "odd has 4608 bytes, and to takes multiples of 4096"},
	} {
		if _, err := Copy(t.Context(), x.src, x.dst, x.o); err == nil || !strings.Contains(err.Error(), x.want) {
			t.Errorf("%+v: %v, want %s", x.o, err, x.want)
		}
	}
}

// changing gives other data at a place when it is read for the second time.
type changing struct {
	hpdi.Device
	off   int64
	times int
}

type changingQueue struct {
	hpdi.Queue
	d *changing
}

func (d *changing) NewQueue(depth int) (hpdi.Queue, error) {
	q, err := d.Device.NewQueue(depth)
	return &changingQueue{q, d}, err
}

func (q *changingQueue) Wait(least int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	before := len(done)
	done, err := q.Queue.Wait(least, done)
	for _, r := range done[before:] {
		if at := q.d.off - r.Offset; r.Op == hpdi.OpRead && at >= 0 && at < r.Bytes() {
			if q.d.times++; q.d.times > 1 {
				r.Vec[0][at] ^= 1
			}
		}
	}
	return done, err
}

// A difference is found, wherever it is, and its place is said.
func TestVerifyFindsDifference(t *testing.T) {
	src, dst := memory(t, "from", size), memory(t, "to", size)
	scatter(t, rand.New(rand.NewPCG(1, 1)), src)
	write(t, src, 4096, bytes.Repeat([]byte{1}, 8192))
	_, err := Copy(t.Context(), &changing{Device: src, off: 8191}, dst, Options{Verify: true})
	if !errors.Is(err, ErrDiffers) || !strings.Contains(err.Error(), "from and to, byte 8191") {
		t.Errorf("data: %v", err)
	}
	// In what is a hole of the source only the target is read.
	_, err = Copy(t.Context(), memory(t, "empty", size), &changing{Device: dst, off: 77, times: 1}, Options{Verify: true})
	if !errors.Is(err, ErrDiffers) || !strings.Contains(err.Error(), "byte 77:") {
		t.Errorf("a hole: %v", err)
	}
	if _, err = Copy(t.Context(), src, dst, Options{}); err != nil {
		t.Errorf("without being asked for: %v", err)
	}
}

// An error names the device, the request and its place, and nothing is left in flight.
func TestErrors(t *testing.T) {
	for _, op := range []hpdi.Op{hpdi.OpRead, hpdi.OpWrite, hpdi.OpFlush} {
		src, dst := memory(t, "from", size), memory(t, "to", size)
		write(t, src, 1<<20, bytes.Repeat([]byte{1}, 2<<20))
		bad := blocktest.NewFault(src, 1)
		from, to, name := hpdi.Device(bad), dst, "from"
		if op != hpdi.OpRead {
			bad = blocktest.NewFault(dst, 1)
			from, to, name = src, hpdi.Device(bad), "to"
		}
		bad.Add(blocktest.Rule{Op: op, Err: hpdi.ErrIO})
		_, err := Copy(t.Context(), from, to, Options{Piece: 64 << 10})
		if !errors.Is(err, hpdi.ErrIO) || !strings.HasPrefix(err.Error(), name+": "+op.String()) {
			t.Errorf("%s fails: %v", op, err)
		}
	}
}

// broken is a device whose queues fail as queues may.
type broken struct {
	hpdi.Device
	at string
}

type brokenQueue struct {
	hpdi.Queue
	at string
	n  int
}

var errBroken = errors.New("the ring is gone")

func (d broken) NewQueue(depth int) (hpdi.Queue, error) {
	if d.at == "open" {
		return nil, errBroken
	}
	q, err := d.Device.NewQueue(depth)
	return &brokenQueue{Queue: q, at: d.at}, err
}

func (d broken) Register(mem []byte) error {
	if d.at == "register" {
		return errBroken
	}
	return d.Device.Register(mem)
}

func (q *brokenQueue) Submit(reqs ...*hpdi.Request) error {
	if q.n++; q.at == "submit" && q.n == 5 {
		return errBroken
	}
	return q.Queue.Submit(reqs...)
}

func (q *brokenQueue) Wait(least int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	if q.at == "wait" && q.n >= 5 {
		return done, errBroken
	}
	return q.Queue.Wait(least, done)
}

// A queue that breaks, on either side, ends the copy with its error.
func TestBrokenQueues(t *testing.T) {
	for _, at := range []string{"open", "register", "submit", "wait"} {
		for _, target := range []bool{false, true} {
			src, dst := memory(t, "from", size), memory(t, "to", size)
			write(t, src, 0, bytes.Repeat([]byte{1}, size))
			from, to, name := hpdi.Device(broken{src, at}), dst, "from"
			if target {
				from, to, name = src, hpdi.Device(broken{dst, at}), "to"
			}
			r, err := Copy(t.Context(), from, to, Options{Piece: 4096})
			if !errors.Is(err, errBroken) || !strings.HasPrefix(err.Error(), name+":") || r.Copied > 64*4096 {
				t.Errorf("%s breaks at %s, %d bytes copied: %v", name, at, r.Copied, err)
			}
		}
	}
}

// told is a device that tells of its blocks what a test says.
type told struct {
	hpdi.Device
	block int
	tell  []hpdi.Extent
}

type toldQueue struct {
	hpdi.Queue
	d told
}

func (d told) Info() hpdi.Info {
	i := d.Device.Info()
	i.Status, i.BlockSize = true, d.block
	return i
}

func (d told) NewQueue(depth int) (hpdi.Queue, error) {
	q, err := d.Device.NewQueue(depth)
	return &toldQueue{q, d}, err
}

func (q *toldQueue) Submit(reqs ...*hpdi.Request) error {
	for _, r := range reqs {
		if r.Op != hpdi.OpStatus {
			continue
		}
		r.Op, r.Length = hpdi.OpFlush, 0 // it is answered here
		at := int64(0)
		for _, e := range q.d.tell {
			if at += e.Length; at > r.Offset && len(r.Extents) < cap(r.Extents) {
				r.Extents = append(r.Extents, hpdi.Extent{Length: at - max(r.Offset, at-e.Length), State: e.State})
			}
		}
	}
	return q.Queue.Submit(reqs...)
}

// Where a source has smaller blocks than the target, a block of the target in which a
// border lies is copied.
func TestBordersInBlocks(t *testing.T) {
	src := blocktest.NewCrashWith(blocktest.CrashOptions{Name: "from", Size: 64 << 10, BlockSize: 512})
	write(t, src, 512, bytes.Repeat([]byte{1}, 512))
	write(t, src, 9*512, bytes.Repeat([]byte{2}, 512))
	write(t, src, 24*512, bytes.Repeat([]byte{3}, 512))
	d := told{Device: src, block: 512, tell: []hpdi.Extent{
		{Length: 512, State: hpdi.Hole}, {Length: 512}, {Length: 7 * 512, State: hpdi.Zero}, {Length: 512}, {Length: 6 * 512, State: hpdi.Hole},
		{Length: 8 * 512, State: hpdi.Zero}, {Length: 512}, {Length: 103 * 512, State: hpdi.Hole},
	}}
	dst := memory(t, "to", 64<<10)
	write(t, dst, 0, bytes.Repeat([]byte{9}, 64<<10))
	r, err := Copy(t.Context(), d, dst, Options{Verify: true})
	must(t, err)
	if !bytes.Equal(content(t, dst), content(t, src)) {
		t.Error("the target holds something else")
	}
	if r.Copied != 3*4096 || r.Zeroed != 64<<10-3*4096 {
		t.Errorf("%+v", r)
	}
	// One that tells of less than a block at a time is data to it.
	d.tell = []hpdi.Extent{{Length: 512, State: hpdi.Hole}}
	for len(d.tell) < 128 {
		d.tell = append(d.tell, hpdi.Extent{Length: 512, State: hpdi.ExtentState(len(d.tell) % 2)})
	}
	short := told{Device: d, block: 512, tell: d.tell}
	write(t, dst, 0, bytes.Repeat([]byte{9}, 64<<10))
	if r, err = Copy(t.Context(), short, dst, Options{}); err != nil || r.Copied != 64<<10 || !bytes.Equal(content(t, dst), content(t, src)) {
		t.Errorf("%+v, %v", r, err)
	}
}

// A copy ends when its context does, also when the device answers nothing.
func TestCanceled(t *testing.T) {
	src, dst := memory(t, "from", size), memory(t, "to", size)
	write(t, src, 0, bytes.Repeat([]byte{1}, size))
	ctx, cancel := context.WithCancel(t.Context())
	steps := 0
	_, err := Copy(ctx, src, dst, Options{Piece: 4096, Progress: func(bool, int64, int64) {
		if steps++; steps == 20 {
			cancel()
		}
	}})
	if !errors.Is(err, context.Canceled) || steps > 200 {
		t.Errorf("after %d steps: %v", steps, err)
	}
	ctx, cancel = context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err = Copy(ctx, stuck{src}, dst, Options{}); !errors.Is(err, context.DeadlineExceeded) && !errors.Is(err, hpdi.ErrCanceled) {
		t.Errorf("a source that hangs: %v", err)
	}
}

// What the source gives after the end was asked for begins nothing on a target that hangs.
func TestCanceledBetween(t *testing.T) {
	src, dst := memory(t, "from", size), memory(t, "to", size)
	write(t, src, 0, bytes.Repeat([]byte{1}, size))
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	ended := make(chan error, 1)
	go func() {
		_, err := Copy(ctx, late{src}, stuck{dst}, Options{})
		ended <- err
	}()
	select {
	case err := <-ended:
		if !errors.Is(err, context.DeadlineExceeded) {
			t.Error(err)
		}
	case <-time.After(20 * time.Second):
		t.Fatal("the copy does not end")
	}
}

// late is a device whose reads complete only after they were cancelled in vain.
type late struct{ hpdi.Device }

type lateQueue struct {
	hpdi.Queue
	held []*hpdi.Request
}

func (d late) NewQueue(depth int) (hpdi.Queue, error) {
	q, err := d.Device.NewQueue(depth)
	return &lateQueue{Queue: q}, err
}

func (q *lateQueue) Submit(reqs ...*hpdi.Request) error {
	for _, r := range reqs {
		if r.Op == hpdi.OpRead {
			q.held = append(q.held, r)
		} else if err := q.Queue.Submit(r); err != nil {
			return err
		}
	}
	return nil
}

func (q *lateQueue) Cancel(...*hpdi.Request) {
	held := q.held
	q.held = nil
	_ = q.Queue.Submit(held...) // that of memory takes everything
}

// stuck completes requests only when they are cancelled.
type stuck struct{ hpdi.Device }

type stuckQueue struct {
	hpdi.Queue
	event      hpdi.Signal
	held, done []*hpdi.Request
}

func (d stuck) NewQueue(depth int) (hpdi.Queue, error) {
	q, err := d.Device.NewQueue(depth)
	return &stuckQueue{Queue: q}, err
}

func (q *stuckQueue) Event() int { return q.event.Event() }

func (q *stuckQueue) Submit(reqs ...*hpdi.Request) error {
	q.held = append(q.held, reqs...)
	return nil
}

func (q *stuckQueue) Cancel(reqs ...*hpdi.Request) {
	for _, r := range reqs {
		if i := slices.Index(q.held, r); i >= 0 {
			q.held = slices.Delete(q.held, i, i+1)
			r.Err = hpdi.ErrCanceled
			q.done = append(q.done, r)
		}
	}
	q.event.Set(len(q.done) > 0)
}

func (q *stuckQueue) Wait(_ int, done []*hpdi.Request) ([]*hpdi.Request, error) {
	done = append(done, q.done...)
	q.done = nil
	q.event.Set(false)
	return done, nil
}

// The target is asked until it has told of everything, however many extents that takes.
func TestManyExtentsOfTarget(t *testing.T) {
	const pages = 100
	src, dst := memory(t, "from", pages*4096), memory(t, "to", pages*4096)
	d := told{Device: dst, block: 4096}
	for i := range int64(pages) {
		d.tell = append(d.tell, hpdi.Extent{Length: 4096, State: hpdi.ExtentState(i % 2)})
		if i%2 == 0 {
			write(t, dst, i*4096, bytes.Repeat([]byte{9}, 4096))
		}
	}
	for _, zeroes := range []bool{true, false} {
		r, err := Copy(t.Context(), src, less{d, func(i *hpdi.Info) { i.Zeroes = zeroes }}, Options{Verify: true})
		if err != nil || r.Zeroed != pages/2*4096 || r.Skipped != pages/2*4096 || r.Verified != pages*4096 {
			t.Errorf("%+v, %v", r, err)
		}
	}
	// One that tells nothing is zeroed.
	d.tell = nil
	if r, err := Copy(t.Context(), src, d, Options{Verify: true}); err != nil || r.Zeroed != pages*4096 {
		t.Errorf("%+v, %v", r, err)
	}
}

// keeping is a device whose queues cannot be closed: its peer may have their memory.
type keeping struct {
	hpdi.Device
	mem []byte
}

type keepingQueue struct{ hpdi.Queue }

func (d *keeping) Register(mem []byte) error {
	d.mem = mem
	return d.Device.Register(mem)
}

func (d *keeping) Unregister([]byte) error { return errors.New("it is in use") }

func (d *keeping) NewQueue(depth int) (hpdi.Queue, error) {
	q, err := d.Device.NewQueue(depth)
	return keepingQueue{q}, err
}

func (q keepingQueue) Close() error { return errors.Join(q.Queue.Close(), errBroken) }

// Memory that a queue still has is left alone.
func TestCloseFails(t *testing.T) {
	dst := &keeping{Device: memory(t, "to", size)}
	_, err := Copy(t.Context(), memory(t, "from", size), dst, Options{})
	if !errors.Is(err, errBroken) || strings.Contains(err.Error(), "in use") {
		t.Errorf("%v", err)
	}
	must(t, hpdi.Free(dst.mem)) // which fails where it is free already
}
