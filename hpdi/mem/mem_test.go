package mem_test

import (
	"errors"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/hpditest"
	"github.com/pollux-storage/pollux/hpdi/mem"
)

func TestConformance(t *testing.T) {
	hpditest.Run(t, func(t *testing.T) hpdi.Device {
		dev, err := mem.New("test", 16<<20)
		if err != nil {
			t.Fatal(err)
		}
		return dev
	})
}

func TestNewRefusesBadSize(t *testing.T) {
	for _, size := range []int64{-4096, 0, 1, 4097} {
		if dev, err := mem.New("test", size); err == nil {
			t.Errorf("New of %d bytes worked: %v", size, dev.Info())
		}
	}
}

func TestCloseRefusesOpenQueues(t *testing.T) {
	dev, err := mem.New("test", 4096)
	if err != nil {
		t.Fatal(err)
	}
	q, err := dev.NewQueue(1)
	if err != nil {
		t.Fatal(err)
	}
	if err := dev.Close(); err == nil {
		t.Fatal("device closed under an open queue")
	}
	if err := q.Close(); err != nil {
		t.Fatal(err)
	}
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
}

func BenchmarkWrite4K(b *testing.B) {
	dev, err := mem.New("bench", 16<<20)
	if err != nil {
		b.Fatal(err)
	}
	hpditest.Bench(b, dev, hpdi.OpWrite, 4096, 16)
	if err := dev.Close(); err != nil {
		b.Fatal(err)
	}
}

// More memory than there are addresses is an error that names the device.
func TestNoMemory(t *testing.T) {
	d, err := mem.New("disk-a", 1<<60)
	if err == nil {
		t.Fatalf("there is %+v", d.Info())
	}
	if !errors.Is(err, unix.ENOMEM) || !strings.Contains(err.Error(), "disk-a") || !strings.Contains(err.Error(), "map 1152921504606846976 bytes") {
		t.Error(err)
	}
}

// A request costs no allocation, with an event as without.
func TestAllocations(t *testing.T) {
	d, err := mem.New("disk", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	q, err := d.NewQueue(8)
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 8192)
	reqs := []*hpdi.Request{
		{Op: hpdi.OpWrite, Vec: [][]byte{p[:4096], p[4096:]}}, {Op: hpdi.OpRead, Vec: [][]byte{p}}, {Op: hpdi.OpFlush},
		{Op: hpdi.OpWriteZeroes, Offset: 8192, Length: 4096}, {Op: hpdi.OpDiscard, Length: 4096},
		{Op: hpdi.OpStatus, Length: 1 << 20, Extents: make([]hpdi.Extent, 0, 8)},
	}
	done := make([]*hpdi.Request, 0, 8)
	for _, event := range []bool{false, true} {
		if event && q.Event() < 0 {
			t.Fatal("no descriptor")
		}
		if n := testing.AllocsPerRun(100, func() {
			reqs[5].Extents = reqs[5].Extents[:0]
			if err := q.Submit(reqs...); err != nil {
				t.Fatal(err)
			}
			if done, err = q.Wait(6, done[:0]); err != nil || len(done) != 6 {
				t.Fatal(len(done), err)
			}
			for _, r := range done {
				if r.Err != nil {
					t.Fatal(r.Err)
				}
			}
		}); n != 0 {
			t.Errorf("%v allocations, with an event: %v", n, event)
		}
	}
	if err := errors.Join(q.Close(), d.Close()); err != nil {
		t.Error(err)
	}
}

// Holes are what was not written, or was given back since.
func TestHoles(t *testing.T) {
	d, err := mem.New("disk", 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	q, err := d.NewQueue(8)
	if err != nil {
		t.Fatal(err)
	}
	p := make([]byte, 16384)
	if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpWrite, Offset: 4096, Vec: [][]byte{p}}, &hpdi.Request{Op: hpdi.OpDiscard, Offset: 8192, Length: 4096},
		&hpdi.Request{Op: hpdi.OpWriteZeroes, Offset: 16384, Length: 4096}); err != nil {
		t.Fatal(err)
	}
	r := &hpdi.Request{Op: hpdi.OpStatus, Length: 1 << 20, Extents: make([]hpdi.Extent, 0, 8)}
	if err := hpdi.Do(q, r); err != nil {
		t.Fatal(err)
	}
	want := []hpdi.Extent{{Length: 4096, State: hpdi.Hole}, {Length: 4096}, {Length: 4096, State: hpdi.Hole}, {Length: 4096}, {Length: 1<<20 - 16384, State: hpdi.Hole}}
	if !slices.Equal(r.Extents, want) {
		t.Errorf("%v, want %v", r.Extents, want)
	}
	if err := errors.Join(q.Close(), d.Close()); err != nil {
		t.Error(err)
	}
}
