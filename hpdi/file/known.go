package file

import (
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
)

// Identity tells a file or block device from all others that the host has had since it was
// booted, without reading it. It says nothing of what is stored there.
type Identity struct {
	Block  bool   // a block device, not a regular file
	Device uint64 // the number of the block device, or of the one that the file system of a file is on
	Inode  uint64 // of a file
	// Born is when a file was made, in nanoseconds since 1970, and of a block device the
	// number that the kernel gave to this disk when it came. Inodes and numbers of devices
	// are given out again; this is not. 0 if the kernel does not tell.
	Born uint64
	Size int64 // bytes
}

// Sure reports whether two that are equal are the same file or disk.
func (i Identity) Sure() bool { return i.Born != 0 }

// Known is what Open has found out about a file. It holds until the host is booted again.
type Known struct {
	Identity Identity
	Info     hpdi.Info
}

// KnownOf returns what Open has found out about a device of this package; ok is false for
// one of another driver, and where nothing tells the file from one in its place.
func KnownOf(d hpdi.Device) (k Known, ok bool) {
	f, ok := d.(*device)
	if !ok {
		return k, false
	}
	return Known{Identity: f.id, Info: f.info}, f.id.Sure()
}

// diskSequence is BLKGETDISKSEQ, since Linux 5.15.
const diskSequence = 0x80081280

// identify finds out which file this is. Size is that of the whole file or device.
func (d *device) identify(size int64) {
	d.id = Identity{Block: d.block, Size: size}
	if d.block {
		var st unix.Stat_t
		if unix.Fstat(d.fd, &st) == nil && ioctl(d.fd, diskSequence, unsafe.Pointer(&d.id.Born)) == nil {
			d.id.Device = st.Rdev
			return
		}
		d.id.Born = 0
		return
	}
	var st unix.Statx_t
	if unix.Statx(d.fd, "", unix.AT_EMPTY_PATH, unix.STATX_INO|unix.STATX_BTIME, &st) != nil || st.Mask&unix.STATX_BTIME == 0 {
		return
	}
	d.id.Device, d.id.Inode = unix.Mkdev(st.Dev_major, st.Dev_minor), st.Ino
	d.id.Born = uint64(st.Btime.Sec)*1e9 + uint64(st.Btime.Nsec)
}

// known takes over what an earlier Open has found out, if this is the same file and the
// ways that it has chosen still work. The device is measured by then.
func (d *device) known(opts Options) bool {
	k := opts.Known
	if k == nil || opts.Thread || !d.id.Sure() || k.Identity != d.id || k.Info.ReadOnly != opts.ReadOnly ||
		opts.Direct != "" && opts.Direct != DirectAuto || opts.Engine != "" && opts.Engine != EngineAuto {
		return false
	}
	if k.Info.Driver == string(EngineURing) && ringKnows.Load() != nil {
		d.info.Driver, d.makeQueue = string(EngineURing), newURingQueue
	} else if _, err := d.chooseEngine(""); err != nil || d.info.Driver != k.Info.Driver {
		return false
	}
	if k.Info.Direct && d.setDirect(true) != nil {
		return false
	}
	measured := d.info
	d.info = k.Info
	d.info.Name, d.info.Size, d.info.BlockSize = measured.Name, measured.Size, measured.BlockSize
	d.info.Status, d.info.Event, d.info.Cancel = measured.Status, measured.Event, measured.Cancel
	return true
}
