package guest

import (
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/partner"
)

// vhostFiles returns what is in the directory of a's sockets for virtual machines.
func (b *bench) vhostFiles() (names []string) {
	b.t.Helper()
	list, err := os.ReadDir(b.cfg.VhostDir("a"))
	if err != nil {
		b.t.Fatal(err)
	}
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names
}

// attach connects to a socket as a virtual machine does.
func attach(t *testing.T, path string) net.Conn {
	t.Helper()
	c, err := net.Dial("unix", path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// attached waits until so many machines are attached to volume v.
func (b *bench) attached(c *control.Client, n int) {
	b.t.Helper()
	for began := time.Now(); ; time.Sleep(time.Millisecond) {
		v, err := c.Volume(b.t.Context(), "v")
		if err != nil {
			b.t.Fatal(err)
		}
		if v.VhostUser.Clients == n {
			return
		}
		if time.Since(began) > 10*time.Second {
			b.t.Fatalf("%d machines are attached, want %d", v.VhostUser.Clients, n)
		}
	}
}

// TestVhostSockets: each volume has a socket for virtual machines, which is renamed and
// deleted with it.
func TestVhostSockets(t *testing.T) {
	b := newBench(t)
	dir := b.cfg.VhostDir("a")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	// What another guest has left that died: of a volume that is no more.
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "old.sock"), Net: "unix"})
	if err != nil {
		t.Fatal(err)
	}
	ln.SetUnlinkOnClose(false)
	_ = ln.Close()
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindServing)
	c, ctx := b.client(), t.Context()
	v, err := c.CreateVolume(ctx, control.VolumeCreate{Name: "v", Size: 4096, Guest: "a"})
	if err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "v.sock")
	if u := v.VhostUser; u == nil || u.Socket != path || u.URI != "vhost-user:"+path || u.Serial == "" || len(u.Serial) > 20 || u.Note != "" ||
		!slices.Contains(u.QEMU, "socket,id=pollux-v,path="+path+",reconnect=1") {
		t.Fatalf("%+v", u)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o660 {
		t.Errorf("%v, %v", st, err)
	}
	if got := b.vhostFiles(); !slices.Equal(got, []string{"v.sock"}) {
		t.Errorf("sockets %q", got)
	}
	one := attach(t, path)
	b.attached(c, 1)
	if err := c.DeleteVolume(ctx, "v"); control.KindOf(err) != control.KindRefused || !strings.Contains(err.Error(), "attached to 1 virtual machine") {
		t.Errorf("volume in use: %v", err)
	}
	w, err := c.RenameVolume(ctx, "v", "w")
	if err != nil || w.VhostUser.Socket != filepath.Join(dir, "w.sock") || w.VhostUser.Serial != v.VhostUser.Serial || w.VhostUser.Clients != 1 {
		t.Errorf("renamed: %+v, %v", w.VhostUser, err)
	}
	if got := b.vhostFiles(); !slices.Equal(got, []string{"w.sock"}) {
		t.Errorf("sockets %q", got)
	}
	if _, err := c.RenameVolume(ctx, "w", "v"); err != nil {
		t.Fatal(err)
	}
	_ = one.Close()
	b.attached(c, 0)
	if err := c.DeleteVolume(ctx, "v"); err != nil {
		t.Fatal(err)
	}
	if got := b.vhostFiles(); len(got) != 0 {
		t.Errorf("sockets %q are left", got)
	}
}

// TestVhostMoves: whoever serves next replaces the sockets, and who has served cuts
// machines and leaves the files.
func TestVhostMoves(t *testing.T) {
	b := newBench(t)
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindServing)
	v, err := b.client().CreateVolume(t.Context(), control.VolumeCreate{Name: "v", Size: 4096, Guest: "a"})
	if err != nil {
		t.Fatal(err)
	}
	c := attach(t, v.VhostUser.Socket)
	b.attached(b.client(), 1)
	before, err := os.Stat(v.VhostUser.Socket)
	if err != nil {
		t.Fatal(err)
	}
	next := newVhosts(b.cfg, "a", quiet())
	next.sync(b.storage.last())
	if after, err := os.Stat(v.VhostUser.Socket); err != nil || os.SameFile(before, after) {
		t.Errorf("the socket was not replaced: %v", err)
	}
	attach(t, v.VhostUser.Socket)
	for began := time.Now(); next.clients("v") != 1; time.Sleep(time.Millisecond) {
		if time.Since(began) > 10*time.Second {
			t.Fatal("a machine does not find who serves last")
		}
	}
	if n := next.clients("nobody"); n != 0 {
		t.Errorf("%d machines are attached to a volume that is not there", n)
	}
	next.close(t.Context())
	next.sync(b.storage.last()) // too late
	if _, err := net.Dial("unix", v.VhostUser.Socket); err == nil {
		t.Error("somebody listens at a socket that was closed")
	}
	b.line.Send(partner.Message{Kind: partner.KindRelease, Identity: "a", Term: 1})
	b.expect(partner.KindReleased)
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	if n, err := c.Read(make([]byte, 1)); n != 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("a machine is not cut at a release: %d, %v", n, err)
	}
	if _, err := os.Stat(v.VhostUser.Socket); err != nil {
		t.Errorf("a release takes the socket away: %v", err)
	}
}

// TestVhostTrouble: a volume whose socket cannot be had is served all the same, and says
// why and what to do.
func TestVhostTrouble(t *testing.T) {
	long := strings.Repeat("long-", 12)
	b := newBench(t, func(c *config.Config) { c.VhostUser.Dir = filepath.Join(c.Dir, strings.Repeat("d", 40)) })
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindServing)
	c, ctx := b.client(), t.Context()
	v, err := c.CreateVolume(ctx, control.VolumeCreate{Name: long, Size: 4096, Guest: "a"})
	if err != nil || v.VhostUser.Socket != "" || !strings.Contains(v.VhostUser.Note, "vhost_user.dir") {
		t.Errorf("%+v, %v", v.VhostUser, err)
	}
	if v, err = c.RenameVolume(ctx, long, "short"); err != nil || v.VhostUser.Socket == "" || v.VhostUser.Note != "" {
		t.Errorf("%+v, %v", v.VhostUser, err)
	}
	if err := os.WriteFile(filepath.Join(b.cfg.VhostDir("a"), "file.sock"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if v, err = c.CreateVolume(ctx, control.VolumeCreate{Name: "file", Size: 4096, Guest: "a"}); err != nil || !strings.Contains(v.VhostUser.Note, "is not a socket") {
		t.Errorf("%+v, %v", v.VhostUser, err)
	}
	st, err := c.Status(ctx)
	if err != nil || len(st.Guests[0].Exports) != 2 || st.Guests[0].Exports[0].VhostUser.Note == "" || st.Guests[0].Exports[1].VhostUser.Socket == "" {
		t.Errorf("%+v, %v", st.Guests[0].Exports, err)
	}
	// A name that is too long leaves who is attached alone, and the socket to others.
	one := attach(t, filepath.Join(b.cfg.VhostDir("a"), "short.sock"))
	for began := time.Now(); v.VhostUser.Clients != 1; {
		if v, err = c.Volume(ctx, "short"); err != nil || time.Since(began) > 10*time.Second {
			t.Fatalf("%+v, %v", v.VhostUser, err)
		}
	}
	if v, err = c.RenameVolume(ctx, "short", long); err != nil || v.VhostUser.Socket != "" || v.VhostUser.Note == "" || v.VhostUser.Clients != 1 {
		t.Errorf("%+v, %v", v.VhostUser, err)
	}
	if got := b.vhostFiles(); !slices.Equal(got, []string{"file.sock"}) {
		t.Errorf("sockets %q", got)
	}
	if v, err = c.RenameVolume(ctx, long, "short"); err != nil || v.VhostUser.Socket == "" || v.VhostUser.Note != "" {
		t.Errorf("%+v, %v", v.VhostUser, err)
	}
	_ = one.SetReadDeadline(time.Now().Add(10 * time.Second))
	if n, err := one.Read(make([]byte, 1)); n != 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("whoever was attached is not cut when the socket comes back: %d, %v", n, err)
	}
}

func TestVhostOff(t *testing.T) {
	b := newBench(t, func(c *config.Config) { c.VhostUser.Off = true })
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindServing)
	v, err := b.client().CreateVolume(t.Context(), control.VolumeCreate{Name: "v", Size: 4096, Guest: "a"})
	if err != nil || v.VhostUser != nil {
		t.Errorf("%+v, %v", v.VhostUser, err)
	}
	var before *vhosts // as before an identity is served
	if before.clients("v") != 0 || before.status(VolumeInfo{}) != nil {
		t.Error("machines are attached to volumes that nobody serves")
	}
	if _, err := os.Stat(b.cfg.VhostUser.Dir); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("directory of sockets: %v", err)
	}
}

// TestVhostExport: a pool is not exported while a machine is attached to one of its volumes,
// unless that is forced.
func TestVhostExport(t *testing.T) {
	b := newBench(t)
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindServing)
	c, ctx := b.client(), t.Context()
	v, err := c.CreateVolume(ctx, control.VolumeCreate{Name: "v", Size: 4096, Guest: "a"})
	if err != nil {
		t.Fatal(err)
	}
	m := attach(t, v.VhostUser.Socket)
	b.attached(c, 1)
	name := b.storage.last().Name()
	if _, err := c.ExportPool(ctx, name, control.PoolExport{}); control.KindOf(err) != control.KindRefused || !strings.Contains(err.Error(), "--force") {
		t.Errorf("a machine is attached: %v", err)
	}
	if _, err := c.ExportPool(ctx, name, control.PoolExport{Force: true}); err != nil {
		t.Error(err)
	}
	_ = m.SetReadDeadline(time.Now().Add(10 * time.Second))
	if n, err := m.Read(make([]byte, 1)); n != 0 || errors.Is(err, os.ErrDeadlineExceeded) {
		t.Errorf("the machine is not cut: %d, %v", n, err)
	}
	for began := time.Now(); len(b.vhostFiles()) > 0; time.Sleep(time.Millisecond) {
		if time.Since(began) > 10*time.Second {
			t.Fatalf("sockets %q of a pool that was exported", b.vhostFiles())
		}
	}
}
