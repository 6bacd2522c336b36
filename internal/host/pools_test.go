package host

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/identity"
	"github.com/pollux-storage/pollux/internal/partner"
)

// answering is an agent with guest a, which has no pool yet and answers
// commands by h, and guest b, whose pool is open.
func answering(t *testing.T, h control.Handlers) *agent {
	t.Helper()
	a := bareAgent(t, strings.Replace(pairConfig, "size: 256MiB}", "size: 256MiB, manual: true}", 1))
	if err := os.MkdirAll(a.cfg.RunDir(), 0o700); err != nil {
		t.Fatal(err)
	}
	for _, g := range a.cfg.Guests {
		path := control.GuestSocket(a.cfg.Dir, g.Name)
		ln, err := identity.ListenUnix(path, 0o600)
		if err != nil {
			t.Fatal(err)
		}
		srv := control.Serve(ln, h)
		m := &member{name: g.Name, client: control.NewSocketClient(path)}
		t.Cleanup(func() {
			m.client.Close()
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			_ = srv.Close(ctx)
		})
		a.members[g.Name] = m
		a.step(t, partner.Message{Kind: partner.KindStarted, Guest: g.Name, Inc: 1})
	}
	for _, g := range a.cfg.Guests {
		a.step(t, partner.Message{Kind: partner.KindHello, From: g.Name, Inc: 1, Term: 1, Holds: []partner.Hold{{Identity: g.Name, Term: 1, Phase: partner.PhaseServing}}})
	}
	return a
}

// next returns what a start from now on would go by.
func next(t *testing.T, a *agent, guest string) config.Pool {
	t.Helper()
	cfg, err := config.Load(a.cfg.Dir, "")
	if err != nil {
		t.Fatal(err)
	}
	return cfg.Guest(guest).Pool
}

func there(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// TestPoolWithoutAnswer: when the person gives up while a pool is made, its
// device stays, for the pool may be on it, and a start makes what is missing.
func TestPoolWithoutAnswer(t *testing.T) {
	for name, c := range map[string]struct {
		giveUp bool
		err    error
		manual bool // there is no pool afterwards
		create bool // the next start makes it
	}{
		"made":     {},
		"given up": {giveUp: true, create: true},
		"refused":  {err: control.NewError(control.KindRefused, "no", ""), manual: true},
	} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithCancel(t.Context())
			defer cancel()
			a := answering(t, control.Handlers{CreatePool: func(ctx context.Context, _ control.PoolCreate) (control.Pool, error) {
				if c.giveUp {
					cancel()
					<-ctx.Done()
				}
				return control.Pool{Name: "tank"}, errors.Join(c.err, ctx.Err())
			}})
			dev := filepath.Join(a.cfg.Dir, "d.img")
			_, err := a.createPool(ctx, control.PoolCreate{Guest: "a", Name: "tank", Devices: []string{"d.img"}})
			if (err != nil) != (c.giveUp || c.err != nil) {
				t.Errorf("%v", err)
			}
			if c.giveUp && !strings.Contains(err.Error(), "`pollux guest restart a` makes it") {
				t.Errorf("%v", err)
			}
			p := next(t, a, "a")
			if p.Manual != c.manual || p.Create != c.create || there(dev) == c.manual {
				t.Errorf("device is there: %v; %+v", there(dev), p)
			}
			if !c.manual && (p.Name != "tank" || len(p.Devices) != 1 || p.Devices[0] != dev) {
				t.Errorf("%+v", p)
			}
			if now := a.settings().Guest("a").Pool; now.Manual != c.manual || now.Create != c.create {
				t.Errorf("in force: %+v", now)
			}
		})
	}
}

// TestDeviceWithoutAnswer: the same for a device that is added.
func TestDeviceWithoutAnswer(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	a := answering(t, control.Handlers{AddDevice: func(ctx context.Context, _ string, _ control.PoolAdd) (control.Pool, error) {
		cancel()
		<-ctx.Done()
		return control.Pool{}, ctx.Err()
	}})
	before := next(t, a, "b").Devices
	dev := filepath.Join(a.cfg.Dir, "more.img")
	if _, err := a.addDevice(ctx, a.cfg.Guest("b").Pool.Name, control.PoolAdd{Device: dev}); err == nil {
		t.Error("nobody answered, and yet it is added")
	}
	if now := next(t, a, "b").Devices; len(now) != len(before)+1 || now[len(before)] != dev || !there(dev) {
		t.Errorf("%q", now)
	}
}

// TestPoolThatCannotBeRecorded: nothing is asked of the guest, and what was
// half recorded is taken back.
func TestPoolThatCannotBeRecorded(t *testing.T) {
	a := answering(t, control.Handlers{
		CreatePool: func(context.Context, control.PoolCreate) (control.Pool, error) {
			t.Error("the guest was asked")
			return control.Pool{}, nil
		},
		AddDevice: func(context.Context, string, control.PoolAdd) (control.Pool, error) {
			t.Error("the guest was asked")
			return control.Pool{}, nil
		},
	})
	if err := os.MkdirAll(filepath.Join(config.EffectivePath(a.cfg.Dir), "in the way"), 0o700); err != nil {
		t.Fatal(err)
	}
	_, err := a.createPool(t.Context(), control.PoolCreate{Guest: "a", Name: "tank", Devices: []string{"d.img"}})
	if err == nil || !strings.Contains(err.Error(), "effective.json") {
		t.Errorf("%v", err)
	}
	if p := next(t, a, "a"); !p.Manual || there(filepath.Join(a.cfg.Dir, "d.img")) {
		t.Errorf("%+v", p)
	}
	before := next(t, a, "b").Devices
	_, err = a.addDevice(t.Context(), a.cfg.Guest("b").Pool.Name, control.PoolAdd{Device: "more.img"})
	if err == nil || !strings.Contains(err.Error(), "effective.json") {
		t.Errorf("%v", err)
	}
	if now := next(t, a, "b").Devices; len(now) != len(before) {
		t.Errorf("%q", now)
	}
}

// TestVolumeThatStays: a volume that its guest does not delete is there still,
// and no event tells otherwise.
func TestVolumeThatStays(t *testing.T) {
	a := answering(t, control.Handlers{
		Volumes: func(context.Context) ([]control.Volume, error) {
			return []control.Volume{{Name: "v", Guest: "b"}}, nil
		},
		DeleteVolume: func(context.Context, string) error {
			return control.NewError(control.KindRefused, "volume \"v\" has 2 connections", "detach its clients first")
		},
	})
	err := a.deleteVolume(t.Context(), "v")
	if control.KindOf(err) != control.KindRefused || !strings.Contains(err.Error(), "2 connections") {
		t.Errorf("%v", err)
	}
	if e, _ := a.events.since(0); len(e) != 0 {
		t.Errorf("%+v", e)
	}
}
