package file

import (
	"fmt"
	"os"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/hpditest"
)

// loop makes the file at path a block device for the length of the test. It
// skips the test where that is not permitted.
func loop(t *testing.T, path string) string {
	t.Helper()
	control, err := unix.Open("/dev/loop-control", unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Skipf("no loop devices: %v", err)
	}
	defer unix.Close(control)
	backing, err := unix.Open(path, unix.O_RDWR|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(backing)
	for {
		n, err := unix.IoctlRetInt(control, unix.LOOP_CTL_GET_FREE)
		if err != nil {
			t.Skipf("no free loop device: %v", err)
		}
		name := fmt.Sprintf("/dev/loop%d", n)
		dev, err := unix.Open(name, unix.O_RDWR|unix.O_CLOEXEC, 0)
		if err != nil {
			t.Skipf("no loop device: %v", err)
		}
		config := unix.LoopConfig{Fd: uint32(backing), Size: 4096}
		config.Info.Flags = unix.LO_FLAGS_DIRECT_IO
		err = ioctl(dev, unix.LOOP_CONFIGURE, unsafe.Pointer(&config))
		if err == unix.EBUSY { // somebody was quicker
			_ = unix.Close(dev)
			continue
		}
		if err != nil {
			_ = unix.Close(dev)
			t.Skipf("set up %s: %v", name, err)
		}
		t.Cleanup(func() {
			if err := unix.IoctlSetInt(dev, unix.LOOP_CLR_FD, 0); err != nil {
				t.Errorf("free %s: %v", name, err)
			}
			_ = unix.Close(dev)
		})
		return name
	}
}

func TestConformanceBlockDevice(t *testing.T) {
	for _, engine := range engines(t) {
		for _, direct := range []Direct{DirectOn, DirectOff} {
			t.Run(fmt.Sprintf("%s/direct-%s", engine, direct), func(t *testing.T) {
				name := loop(t, create(t, t.TempDir(), testSize))
				hpditest.Run(t, func(t *testing.T) hpdi.Device {
					d, err := Open(name, Options{Engine: engine, Direct: direct, Lock: true})
					if err != nil {
						t.Fatal(err)
					}
					return d
				})
			})
		}
	}
}

// TestBlockDeviceDiscard: a discard reaches the device, by whichever way.
func TestBlockDeviceDiscard(t *testing.T) {
	for _, engine := range engines(t) {
		for _, ioctlOnly := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/ioctl-%v", engine, ioctlOnly), func(t *testing.T) {
				backing := create(t, t.TempDir(), testSize)
				d := open(t, loop(t, backing), Options{Engine: engine})
				d.(*device).noAsyncDiscard.Store(ioctlOnly)
				if info := d.Info(); !info.Discard || !info.Zeroes || info.Size != testSize {
					t.Skipf("the loop device cannot discard: %+v", info)
				}
				q := newQueue(t, d, 4)
				defer closeQueue(t, q)
				p := alloc(t, testSize)
				for i := range p {
					p[i] = 1
				}
				w := &hpdi.Request{Op: hpdi.OpWrite, Vec: [][]byte{p}}
				f := &hpdi.Request{Op: hpdi.OpFlush}
				c := &hpdi.Request{Op: hpdi.OpDiscard, Length: testSize / 2}
				for _, r := range []*hpdi.Request{w, f, c, f} {
					if err := hpdi.Do(q, r); err != nil {
						t.Fatal(err)
					}
				}
				var st unix.Stat_t
				if err := unix.Stat(backing, &st); err != nil {
					t.Fatal(err)
				}
				if used := st.Blocks * 512; used > testSize*3/4 {
					t.Errorf("the backing file takes %d bytes after half of it was discarded", used)
				}
				if got := d.(*device).noAsyncDiscard.Load(); got != ioctlOnly {
					t.Logf("this kernel discards by ioctl only")
				}
			})
		}
	}
}

// TestMountedDeviceIsRefused opens a device that something holds exclusively,
// as a mount does.
func TestMountedDeviceIsRefused(t *testing.T) {
	name := loop(t, create(t, t.TempDir(), testSize))
	holder, err := os.OpenFile(name, os.O_RDONLY|unix.O_EXCL, 0)
	if err != nil {
		t.Fatal(err)
	}
	if d, err := Open(name, Options{Lock: true}); err == nil {
		t.Errorf("a device in use was opened: %+v", d.Info())
	}
	if err := holder.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, name, Options{Lock: true})
}
