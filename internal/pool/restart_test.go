package pool

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/region"
	"github.com/pollux-storage/pollux/internal/restart"
)

// restartRig returns a rig of four devices with data on each of them, of a guest that died,
// and the restart record that it has left.
func restartRig(t *testing.T) (*rig, *restart.Record, map[int64]byte) {
	t.Helper()
	r := newRig(t, 4, smallest)
	r.byRecord = false // tests say themselves by what they open
	r.mustOpen()
	v := r.volume("v", 16<<20)
	holds := map[int64]byte{}
	for n := range int64(16) {
		for b := n * 200; b < n*200+100; b++ {
			holds[b] = byte(b%250 + 1)
			if err := write(v, b*block.Size, pattern(holds[b])); err != nil {
				t.Fatal(err)
			}
		}
		if err := r.Commit(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	for dev := range r.devs {
		if r.on(dev) == 0 {
			t.Fatalf("nothing is on device %d", dev)
		}
	}
	r.keepRecord()
	r.die()
	rec, err := ReadRecord(r.region)
	if err != nil {
		t.Fatal(err)
	}
	return r, rec, holds
}

// traced lets all devices tell what they are asked for.
func (r *rig) traced() *blocktest.Recorder {
	rec := &blocktest.Recorder{}
	r.wrap = func(i int, d hpdi.Device) hpdi.Device { return rec.Wrap(fmt.Sprint("disk", i), d) }
	return rec
}

// linesOf returns what was asked of a device.
func linesOf(rec *blocktest.Recorder, dev int) (lines []string) {
	for _, l := range strings.Split(rec.String(), "\n") {
		if of, what, ok := strings.Cut(l, ": "); ok && of == fmt.Sprint("disk", dev) {
			lines = append(lines, what)
		}
	}
	return lines
}

// openBy opens the pool by a record.
func (r *rig) openRecord(rec *restart.Record) error {
	o := r.options()
	o.Restart = rec
	return r.openWith(o)
}

const labelRead = "read 0+4096"

// A pool that is opened by its record asks other devices for nothing before they are used,
// then for the label first, and for that of all of them before anything is written.
func TestOpenByRecord(t *testing.T) {
	r, rec, holds := restartRig(t)
	trace := r.traced()
	if err := r.openRecord(rec); err != nil {
		t.Fatal(err)
	}
	asked := 0
	for dev := 1; dev < 4; dev++ {
		lines := linesOf(trace, dev)
		if asked += len(lines); len(lines) > 0 && lines[0] != labelRead {
			t.Errorf("device %d is asked for %q before its label", dev, lines[0])
		}
	}
	if asked > 3 { // a page of metadata may lie there
		t.Errorf("opening the pool asked others than the first device %d times:\n%s", asked, trace)
	}
	v, err := r.Volume("v")
	if err != nil {
		t.Fatal(err)
	}
	verifyBlocks(t, v, holds)
	for dev := range 4 {
		if lines := linesOf(trace, dev); lines[0] != labelRead || slices.Contains(lines[1:], labelRead) {
			t.Errorf("device %d: %q", dev, lines)
		}
	}
	if r.set.Unproved() {
		t.Error("devices that were read are not proved")
	}
	r.byRecord = true
	r.wrap = nil
	r.shut()
}

// All labels have been read before the first write to any device.
func TestProvedBeforeWrites(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, rec, _ := restartRig(t)
		trace := r.traced()
		o := r.options()
		o.Restart = rec
		p, err := Open(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		v, err := p.Volume("v")
		if err == nil {
			err = write(v, 0, pattern(7))
		}
		if err != nil {
			t.Fatal(err)
		}
		ctx, cancel := context.WithCancel(t.Context())
		ended := make(chan error, 1)
		go func() { ended <- p.Run(ctx) }()
		if err := p.Commit(ctx); err != nil {
			t.Fatal(err)
		}
		cancel()
		if err := errors.Join(<-ended, p.Release(t.Context())); err != nil {
			t.Fatal(err)
		}
		lines := strings.Split(trace.String(), "\n")
		first := slices.IndexFunc(lines, func(l string) bool { return strings.Contains(l, "write") || strings.Contains(l, "flush") })
		if first < 0 {
			t.Fatal("nothing was written")
		}
		for dev := range 4 {
			if !slices.Contains(lines[:first], fmt.Sprintf("disk%d: %s", dev, labelRead)) {
				t.Errorf("the label of device %d is not read before %q", dev, lines[first])
			}
		}
	})
}

// relabel writes another label to a device of a rig, or none.
func (r *rig) relabel(dev int, change func(*Label)) {
	r.t.Helper()
	l, err := ReadLabel(r.devs[dev])
	if err != nil {
		r.t.Fatal(err)
	}
	if change == nil {
		err = wipeLabel(r.devs[dev])
	} else {
		change(&l)
		err = writeLabel(r.devs[dev], l)
	}
	if err != nil {
		r.t.Fatal(err)
	}
	r.reopenDevices()
}

// bytesOf returns all that a device holds in its first blocks, where everything is that these
// tests write.
func bytesOf(t *testing.T, d hpdi.Device) []byte {
	t.Helper()
	q, err := d.NewQueue(1)
	if err != nil {
		t.Fatal(err)
	}
	buf, err := hpdi.AllocPrivate(8 << 20)
	if err == nil {
		err = hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{buf}})
	}
	if err = errors.Join(err, q.Close()); err != nil {
		t.Fatal(err)
	}
	defer func() { _ = hpdi.Free(buf) }()
	return bytes.Clone(buf)
}

// Every other device than the one of the record is found out before anything is written to it,
// whatever is asked of it first. When the right one is back the pool is as it was.
func TestRecordOfAnotherDevice(t *testing.T) {
	for what, change := range map[string]func(r *rig, dev int){
		"of another pool":    func(r *rig, dev int) { r.relabel(dev, func(l *Label) { l.Pool[3]++ }) },
		"another device":     func(r *rig, dev int) { r.relabel(dev, func(l *Label) { l.Device[3]++ }) },
		"another number":     func(r *rig, dev int) { r.relabel(dev, func(l *Label) { l.Index = 5 }) },
		"another guest's":    func(r *rig, dev int) { r.relabel(dev, func(l *Label) { l.Identity = "b" }) },
		"of another name":    func(r *rig, dev int) { r.relabel(dev, func(l *Label) { l.Name = "q" }) },
		"of another host":    func(r *rig, dev int) { r.relabel(dev, func(l *Label) { l.Host = "elsewhere" }) },
		"of another size":    func(r *rig, dev int) { r.relabel(dev, func(l *Label) { l.Blocks-- }) },
		"of another layout":  func(r *rig, dev int) { r.relabel(dev, func(l *Label) { l.Layout.First += 256 }) },
		"of another log":     func(r *rig, dev int) { r.relabel(dev, func(l *Label) { l.LogBytes *= 2 }) },
		"exported meanwhile": func(r *rig, dev int) { r.relabel(dev, func(l *Label) { l.Exported = true }) },
		"about to join":      func(r *rig, dev int) { r.relabel(dev, func(l *Label) { l.Joining = true }) },
		"without a label":    func(r *rig, dev int) { r.relabel(dev, nil) },
	} {
		for _, dev := range []int{2, 0, 1, 3}[:few(4)] {
			t.Run(fmt.Sprintf("%s, number %d", what, dev), func(t *testing.T) {
				r, rec, holds := restartRig(t)
				label := bytesOf(t, r.devs[dev])[:block.Size]
				change(r, dev)
				before := bytesOf(t, r.devs[dev])
				err := r.openRecord(rec)
				if untrue := (*RecordError)(nil); dev == 0 && !errors.As(err, &untrue) {
					t.Fatalf("it was opened: %v", err)
				}
				if err == nil {
					r.useUntrue(dev, holds)
				}
				if !bytes.Equal(bytesOf(t, r.devs[dev]), before) {
					t.Error("the device was written to")
				}
				if err := writeLabelBlocks(r.devs[dev], label); err != nil {
					t.Fatal(err)
				}
				r.reopen()
				r.mustOpen()
				v, _ := r.Volume("v")
				verifyBlocks(t, v, holds)
				r.shut()
			})
		}
	}
}

// useUntrue uses a pool that was opened by a record of which one device is not true.
func (r *rig) useUntrue(dev int, holds map[int64]byte) {
	r.t.Helper()
	t := r.t
	v, err := r.Volume("v")
	if err != nil {
		t.Fatal(err)
	}
	failed := 0
	got := make([]byte, block.Size)
	for _, b := range slices.Sorted(maps.Keys(holds)) {
		switch err := v.Read(context.Background(), got, b*block.Size); {
		case err != nil:
			failed++
		case !bytes.Equal(got, pattern(holds[b])):
			t.Fatalf("block %d is wrong", b)
		}
	}
	if failed == 0 {
		t.Error("data were read from a device that is another one")
	}
	if err := r.Commit(context.Background()); err != nil {
		t.Fatal(err) // it had nothing to do
	}
	// As Run would: before anything else.
	err = r.proved()
	if untrue := (*RecordError)(nil); !errors.As(err, &untrue) || !strings.Contains(err.Error(), fmt.Sprintf("number %d", dev+1)) && !strings.Contains(err.Error(), fmt.Sprint("disk", dev)) {
		t.Errorf("%v", err)
	}
	r.die()
}

// Run ends before it has written anything, and forgets the record, so that the next one opens
// the pool by looking.
func TestRunWithUntrueRecord(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		r, rec, holds := restartRig(t)
		r.relabel(2, func(l *Label) { l.Device[0]++ })
		trace := r.traced()
		o := r.options()
		o.Restart = rec
		p, err := Open(t.Context(), o)
		if err != nil {
			t.Fatal(err)
		}
		v, err := p.Volume("v")
		if err == nil {
			err = write(v, 0, pattern(9))
		}
		if err != nil {
			t.Fatal(err)
		}
		holds[0] = 9
		untrue := (*RecordError)(nil)
		if err := p.Run(t.Context()); !errors.As(err, &untrue) || !strings.Contains(err.Error(), "disk2") {
			t.Errorf("%v", err)
		}
		if err := p.Release(t.Context()); err != nil {
			t.Fatal(err)
		}
		if strings.Contains(trace.String(), "write") || strings.Contains(trace.String(), "flush") {
			t.Errorf("something was written:\n%s", trace)
		}
		if _, err := ReadRecord(r.region); !errors.Is(err, restart.ErrNone) {
			t.Errorf("the record is kept: %v", err)
		}
		r.wrap = nil
		r.reopen()
		r.relabel(2, func(l *Label) { l.Device[0]-- })
		r.mustOpen()
		w, _ := r.Volume("v")
		verifyBlocks(t, w, holds)
		r.shut()
	})
}

// What has changed since the record was written is found out when the pool is opened.
func TestRecordOfBefore(t *testing.T) {
	add := func(t *testing.T, r *rig) {
		d := blocktest.NewCrashWith(blocktest.CrashOptions{Name: "disk4", Size: smallest, Seed: 4, Clock: r.clock, Direct: true})
		if err := r.AddDevice(t.Context(), d); err != nil {
			t.Fatal(err)
		}
		r.devs = append(r.devs, d)
	}
	for _, tt := range []struct {
		what  string
		alive func(t *testing.T, r *rig)             // what happens after the record was written
		dead  func(r *rig, rec *restart.Record)      // and what after the death
		given func(devs []hpdi.Device) []hpdi.Device // what devices are given
		want  string
	}{
		{what: "nothing"},
		{what: "a device was added", alive: add, want: "it has no device disk4"},
		{what: "a device was added and is not given", alive: add, given: func(devs []hpdi.Device) []hpdi.Device { return devs[:4] }, want: "number 5 has joined"},
		{what: "a device is being removed", alive: func(t *testing.T, r *rig) {
			if err := r.RemoveDevice(t.Context(), "disk3"); err != nil {
				t.Fatal(err)
			}
		}, want: "number 4 is another one than before"},
		{what: "a device was removed", alive: func(t *testing.T, r *rig) {
			if err := r.RemoveDevice(t.Context(), "disk3"); err != nil {
				t.Fatal(err)
			}
			r.removeRest()
			r.devs = r.devs[:3]
		}, want: "number 4 has left"},
		{what: "another device was added in the place of one", alive: func(t *testing.T, r *rig) {
			if err := r.RemoveDevice(t.Context(), "disk3"); err != nil {
				t.Fatal(err)
			}
			r.removeRest()
			r.devs = r.devs[:3]
			add(t, r)
		}, want: "it has no device disk4"},
		{what: "another pool", dead: func(_ *rig, rec *restart.Record) { rec.Pool[0]++ }, want: "does not belong to the pool"},
		{what: "another identity", dead: func(_ *rig, rec *restart.Record) { rec.Identity = "b" }, want: "does not belong to the pool"},
		{what: "an epoch that is to come", dead: func(_ *rig, rec *restart.Record) { rec.Epoch += 5 }, want: "it is of epoch"},
		{what: "a superblock that is to come", dead: func(_ *rig, rec *restart.Record) { rec.Generation += 5 }, want: "it is of epoch"},
		{what: "a label that is none", dead: func(_ *rig, rec *restart.Record) { rec.Devices[2].Label[70]++ }, want: "its label of device disk2"},
		{what: "a label of another", dead: func(_ *rig, rec *restart.Record) { rec.Devices[2].Label = rec.Devices[1].Label }, want: "its label of device disk2"},
		{what: "an id", dead: func(_ *rig, rec *restart.Record) { rec.Devices[2].ID[0]++ }, want: "its label of device disk2"},
		{what: "a size", dead: func(_ *rig, rec *restart.Record) { rec.Devices[2].Blocks++ }, want: "number 3 is another one"},
		{what: "where data begin", dead: func(_ *rig, rec *restart.Record) { rec.Devices[2].First++ }, want: "number 3 is another one"},
		{what: "a class", dead: func(_ *rig, rec *restart.Record) { rec.Devices[2].Class = uint8(cp.ClassMemory) }, want: "number 3 is another one"},
		{what: "a device less", dead: func(_ *rig, rec *restart.Record) { rec.Devices = rec.Devices[:3] }, want: "it has no device disk3"},
		{what: "other names", dead: func(_ *rig, rec *restart.Record) { rec.Devices[1].Copies[0].Path = "disk9" }, want: "it has no device disk1"},
		{what: "a device is missing", given: func(devs []hpdi.Device) []hpdi.Device { return devs[:3] }, want: "number 4 is missing"},
		{what: "volumes", alive: func(t *testing.T, r *rig) {
			r.volume("w", 1<<20)
			if err := errors.Join(r.ResizeVolume(t.Context(), "v", 32<<20), r.RenameVolume(t.Context(), "v", "x"), r.RenameVolume(t.Context(), "x", "v")); err != nil {
				t.Fatal(err)
			}
		}},
		{what: "settings of the pool", alive: func(t *testing.T, r *rig) {
			if err := r.SetSettings(t.Context(), SettingsChange{Threshold: new(int)}); err != nil {
				t.Fatal(err)
			}
		}},
		{what: "an owner since", alive: func(_ *testing.T, r *rig) {
			r.die()
			r.mustOpen()
		}},
	} {
		t.Run(tt.what, func(t *testing.T) {
			r, _, holds := restartRig(t)
			r.mustOpen()
			r.keepRecord()
			rec, err := ReadRecord(r.region)
			if err != nil {
				t.Fatal(err)
			}
			if tt.alive != nil {
				tt.alive(t, r)
			}
			r.die()
			if tt.dead != nil {
				tt.dead(r, rec)
			}
			o := r.options()
			o.Restart = rec
			if tt.given != nil {
				o.Devices = tt.given(o.Devices)
			}
			p, err := Open(t.Context(), o)
			switch untrue := (*RecordError)(nil); {
			case tt.want == "" && err != nil:
				t.Fatal(err)
			case tt.want != "" && (err == nil || !strings.Contains(err.Error(), tt.want)):
				t.Fatalf("%v", err)
			case tt.want != "" && tt.given == nil && !errors.As(err, &untrue):
				t.Errorf("%v is no RecordError", err)
			}
			if err == nil {
				for _, v := range p.Volumes() {
					if v.Name == "v" && tt.what == "volumes" && v.Size != 32<<20 {
						t.Errorf("%+v", v)
					}
				}
				if tt.what == "volumes" && len(p.Volumes()) != 2 {
					t.Errorf("%+v", p.Volumes())
				}
				if err := p.free(); err != nil {
					t.Fatal(err)
				}
			}
			r.reopen()
			r.mustOpen()
			v, _ := r.Volume("v")
			verifyBlocks(t, v, holds)
			r.shut()
		})
	}
}

// Two devices whose contents were exchanged are found out, each by its label.
func TestRecordExchanged(t *testing.T) {
	r, rec, holds := restartRig(t)
	d := rec.Devices
	d[1].Copies[0].Path, d[2].Copies[0].Path = d[2].Copies[0].Path, d[1].Copies[0].Path
	if err := r.openRecord(rec); err != nil {
		t.Fatal(err)
	}
	r.useUntrue(1, holds)
	r.mustOpen()
	v, _ := r.Volume("v")
	verifyBlocks(t, v, holds)
	r.shut()
}

// A record that is damaged anywhere is none, or the one before counts, and what is opened by
// it is right.
func TestRecordDamaged(t *testing.T) {
	r, rec, holds := restartRig(t)
	r.mustOpen()
	r.keepRecord() // both places are used now
	r.die()
	var section region.Section
	var good []byte
	r.changeRegion(func(q *region.Region) {
		section = q.Sections(region.SectionRestart)[0]
		mem, err := q.MapSection(section)
		if err != nil {
			t.Fatal(err)
		}
		good = bytes.Clone(mem)
	})
	enc, err := rec.Encode()
	if err != nil {
		t.Fatal(err)
	}
	half := len(good) / 2
	damage := func(change func(mem []byte)) (*restart.Record, error) {
		r.changeRegion(func(q *region.Region) {
			mem, err := q.MapSection(section)
			if err != nil {
				t.Fatal(err)
			}
			copy(mem, good)
			change(mem)
		})
		return ReadRecord(r.region)
	}
	newer, err := damage(func([]byte) {})
	if err != nil || newer.Number <= rec.Number {
		t.Fatalf("%+v, %v", newer, err)
	}
	for i := 0; i < len(enc); i += 7 * oneIn(8) {
		got, err := damage(func(mem []byte) { mem[half+i] ^= 0x10 })
		if err != nil || got.Number != rec.Number {
			t.Fatalf("byte %d of the newer one: %+v, %v", i, got, err)
		}
		if got, err = damage(func(mem []byte) { mem[half+i] ^= 0x10; mem[i] ^= 0x10 }); err == nil {
			t.Fatalf("byte %d of both: %+v", i, got)
		}
	}
	seed := rand.Uint64()
	rng := rand.New(rand.NewPCG(seed, 0))
	for n := range few(60) {
		got, err := damage(func(mem []byte) {
			from := rng.IntN(len(enc))
			for i := range mem[from:min(from+1+rng.IntN(400), len(mem))] {
				mem[from+i] = byte(rng.Uint32())
				mem[half+from+i] ^= byte(rng.Uint32())
			}
		})
		if err != nil {
			got = nil
		}
		if err := r.openRecord(got); err != nil && got == nil {
			t.Fatalf("seed %d round %d: %v", seed, n, err)
		} else if err != nil {
			r.mustOpen()
		}
		v, _ := r.Volume("v")
		verifyBlocks(t, v, holds)
		r.die()
	}
	r.mustOpen()
	r.shut()
}

// Records have their place in the region for as long as they fit it, and an owner that finds
// several places has one in the end.
func TestKeepRecord(t *testing.T) {
	r, _, _ := restartRig(t)
	r.mustOpen()
	number := uint64(100)
	keep := func(volumes int) {
		t.Helper()
		rec := r.record()
		number++
		rec.Number = number
		for n := range volumes {
			rec.Volumes = append(rec.Volumes, restart.Volume{ID: block.VolumeID(n + 1), Size: 4096, Name: strings.Repeat("x", 200)})
		}
		enc, err := rec.Encode()
		if err == nil {
			err = r.Pool.KeepRecord(enc)
		}
		if err != nil {
			t.Fatal(err)
		}
		got, err := ReadRecord(r.region)
		if err != nil || got.Number != rec.Number || len(got.Volumes) != len(rec.Volumes) {
			t.Fatalf("with %d volumes: %v", volumes, err)
		}
		if n := len(r.Pool.region.Sections(region.SectionRestart)); n != 1 {
			t.Fatalf("%d places", n)
		}
	}
	for _, n := range []int{0, 1, 40, 41, 4000, 0} {
		keep(n)
	}
	r.die()
	r.changeRegion(func(q *region.Region) {
		for range 2 {
			if _, _, err := q.AddSection(region.SectionRestart, 8<<10); err != nil {
				t.Fatal(err)
			}
		}
	})
	r.mustOpen()
	keep(2)
	r.Pool.dropRecord()
	if _, err := ReadRecord(r.region); !errors.Is(err, restart.ErrNone) {
		t.Errorf("%v", err)
	}
	keep(3)
	r.Pool.dropRecord()
	for range 8 {
		_, _, _ = r.Pool.region.AddSection(foreign, 1) // until there is no room
	}
	if err := r.Pool.KeepRecord(make([]byte, 100)); err == nil {
		t.Error("a region has room for anything")
	}
	r.shut()
	if _, err := ReadRecord(r.region); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("of a pool that was closed: %v", err)
	}
	if _, err := ReadRecord(filepath.Join(t.TempDir(), "none")); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%v", err)
	}
}

// A pool that was closed is opened by the record, too, and its journal's end is proved without
// reading all of it.
func TestRecordAfterClose(t *testing.T) {
	r, _, holds := restartRig(t)
	r.mustOpen()
	rec := r.record()
	r.shut()
	r.reopen()
	trace := r.traced()
	if err := r.openRecord(rec); err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(trace.String(), "\n")
	first := slices.IndexFunc(lines, func(l string) bool { return strings.Contains(l, "write") })
	for dev := range 4 {
		if at := slices.Index(lines, fmt.Sprintf("disk%d: %s", dev, labelRead)); at < 0 || at > first {
			t.Errorf("the label of device %d is not read before the superblock is written", dev)
		}
	}
	v, _ := r.Volume("v")
	verifyBlocks(t, v, holds)
	r.wrap = nil
	r.shut()
}

// UseIn tells what ReadLastUse does.
func TestUseIn(t *testing.T) {
	r, _, _ := restartRig(t)
	r.mustOpen()
	if err := r.RemoveDevice(t.Context(), "disk2"); err != nil {
		t.Fatal(err)
	}
	r.removeRest()
	r.devs = slices.Delete(r.devs, 2, 3)
	rec := r.record()
	r.die()
	u := UseIn(rec)
	want, err := ReadLastUse(r.devs[0], rec.Pool)
	if err != nil {
		t.Fatal(err)
	}
	want.BootID, want.Epoch, u.BootID, u.Epoch = "", 0, "", 0
	if fmt.Sprintf("%+v", u) != fmt.Sprintf("%+v", want) {
		t.Errorf("%+v instead of %+v", u, want)
	}
	l, err := FirstLabel(rec)
	if now, e := ReadLabel(r.devs[0]); err != nil || e != nil || l != now {
		t.Errorf("%+v, %v", l, err)
	}
	rec.Devices = rec.Devices[1:]
	if _, err := FirstLabel(rec); err == nil {
		t.Error("another device counts as the first")
	}
	r.reopen()
	r.mustOpen()
	r.shut()
}
