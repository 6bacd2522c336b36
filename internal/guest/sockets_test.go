package guest

import (
	"errors"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/open"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/partner"
)

// kind is one kind of sockets at which clients on the same host attach.
type kind struct {
	network string
	ending  string
	scheme  string
	setting string
	dir     func(*config.Config) *string
	of      func(control.Volume) *control.VolumeSocket
	new     func(*config.Config, string, *slog.Logger) *sockets
	refused string // says who deletes a volume to which one is attached
}

var kinds = map[string]kind{
	"vhost-user": {
		network: "unix", ending: ".sock", scheme: "vhost-user:", setting: "vhost_user.dir", new: newVhosts, refused: "attached to 1 virtual machine",
		dir: func(c *config.Config) *string { return &c.VhostUser.Dir },
		of:  func(v control.Volume) *control.VolumeSocket { return &v.VhostUser.VolumeSocket },
	},
	"ring": {
		network: "unixpacket", ending: ".ring", scheme: "ring:", setting: "rings.dir", new: newRings, refused: "open over rings in 1 program",
		dir: func(c *config.Config) *string { return &c.Rings.Dir },
		of:  func(v control.Volume) *control.VolumeSocket { return v.Ring },
	},
}

// ofKinds runs a test for each kind of sockets.
func ofKinds(t *testing.T, f func(*testing.T, kind)) {
	for name, k := range kinds {
		t.Run(name, func(t *testing.T) { f(t, k) })
	}
}

// in returns the directory of a's sockets of a kind.
func (k kind) in(b *bench) string { return filepath.Join(*k.dir(b.cfg), "a") }

// files returns what is in the directory of a's sockets.
func (k kind) files(b *bench) (names []string) {
	b.t.Helper()
	list, err := os.ReadDir(k.in(b))
	if err != nil {
		b.t.Fatal(err)
	}
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names
}

// attach connects to a socket as a client does.
func (k kind) attach(t *testing.T, path string) net.Conn {
	t.Helper()
	c, err := net.Dial(k.network, path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Close() })
	return c
}

// attached waits until so many clients are attached to volume v.
func (k kind) attached(b *bench, c *control.Client, n int) {
	b.t.Helper()
	for began := time.Now(); ; time.Sleep(time.Millisecond) {
		v, err := c.Volume(b.t.Context(), "v")
		if err != nil {
			b.t.Fatal(err)
		}
		if k.of(v).Clients == n {
			return
		}
		if time.Since(began) > 10*time.Second {
			b.t.Fatalf("%d clients are attached, want %d", k.of(v).Clients, n)
		}
	}
}

// cut demands that the other side has closed a connection: it may say why before.
func cut(t *testing.T, c net.Conn) {
	t.Helper()
	_ = c.SetReadDeadline(time.Now().Add(10 * time.Second))
	if _, err := io.Copy(io.Discard, c); errors.Is(err, os.ErrDeadlineExceeded) {
		t.Error("a client is not cut")
	}
}

// TestSockets: each volume has a socket for virtual machines and one for rings, which are
// renamed and deleted with it.
func TestSockets(t *testing.T) { ofKinds(t, testSockets) }

func testSockets(t *testing.T, k kind) {
	b := newBench(t)
	dir := k.in(b)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	// What another guest has left that died: of a volume that is no more.
	ln, err := net.ListenUnix(k.network, &net.UnixAddr{Name: filepath.Join(dir, "old"+k.ending), Net: k.network})
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
	path := filepath.Join(dir, "v"+k.ending)
	if u := k.of(v); u == nil || u.Socket != path || u.URI != k.scheme+path || u.Note != "" {
		t.Fatalf("%+v", u)
	}
	if u := v.VhostUser; u.Serial == "" || len(u.Serial) > 20 || !slices.Contains(u.QEMU, "socket,id=pollux-v,path="+u.Socket+",reconnect=1") {
		t.Fatalf("%+v", u)
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o660 {
		t.Errorf("%v, %v", st, err)
	}
	if got := k.files(b); !slices.Equal(got, []string{"v" + k.ending}) {
		t.Errorf("sockets %q", got)
	}
	one := k.attach(t, path)
	k.attached(b, c, 1)
	if err := c.DeleteVolume(ctx, "v"); control.KindOf(err) != control.KindRefused || !strings.Contains(err.Error(), k.refused) {
		t.Errorf("volume in use: %v", err)
	}
	w, err := c.RenameVolume(ctx, "v", "w")
	if err != nil || k.of(w).Socket != filepath.Join(dir, "w"+k.ending) || w.VhostUser.Serial != v.VhostUser.Serial || k.of(w).Clients != 1 {
		t.Errorf("renamed: %+v, %v", k.of(w), err)
	}
	if got := k.files(b); !slices.Equal(got, []string{"w" + k.ending}) {
		t.Errorf("sockets %q", got)
	}
	if _, err := c.RenameVolume(ctx, "w", "v"); err != nil {
		t.Fatal(err)
	}
	_ = one.Close()
	k.attached(b, c, 0)
	if err := c.DeleteVolume(ctx, "v"); err != nil {
		t.Fatal(err)
	}
	if got := k.files(b); len(got) != 0 {
		t.Errorf("sockets %q are left", got)
	}
}

// TestSocketsMove: whoever serves next replaces the sockets, and who has served cuts
// clients and leaves the files.
func TestSocketsMove(t *testing.T) { ofKinds(t, testSocketsMove) }

func testSocketsMove(t *testing.T, k kind) {
	b := newBench(t)
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindServing)
	v, err := b.client().CreateVolume(t.Context(), control.VolumeCreate{Name: "v", Size: 4096, Guest: "a"})
	if err != nil {
		t.Fatal(err)
	}
	c := k.attach(t, k.of(v).Socket)
	k.attached(b, b.client(), 1)
	before, err := os.Stat(k.of(v).Socket)
	if err != nil {
		t.Fatal(err)
	}
	next := k.new(b.cfg, "a", quiet())
	next.sync(b.storage.last())
	if after, err := os.Stat(k.of(v).Socket); err != nil || os.SameFile(before, after) {
		t.Errorf("the socket was not replaced: %v", err)
	}
	k.attach(t, k.of(v).Socket)
	for began := time.Now(); next.clients("v") != 1; time.Sleep(time.Millisecond) {
		if time.Since(began) > 10*time.Second {
			t.Fatal("a client does not find who serves last")
		}
	}
	if n := next.clients("nobody"); n != 0 {
		t.Errorf("%d clients are attached to a volume that is not there", n)
	}
	next.close(t.Context())
	next.sync(b.storage.last()) // too late
	if _, err := net.Dial(k.network, k.of(v).Socket); err == nil {
		t.Error("somebody listens at a socket that was closed")
	}
	b.line.Send(partner.Message{Kind: partner.KindRelease, Identity: "a", Term: 1})
	b.expect(partner.KindReleased)
	cut(t, c)
	if _, err := os.Stat(k.of(v).Socket); err != nil {
		t.Errorf("a release takes the socket away: %v", err)
	}
}

// TestSocketsRenamed: volumes whose names move on to each other before anybody looks keep
// their own sockets.
func TestSocketsRenamed(t *testing.T) { ofKinds(t, testSocketsRenamed) }

func testSocketsRenamed(t *testing.T, k kind) {
	b := newBench(t)
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindServing)
	st := b.storage.last()
	for _, name := range []string{"a", "b"} {
		if err := st.CreateVolume(t.Context(), name, 4096, 0); err != nil {
			t.Fatal(err)
		}
	}
	h := k.new(b.cfg, "a", quiet())
	defer h.close(t.Context())
	h.sync(st)
	file := func(name string) os.FileInfo {
		fi, err := os.Stat(filepath.Join(k.in(b), name+k.ending))
		if err != nil {
			t.Fatal(err)
		}
		return fi
	}
	of := map[string]os.FileInfo{"a": file("a"), "b": file("b")}
	rename := func(names ...string) {
		for i := 0; i < len(names); i += 2 {
			if err := st.RenameVolume(t.Context(), names[i], names[i+1]); err != nil {
				t.Fatal(err)
			}
		}
		h.sync(st)
	}
	holds := func(a, b string) {
		t.Helper()
		if !os.SameFile(file(a), of["a"]) || !os.SameFile(file(b), of["b"]) {
			t.Errorf("%s and %s have not the sockets of the volumes that had been a and b", a, b)
		}
	}
	rename("b", "x", "a", "b")
	holds("b", "x")
	rename("b", "y", "x", "b", "y", "x") // change places
	holds("x", "b")
	if got := k.files(b); !slices.Equal(got, []string{"b" + k.ending, "x" + k.ending}) {
		t.Errorf("sockets %q", got)
	}
	// What is no socket stays, and the volume says so.
	foreign := filepath.Join(k.in(b), "z"+k.ending)
	if err := os.WriteFile(foreign, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	rename("b", "z")
	if fi, err := os.Lstat(foreign); err != nil || !fi.Mode().IsRegular() {
		t.Errorf("a foreign file was replaced: %v", err)
	}
	if got := k.files(b); !slices.Equal(got, []string{"x" + k.ending, "z" + k.ending}) {
		t.Errorf("sockets %q", got)
	}
}

// TestSocketTrouble: a volume whose socket cannot be had is served all the same, and says
// why and what to do.
func TestSocketTrouble(t *testing.T) { ofKinds(t, testSocketTrouble) }

func testSocketTrouble(t *testing.T, k kind) {
	long := strings.Repeat("long-", 12)
	b := newBench(t, func(c *config.Config) { *k.dir(c) = filepath.Join(c.Dir, strings.Repeat("d", 40)) })
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindServing)
	c, ctx := b.client(), t.Context()
	v, err := c.CreateVolume(ctx, control.VolumeCreate{Name: long, Size: 4096, Guest: "a"})
	if err != nil || k.of(v).Socket != "" || !strings.Contains(k.of(v).Note, k.setting) {
		t.Errorf("%+v, %v", k.of(v), err)
	}
	if v, err = c.RenameVolume(ctx, long, "short"); err != nil || k.of(v).Socket == "" || k.of(v).Note != "" {
		t.Errorf("%+v, %v", k.of(v), err)
	}
	if err := os.WriteFile(filepath.Join(k.in(b), "file"+k.ending), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if v, err = c.CreateVolume(ctx, control.VolumeCreate{Name: "file", Size: 4096, Guest: "a"}); err != nil || !strings.Contains(k.of(v).Note, "is not a socket") {
		t.Errorf("%+v, %v", k.of(v), err)
	}
	st, err := c.Status(ctx)
	if err != nil || len(st.Guests[0].Exports) != 2 {
		t.Fatalf("%+v, %v", st.Guests, err)
	}
	for i, bad := range []bool{true, false} {
		e := st.Guests[0].Exports[i]
		if s := k.of(control.Volume{VhostUser: e.VhostUser, Ring: e.Ring}); (s.Note != "") != bad || (s.Socket == "") != bad {
			t.Errorf("%s: %+v", e.Volume, s)
		}
	}
	// A name that is too long leaves who is attached alone, and the socket to others.
	one := k.attach(t, filepath.Join(k.in(b), "short"+k.ending))
	for began := time.Now(); k.of(v).Clients != 1; {
		if v, err = c.Volume(ctx, "short"); err != nil || time.Since(began) > 10*time.Second {
			t.Fatalf("%+v, %v", k.of(v), err)
		}
	}
	if v, err = c.RenameVolume(ctx, "short", long); err != nil || k.of(v).Socket != "" || k.of(v).Note == "" || k.of(v).Clients != 1 {
		t.Errorf("%+v, %v", k.of(v), err)
	}
	if got := k.files(b); !slices.Equal(got, []string{"file" + k.ending}) {
		t.Errorf("sockets %q", got)
	}
	if v, err = c.RenameVolume(ctx, long, "short"); err != nil || k.of(v).Socket == "" || k.of(v).Note != "" {
		t.Errorf("%+v, %v", k.of(v), err)
	}
	cut(t, one) // when the socket came back
}

// TestRing: a program writes to a volume over a ring and reads it back, the status counts
// that, and one that is read-only for clients is so for it.
func TestRing(t *testing.T) {
	b := newBench(t, func(c *config.Config) { c.Exports = map[string]config.Export{"fixed": {ReadOnly: true}} })
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindServing)
	c, ctx := b.client(), t.Context()
	mem, err := hpdi.Alloc(4096)
	if err != nil {
		t.Fatal(err)
	}
	defer hpdi.Free(mem)
	for _, name := range []string{"v", "fixed"} {
		v, err := c.CreateVolume(ctx, control.VolumeCreate{Name: name, Size: 1 << 20, Guest: "a"})
		if err != nil {
			t.Fatal(err)
		}
		d, err := open.Open(ctx, v.Ring.URI)
		if err != nil {
			t.Fatal(err)
		}
		q, err := d.NewQueue(4)
		if err != nil {
			t.Fatal(err)
		}
		if i := d.Info(); i.Size != 1<<20 || i.ReadOnly != (name == "fixed") {
			t.Errorf("%s: %+v", name, i)
		}
		for i := range mem {
			mem[i] = 7
		}
		err = hpdi.Do(q, &hpdi.Request{Op: hpdi.OpWrite, Offset: 8192, Vec: [][]byte{mem}})
		if name == "fixed" {
			if !errors.Is(err, hpdi.ErrReadOnly) {
				t.Errorf("a write to a volume that is read-only: %v", err)
			}
		} else if err != nil {
			t.Error(err)
		}
		clear(mem)
		for _, r := range []*hpdi.Request{
			{Op: hpdi.OpRead, Offset: 8192, Vec: [][]byte{mem}}, {Op: hpdi.OpFlush},
			{Op: hpdi.OpStatus, Length: 4096, Extents: make([]hpdi.Extent, 0, 4)},
		} {
			if err := hpdi.Do(q, r); err != nil {
				t.Errorf("%s: %v", r.Op, err)
			}
		}
		want := control.SocketCounts{Reads: 1, ReadBytes: 4096, Flushes: 1}
		if name == "v" {
			want.Writes, want.WrittenBytes = 1, 4096
			for _, op := range []hpdi.Op{hpdi.OpDiscard, hpdi.OpWriteZeroes} {
				if err := hpdi.Do(q, &hpdi.Request{Op: op, Length: 4096}); err != nil {
					t.Errorf("%s: %v", op, err)
				}
			}
			want.Discards, want.WriteZeroes = 1, 1
			if mem[0] != 7 || mem[4095] != 7 {
				t.Errorf("%d and %d were read, not what was written", mem[0], mem[4095])
			}
		}
		if v, err = c.Volume(ctx, name); err != nil || v.Ring.Clients != 1 {
			t.Errorf("%+v, %v", v.Ring, err)
		}
		got := v.Ring.SocketCounts
		got.Errors = 0 // who refuses what is not the point
		if got != want {
			t.Errorf("%s: counted %+v, want %+v", name, got, want)
		}
		if err := errors.Join(q.Close(), d.Close()); err != nil {
			t.Error(err)
		}
	}
}

// TestSocketsTogether: both kinds may have one directory.
func TestSocketsTogether(t *testing.T) {
	b := newBench(t, func(c *config.Config) { c.Rings.Dir = c.VhostUser.Dir })
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindServing)
	c, ctx := b.client(), t.Context()
	for _, name := range []string{"v", "w"} {
		if _, err := c.CreateVolume(ctx, control.VolumeCreate{Name: name, Size: 4096, Guest: "a"}); err != nil {
			t.Fatal(err)
		}
	}
	if err := c.DeleteVolume(ctx, "w"); err != nil {
		t.Fatal(err)
	}
	if got := kinds["ring"].files(b); !slices.Equal(got, []string{"v.ring", "v.sock"}) {
		t.Errorf("sockets %q", got)
	}
	for _, k := range kinds {
		k.attach(t, filepath.Join(k.in(b), "v"+k.ending))
		k.attached(b, c, 1)
	}
}

func TestSocketsOff(t *testing.T) {
	b := newBench(t, func(c *config.Config) { c.VhostUser.Off, c.Rings.Off = true, true })
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindServing)
	v, err := b.client().CreateVolume(t.Context(), control.VolumeCreate{Name: "v", Size: 4096, Guest: "a"})
	if err != nil || v.VhostUser != nil || v.Ring != nil {
		t.Errorf("%+v, %v", v, err)
	}
	var before *sockets // as before an identity is served
	if before.clients("v") != 0 || vhostStatus(before, VolumeInfo{}) != nil {
		t.Error("clients are attached to volumes that nobody serves")
	}
	before.resized("v")
	for _, dir := range []string{b.cfg.VhostUser.Dir, b.cfg.Rings.Dir} {
		if _, err := os.Stat(dir); !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("directory of sockets: %v", err)
		}
	}
}

// TestSocketsExport: a pool is not exported while somebody is attached to one of its
// volumes, unless that is forced.
func TestSocketsExport(t *testing.T) { ofKinds(t, testSocketsExport) }

func testSocketsExport(t *testing.T, k kind) {
	b := newBench(t)
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindServing)
	c, ctx := b.client(), t.Context()
	v, err := c.CreateVolume(ctx, control.VolumeCreate{Name: "v", Size: 4096, Guest: "a"})
	if err != nil {
		t.Fatal(err)
	}
	m := k.attach(t, k.of(v).Socket)
	k.attached(b, c, 1)
	name := b.storage.last().Name()
	if _, err := c.ExportPool(ctx, name, control.PoolExport{}); control.KindOf(err) != control.KindRefused || !strings.Contains(err.Error(), "--force") {
		t.Errorf("a machine is attached: %v", err)
	}
	if _, err := c.ExportPool(ctx, name, control.PoolExport{Force: true}); err != nil {
		t.Error(err)
	}
	cut(t, m)
	for began := time.Now(); len(k.files(b)) > 0; time.Sleep(time.Millisecond) {
		if time.Since(began) > 10*time.Second {
			t.Fatalf("sockets %q of a pool that was exported", k.files(b))
		}
	}
}
