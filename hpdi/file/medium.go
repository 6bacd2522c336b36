package file

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// sysfs is where the kernel tells of its devices.
const sysfs = "/sys"

// probeMedium finds out whether the medium rotates: of a block device itself, of a regular
// file the one that its file system is on. Info.Rotates is what the kernel says of it, and of
// a partition what it says of the disk. A volume of device-mapper, md or a loop device has an
// answer of its own. A file that lives in memory has no seeks.
//
// Where the kernel says nothing, as for file systems that are on no single device of their
// own (overlay, btrfs, network), the medium is taken to rotate: what is done to spare seeks
// costs little where there are none, and the other mistake costs a seek each time. A virtual
// disk says what its host makes it say; virtio disks say that they rotate whatever is below.
func (d *device) probeMedium() {
	d.info.Rotates = true
	var st unix.Stat_t
	if unix.Fstat(d.fd, &st) != nil {
		return
	}
	on := st.Rdev
	if !d.block {
		if inMemory, err := d.inMemory(); err == nil && inMemory {
			d.info.Rotates = false
			return
		}
		on = st.Dev
	}
	d.info.Rotates = rotates(sysfs, on)
}

// rotates reports what sysfs says of a device, true where it says nothing.
func rotates(sysfs string, dev uint64) bool {
	n, ok := queueAttribute(sysfs, dev, "rotational")
	return !ok || n != 0
}

// inMemory reports whether the file is of a file system that has its files in memory.
func (d *device) inMemory() (bool, error) {
	var fs unix.Statfs_t
	if err := unix.Fstatfs(d.fd, &fs); err != nil {
		return false, err
	}
	return !d.block && (fs.Type == unix.TMPFS_MAGIC || fs.Type == unix.RAMFS_MAGIC || fs.Type == unix.HUGETLBFS_MAGIC), nil
}

// queueAttribute reads a number that the kernel tells of a block device's request queue; for
// a partition, of that of the disk that it is on.
func queueAttribute(sysfs string, dev uint64, name string) (n int64, ok bool) {
	dir := fmt.Sprintf("%s/dev/block/%d:%d/", sysfs, unix.Major(dev), unix.Minor(dev))
	for _, queue := range []string{"queue/", "../queue/"} {
		// Not filepath.Join: ".." is the disk only after the link is followed.
		text, err := os.ReadFile(dir + queue + name)
		if err != nil {
			continue
		}
		n, err := strconv.ParseInt(strings.TrimSpace(string(text)), 10, 64)
		return n, err == nil
	}
	return 0, false
}
