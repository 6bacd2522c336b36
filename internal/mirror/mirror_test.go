package mirror

import (
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/hpditest"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

const testSize = 6 << 20 // of a copy

func crashes(n int) []*blocktest.Crash {
	clock := blocktest.NewClock()
	var out []*blocktest.Crash
	for i := range n {
		out = append(out, blocktest.NewCrashWith(blocktest.CrashOptions{Name: string(rune('x' + i)), Size: testSize, Seed: uint64(i + 1), Clock: clock}))
	}
	return out
}

func devices[D hpdi.Device](ds ...D) (out []hpdi.Device) {
	for _, d := range ds {
		out = append(out, d)
	}
	return out
}

func create(t testing.TB, devs []hpdi.Device) ID {
	t.Helper()
	id, err := Create(devs)
	if err != nil {
		t.Fatal(err)
	}
	return id
}

func open(t testing.TB, o Options) *Mirror {
	t.Helper()
	m, err := Open(o)
	if err != nil {
		t.Fatal(err)
	}
	return m
}

func TestConformance(t *testing.T) {
	for _, n := range []int{2, 3} {
		t.Run(string(rune('0'+n)), func(t *testing.T) {
			hpditest.Run(t, func(t *testing.T) hpdi.Device {
				devs := devices(crashes(n)...)
				create(t, devs)
				return open(t, Options{Devices: devs})
			})
		})
	}
}

// A mirror rotates while a copy that is there does.
func TestRotates(t *testing.T) {
	disks := crashes(3)
	create(t, devices(disks[:2]...))
	m := open(t, Options{Devices: []hpdi.Device{disks[0], blocktest.NewDisk(blocktest.BarracudaES2).Wrap(disks[1])}})
	if !m.Info().Rotates {
		t.Error("one of two disks rotates, the mirror does not")
	}
	must(t, m.Replace(1, disks[2]))
	if m.Info().Rotates {
		t.Error("the mirror rotates without the disk")
	}
	must(t, m.Close())
}

// all reads the whole of a device past the mirror.
func all(t testing.TB, dev hpdi.Device, from int64, n int64) []byte {
	t.Helper()
	q, err := dev.NewQueue(1)
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = q.Close() }()
	p := make([]byte, n)
	if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Offset: from, Vec: [][]byte{p}}); err != nil {
		t.Fatal(err)
	}
	return p
}

var _ = block.Size
