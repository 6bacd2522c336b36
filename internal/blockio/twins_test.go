package blockio

import (
	"bytes"
	"errors"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/devices"
)

// twinned makes block b of device 0 a page whose twin lies on device 1.
func (r *rig) twinned(b uint64) block.Pointer {
	r.t.Helper()
	p := pointer(0, b)
	p.Twin = block.TwinOn(1)
	mem, err := hpdi.AllocPrivate(block.Size)
	if err != nil {
		r.t.Fatal(err)
	}
	defer func() { _ = hpdi.Free(mem) }()
	copy(mem, content(p.Phys))
	if err := r.set.Do([]*devices.IO{{Op: hpdi.OpWrite, At: p.Second().Phys, Vec: [][]byte{mem}}}); err != nil {
		r.t.Fatal(err)
	}
	return p
}

// good reports whether a page is sound in its first place.
func (r *rig) good(p block.Pointer) bool {
	mem, err := hpdi.AllocPrivate(block.Size)
	if err != nil {
		r.t.Fatal(err)
	}
	defer func() { _ = hpdi.Free(mem) }()
	return r.set.Read(p.Phys, mem) == nil && bytes.Equal(mem, content(p.Phys))
}

func (r *rig) views(p block.Pointer, view func(block.Pointer, func([]byte)) error) error {
	same := false
	err := view(p, func(frame []byte) { same = bytes.Equal(frame, content(p.Phys)) })
	if err == nil && !same {
		r.t.Errorf("page at %v is not what it was", p)
	}
	return err
}

func (r *rig) beside(current bool) func(block.Pointer, func([]byte)) error {
	return func(p block.Pointer, fn func([]byte)) error {
		return r.ViewBeside(p, fn, func() bool { return current })
	}
}

// A bad page is read from its twin. It is mended at once by who keeps it, later where it
// was read beside others, and not at all once it may have been freed.
func TestTwins(t *testing.T) {
	for _, c := range []struct {
		name   string
		view   func(*rig) func(block.Pointer, func([]byte)) error
		freed  uint64 // a block that is freed before Mend, of device 0 or 1
		device int
		mended bool
	}{
		{"alone", func(r *rig) func(block.Pointer, func([]byte)) error { return r.View }, 0, 0, true},
		{"beside", func(r *rig) func(block.Pointer, func([]byte)) error { return r.beside(true) }, 0, 0, true},
		{"another freed", func(r *rig) func(block.Pointer, func([]byte)) error { return r.beside(true) }, 71, 0, true},
		{"stale", func(r *rig) func(block.Pointer, func([]byte)) error { return r.beside(false) }, 0, 0, false},
		{"freed", func(r *rig) func(block.Pointer, func([]byte)) error { return r.beside(true) }, 70, 0, false},
		{"twin freed", func(r *rig) func(block.Pointer, func([]byte)) error { return r.beside(true) }, 70, 1, false},
	} {
		r := newRig(t, 64<<10)
		p := r.twinned(70)
		r.crash[0].Corrupt(70*block.Size+9, 2)
		if err := r.views(p, c.view(r)); err != nil {
			t.Errorf("%s: %v", c.name, err)
		}
		if e := r.set.Errors(0); e != (devices.Errors{}) {
			t.Errorf("%s: counted as lost: %+v", c.name, e)
		}
		if c.freed > 0 {
			r.Forget(block.At(c.device, c.freed), 1)
		}
		r.Mend()
		if n := r.set.Mended(); r.good(p) != c.mended || (n == 1) != c.mended {
			t.Errorf("%s: mended %v, %d times", c.name, r.good(p), n)
		}
	}
}

// What is bad in both places is an error, and written over by nothing; so is what cannot
// be written a page, which reads all the same.
func TestTwinsThatDoNotHelp(t *testing.T) {
	r := newRig(t, 0)
	p := r.twinned(70)
	for dev, f := range r.fault {
		f.Add(blocktest.Rule{Op: hpdi.OpWrite, Err: errBroken})
		if r.crash[dev].Corrupt(70*block.Size+9, 2); dev == 0 {
			if err := errors.Join(r.views(p, r.View), r.views(p, r.beside(true))); err != nil {
				t.Error(err)
			}
			r.Mend()
		}
	}
	for _, view := range []func(block.Pointer, func([]byte)) error{r.View, r.beside(true)} {
		if err := r.views(p, view); !errors.Is(err, block.ErrCorrupt) {
			t.Errorf("%v", err)
		}
	}
	r.Mend()
	if n := r.set.Mended(); n != 0 || r.set.Errors(0).Corrupt != 2 {
		t.Errorf("mended %d times, counted %+v", n, r.set.Errors(0))
	}
}

// Only so many pages are remembered, each once, and forgotten when they are freed.
func TestSuspects(t *testing.T) {
	var s suspects
	for i := range uint64(mostSuspects + 10) {
		for range 2 {
			s.add(block.Pointer{Phys: block.At(0, 100+i), Twin: block.TwinOn(1)}, func() bool { return true })
		}
	}
	s.forget(block.At(0, 100), 3)
	s.forget(block.At(1, 110), 2)
	s.forget(block.At(2, 110), 2)
	if n := len(s.list); n != mostSuspects-5 || s.n.Load() != int64(n) {
		t.Errorf("%d suspects, counted as %d", n, s.n.Load())
	}
	if n := len(s.take()); n != mostSuspects-5 || s.n.Load() != 0 || s.take() != nil {
		t.Errorf("%d suspects taken, %d left", n, s.n.Load())
	}
}
