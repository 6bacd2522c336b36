package flashmap

import (
	"errors"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/mirror"
)

// mirrored returns a mirror of two devices of so many bytes, beside 1 MiB each, and
// the devices.
func mirrored(t testing.TB, names string, size int64) (hpdi.Device, []*blocktest.Crash) {
	t.Helper()
	clock := blocktest.NewClock()
	var disks []*blocktest.Crash
	var devs []hpdi.Device
	for i := range names {
		d := blocktest.NewCrashWith(blocktest.CrashOptions{Name: names[i : i+1], Size: size + block.TrackBytes, Seed: uint64(i), Clock: clock})
		disks, devs = append(disks, d), append(devs, d)
	}
	_, err := mirror.Create(devs)
	must(t, err)
	m, err := mirror.Open(mirror.Options{Devices: devs})
	must(t, err)
	return m, disks
}

// Copies are asked where the range is: of a mirror on either side, of both, of none.
func TestCopies(t *testing.T) {
	for name, tt := range map[string]struct{ primary, flash bool }{"primary": {true, false}, "flash": {false, true}, "both": {true, true}} {
		t.Run(name, func(t *testing.T) {
			var primary, flash hpdi.Device = blocktest.NewCrash(primarySize, 1), blocktest.NewCrash(flashSize, 2)
			var disks, ssds []*blocktest.Crash
			if tt.primary {
				primary, disks = mirrored(t, "ab", primarySize)
			}
			if tt.flash {
				flash, ssds = mirrored(t, "xy", flashSize)
			}
			_, err := Create(flash, CreateOptions{SetBytes: setBytes, Reach: reach, Notes: notes})
			must(t, err)
			f, dev := attach(t, primary, flash)
			d, ok := dev.(hpdi.Copies)
			if !ok {
				t.Fatal("it is no device with copies")
			}
			d.Verified(0)
			d.Unused(func(off, n int64) bool { return false })
			must(t, write(t, d, 9*setBlocks, 1, 3*setBlocks))
			in(t, f, 10)
			if n := d.NumCopies(); n != 2 {
				t.Errorf("%d copies", n)
			}
			for set, has := range map[Set]bool{9: tt.primary, 10: tt.flash} {
				b := int64(set) * setBlocks
				p := make([]byte, block.Size)
				for i := range 2 {
					err := d.ReadCopy(i, b*block.Size, p)
					if want := i == 0 || has; want != (err == nil) || !want && !errors.Is(err, hpdi.ErrNoCopy) {
						t.Errorf("copy %d of data set %d: %v", i, set, err)
					}
				}
				var rotten *blocktest.Crash
				at := b * block.Size
				switch {
				case set == 10 && has:
					rotten, at = ssds[0], block.TrackBytes+f.offset(0)
				case set == 9 && has:
					rotten, at = disks[0], at+block.TrackBytes
				}
				good := func(p []byte) bool { return p[0] == 1 }
				want := 0
				if has {
					want = 1
					rotten.Corrupt(at, 0xff)
				}
				if n, err := d.ReadGood(b*block.Size, p, good); n != want || err != nil {
					t.Errorf("data set %d: %d repaired, %v", set, n, err)
				}
				if _, err := d.ReadGood(b*block.Size, p, func([]byte) bool { return false }); !errors.Is(err, block.ErrCorrupt) {
					t.Errorf("data set %d: without a good copy %v", set, err)
				}
				if has {
					rotten.Corrupt(at, 0xff)
				}
				must(t, d.ReadCopy(0, b*block.Size, p))
				p[0] = 1
				if n, err := d.Settle(b*block.Size, p); n != want || err != nil {
					t.Errorf("data set %d: %d settled, %v", set, n, err)
				}
			}
			both := make([]byte, 2*block.Size) // across both sides
			off := int64(10*setBlocks-1) * block.Size
			if has := tt.primary && tt.flash; has {
				ssds[0].Corrupt(block.TrackBytes+f.offset(0), 0xff)
				if n, err := d.ReadGood(off, both, func(p []byte) bool { return p[0] == 1 && p[block.Size] == 1 }); n != 1 || err != nil {
					t.Errorf("across both: %d repaired, %v", n, err)
				}
				must(t, d.ReadCopy(1, off, both[:block.Size], both[block.Size:]))
			} else if err := d.ReadCopy(1, off, both); !errors.Is(err, hpdi.ErrNoCopy) {
				t.Errorf("a copy that half of the range has: %v", err)
			}
			wantRead(t, d, 10*setBlocks, 1)
			if n, err := d.ProveOwn(); n != 0 || err != nil {
				t.Errorf("%d mended, %v", n, err)
			}
			for name, err := range map[string]error{
				"no such copy": d.ReadCopy(2, 0, both), "before the first": d.ReadCopy(-1, 0, both), "beyond the end": d.ReadCopy(0, primarySize, both),
			} {
				if err == nil {
					t.Errorf("%s was read", name)
				}
			}
			if _, err := d.ReadGood(block.TrackBytes-block.Size, both, nil); !errors.Is(err, block.ErrInvalid) {
				t.Errorf("across a track: %v", err)
			}
			if _, err := d.Settle(1, both); err == nil {
				t.Error("an offset within a block")
			}
			sound(t, f)
		})
	}
}

// A repair waits for a move that holds the data set, and what it repairs is copied.
func TestRepairBesideMove(t *testing.T) {
	primary, disks := mirrored(t, "ab", primarySize)
	flash := blocktest.NewCrash(flashSize, 2)
	_, err := Create(flash, CreateOptions{SetBytes: setBytes, Reach: reach, Notes: notes})
	must(t, err)
	f, dev := attach(t, primary, flash)
	d := dev.(hpdi.Copies)
	must(t, write(t, d, 10*setBlocks, 1, setBlocks))
	m, err := f.MoveIn(3, 10)
	must(t, err)
	copyAll(t, m) // it has read what is below
	for _, disk := range disks {
		disk.Corrupt(block.TrackBytes+10*setBytes, 0xff)
	}
	p := pattern(1, 1)
	if n, err := d.Settle(10*setBytes, p); n != 2 || err != nil {
		t.Errorf("%d settled, %v", n, err)
	}
	s := f.lock(m.key)
	m.held = make(chan struct{})
	s.mu.Unlock()
	done := make(chan error)
	go func() {
		_, err := d.Settle(10*setBytes, p)
		done <- err
	}()
	through(t, m, nil)
	must(t, <-done)
	wantRead(t, d, 10*setBlocks, 1)
	sound(t, f)
}
