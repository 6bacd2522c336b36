package pool

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/catalogue"
	"github.com/pollux-storage/pollux/internal/cp"
)

// says wants an error of a kind, nil for any, that contains certain words.
func says(t *testing.T, what string, err, kind error, words ...string) {
	t.Helper()
	if err == nil || kind != nil && !errors.Is(err, kind) {
		t.Errorf("%s: %v, want %v", what, err, kind)
		return
	}
	for _, w := range words {
		if !strings.Contains(err.Error(), w) {
			t.Errorf("%s: %q does not say %q", what, err, w)
		}
	}
}

// sized shows another size than its device has.
type sized struct {
	hpdi.Device
	size int64
}

func (d sized) Info() hpdi.Info {
	info := d.Device.Info()
	info.Size = d.size
	return info
}

func TestCreateRefuses(t *testing.T) {
	dev := blocktest.NewCrashWith(blocktest.CrashOptions{Name: "disk", Size: testSize, Direct: true})
	huge := sized{dev, block.MaxDeviceBlocks*block.Size + block.Size}
	for _, test := range []struct {
		name string
		edit func(*CreateOptions)
		word string
	}{
		{"no name", func(o *CreateOptions) { o.Name = "" }, `pool name ""`},
		{"long name", func(o *CreateOptions) { o.Name = strings.Repeat("x", maxName+1) }, "pool name"},
		{"long identity", func(o *CreateOptions) { o.Identity = strings.Repeat("y", maxName+1) }, "of guest"},
		{"no devices", func(o *CreateOptions) { o.Devices = nil }, "pool of 0 devices; 1 to 64"},
		{"too many devices", func(o *CreateOptions) { o.Devices = make([]hpdi.Device, maxDevices+1) }, "pool of 65 devices"},
		{"small log", func(o *CreateOptions) { o.LogBytes = minLog - block.Size }, "operation log of 1044480 bytes"},
		{"large log", func(o *CreateOptions) { o.LogBytes = maxLog + block.Size }, "operation log of"},
		{"odd log", func(o *CreateOptions) { o.LogBytes = minLog + 1 }, "in steps of 4096"},
		{"small journal", func(o *CreateOptions) { o.JournalBytes = minJournal - block.Size }, "metadata journal of 45056 bytes; 49152"},
		{"odd journal", func(o *CreateOptions) { o.JournalBytes = minJournal + 1 }, "metadata journal"},
		{"huge device", func(o *CreateOptions) { o.Devices = []hpdi.Device{huge} }, "device disk has more than"},
		{"log that does not fit", func(o *CreateOptions) { o.LogBytes = 0 }, "device disk has 268435456 bytes; with an operation log of 268435456"},
	} {
		o := CreateOptions{Name: "p", Identity: "a", Devices: []hpdi.Device{dev}, LogBytes: testLog}
		test.edit(&o)
		_, err := Create(context.Background(), o)
		says(t, test.name, err, block.ErrInvalid, test.word)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cancel()
	_, err := Create(ctx, CreateOptions{Name: "p", Devices: []hpdi.Device{dev}, LogBytes: testLog})
	says(t, "cancelled", err, context.Canceled)
	if n := dev.Blocks(); n != 0 {
		t.Errorf("refusals have written %d blocks", n)
	}
}

// A device fails while a pool is made of it. There is no pool then that would
// open without being whole, and it can be made afterwards.
func TestCreateFails(t *testing.T) {
	at := func(b uint64) int64 { return int64(b) * block.Size }
	for _, test := range []struct {
		rule blocktest.Rule
		word string
	}{
		{blocktest.Rule{Op: hpdi.OpRead}, "device disk0 may belong to a pool"},
		{blocktest.Rule{Op: hpdi.OpWrite, Offset: at(cp.SuperblockAt(1)[0]), Length: block.Size}, "create pool p: write superblock"},
		{blocktest.Rule{Op: hpdi.OpFlush, Count: 1}, "create pool p: superblock"},
		{blocktest.Rule{Op: hpdi.OpWrite, Offset: at(labelBlocks[0]), Length: block.Size}, "create pool p: label device disk0"},
		{blocktest.Rule{Op: hpdi.OpFlush, Skip: 1}, "create pool p: label device disk0"},
	} {
		r := newBareRig(t, 1, testSize)
		f := blocktest.NewFault(r.devs[0], 1)
		test.rule.Err = errMedium
		f.Add(test.rule)
		o := CreateOptions{Name: "p", Identity: "a", Devices: []hpdi.Device{f}, LogBytes: testLog}
		_, err := Create(context.Background(), o)
		says(t, test.word, err, errMedium, test.word)
		f.Clear()
		_, lerr := ReadLabel(f)
		o.Force = lerr == nil
		if _, err := Create(context.Background(), o); err != nil {
			t.Errorf("after %q: %v", test.word, err)
		}
		r.mustOpen()
		r.shut()
	}
}

// A device that is gone altogether.
func TestLabelOfLostDevice(t *testing.T) {
	dev := blocktest.NewCrash(testSize, 1)
	dev.Clock().Cut()
	if _, err := ReadLabel(dev); !errors.Is(err, blocktest.ErrPowerCut) {
		t.Errorf("read: %v", err)
	}
	if err := writeLabel(dev, testLabel()); !errors.Is(err, blocktest.ErrPowerCut) {
		t.Errorf("write: %v", err)
	}
	if _, err := InspectLabels(dev); !errors.Is(err, blocktest.ErrPowerCut) {
		t.Errorf("inspect: %v", err)
	}
}

// Labels with a good checksum that cannot be: a program that writes such is
// not this one, and sizes of memory are computed from them.
func TestImpossibleLabels(t *testing.T) {
	for name, edit := range map[string]func(*Label){
		"device 64 of":                    func(l *Label) { l.Index = maxDevices },
		"of 1099511627777 blocks":         func(l *Label) { l.Blocks = block.MaxDeviceBlocks + 1 },
		"data begin at block 255":         func(l *Label) { l.Index, l.Layout = 1, Layout{First: block.TrackBlocks - 1} },
		"data begin at block 65537":       func(l *Label) { l.Index, l.Layout = 1, Layout{First: 65537} },
		"journal and flush log do not":    func(l *Label) { l.Layout.Flush++ },
		"do not fit: {Journal:0":          func(l *Label) { l.Layout.Journal = 0 },
		"FlushBlocks:0":                   func(l *Label) { l.Layout.FlushBlocks = 0 },
		"operation log of 0 bytes":        func(l *Label) { l.LogBytes = 0 },
		"operation log of 137438953472":   func(l *Label) { l.LogBytes = 128 << 30 },
		"JournalBlocks:18446744073709551": func(l *Label) { l.Layout.JournalBlocks = 1<<64 - 300 },
	} {
		l := testLabel()
		edit(&l)
		_, err := decodeLabel(l.encode())
		says(t, name, err, block.ErrCorrupt, "label", name)
	}
}

// What names and sizes of volumes cannot be, and volumes that are not there.
func TestVolumeRefusals(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, testSize)
	r.mustOpen()
	r.volume("v", 1<<20)
	r.volume("w", 1<<20)
	create := func(name string, size int64) error { _, err := r.CreateVolume(ctx, name, size); return err }
	says(t, "no size", create("x", 0), block.ErrInvalid, "size of 0 bytes")
	says(t, "negative", create("x", -1), block.ErrInvalid)
	says(t, "too large", create("x", catalogue.MaxSize+1), block.ErrInvalid, "1 to 17592186044416")
	says(t, "no name", create("", 1), block.ErrInvalid, "volume name of 0 bytes")
	says(t, "long name", create(strings.Repeat("n", catalogue.MaxName+1), 1), block.ErrInvalid, "256 bytes")
	says(t, "there already", create("v", 1), block.ErrExists, `volume "v" of pool p`)
	says(t, "smaller", r.ResizeVolume(ctx, "v", 4096), block.ErrInvalid, `volume "v" has 1048576 bytes and can only grow`)
	says(t, "resize to nothing", r.ResizeVolume(ctx, "v", 0), block.ErrInvalid)
	says(t, "resize what is not there", r.ResizeVolume(ctx, "x", 1<<20), block.ErrNotFound, `"x"`)
	says(t, "rename to what is there", r.RenameVolume(ctx, "v", "w"), block.ErrExists, `"w"`)
	says(t, "rename to nothing", r.RenameVolume(ctx, "v", ""), block.ErrInvalid)
	says(t, "rename what is not there", r.RenameVolume(ctx, "x", "y"), block.ErrNotFound, `"x"`)
	says(t, "delete what is not there", r.DeleteVolume(ctx, "x"), block.ErrNotFound, `"x"`)
	_, err := r.Volume("x")
	says(t, "use what is not there", err, block.ErrNotFound, `"x"`, "pool p")
	cancelled, cancel := context.WithCancel(ctx)
	cancel()
	for range 20 { // whether the job or the end is seen first is a matter of luck
		_, err := r.CreateVolume(cancelled, "x", 1)
		says(t, "nobody waits", err, context.Canceled)
	}
	r.die()
	r.mustOpen()
	if l := r.catalogue.List(); len(l) != 2 || l[0].Name != "v" || l[1].Name != "w" || l[0].Size != 1<<20 {
		t.Errorf("%+v", l)
	}
	r.shut()
}

// A pool takes no more devices than its superblock can name.
func TestTooManyDevices(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, smallest)
	r.mustOpen()
	for i := 1; ; i++ {
		d := blocktest.NewCrashWith(blocktest.CrashOptions{Name: fmt.Sprintf("disk%d", i), Size: 8 << 20, Clock: r.clock, Direct: true})
		err := r.AddDevice(ctx, d)
		if i < maxDevices && err != nil || i > maxDevices {
			t.Fatalf("device %d: %v", i+1, err)
		}
		if i == maxDevices {
			says(t, "one more", err, block.ErrInvalid, "pool p has 64 devices")
			break
		}
		r.devs = append(r.devs, d)
	}
	r.die()
	r.mustOpen()
	r.shut()
}

// A fold under way is completed before a device is added; where that fails,
// the device stays out.
func TestAddDeviceDuringFold(t *testing.T) {
	ctx := context.Background()
	r := newRig(t, 1, testSize)
	f := r.faulty()
	r.mustOpen()
	v := r.volume("v", 1<<20)
	if err := write(v, 0, pattern(1)); err != nil {
		t.Fatal(err)
	}
	if err := r.Commit(ctx); err != nil {
		t.Fatal(err)
	}
	f[0].Add(blocktest.Rule{Op: hpdi.OpWrite, Err: errMedium})
	says(t, "fold", r.Fold(ctx), errMedium)
	d := blocktest.NewCrashWith(blocktest.CrashOptions{Name: "added", Size: 8 << 20, Clock: r.clock, Direct: true})
	says(t, "add", r.AddDevice(ctx, d), errMedium, "fold 1")
	if d.Blocks() != 0 {
		t.Error("the device was labelled")
	}
	f[0].Clear()
	if err := r.AddDevice(ctx, d); err != nil {
		t.Fatal(err)
	}
	r.devs = append(r.devs, d)
	r.wrap = nil
	r.die()
	r.mustOpen()
	v, err := r.Volume("v")
	if err != nil {
		t.Fatal(err)
	}
	verifyBlocks(t, v, map[int64]byte{0: 1})
	r.shut()
}

// A new device that fails when its label is to be read is not taken.
func TestAddDeviceUnreadable(t *testing.T) {
	r := newRig(t, 1, smallest)
	r.mustOpen()
	d := blocktest.NewFault(blocktest.NewCrashWith(blocktest.CrashOptions{Name: "added", Size: 8 << 20, Clock: r.clock, Direct: true}), 1)
	d.Add(blocktest.Rule{Op: hpdi.OpRead, Err: errMedium})
	says(t, "add", r.AddDevice(context.Background(), d), errMedium, "device added may belong to a pool")
	r.shut()
}
