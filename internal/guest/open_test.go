package guest

import (
	"errors"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi/file"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/partner"
	"github.com/pollux-storage/pollux/internal/region"
)

// TestIdentityFails: what hinders a guest from serving an identity reaches the
// agent, with its reason.
func TestIdentityFails(t *testing.T) {
	for name, c := range map[string]struct {
		edit    func(*config.Config)
		prepare func(*bench) error
		want    string
	}{
		"device is gone": {nil, func(b *bench) error { return os.Remove(b.cfg.Guests[0].Pool.Devices[0]) }, "no such file"},
		"certificate cannot be read": {
			func(c *config.Config) {
				c.NBD.TLS, c.NBD.Cert, c.NBD.Key = "required", filepath.Join(c.Dir, "none"), filepath.Join(c.Dir, "none")
			}, nil, "TLS: open",
		},
		"pool is gone":          {func(c *config.Config) { c.Guests[0].Pool.Create = false }, nil, "belongs to no pool"},
		"region cannot be made": {nil, func(b *bench) error { return os.Remove(b.cfg.RegionDir) }, "no such file"},
	} {
		t.Run(name, func(t *testing.T) {
			edit := c.edit
			if edit == nil {
				edit = func(*config.Config) {}
			}
			b := newBench(t, edit)
			if c.prepare != nil {
				if err := c.prepare(b); err != nil {
					t.Fatal(err)
				}
			}
			b.grant("a", partner.BasisStart, 1)
			if why := b.failure(); !strings.Contains(why, c.want) {
				t.Error(why)
			}
			if d := b.cfg.Guests[0].Pool.Devices[0]; name != "device is gone" && b.locked("a") {
				t.Errorf("%s is still locked", d)
			}
		})
	}
}

// TestPoolEnds: an identity whose pool ends without a reason is given up, and
// a guest that cannot even give it up ends.
func TestPoolEnds(t *testing.T) {
	b := newBench(t)
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindServing)
	b.storage.last().lost <- nil
	if why := b.failure(); !strings.Contains(why, "consistency points ended") || b.locked("a") {
		t.Error(why)
	}
	b.storage.mu.Lock()
	b.storage.stuck = true
	b.storage.mu.Unlock()
	b.grant("a", partner.BasisStart, 2)
	b.expect(partner.KindServing)
	b.storage.last().lost <- block.ErrStale
	if err := b.end(); err == nil || !strings.Contains(err.Error(), "give up a") {
		t.Errorf("it lives on with a pool that it lost: %v", err)
	}
}

// TestCandidate: a device whose addition did not come as far as its label is
// left out.
func TestCandidate(t *testing.T) {
	for name, want := range map[string]int{"unlabelled": 1, "labelled": 2, "member": 2, "interrupted": 1} {
		t.Run(name, func(t *testing.T) {
			var second string
			b := newBench(t, func(c *config.Config) {
				p := &c.Guests[0].Pool
				second = filepath.Join(c.Dir, "second")
				if p.Create, p.Devices = false, append(p.Devices, second); name != "member" {
					p.Adding = 1
				}
			})
			if err := os.WriteFile(second, make([]byte, 1<<20), 0o600); err != nil {
				t.Fatal(err)
			}
			b.storage.mu.Lock()
			b.storage.labels[b.cfg.Guests[0].Pool.Devices[0]] = Label{Pool: block.PoolID{1}, Name: "tank", Identity: "a"}
			if name == "labelled" {
				b.storage.labels[second] = Label{Pool: block.PoolID{1}, Name: "tank", Identity: "a"}
			}
			if name == "interrupted" {
				b.storage.labels[second] = Label{Pool: block.PoolID{1}, Name: leftOutName, Identity: "a"}
			}
			b.storage.mu.Unlock()
			b.grant("a", partner.BasisStart, 1)
			b.expect(partner.KindServing)
			if n := len(b.storage.last().devs); n != want {
				t.Errorf("opened with %d devices, not %d", n, want)
			}
			if st, err := b.client().Status(t.Context()); err != nil || len(st.Guests[0].Devices) != want {
				t.Errorf("shows %+v, %v", st.Guests, err)
			}
		})
	}
}

// TestSettingsGone: the settings of the start do when those in force cannot be
// read.
func TestSettingsGone(t *testing.T) {
	b := newBench(t)
	if err := os.Remove(config.EffectivePath(b.cfg.Dir)); err != nil {
		t.Fatal(err)
	}
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindServing)
}

// TestPoolNotMade: a manual pool whose devices belong to none is one that is
// yet to be made.
func TestPoolNotMade(t *testing.T) {
	b := newBench(t, func(c *config.Config) { c.Guests[0].Pool.Manual, c.Guests[0].Pool.Create = true, false })
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindServing)
	if p, err := b.client().Pools(t.Context()); err != nil || len(p) != 0 || b.locked("a") {
		t.Errorf("%+v, %v", p, err)
	}
	for range 3 {
		c, err := connectTo(t, b.cfg.Guest("a").Socket)
		if err == nil {
			_, err = io.ReadFull(c, make([]byte, 18)) // greeting
		}
		if err != nil {
			t.Errorf("a client of an identity without a pool: %v", err)
		}
	}
}

// TestReleasingShows: status tells of a release that takes its time.
func TestReleasingShows(t *testing.T) {
	b := newBench(t)
	b.grant("a", partner.BasisStart, 1)
	b.expect(partner.KindServing)
	finish := make(chan struct{})
	b.storage.last().finish.Store(&finish)
	b.line.Send(partner.Message{Kind: partner.KindRelease, Identity: "a", Term: 1, Reason: "test"})
	c := b.client()
	for {
		st, err := c.Status(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		if st.Guests[0].State == control.StateReleasing {
			break
		}
	}
	close(finish)
	b.expect(partner.KindReleased)
}

// TestPartnersRegion: only the announced region is mapped, and after a fence
// that was refused not even that.
func TestPartnersRegion(t *testing.T) {
	b := newBench(t)
	path := filepath.Join(b.cfg.Dir, "partner")
	r, err := region.Create(path, region.Options{Pool: block.PoolID{7}, Owner: "b", LogBytes: 1 << 16})
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	b.line.Send(partner.Message{Kind: partner.KindUp, Guest: "b", Inc: 1, Well: true})
	announce := func(term uint64, path string, pool byte) {
		b.line.Send(partner.Message{Kind: partner.KindRegion, From: "b", Inc: 1, Identity: "b", Term: term, Region: partner.Region{Path: path, Pool: block.PoolID{pool}}})
		// The answer tells that what was sent before has been heard.
		b.line.Send(partner.Message{Kind: partner.KindPing})
		b.expect(partner.KindPong)
	}
	c := b.client()
	shows := func(alert string, regions int) {
		t.Helper()
		st, err := c.Status(t.Context())
		if err != nil || !strings.Contains(strings.Join(st.Guests[0].Alerts, "\n"), alert) || len(st.Guests[0].Region) != regions {
			t.Errorf("no %q or not %d regions: %+v, %v", alert, regions, st.Guests, err)
		}
	}
	announce(1, path+"2", 7)
	shows("cannot be mapped: ", 0)
	announce(2, path, 8)
	shows("it is of another pool", 0)
	announce(3, path, 7)
	shows("", 1)
	b.line.Send(partner.Message{Kind: partner.KindRefused, Guest: "b", Inc: 1, Identity: "b", Reason: "test"})
	announce(3, path, 8)
	shows("it is of another pool", 0)
}

// TestAgentHangsUp: an agent that goes before it was answered is not the last.
func TestAgentHangsUp(t *testing.T) {
	b := newBench(t)
	b.expect(partner.KindHello)
	c, _ := connectTo(t, b.link) // waits for the line before it
	_ = c.Close()
	b.line.Close()
	b.dial()
	b.expect(partner.KindHello)
}

// TestStopWhileOpening: a pool that opens when the guest is ending already is
// given up at once.
func TestStopWhileOpening(t *testing.T) {
	b := newBench(t)
	held, err := file.Open(b.cfg.Guest("a").Pool.Devices[0], file.Options{Lock: true})
	if err != nil {
		t.Fatal(err)
	}
	b.grant("a", partner.BasisStart, 1)
	b.line.Send(partner.Message{Kind: partner.KindPing})
	b.expect(partner.KindPong) // the grant has been heard
	b.cancel()
	for end := time.Now().Add(30 * time.Second); ; {
		// Its control socket goes after it has ended what was open.
		c, err := net.Dial("unix", control.GuestSocket(b.cfg.Dir, "a"))
		if err != nil {
			break
		}
		_ = c.Close()
		if time.Now().After(end) {
			t.Fatal("the guest does not end")
		}
	}
	if err := held.Close(); err != nil {
		t.Fatal(err)
	}
	if err := b.end(); err != nil || b.storage.last() == nil || b.storage.last().how.Load() != "released" || b.locked("a") {
		t.Errorf("%v: the pool is not given up", err)
	}
}

// TestGoneIsNotServed: an identity that was given up meanwhile is neither
// served nor given up again.
func TestGoneIsNotServed(t *testing.T) {
	b := newBench(t)
	g := &Guest{opt: Options{Sockets: b.sockets}, cfg: b.cfg, log: quiet(), tenants: map[string]*tenancy{}}
	gone := &tenancy{identity: "a", gone: true, left: make(chan struct{})}
	close(gone.left)
	if err := g.startServer(gone); err != nil || gone.server != nil {
		t.Errorf("it is served: %v", err)
	}
	if err := g.startServer(&tenancy{identity: "nobody"}); err == nil {
		t.Error("an identity without sockets is served")
	}
	if err := g.leave(gone, func(Store) error { return errors.New("again") }); err != nil {
		t.Errorf("it is given up twice: %v", err)
	}
	other := &tenancy{identity: "a", term: 2}
	g.tenants["a"] = other
	g.serve(partner.Action{Identity: "a", Term: 1})
	g.serve(partner.Action{Identity: "b", Term: 1})
	if other.server != nil {
		t.Error("what an earlier term was to serve is served in this one")
	}
}
