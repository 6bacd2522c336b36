package flashmap

import (
	"encoding/binary"
	"math/rand/v2"
	"os"
	"strconv"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

const (
	setBytes    = MinSetBytes
	setBlocks   = setBytes / block.Size
	primarySize = 5<<20 + 2*block.Size // the last data set is not whole
	flashSize   = 1<<20 + 26*block.Size + 8*setBytes
)

// notes is what was collected at most: so little that the first slot lies where it would
// without.
const notes = 2 * block.Size

// reach makes the map one page, and those that are spare.
const reach = 1 << 20

var primaryID = block.DeviceID{7}

// soak is for tests that take long.
var soak = os.Getenv("POLLUX_SOAK") == "1"

// seedOf returns the seed of a random test and prints it.
func seedOf(t testing.TB) uint64 {
	seed := rand.Uint64()
	if v := os.Getenv("POLLUX_SEED"); v != "" {
		var err error
		if seed, err = strconv.ParseUint(v, 10, 64); err != nil {
			t.Fatalf("POLLUX_SEED: %v", err)
		}
	}
	t.Logf("seed %d (POLLUX_SEED=%d repeats this run)", seed, seed)
	return seed
}

func must(t testing.TB, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// disks returns a primary and a flash device of 8 slots on one clock.
func disks(t testing.TB) (primary, flash *blocktest.Crash) {
	t.Helper()
	return disksOf(t, 8)
}

// disksOf returns a primary and a flash device of so many slots on one clock.
func disksOf(t testing.TB, slots int64) (primary, flash *blocktest.Crash) {
	t.Helper()
	clock := blocktest.NewClock()
	primary = blocktest.NewCrashWith(blocktest.CrashOptions{Name: "disk", Size: primarySize, Seed: 1, Clock: clock, Rotates: true})
	flash = blocktest.NewCrashWith(blocktest.CrashOptions{Name: "ssd", Size: flashSize + (slots-8)*setBytes, Seed: 2, Clock: clock})
	_, err := Create(flash, CreateOptions{SetBytes: setBytes, Reach: reach, Notes: notes})
	must(t, err)
	return primary, flash
}

// drive is a device that does not rotate.
type drive struct{ hpdi.Device }

func (d drive) Info() hpdi.Info {
	info := d.Device.Info()
	info.Rotates = false
	return info
}

// fixed is the first data set, and half of the third.
var fixed = []Range{{0, setBytes}, {2 * setBytes, setBytes / 2}}

func attach(t testing.TB, primary, flash hpdi.Device) (*Flash, Device) {
	t.Helper()
	f, err := Open(flash)
	must(t, err)
	d, err := f.Over(primary, Primary{Number: 3, ID: primaryID, Fixed: fixed})
	must(t, err)
	return f, d
}

// pattern returns n blocks that say which write they are of.
func pattern(v uint64, n int) []byte {
	mem := make([]byte, n*block.Size+block.Size)
	p := mem[:n*block.Size]
	for i := 0; i < len(p); i += 8 {
		binary.LittleEndian.PutUint64(p[i:], v)
	}
	return p
}

func do(t testing.TB, d hpdi.Device, r *hpdi.Request) error {
	t.Helper()
	q, err := d.NewQueue(1)
	if err != nil {
		return err
	}
	defer func() { _ = q.Close() }()
	return hpdi.Do(q, r)
}

func write(t testing.TB, d hpdi.Device, b int, v uint64, n int) error {
	t.Helper()
	return do(t, d, &hpdi.Request{Op: hpdi.OpWrite, Offset: int64(b) * block.Size, Vec: [][]byte{pattern(v, n)}})
}

// read returns which write a block is of.
func read(t testing.TB, d hpdi.Device, b int) (uint64, error) {
	t.Helper()
	p := make([]byte, block.Size)
	err := do(t, d, &hpdi.Request{Op: hpdi.OpRead, Offset: int64(b) * block.Size, Vec: [][]byte{p}})
	return binary.LittleEndian.Uint64(p), err
}

func wantRead(t testing.TB, d hpdi.Device, b int, v uint64) {
	t.Helper()
	if got, err := read(t, d, b); err != nil || got != v {
		t.Fatalf("block %d holds write %d, %v; want %d", b, got, err, v)
	}
}

func discard(t testing.TB, d hpdi.Device, set Set) error {
	t.Helper()
	return do(t, d, &hpdi.Request{Op: hpdi.OpDiscard, Offset: int64(set) * setBytes, Length: setBytes})
}

// through steps a move to its end.
func through(t testing.TB, m *Move, err error) {
	t.Helper()
	must(t, err)
	for range 100 {
		p, err := m.Step()
		must(t, err)
		if p == Done {
			return
		}
	}
	t.Fatal("the move does not end")
}

// copyAll steps a move until all is copied that was marked.
func copyAll(t testing.TB, m *Move) {
	t.Helper()
	for m.stage == copying {
		_, err := m.Step()
		must(t, err)
	}
}

func in(t testing.TB, f *Flash, set Set) {
	t.Helper()
	m, err := f.MoveIn(3, set)
	through(t, m, err)
}

func out(t testing.TB, f *Flash, set Set) {
	t.Helper()
	m, err := f.MoveOut(3, set)
	through(t, m, err)
}

func onFlashNow(d Device, set Set) bool {
	on, _ := d.OnFlash(int64(set) * setBytes)
	return on
}

func sound(t testing.TB, f *Flash) {
	t.Helper()
	for _, p := range f.Check() {
		t.Error(p)
	}
	if t.Failed() {
		t.FailNow()
	}
}
