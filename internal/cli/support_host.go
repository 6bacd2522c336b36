package cli

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/control"
)

// hostFiles are what the kernel and the system say of a host. Those that a kernel does not
// have are left out.
var hostFiles = []string{
	"/etc/os-release", "/proc/version", "/proc/cpuinfo", "/proc/meminfo", "/proc/loadavg", "/proc/uptime", "/proc/self/mountinfo",
	"/proc/partitions", "/proc/diskstats", "/proc/mdstat", "/proc/swaps", "/proc/vmstat",
	"/proc/pressure/cpu", "/proc/pressure/io", "/proc/pressure/memory", "/proc/sys/kernel/io_uring_disabled",
	"/proc/sys/vm/nr_hugepages", "/sys/kernel/mm/transparent_hugepage/enabled", "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
}

// hostFacts adds what is known of the host, its devices, and the processes of a pair.
func hostFacts(b *bundle, st control.Status) {
	b.gather("host/kernel.txt", kernel)
	for _, f := range hostFiles {
		b.file(path.Join("host", f), f, head)
	}
	b.gather("host/devices.txt", func() ([]byte, error) { return blockDevices("/sys/class/block") })
	b.gather("host/pool-devices.txt", func() ([]byte, error) { return poolDevices(st) })
	processes := map[string]int{"agent": st.Agent.PID}
	for _, g := range st.Guests {
		processes["guest-"+g.Name] = g.PID
	}
	for _, name := range slices.Sorted(maps.Keys(processes)) {
		pid := processes[name]
		if pid < 2 {
			continue
		}
		for _, f := range []string{"status", "limits", "io", "wchan"} {
			b.file(path.Join("processes", name, f), filepath.Join("/proc", strconv.Itoa(pid), f), head)
		}
	}
}

func kernel() ([]byte, error) {
	var u unix.Utsname
	if err := unix.Uname(&u); err != nil {
		return nil, fmt.Errorf("uname: %w", err)
	}
	var out bytes.Buffer
	for _, f := range [][]byte{u.Sysname[:], u.Nodename[:], u.Release[:], u.Version[:], u.Machine[:]} {
		fmt.Fprintf(&out, "%s\n", unix.ByteSliceToString(f))
	}
	return out.Bytes(), nil
}

// blockFacts are the attributes of a block device that matter for storage.
var blockFacts = []string{"size", "ro", "queue/rotational", "queue/logical_block_size", "queue/physical_block_size", "queue/scheduler",
	"queue/write_cache", "queue/discard_max_bytes", "queue/nr_requests", "device/vendor", "device/model", "device/state", "dm/name", "md/level"}

// blockDevices tells of the block devices below a folder of the kernel's. Sizes are in
// sectors of 512 bytes.
func blockDevices(dir string) ([]byte, error) {
	names, err := os.ReadDir(dir)
	if err != nil {
		return nil, err
	}
	var out bytes.Buffer
	for _, n := range names {
		fmt.Fprintf(&out, "%s", n.Name())
		for _, f := range blockFacts {
			if p, err := os.ReadFile(filepath.Join(dir, n.Name(), f)); err == nil {
				fmt.Fprintf(&out, " %s=%q", f, strings.TrimSpace(string(p)))
			}
		}
		out.WriteByte('\n')
	}
	return out.Bytes(), nil
}

// poolDevices tells how the devices of open pools look from outside of their guests.
func poolDevices(st control.Status) ([]byte, error) {
	var out bytes.Buffer
	for _, g := range st.Guests {
		for _, d := range g.Devices {
			fmt.Fprintf(&out, "%s %s: ", d.Pool, d.Path)
			var s unix.Stat_t
			if err := unix.Stat(d.Path, &s); err != nil {
				fmt.Fprintln(&out, err)
				continue
			}
			mode := fs.FileMode(s.Mode & 0o777)
			if s.Mode&unix.S_IFMT == unix.S_IFBLK {
				fmt.Fprintf(&out, "block device %d:%d, mode %v\n", unix.Major(s.Rdev), unix.Minor(s.Rdev), mode)
				continue
			}
			fmt.Fprintf(&out, "file of %d bytes, %d allocated, mode %v", s.Size, s.Blocks*512, mode)
			var v unix.Statfs_t
			if err := unix.Statfs(d.Path, &v); err == nil {
				fmt.Fprintf(&out, "; file system %#x with %d of %d bytes free", v.Type, v.Bavail*uint64(v.Bsize), v.Blocks*uint64(v.Bsize))
			}
			out.WriteByte('\n')
		}
	}
	if out.Len() == 0 {
		return nil, errors.New("no pool is open")
	}
	return out.Bytes(), nil
}
