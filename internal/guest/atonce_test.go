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
	"github.com/pollux-storage/pollux/internal/partner"
)

// lateDevice takes its time for whatever is asked of it.
type lateDevice struct {
	hpdi.Device
	closed *atomic.Int64
}

const late = 10 * time.Millisecond

func (d lateDevice) NewQueue(depth int) (hpdi.Queue, error) {
	time.Sleep(late)
	return d.Device.NewQueue(depth)
}

func (d lateDevice) Close() error {
	d.closed.Add(1)
	return d.Device.Close()
}

// A pool of many devices waits for the latency of few of them: they are opened at once,
// and their labels read at once. They stay in order, and after an error all are closed.
func TestDevicesAtOnce(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 2 * manyAtOnce
		var set config.Pool
		made := map[string]hpdi.Device{}
		var closed atomic.Int64
		for i := range n {
			path := fmt.Sprintf("disk-%02d", i)
			set.Devices = append(set.Devices, path)
			d, err := mem.New(path, 32<<20)
			if err != nil {
				t.Fatal(err)
			}
			made[path] = lateDevice{d, &closed}
		}
		bad := ""
		o := opening{open: func(path string) (hpdi.Device, error) {
			time.Sleep(late)
			if path == bad {
				return nil, errors.New("it does not turn")
			}
			return made[path], nil
		}}
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
		st, err := NewPools(&config.Config{}, 1<<20)
		if err != nil {
			t.Fatal(err)
		}
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
		bad = set.Devices[n/2]
		if _, err = disks(&set, o); err == nil || !strings.Contains(err.Error(), bad) {
			t.Errorf("a device fails: %v", err)
		}
		if got := closed.Load(); got != n-1 {
			t.Errorf("%d of %d devices are closed", got, n-1)
		}
	})
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
		d, err := openLocked(path, time.Now())
		if err != nil {
			t.Fatal(err)
		}
		devs = append(devs, d)
	}
	st, err := NewPools(cfg, 1<<20)
	if err != nil {
		t.Fatal(err)
	}
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
