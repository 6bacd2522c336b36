package file

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
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
	return loopWith(t, path, 4096, unix.LO_FLAGS_DIRECT_IO)
}

// loopWith is loop with sectors of that size.
func loopWith(t *testing.T, path string, sector uint32, flags uint32) string {
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
		config := unix.LoopConfig{Fd: uint32(backing), Size: sector}
		config.Info.Flags = flags
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

// TestLargeSectorsAreRefused: a device whose sectors are larger than a block
// cannot be written a block at a time.
func TestLargeSectorsAreRefused(t *testing.T) {
	name := loopWith(t, create(t, t.TempDir(), testSize), 4*BlockSize, 0)
	d, err := Open(name, Options{})
	if err == nil {
		_ = d.Close()
		t.Fatalf("opened: %+v", d.Info())
	}
	if !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "sectors of 16384 bytes, at most 4096") {
		t.Error(err)
	}
}

// TestPartition: the limits of a partition are those of its disk.
func TestPartition(t *testing.T) {
	name := loopWith(t, create(t, t.TempDir(), testSize), 4096, unix.LO_FLAGS_PARTSCAN)
	disk := open(t, name, Options{})
	part := unix.BlkpgPartition{Start: testSize / 2, Length: testSize / 4, Pno: 1}
	arg := unix.BlkpgIoctlArg{Op: unix.BLKPG_ADD_PARTITION, Datalen: int32(unsafe.Sizeof(part)), Data: (*byte)(unsafe.Pointer(&part))}
	if err := ioctl(disk.(*device).fd, unix.BLKPG, unsafe.Pointer(&arg)); err != nil {
		t.Skipf("no partition: %v", err)
	}
	t.Cleanup(func() {
		arg.Op = unix.BLKPG_DEL_PARTITION
		if err := ioctl(disk.(*device).fd, unix.BLKPG, unsafe.Pointer(&arg)); err != nil {
			t.Error(err)
		}
	})
	path := name + "p1"
	if _, err := os.Stat(path); err != nil { // nobody makes nodes here
		number, err := os.ReadFile("/sys/class/block/" + filepath.Base(path) + "/dev")
		var major, minor uint32
		if err == nil {
			_, err = fmt.Sscanf(string(number), "%d:%d", &major, &minor)
		}
		path = filepath.Join(t.TempDir(), "partition")
		if err == nil {
			err = unix.Mknod(path, unix.S_IFBLK|0o600, int(unix.Mkdev(major, minor)))
		}
		if err != nil {
			t.Skip(err)
		}
	}
	d, err := Open(path, Options{Lock: true})
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	got, want := d.Info(), disk.Info()
	if got.Size != testSize/4 || got.Discard != want.Discard || got.Zeroes != want.Zeroes || !got.Discard {
		t.Errorf("partition %+v of %+v", got, want)
	}
	q := newQueue(t, d, 4)
	defer closeQueue(t, q)
	if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpDiscard, Length: testSize / 4}); err != nil {
		t.Error(err)
	}
	if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Offset: testSize / 4, Vec: [][]byte{alloc(t, BlockSize)}}); !errors.Is(err, hpdi.ErrRange) {
		t.Errorf("beyond the partition: %v", err)
	}
}

// TestDiscardNoLongerTaken: the device was seen to discard and does not any
// more. The request fails by name, and others do not.
func TestDiscardNoLongerTaken(t *testing.T) {
	for _, engine := range engines(t) {
		t.Run(string(engine), func(t *testing.T) {
			dir, name := t.TempDir(), ""
			inMount(t, "ramfs", "", dir, func() error { // which cannot punch holes
				path := filepath.Join(dir, "disk")
				err := Create(path, testSize)
				if err == nil {
					name = loop(t, path)
				}
				return err
			})
			if name == "" {
				t.Skip("no such loop device")
			}
			d := open(t, name, Options{Engine: engine})
			if d.Info().Discard {
				t.Fatal("discard is said to work")
			}
			d.(*device).info.Discard = true
			q := newQueue(t, d, 4)
			defer closeQueue(t, q)
			err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpDiscard, Offset: BlockSize, Length: BlockSize})
			if !errors.Is(err, unix.EOPNOTSUPP) || !strings.Contains(err.Error(), name) || !strings.Contains(err.Error(), "at 4096") {
				t.Errorf("discard: %v", err)
			}
			if d.(*device).noAsyncDiscard.Load() {
				t.Error("a way that was never seen to work was taken for the only one")
			}
			if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Vec: [][]byte{alloc(t, BlockSize)}}); err != nil {
				t.Error(err)
			}
		})
	}
}
