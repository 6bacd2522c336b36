package mirror

import (
	"errors"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

// grownTo returns the disks as they are found after they were made larger.
func grownTo(size int64, disks ...*blocktest.Crash) (out []*blocktest.Crash) {
	for _, d := range disks {
		out = append(out, d.Resize(size))
	}
	return out
}

// A mirror is as large as the smallest of its copies when all are there, and only
// then; what was in it stays, and what it has grown by is kept as safe as the rest.
func TestGrow(t *testing.T) {
	const larger = 2*testSize + 5*block.Size
	disks := crashes(3)
	create(t, devices(disks[:2]...))
	m := open(t, Options{Devices: devices(disks[:2]...)})
	w := newWorld(t, m)
	w.write(0, 3)
	w.write(300, 2)
	small := m.Info().Size
	must(t, w.q.Close())

	disks = grownTo(larger, append(shut(t, m, disks[:2]...), disks[2])...)
	for _, o := range []Options{
		{ReadOnly: true},
		{ReadOnly: true, Degraded: true},
		{Degraded: true}, // the other one may not have grown
	} {
		if o.Devices = devices(disks[:2]...); o.Degraded {
			o.Devices = o.Devices[:1]
		}
		m = open(t, o)
		if n := m.Info().Size; n != small {
			t.Errorf("%+v: %d bytes", o, n)
		}
		disks = append(shut(t, m, disks[:2]...), disks[2])
	}
	one := disks[1].Resize(testSize)
	m = open(t, Options{Devices: devices(disks[0], one)})
	if n := m.Info().Size; n != small {
		t.Errorf("one copy has grown: %d bytes", n)
	}
	disks = append(shut(t, m, disks[0], one), disks[2])

	disks[1] = disks[1].Resize(larger)
	m = open(t, Options{Devices: devices(disks[:2]...)})
	want := int64(larger - reserved*block.Size)
	if n := m.Info().Size; n != want || m.Status().Copies[1].State == Absent {
		t.Fatalf("%d bytes, want %d: %+v", n, want, m.Status())
	}
	w.m = m
	w.connect()
	w.latest()
	last := int(want/block.Size) - 2
	w.write(last, 2)
	w.write(298, 4)
	w.resync()
	w.latest()

	// Its new part is filled into a replacement, and is there when power was cut.
	must(t, m.Replace(0, disks[2]))
	w.resync()
	w.flush()
	clock := blocktest.NewClock()
	left := disks[2].CutTo(clock, blocktest.DropAll, 1)
	m = open(t, Options{Devices: devices(left), Degraded: true})
	w.m = m
	w.connect()
	w.latest()
	if n := m.Info().Size; n != want {
		t.Errorf("with one copy left: %d bytes", n)
	}
	// It does not shrink any more.
	left = shut(t, m, left)[0].Resize(larger - block.Size)
	if _, err := Open(Options{Devices: devices(left), Degraded: true}); !errors.Is(err, block.ErrInvalid) {
		t.Errorf("with a copy that is smaller than the mirror: %v", err)
	}
}

// Power is cut at each operation while a mirror grows: it has the old or the new
// size, with all that was written.
func TestPowerCutWhileGrowing(t *testing.T) {
	for n, done := int64(1), false; !done; n++ {
		disks := crashes(2)
		create(t, devices(disks...))
		m := open(t, Options{Devices: devices(disks...)})
		w := newWorld(t, m)
		w.write(0, 3)
		w.write(600, 2)
		w.flush()
		small := m.Info().Size
		must(t, w.q.Close())
		disks = grownTo(2*testSize, shut(t, m, disks...)...)
		clock := disks[0].Clock()
		clock.CutAfter(clock.Ops() + n)
		m, err := Open(Options{Devices: devices(disks...)})
		if done = err == nil; done {
			must(t, m.Close())
		}
		for seed := range uint64(4) {
			clock := blocktest.NewClock()
			var left []*blocktest.Crash
			for i, d := range disks {
				left = append(left, d.CutTo(clock, blocktest.CutRandom, seed<<16+uint64(n)<<1+uint64(i)))
			}
			// One copy by itself first: it must do, and not grow alone.
			alone := open(t, Options{Devices: devices(left[seed%2]), Degraded: true, ReadOnly: true})
			if s := alone.Info().Size; s != small && s != small+testSize {
				t.Errorf("cut at %d, seed %d: %d bytes", n, seed, s)
			}
			left[seed%2] = shut(t, alone, left[seed%2])[0]
			m := open(t, Options{Devices: devices(left...)})
			if s := m.Info().Size; s != small+testSize {
				t.Errorf("cut at %d, seed %d: %d bytes after all", n, seed, s)
			}
			w.m = m
			w.connect()
			w.latest()
			w.resync()
			w.latest()
			must(t, w.q.Close())
			must(t, m.Close())
		}
		if n > 1000 {
			t.Fatal("growing does not end")
		}
	}
}

// Regions become larger with a mirror that is too large for its map, and only while
// nothing is marked: the marks would mean something else.
func TestGrowBeyondMap(t *testing.T) {
	const most = int64(mapPages*pageBits) << minShift // blocks with the smallest regions
	size := (most/2 + reserved) * block.Size
	clock := blocktest.NewClock()
	var disks []*blocktest.Crash
	for i := range 2 {
		disks = append(disks, blocktest.NewCrashWith(blocktest.CrashOptions{Name: string(rune('x' + i)), Size: size, Seed: uint64(i), Clock: clock}))
	}
	create(t, devices(disks...))
	m := open(t, Options{Devices: devices(disks...)})
	w := newWorld(t, m)
	w.write(7, 1)
	must(t, w.q.Close())
	disks = grownTo(4*size, shut(t, m, disks...)...)
	m = open(t, Options{Devices: devices(disks...)})
	if n := m.Info().Size / block.Size; n != most {
		t.Errorf("marked, it grows to %d blocks instead of %d", n, most)
	}
	w.m = m
	w.connect()
	w.latest()
	w.write(int(most)-1, 1)
	w.resync()
	w.flush()
	for range 3 {
		must(t, m.Tidy())
	}
	must(t, w.q.Close())
	disks = shut(t, m, disks...)
	m = open(t, Options{Devices: devices(disks...)})
	if n, want := m.Info().Size, 4*size-reserved*block.Size; n != want || m.shift <= minShift || m.regions() > mapPages*pageBits {
		t.Errorf("%d bytes instead of %d, regions of 2^%d blocks", n, want, m.shift)
	}
	w.m = m
	w.connect()
	w.latest()
	w.write(int(m.Info().Size/block.Size)-1, 1)
	w.resync()
	w.latest()
	must(t, w.q.Close())
	disks = shut(t, m, disks...)
	m = open(t, Options{Devices: devices(disks...)})
	w.m = m
	w.connect()
	w.latest()
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}
