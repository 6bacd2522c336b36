package guest

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/file"
	"github.com/pollux-storage/pollux/hpdi/mem"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/mirror"
	"github.com/pollux-storage/pollux/internal/partner"
)

// lateDevice takes its time for whatever is asked of it.
type lateDevice struct {
	hpdi.Device
	closed *atomic.Int64
}

const late = 10 * time.Millisecond

func (d lateDevice) NewQueue(depth int) (hpdi.Queue, error) {
	q, err := d.Device.NewQueue(depth)
	return lateQueue{q}, err
}

func (d lateDevice) Close() error {
	d.closed.Add(1)
	return d.Device.Close()
}

type lateQueue struct{ hpdi.Queue }

func (q lateQueue) Submit(reqs ...*hpdi.Request) error {
	time.Sleep(late)
	return q.Queue.Submit(reqs...)
}

// lateDisks makes devices, and what opens them by their names but for a bad one.
func lateDisks(t *testing.T, n int) (set config.Pool, o opening, bad *string, closed *atomic.Int64) {
	made := map[string]hpdi.Device{}
	bad, closed = new(string), new(atomic.Int64)
	for i := range n {
		path := fmt.Sprintf("disk-%02d", i)
		set.Devices = append(set.Devices, path)
		d, err := mem.New(path, 32<<20)
		if err != nil {
			t.Fatal(err)
		}
		made[path] = lateDevice{d, closed}
	}
	o.open = func(path string) (hpdi.Device, error) {
		time.Sleep(late)
		if path == *bad {
			return nil, errors.New("it does not turn")
		}
		return made[path], nil
	}
	return set, o, bad, closed
}

// A pool of many devices waits for the latency of few of them: they are opened at once,
// and their labels read at once. They stay in order, and after an error all are closed.
func TestDevicesAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 2 * manyAtOnce
		set, o, bad, closed := lateDisks(t, n)
		begun := time.Now()
		devs, err := disks(&set, o)
		if err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begun); took != 2*late {
			t.Errorf("%d devices were opened within %v, %d at once take %v", n, took, manyAtOnce, 2*late)
		}
		for i, d := range devs {
			if d.Info().Name != set.Devices[i] {
				t.Fatalf("device %d is %s", i, d.Info().Name)
			}
		}
		st := NewPools(&config.Config{}, 1<<20)
		member := devs[:n-1]
		if err := st.Create(t.Context(), CreateSpec{Name: "p", Identity: "a", Devices: member, LogBytes: 1 << 20}); err != nil {
			t.Fatal(err)
		}
		slices.Reverse(member)
		begun = time.Now()
		labels, err := readLabels(member, "a")
		if err != nil {
			t.Fatal(err)
		}
		if took := time.Since(begun); took != 2*late {
			t.Errorf("labels of %d devices were read within %v", len(member), took)
		}
		for i, l := range labels {
			if l.Index != len(member)-1-i {
				t.Errorf("label %d is of device %d", i, l.Index)
			}
		}
		if _, err := readLabels(member, "b"); err == nil || !strings.Contains(err.Error(), `of "a", not of "b"`) {
			t.Errorf("another's pool: %v", err)
		}
		if _, err := readLabels(devs, "a"); !errors.Is(err, ErrNoPool) || !strings.Contains(err.Error(), set.Devices[n-1]) {
			t.Errorf("with a device that is none of a pool: %v", err)
		}
		// One in the middle fails; others have come before and after it.
		*bad = set.Devices[n/2]
		if _, err = disks(&set, o); err == nil || !strings.Contains(err.Error(), *bad) {
			t.Errorf("a device fails: %v", err)
		}
		if got := closed.Load(); got != n-1 {
			t.Errorf("%d of %d devices are closed", got, n-1)
		}
	})
}

// So do those of many mirrors, each of which reads headers and maps of its copies. What is
// left out is told once, in order, and a mirror that fails leaves no device open.
func TestMirrorsAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 2 * manyAtOnce
		set, o, bad, closed := lateDisks(t, n)
		var without []string
		o.without = func(path string, _ error) { without = append(without, path) }
		devs, err := disks(&set, o) // as single ones
		if err != nil {
			t.Fatal(err)
		}
		for i := 0; i < n; i += 2 {
			if _, err := mirror.Create(devs[i : i+2]); err != nil {
				t.Fatal(err)
			}
		}
		set.Copies = 2
		begun := time.Now()
		devs, err = disks(&set, o)
		if err != nil {
			t.Fatal(err)
		}
		// Two rounds of opening, two of two headers each, one of the pages of two maps.
		if took := time.Since(begun); took != (2+2*2+2)*late {
			t.Errorf("%d mirrors were opened within %v", n/2, took)
		}
		for i, m := range mirrors(devs) {
			if got := m.Status().Copies[0].Info.Name; got != set.Devices[2*i] {
				t.Errorf("mirror %d begins with %s", i, got)
			}
		}
		if len(mirrors(devs)) != n/2 || len(without) > 0 {
			t.Fatalf("%d mirrors, without %v", len(mirrors(devs)), without)
		}
		*bad = set.Devices[n/2+1]
		if devs, err = disks(&set, o); err != nil || len(mirrors(devs)) != n/2 || !slices.Equal(without, []string{*bad}) {
			t.Errorf("with a copy that fails: %d mirrors, without %v, %v", len(mirrors(devs)), without, err)
		}
		// Both copies of one have decayed: nothing of the others stays open.
		for _, path := range set.Devices[:2] {
			d, err := o.open(path)
			if err == nil {
				err = wipe(d)
			}
			if err != nil {
				t.Fatal(err)
			}
		}
		closed.Store(0)
		if _, err = disks(&set, o); !errors.Is(err, block.ErrNotFound) {
			t.Errorf("with a mirror less: %v", err)
		}
		if got := closed.Load(); got < n-1 {
			t.Errorf("%d of %d devices are closed", got, n-1)
		}
	})
}

// wipe overwrites all that says what a device is.
func wipe(d hpdi.Device) error {
	q, err := d.NewQueue(1)
	if err != nil {
		return err
	}
	return errors.Join(hpdi.Do(q, &hpdi.Request{Op: hpdi.OpWriteZeroes, Length: 1 << 20}), q.Close())
}

// Only the first device of a pool tells more than its size, wherever it stands.
func TestMemoryOfManyDevices(t *testing.T) {
	cfg := settingsOf(t, "{guests: [{name: a, pool: {devices: [one, two, three], size: 1GiB}}]}")
	set := &cfg.Guests[0]
	var devs []hpdi.Device
	for i, path := range set.Pool.Devices {
		if err := file.Create(path, int64(i+1)<<30); err != nil {
			t.Fatal(err)
		}
		d, err := openLocked(path, time.Now(), nil)
		if err != nil {
			t.Fatal(err)
		}
		devs = append(devs, d)
	}
	st := NewPools(cfg, 1<<20)
	if err := st.Create(t.Context(), CreateSpec{Name: "p", Identity: "a", Devices: devs, LogBytes: 24 << 20}); err != nil {
		t.Fatal(err)
	}
	closeAll(devs)
	for range devs {
		n := needsOf(cfg, set)
		if n.log != 24<<20 || len(n.blocks) != len(devs) {
			t.Fatalf("%v: %+v", set.Pool.Devices, n)
		}
		for i, path := range set.Pool.Devices {
			j := slices.IndexFunc(devs, func(d hpdi.Device) bool { return d.Info().Name == path })
			if want := uint64(j+1) << 30 / block.Size; n.blocks[i] != want {
				t.Errorf("%s has %d blocks, want %d", path, n.blocks[i], want)
			}
		}
		set.Pool.Devices = append(set.Pool.Devices[1:], set.Pool.Devices[0])
	}
}

func TestStepText(t *testing.T) {
	got := stepText([]partner.Step{{Name: "lock devices", Took: 1234567}, {Name: "serve", Took: time.Second}})
	if want := "lock devices: 1.235ms, serve: 1s"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}
