package e2e

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/test/pair"
	"github.com/pollux-storage/pollux/test/vm"
	"github.com/pollux-storage/pollux/test/vm/wire"
)

// reconnect is how long QEMU takes to find a back-end again, with some time to work with it.
const reconnect = 1800 * time.Millisecond

// machineDisk is a volume as a virtual machine has it.
type machineDisk struct {
	vm.Disk
	volume string
	guest  string // of whose pool it is
	dev    string // in the machine
	dir    string // where it is mounted there
}

// machine is a virtual machine with volumes of a pair.
type machine struct {
	*vm.Machine
	t     *testing.T
	r     *rig
	disks []*machineDisk
}

// do runs a command in the machine, which must succeed.
func (m *machine) do(args ...string) string {
	m.t.Helper()
	out, err := m.Do(m.t.Context(), args...)
	if err != nil {
		m.t.Fatal(err)
	}
	return out
}

// vhost returns how virtual machines attach to a volume.
func (r *rig) vhost(volume string) control.VhostUser {
	r.t.Helper()
	var v control.Volume
	if err := r.JSON(r.t.Context(), &v, "volume", "show", volume); err != nil {
		r.t.Fatal(err)
	}
	if v.VhostUser == nil || v.VhostUser.Socket == "" {
		r.t.Fatalf("volume %s has no socket for virtual machines: %+v", volume, v.VhostUser)
	}
	return *v.VhostUser
}

// bootMachine boots a machine with a disk for each volume, of 128 MiB, which it makes.
func bootMachine(t *testing.T, r *rig, disks ...*machineDisk) *machine {
	t.Helper()
	k := vm.NeedKernel(t)
	dir, err := os.MkdirTemp("", "plx-vm-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	suite, err := vm.BuildTest(t.Context(), "github.com/pollux-storage/pollux/test/vm/inside", dir)
	if err != nil {
		t.Fatal(err)
	}
	image := filepath.Join(dir, "initramfs")
	if err := (vm.Image{Programs: []string{"mke2fs", "e2fsck", "resize2fs", "fio"}, Files: map[string]string{"/inside": suite}}).Write(t.Context(), k, image); err != nil {
		t.Fatal(err)
	}
	var args []string
	for _, d := range disks {
		r.volume(d.volume, 128<<20, d.guest)
		d.Name, d.Socket = d.volume, r.vhost(d.volume).Socket
		args = append(args, d.Args()...)
	}
	v, err := vm.Boot(t.Context(), vm.Spec{Dir: dir, Kernel: k, Initramfs: image, Memory: 512, CPUs: 2, Args: args})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(v.Stop)
	m := &machine{v, t, r, disks}
	for _, d := range disks {
		d.dev, d.dir = m.do("@disk", r.vhost(d.volume).Serial), "/mnt/"+d.volume
	}
	return m
}

// load writes and verifies on a disk's file system until done is closed.
func (m *machine) load(d *machineDisk, done <-chan struct{}) error {
	for n := 0; !isClosed(done); n++ {
		// Each time other content, at the same places.
		_, err := m.Do(m.t.Context(), "fio", "--name="+d.volume, "--filename="+d.dir+"/load", "--size=24M", "--rw=randwrite", "--bs=4k-64k",
			"--ioengine=io_uring", "--iodepth=16", "--direct=1", "--fdatasync=32", "--verify=crc32c", "--verify_backlog=128", "--verify_fatal=1",
			"--time_based", "--runtime=6", "--minimal", "--randseed="+strconv.Itoa(n+1))
		if err != nil {
			return err
		}
	}
	return nil
}

func isClosed(done <-chan struct{}) bool {
	select {
	case <-done:
		return true
	default:
		return false
	}
}

// struck sends a signal that ends guests, or has them fenced, at the same moment, and
// returns when all is well again: other processes have their places.
func (r *rig) struck(sig unix.Signal, guests ...string) {
	r.t.Helper()
	pids := map[string]int{}
	for _, g := range guests {
		h, err := r.HoldGuest(r.t.Context(), g)
		if err != nil {
			r.t.Fatal(err)
		}
		defer h.Close()
		pids[g] = h.PID
		if err := h.Signal(sig); err != nil {
			r.t.Fatal(err)
		}
	}
	back := func(st control.Status) string {
		for g, pid := range pids {
			if pair.Guest(st, g).PID == pid {
				return "guest " + g + " lives"
			}
		}
		return pair.Well(st)
	}
	if err := r.Until(r.t.Context(), time.Minute, back); err != nil {
		r.t.Fatal(err)
	}
}

// givenBack gives guest a what is its own, which b must have.
func (r *rig) givenBack() {
	r.t.Helper()
	if by := pair.Guest(r.status(), "a").ServedBy; by != "b" {
		r.t.Errorf("guest %s serves a, which has failed", by)
	}
	time.Sleep(reconnect)
	r.must("giveback", "a")
	r.well()
	time.Sleep(reconnect)
}

// TestMachine: a virtual machine has file systems on volumes of a pair, as disks over
// vhost-user with rings of each kind, and writes and verifies without end, while
// guests are killed: of one the partner takes over, which gives back then, the other
// is started again in place. The machine must not see more than pauses. POLLUX_SOAK=1
// makes it 20 kills, and a guest that hangs, and both killed at once.
func TestMachine(t *testing.T) {
	pair.Need(t, vm.Programs("mke2fs", "e2fsck", "resize2fs", "fio")...)
	s := small
	s.Policies = map[string]string{"b": "restart-first"}
	s.More = []string{"exports: {fixed: {read_only: true}}"}
	rounds := 1
	if os.Getenv("POLLUX_SOAK") != "" {
		rounds = 10
		s.Failover = append(slices.Clone(s.Failover), "crash_limit: 1000", "crash_window: 5s", "restart_delay: 200ms", "restart_max: 500ms")
	}
	r := start(t, s)
	probe := &machineDisk{volume: "probe", guest: "a", Disk: vm.Disk{Queues: 1}}
	loaded := []*machineDisk{
		{volume: "split", guest: "a", Disk: vm.Disk{Queues: 2}},
		{volume: "packed", guest: "b", Disk: vm.Disk{Queues: 2, Packed: true}},
		{volume: "plain", guest: "a", Disk: vm.Disk{Queues: 1, NoEvents: true}},
		{volume: "packed-plain", guest: "a", Disk: vm.Disk{Queues: 1, Packed: true, NoEvents: true}},
	}
	fixed := &machineDisk{volume: "fixed", guest: "b"}
	m := bootMachine(t, r, append(loaded, probe, fixed)...)
	for _, d := range m.disks {
		m.shows(d, "ro", map[bool]string{true: "1", false: "0"}[d == fixed])
		m.shows(d, "queue/write_cache", "write back")
		if d != fixed {
			m.shows(d, "queue/discard_granularity", "4096")
		}
	}
	for _, d := range loaded {
		m.do("mke2fs", "-q", "-F", "-t", "ext4", d.dev)
		m.do("@mount", d.dev, d.dir)
	}
	m.underLoad(loaded, probe, func() {
		for range rounds {
			r.struck(unix.SIGKILL, "a")
			r.givenBack()
			r.struck(unix.SIGKILL, "b")
			time.Sleep(reconnect)
		}
	})
	if n := pair.Guest(r.status(), "b").Resumed; n != rounds {
		t.Errorf("guest b was started again in place %d times, want %d", n, rounds)
	}
	if rounds > 1 {
		m.underLoad(loaded, probe, func() {
			r.struck(unix.SIGSTOP, "a") // it is fenced
			r.givenBack()
			r.struck(unix.SIGKILL, "a", "b")
			time.Sleep(3 * reconnect)
		})
	}
	m.grows(loaded[0], 192<<20)
	m.grows(loaded[1], 192<<20)
	m.waits(probe)
	for _, d := range loaded {
		m.do("@umount", d.dir)
		m.do("e2fsck", "-fn", d.dev)
	}
	m.conforms(loaded[1], "io_uring")
	if rounds > 1 {
		m.conforms(loaded[1], "sync")
		m.conforms(probe, ".")
	}
	if bad := vm.Complaints(m.do("@log")); len(bad) > 0 {
		t.Errorf("the machine's kernel complains:\n%s", strings.Join(bad, "\n"))
	}
	r.refused("attached to 1 virtual machine", "volume", "delete", "split")
	m.Stop()
	none := func(control.Status) string {
		if n := r.vhost("split").Clients; n > 0 {
			return fmt.Sprintf("%d machines are attached", n)
		}
		return ""
	}
	if err := r.Until(t.Context(), 10*time.Second, none); err != nil {
		t.Fatal(err)
	}
	sock := r.vhost("split").Socket
	r.must("volume", "delete", "split")
	if _, err := os.Lstat(sock); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("socket of a deleted volume: %v", err)
	}
	r.clean()
}

// underLoad runs loads on disks, and a probe, until something has happened.
func (m *machine) underLoad(loaded []*machineDisk, probe *machineDisk, f func()) {
	m.t.Helper()
	var wg sync.WaitGroup
	done := make(chan struct{})
	errs := make([]error, len(loaded)+1)
	for i, d := range loaded {
		wg.Go(func() { errs[i] = m.load(d, done) })
	}
	var all wire.Probe
	wg.Go(func() {
		for !isClosed(done) && errs[len(loaded)] == nil {
			var p wire.Probe
			out, err := m.Do(m.t.Context(), "@probe", probe.dev, "3")
			if err == nil {
				err = json.Unmarshal([]byte(out), &p)
			}
			all.Rounds, all.Pauses = all.Rounds+p.Rounds, append(all.Pauses, p.Pauses...)
			errs[len(loaded)] = err
		}
	})
	time.Sleep(time.Second)
	func() {
		defer wg.Wait() // also when f ends the test
		defer close(done)
		f()
	}()
	if err := errors.Join(errs...); err != nil {
		m.t.Fatal(err)
	}
	m.t.Logf("%d rounds of the probe, pauses of %.2f s", all.Rounds, all.Pauses)
	if all.Rounds < 10 {
		m.t.Error("the probe did next to nothing")
	}
}

// grows makes a volume larger and demands that the machine sees that, and that the file
// system on it grows while it is mounted.
func (m *machine) grows(d *machineDisk, size int64) {
	m.t.Helper()
	m.r.must("volume", "resize", d.volume, "--size", fmt.Sprint(size))
	file := "/sys/block/" + filepath.Base(d.dev) + "/size"
	want := fmt.Sprint(size / 512)
	for began := time.Now(); m.do("@sysfs", file) != want; time.Sleep(50 * time.Millisecond) {
		if time.Since(began) > time.Minute {
			m.t.Fatalf("the machine sees %s sectors of %s, want %s", m.do("@sysfs", file), d.volume, want)
		}
	}
	m.do("resize2fs", d.dev)
}

// shows demands that the machine knows something of a disk.
func (m *machine) shows(d *machineDisk, what, want string) {
	m.t.Helper()
	if got := m.do("@sysfs", "/sys/block/"+filepath.Base(d.dev)+"/"+what); got != want {
		m.t.Errorf("%s of %s is %s, want %s", what, d.volume, got, want)
	}
}

// waits takes the pair down and up, and demands that the machine waits meanwhile.
func (m *machine) waits(probe *machineDisk) {
	m.t.Helper()
	ended := make(chan error, 1)
	go func() {
		_, err := m.Do(m.t.Context(), "@probe", probe.dev, "2")
		ended <- err
	}()
	time.Sleep(300 * time.Millisecond)
	m.r.down()
	if left, err := os.ReadDir(m.r.Dir + "/vhost"); err != nil || len(left) > 0 {
		m.t.Errorf("left of the sockets: %v, %v", left, err)
	}
	m.r.up()
	if err := <-ended; err != nil {
		m.t.Errorf("while the pair was down: %v", err)
	}
}

// conforms runs the suite of drivers on a disk from inside the machine, with one of the
// drivers for block devices, or with . for all of them.
func (m *machine) conforms(d *machineDisk, engine string) {
	m.t.Helper()
	out := m.do("POLLUX_SEED="+os.Getenv("POLLUX_SEED"), "POLLUX_VM_DISK="+d.dev, "/inside", "-test.run=TestConformance/"+engine, "-test.v", "-test.timeout=5m")
	if n := strings.Count(out, "--- PASS: TestConformance/"); n < 20 {
		m.t.Errorf("the suite did not run on %s: %d tests\n%s", d.volume, n, out)
	}
}
