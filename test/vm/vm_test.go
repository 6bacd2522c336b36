package vm

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/test/pair"
)

// short is a directory with a path that leaves room for sockets.
func short(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "plx-vm-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// export serves a new file of 256 MiB with qemu-storage-daemon until the test ends, and
// returns the socket.
func export(t *testing.T, dir string) string {
	t.Helper()
	image, sock := filepath.Join(dir, "disk"), filepath.Join(dir, "disk.sock")
	if err := os.WriteFile(image, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(image, 256<<20); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command("qemu-storage-daemon",
		"--blockdev", "driver=file,node-name=f,discard=unmap,filename="+image,
		"--export", "type=vhost-user-blk,id=e,node-name=f,writable=on,num-queues=2,addr.type=unix,addr.path="+sock)
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	cmd.Stderr = os.Stderr
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	for began := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(sock); err == nil {
			return sock
		}
		if time.Since(began) > 10*time.Second {
			t.Fatal("qemu-storage-daemon makes no socket")
		}
	}
}

// TestForeignBackend boots a machine with a disk of another back-end: what fails here
// is not the fault of Pollux's. The suite of HPDI drivers runs on the disk, from inside,
// with system calls that wait, as it does with io_uring on a disk of a pair in test/e2e; then
// a file system is made and used.
func TestForeignBackend(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a virtual machine")
	}
	pair.Need(t, Programs("qemu-storage-daemon", "mke2fs", "e2fsck")...)
	k := NeedKernel(t)
	dir := short(t)
	sock := export(t, dir)
	suite, err := BuildTest(t.Context(), "github.com/pollux-storage/pollux/test/vm/inside", dir)
	if err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(dir, "initramfs")
	if err := (Image{Programs: []string{"mke2fs", "e2fsck"}, Files: map[string]string{"/inside": suite}}).Write(t.Context(), k, image); err != nil {
		t.Fatal(err)
	}
	m, err := Boot(t.Context(), Spec{Dir: dir, Kernel: k, Initramfs: image, Memory: 256, CPUs: 2, Args: Disk{Name: "d", Socket: sock, Queues: 2}.Args()})
	if err != nil {
		t.Fatal(err)
	}
	defer m.Stop()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	do := func(args ...string) string {
		t.Helper()
		out, err := m.Do(ctx, args...)
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	out := do("POLLUX_SEED="+os.Getenv("POLLUX_SEED"), "POLLUX_VM_DISK=/dev/vda", "/inside", "-test.run=TestConformance/sync", "-test.v", "-test.timeout=5m")
	if !strings.Contains(out, "--- PASS: TestConformance/sync/Random") {
		t.Errorf("the suite did not run:\n%s", out)
	}
	do("mke2fs", "-q", "-F", "-t", "ext4", "/dev/vda")
	do("@mount", "/dev/vda", "/mnt")
	do("@write", "/mnt/file", "what is in a file")
	do("@umount", "/mnt")
	do("e2fsck", "-fn", "/dev/vda")
	do("@mount", "/dev/vda", "/mnt")
	if got := do("@sysfs", "/mnt/file"); got != "what is in a file" {
		t.Errorf("the file says %q", got)
	}
	if bad := Complaints(do("@log")); len(bad) > 0 {
		t.Errorf("the kernel complains: %q", bad)
	}
	if _, err := m.Do(ctx, "e2fsck", "-fn", "/dev/nothing"); err == nil {
		t.Error("a program that fails in the machine is no error")
	}
	if _, err := m.Do(ctx, "@sysfs", "/sys/nothing"); err == nil {
		t.Error("a command that fails in the machine is no error")
	}
}

// TestBrokenMachine demands that a machine that does not come up says why.
func TestBrokenMachine(t *testing.T) {
	if testing.Short() {
		t.Skip("boots a virtual machine")
	}
	pair.Need(t, Programs()...)
	k := NeedKernel(t)
	dir := short(t)
	image := filepath.Join(dir, "initramfs")
	f, err := os.Create(image)
	if err != nil {
		t.Fatal(err)
	}
	a := newArchive(f)
	if err := a.text("/init", "no program"); err != nil {
		t.Fatal(err)
	}
	if err := a.end(); err != nil {
		t.Fatal(err)
	}
	f.Close()
	_, err = Boot(t.Context(), Spec{Dir: dir, Kernel: k, Initramfs: image, Memory: 128})
	if err == nil || !strings.Contains(err.Error(), "ended while it booted") || !strings.Contains(err.Error(), "Kernel panic") {
		t.Errorf("a machine without a first process: %v", err)
	}
	_, err = Boot(t.Context(), Spec{Dir: short(t), Kernel: k, Initramfs: image, Memory: 128, Args: []string{"-device", "no-such-device"}})
	if err == nil || !strings.Contains(err.Error(), "no-such-device") {
		t.Errorf("arguments that QEMU refuses: %v", err)
	}
}

func TestModules(t *testing.T) {
	k := NeedKernel(t)
	mods, err := k.order([]string{"virtio_blk", "virtio-pmem", "ext4"})
	if err != nil {
		t.Fatal(err)
	}
	at := map[string]int{}
	for i, m := range mods {
		at[m.name] = i + 1
	}
	for _, o := range [][2]string{{"virtio_ring", "virtio"}, {"virtio", "virtio_blk"}, {"nd_virtio", "virtio_pmem"}} {
		if at[o[0]] == 0 || at[o[0]] >= at[o[1]] {
			t.Errorf("%s does not come before %s in %v", o[0], o[1], at)
		}
	}
	if _, err := k.order([]string{"no-such-module"}); err == nil || !strings.Contains(err.Error(), "no_such_module") {
		t.Errorf("a module that is not there: %v", err)
	}
}
