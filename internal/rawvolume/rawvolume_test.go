package rawvolume

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"slices"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/mem"
	"github.com/pollux-storage/pollux/internal/block"
)

const size = 4 << 20

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// poor is a device that cannot write zeroes or tell what is in use.
type poor struct{ hpdi.Device }

func (p poor) Info() hpdi.Info {
	i := p.Device.Info()
	i.Zeroes, i.Status = false, false
	return i
}

func open(t testing.TB, wrap func(hpdi.Device) hpdi.Device) *Volume {
	t.Helper()
	o, err := mem.ParseOptions(map[string][]string{"size": {"4MiB"}})
	must(t, err)
	dev, err := mem.Open("raw", o)
	must(t, err)
	v, err := New("raw", wrap(dev))
	must(t, err)
	t.Cleanup(func() {
		must(t, v.Close())
		must(t, dev.Close())
	})
	return v
}

func send(ctx context.Context, v *Volume, p []byte, off int64, tag block.Tag) error {
	w, err := v.TryStage(off, len(p))
	if err == nil && w == nil {
		w, err = v.Stage(ctx, off, len(p))
	}
	if err != nil {
		return err
	}
	rest := p
	for _, b := range w.Buffers() {
		rest = rest[copy(b, rest):]
	}
	w.SetTag(tag)
	if ok, err := w.TryCommit(); ok || err != nil {
		return err
	}
	return w.Commit(ctx)
}

// Of a write that begins and ends within blocks only these two are read and written again.
func TestEndsAlone(t *testing.T) {
	v := open(t, func(d hpdi.Device) hpdi.Device { return d })
	bs := v.dev.Info().BlockSize
	for _, c := range []struct {
		off  int64
		n    int
		want []int
	}{
		{0, 2 * piece, []int{piece, piece}},
		{int64(bs), piece, []int{piece}},
		{7, 3 * bs, []int{bs - 7, 2 * bs, 7}},
		{7, 5, []int{5}},
		{0, 5, []int{5}},
		{int64(bs) - 1, 2, []int{1, 1}},
		{int64(bs) - 1, 2 + piece + bs, []int{1, piece, bs, 1}},
	} {
		w, err := v.TryStage(c.off, c.n)
		must(t, err)
		var got []int
		for _, b := range w.Buffers() {
			got = append(got, len(b))
		}
		if !slices.Equal(got, c.want) {
			t.Errorf("%d bytes at %d are cut into %d, not %d", c.n, c.off, got, c.want)
		}
		w.Abort()
	}
}

// Any mixture of reads, writes and zeroes at any place does what it does to a slice.
func TestLikeASlice(t *testing.T) {
	for name, wrap := range map[string]func(hpdi.Device) hpdi.Device{
		"all": func(d hpdi.Device) hpdi.Device { return d }, "poor": func(d hpdi.Device) hpdi.Device { return poor{d} },
	} {
		t.Run(name, func(t *testing.T) {
			v := open(t, wrap)
			want := make([]byte, size)
			const seed = 1
			rng := rand.New(rand.NewPCG(seed, 2))
			for i := range 100 {
				n := 1 + rng.IntN(20000)
				if i%40 == 0 {
					n = 1 + rng.IntN(size/2)
				}
				off := rng.IntN(size - n)
				if i%3 == 0 {
					off, n = off/4096*4096, (n+4095)/4096*4096
					n = min(n, size-off)
				}
				switch rng.IntN(4) {
				case 0:
					must(t, v.WriteZeroes(t.Context(), int64(off), int64(n), true, block.Tag{}))
					clear(want[off:][:n])
				case 1:
					p := make([]byte, n)
					must(t, v.Read(t.Context(), p, int64(off)))
					if !bytes.Equal(p, want[off:][:n]) {
						t.Fatalf("seed %d, step %d: %d bytes at %d are not what was written", seed, i, n, off)
					}
				default:
					p := want[off:][:n]
					for j := range p {
						p[j] = byte(rng.Uint32())
					}
					must(t, send(t.Context(), v, p, int64(off), block.Tag{}))
				}
			}
			all := make([]byte, size)
			must(t, v.Read(t.Context(), all, 0))
			if !bytes.Equal(all, want) {
				t.Fatalf("seed %d: the volume is not what was written", seed)
			}
			must(t, v.Flush(t.Context()))
			ext, err := v.Status(t.Context(), 100, size-200, 1000, nil)
			must(t, err)
			var sum int64
			for _, x := range ext {
				if x.Offset != 100+sum || x.Length <= 0 {
					t.Fatalf("%+v after %d bytes", x, sum)
				}
				sum += x.Length
			}
			if sum != size-200 {
				t.Errorf("the status of %d bytes", sum)
			}
		})
	}
}

func TestRefuses(t *testing.T) {
	v := open(t, func(d hpdi.Device) hpdi.Device { return d })
	for name, err := range map[string]error{
		"a read past the end":     v.Read(t.Context(), make([]byte, 2), size-1),
		"a write past the end":    send(t.Context(), v, make([]byte, 2), size-1, block.Tag{}),
		"a write before":          send(t.Context(), v, make([]byte, 2), -1, block.Tag{}),
		"zeroes past the end":     v.WriteZeroes(t.Context(), size, 1, false, block.Tag{}),
		"a write of nothing":      send(t.Context(), v, nil, 0, block.Tag{}),
		"a tag of nobody":         send(t.Context(), v, make([]byte, 1), 0, block.Tag{Session: 5, Counter: 1}),
		"a session without slots": func() error { _, err := v.OpenSession(t.Context(), 1, 1, 0); return err }(),
	} {
		if !errors.Is(err, block.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
	// Writes wait for their share of memory until their client is gone.
	var held []block.Write
	for {
		w, err := v.TryStage(0, 1<<20)
		must(t, err)
		if w == nil {
			break
		}
		held = append(held, w)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := v.Stage(ctx, 0, 1<<20); !errors.Is(err, context.Canceled) || len(held) != memory>>20 {
		t.Errorf("with %d writes staged: %v", len(held), err)
	}
	for _, w := range held {
		w.Abort()
	}
}

// Sessions tell what is done while the program lives, and are bounded.
func TestSessions(t *testing.T) {
	v := open(t, func(d hpdi.Device) hpdi.Device { return d })
	s, err := v.OpenSession(t.Context(), 7, 2, 4)
	must(t, err)
	must(t, send(t.Context(), v, make([]byte, 512), 512, block.Tag{Session: 7, Queue: 1, Slot: 3, Counter: 9}))
	s.Leave()
	if s, err = v.OpenSession(t.Context(), 7, 2, 4); err != nil || s.Fresh() {
		t.Fatal(err)
	}
	for _, x := range []struct {
		slot    int
		counter uint64
		want    bool
	}{{3, 9, true}, {3, 8, false}, {2, 9, false}, {2, 0, false}} {
		if done, err := s.Done(1, x.slot, x.counter); err != nil || done != x.want {
			t.Errorf("slot %d, counter %d: %t, %v", x.slot, x.counter, done, err)
		}
	}
	if _, err := s.Done(2, 0, 1); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("a queue that is not there: %v", err)
	}
	if _, err := v.OpenSession(t.Context(), 7, 1, 4); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("another shape: %v", err)
	}
	for i := range maxSessions - 1 {
		_, err := v.OpenSession(t.Context(), block.SessionID(100+i), 1, 1)
		must(t, err)
	}
	if _, err := v.OpenSession(t.Context(), 999, 1, 1); !errors.Is(err, block.ErrNoSpace) {
		t.Errorf("a session too many: %v", err)
	}
	s.Leave()
	n, err := v.OpenSession(t.Context(), 999, 1, 1)
	must(t, err)
	if _, known := v.known[7]; known {
		t.Error("the session that was left is known")
	}
	n.Close()
	if len(v.known) != maxSessions-1 {
		t.Errorf("%d sessions", len(v.known))
	}
}
