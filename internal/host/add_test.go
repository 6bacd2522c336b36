package host

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/file"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/mirror"
)

// files makes empty devices in the pair's directory.
func (p *pair) files(names ...string) (paths []string) {
	p.t.Helper()
	for _, n := range names {
		path := filepath.Join(p.dir, n)
		p.ok(os.WriteFile(path, nil, 0o600))
		p.ok(os.Truncate(path, 256<<20))
		paths = append(paths, path)
	}
	return paths
}

// consists tells by what groups the open pool-a and the next start have its devices.
func (p *pair) consists(want ...string) {
	p.t.Helper()
	got, err := p.client.Pool(p.t.Context(), "pool-a")
	p.ok(err)
	var shown []string
	for _, d := range got.Devices {
		shown = append(shown, filepath.Base(d.Path))
	}
	cfg, err := config.Load(p.dir, "")
	p.ok(err)
	var groups, all []string
	for _, g := range cfg.Guest("a").Pool.Groups() {
		var names []string
		for _, path := range g {
			names = append(names, filepath.Base(path))
		}
		groups, all = append(groups, strings.Join(names, "+")), append(all, names...)
	}
	slices.Sort(shown)
	slices.Sort(all)
	if !slices.Equal(groups, want) || !slices.Equal(shown, all) || cfg.Guest("a").Pool.Adding != 0 {
		p.t.Errorf("pool-a consists of %q, and %q are open, not %q", groups, shown, want)
	}
}

// killAll ends agent and guests at once, and waits until they hold nothing.
func (p *pair) killAll() {
	p.t.Helper()
	st, err := p.client.Status(p.t.Context())
	p.ok(err)
	p.killAgent()
	for _, g := range st.Guests {
		fd, err := unix.PidfdOpen(g.PID, 0)
		p.ok(err)
		p.ok(unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0))
		for n := 0; n == 0 || err != nil; { // interrupted
			n, err = unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, -1)
		}
		p.ok(unix.Close(fd))
	}
}

// TestAddMirror: mirrors come to pools of both kinds; an addition that ended
// anywhere leaves a pool that opens, and is completed by another one.
func TestAddMirror(t *testing.T) {
	if testing.Short() {
		t.Skip("starts processes")
	}
	for name, c := range map[string]struct {
		copies string
		base   []string
	}{
		"pool of single devices": {"", []string{"pool-a.img"}},
		"pool of mirrors":        {", copies: 2", []string{"pool-a.img+pool-a.copy2.img"}},
	} {
		t.Run(name, func(t *testing.T) {
			p := newPair(t, strings.Replace(pairConfig, "size: 256MiB}", "size: 256MiB"+c.copies+"}", 1))
			ctx := t.Context()
			p.until("start", servedBy("a", "b"))
			_, err := p.client.CreateVolume(ctx, control.VolumeCreate{Name: "v", Size: 64 << 20, Guest: "a"})
			p.ok(err)
			add := func(paths ...string) error {
				_, err := p.client.AddDevice(ctx, "pool-a", control.PoolAdd{Device: paths[0], Copies: paths[1:]})
				return err
			}
			m := p.files("m0", "m1", "m2")
			begun := func(paths ...string) { // what the agent has recorded when it dies
				t.Helper()
				p.killAll()
				st, err := config.ReadState(p.dir)
				p.ok(err)
				gs := st.Guests["a"]
				gs.Adding, gs.AddingCopies = paths[0], paths[1:]
				st.Guests["a"] = gs
				p.ok(st.Write(p.dir))
			}
			again := func() {
				t.Helper()
				p.startAgent()
				p.until("the pool opens", protected)
				p.has("pool-a", "a")
				p.checked()
			}

			// The devices are empty still.
			begun(m[0], m[1])
			again()
			refused(t, "another mirror in part of the same", add(m[0]+"/none", m[1]+"/none"), control.KindInvalid)
			// They are a mirror, and no pool's.
			begun(m[0], m[1])
			var devs []hpdi.Device
			for _, path := range m[:2] {
				d, err := file.Open(path, file.Options{})
				p.ok(err)
				devs = append(devs, d)
			}
			_, err = mirror.Create(devs)
			for _, d := range devs {
				err = errors.Join(err, d.Close())
			}
			p.ok(err)
			again()
			p.ok(add(m[0], m[1]))
			p.consists(append(c.base, "m0+m1")...)
			p.until("protected", protected)
			refused(t, "a device twice", add(m[2], m[2]), control.KindInvalid)
			refused(t, "a member", add(m[1], m[2]), control.KindExists)

			// The guest has added one, and the agent died before it knew.
			n := p.files("n0", "n1", "n2")
			begun(n...)
			p.startAgent()
			p.until("it opens without", protected)
			direct := control.NewSocketClient(control.GuestSocket(p.dir, "a"))
			st, err := p.client.Status(ctx)
			p.ok(err)
			if st.Guests[0].ServedBy != "a" {
				_, err = p.client.Giveback(ctx, "a")
				p.ok(err)
			}
			_, err = direct.AddDevice(ctx, "pool-a", control.PoolAdd{Device: n[0], Copies: n[1:]})
			direct.Close()
			p.ok(err)
			p.killAll()
			again()
			p.ok(add(n...))
			p.consists(append(c.base, "m0+m1", "n0+n1+n2")...)

			// A copy of a mirror that came later is a copy like others.
			_, err = p.client.ChangeCopy(ctx, "pool-a", control.CopyChange{Action: control.CopyOffline, Device: n[1]})
			p.ok(err)
			p.until("it is out", func(st control.Status) bool {
				return strings.Contains(strings.Join(st.AlertTexts(), "\n"), "on "+n[1]+" is absent") || strings.Contains(strings.Join(st.AlertTexts(), "\n"), "copy 2 of mirror")
			})
			p.ok(os.Remove(m[1]))
			p.files("new")
			_, err = p.client.ChangeCopy(ctx, "pool-a", control.CopyChange{Action: control.CopyReplace, Device: m[1], New: filepath.Join(p.dir, "new")})
			p.ok(err)
			p.consistsOf(append(c.base, "m0+new", "n0+n1+n2")...)
			_, err = p.client.ChangeCopy(ctx, "pool-a", control.CopyChange{Action: control.CopyOnline, Device: n[1]})
			p.ok(err)
			p.ok(p.client.Down(ctx))
			_ = p.agent.Wait()
			again()
			p.consists(append(c.base, "m0+new", "n0+n1+n2")...)
			if c.copies == "" {
				_, err = p.client.ChangeCopy(ctx, "pool-a", control.CopyChange{Action: control.CopyOffline, Device: filepath.Join(p.dir, "pool-a.img")})
				refused(t, "offline of what is no copy", err, control.KindInvalid)
			}
		})
	}
}

// consistsOf is consists for the settings alone.
func (p *pair) consistsOf(want ...string) {
	p.t.Helper()
	cfg, err := config.Load(p.dir, "")
	p.ok(err)
	var groups []string
	for _, g := range cfg.Guest("a").Pool.Groups() {
		var names []string
		for _, path := range g {
			names = append(names, filepath.Base(path))
		}
		groups = append(groups, strings.Join(names, "+"))
	}
	if !slices.Equal(groups, want) {
		p.t.Errorf("pool-a consists of %q, not %q", groups, want)
	}
}

// TestAddToMirrors: a device by itself does not come to a pool of mirrors unless
// the person wants it; what its addition left behind can be told from the pool.
func TestAddToMirrors(t *testing.T) {
	added := 0
	var open []string
	h := control.Handlers{
		AddDevice: func(_ context.Context, _ string, c control.PoolAdd) (control.Pool, error) {
			added++
			return control.Pool{}, control.NewError(control.KindTimeout, "no answer", "")
		},
		Pools: func(context.Context) ([]control.Pool, error) {
			p := control.Pool{Name: "pool-b", Guest: "b", State: "open"}
			for _, path := range open {
				p.Devices = append(p.Devices, control.DeviceStatus{Path: path})
			}
			return []control.Pool{p}, nil
		},
	}
	a := answering(t, h)
	ctx := t.Context()
	err := a.remember(func(_ *config.State, c *config.Config) {
		p := &c.Guests[1].Pool
		p.Devices, p.Copies = []string{"/d/0", "/d/1"}, 2
	})
	if err != nil {
		t.Fatal(err)
	}
	dev := filepath.Join(a.cfg.Dir, "more.img")
	_, err = a.addDevice(ctx, "pool-b", control.PoolAdd{Device: dev})
	if control.KindOf(err) != control.KindRefused || !strings.Contains(err.Error(), "lost with it") || !strings.Contains(err.Error(), "--mirror") || added > 0 || there(dev) {
		t.Errorf("%v", err)
	}
	if _, err := a.addDevice(ctx, "pool-b", control.PoolAdd{Device: "1", Copies: []string{"2", "3", "4"}}); control.KindOf(err) != control.KindInvalid {
		t.Errorf("%v", err)
	}
	if _, err := a.addDevice(ctx, "pool-b", control.PoolAdd{Device: dev, Size: 64 << 20, Force: true}); err == nil || added != 1 {
		t.Errorf("%v", err)
	}
	p := a.settings().Guest("b").Pool
	if g := p.Groups(); len(g) != 2 || p.Adding != 1 || g[1][0] != dev || p.Mirrored() {
		t.Errorf("%+v", p)
	}
	// Something else is wanted, and the first is not part of the pool.
	other := filepath.Join(a.cfg.Dir, "other.img")
	if _, err := a.addDevice(ctx, "pool-b", control.PoolAdd{Device: other, Size: 64 << 20, Force: true}); err == nil || added != 2 {
		t.Errorf("%v", err)
	}
	if p := a.settings().Guest("b").Pool; p.Adding != 1 || len(p.Devices) != 3 || p.Devices[2] != other {
		t.Errorf("%+v", p)
	}
	// Somebody has it open: it may become a part at any moment.
	d, err := file.Open(other, file.Options{Lock: true})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.addDevice(ctx, "pool-b", control.PoolAdd{Device: dev, Force: true}); control.KindOf(err) != control.KindRefused || !strings.Contains(err.Error(), "is being added") || added != 2 {
		t.Errorf("%v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	// It is one by now: again is no error, and the guest is not asked.
	open = []string{"/d/0", "/d/1", other}
	if _, err := a.addDevice(ctx, "pool-b", control.PoolAdd{Device: other, Force: true}); err != nil || added != 2 {
		t.Errorf("%v", err)
	}
	for _, p := range []config.Pool{a.settings().Guest("b").Pool, next(t, a, "b")} {
		if p.Adding != 0 || len(p.Devices) != 3 || p.Devices[2] != other || !slices.Equal(p.Widths, []int{2, 1}) || p.Copies != 2 {
			t.Errorf("%+v", p)
		}
	}
	if _, err := a.addDevice(ctx, "pool-b", control.PoolAdd{Device: other}); control.KindOf(err) != control.KindExists {
		t.Errorf("%v", err)
	}
}
