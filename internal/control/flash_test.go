package control

import (
	"context"
	"fmt"
	"slices"
	"testing"
)

// Everything that can be asked of flash reaches its handler with what was asked, and the
// answer comes back.
func TestFlashRequests(t *testing.T) {
	dir := shortDir(t)
	var got []string
	note := func(format string, args ...any) { got = append(got, fmt.Sprintf(format, args...)) }
	start(t, AgentSocket(dir), Handlers{
		Flash: func(_ context.Context, p string) (PoolFlash, error) {
			note("status %s", p)
			return PoolFlash{Pool: p, FlashStatus: FlashStatus{Slots: 7}}, nil
		},
		FlashPolicy: func(_ context.Context, p string) (FlashPolicy, error) {
			note("policy %s", p)
			return FlashPolicy{Pool: p}, nil
		},
		ChangeFlashPolicy: func(_ context.Context, p string, c FlashPolicyChange) (FlashPolicy, error) {
			note("change %s %+v", p, c)
			return FlashPolicy{Pool: p}, nil
		},
		ChangeFlashPin: func(_ context.Context, v string, c FlashPinChange) (PoolFlash, error) {
			note("pin %s %+v", v, c)
			return PoolFlash{Pool: "of " + v}, nil
		},
		EvacuateFlash: func(_ context.Context, p string, e FlashEvacuation) (PoolFlash, error) {
			note("evacuate %s %s", p, e.Action)
			return PoolFlash{Pool: p}, nil
		},
		ExplainFlash: func(_ context.Context, v string, at FlashPlace) (FlashExplanation, error) {
			note("explain %s %d", v, at.Offset)
			return FlashExplanation{Volume: v}, nil
		},
		SimulateFlash: func(_ context.Context, p string, t FlashTrial) (FlashPrediction, error) {
			note("simulate %s %+v", p, t)
			return FlashPrediction{Pool: p}, nil
		},
	})
	c, ctx := NewClient(dir), t.Context()
	defer c.Close()
	answered := func(got string, err error, want string) {
		t.Helper()
		if err != nil || got != want {
			t.Errorf("%q instead of %q, %v", got, want, err)
		}
	}
	const name = "a/b %"
	f, err := c.Flash(ctx, name)
	answered(f.Pool, err, name)
	if f.Slots != 7 {
		t.Errorf("%+v", f)
	}
	p, err := c.FlashPolicy(ctx, name)
	answered(p.Pool, err, name)
	p, err = c.ChangeFlashPolicy(ctx, name, FlashPolicyChange{Class: "sata", Set: map[string]string{"saves": "1ms"}, Reset: []string{"x"}, Classes: map[string]string{"d": ""}})
	answered(p.Pool, err, name)
	f, err = c.ChangeFlashPin(ctx, name, FlashPinChange{Action: PinAdd, Offset: 1, Length: 2})
	answered(f.Pool, err, "of "+name)
	f, err = c.EvacuateFlash(ctx, name, FlashEvacuation{Action: EvacuateStop})
	answered(f.Pool, err, name)
	x, err := c.ExplainFlash(ctx, name, FlashPlace{Offset: 5})
	answered(x.Volume, err, name)
	s, err := c.SimulateFlash(ctx, name, FlashTrial{FlashPolicyChange: FlashPolicyChange{ResetAll: true}, Bytes: 9})
	answered(s.Pool, err, name)
	want := []string{
		"status a/b %", "policy a/b %", "change a/b % {Class:sata Set:map[saves:1ms] Reset:[x] ResetAll:false Classes:map[d:]}",
		"pin a/b % {Action:add Offset:1 Length:2 All:false}", "evacuate a/b % stop", "explain a/b % 5",
		"simulate a/b % {FlashPolicyChange:{Class: Set:map[] Reset:[] ResetAll:true Classes:map[]} Bytes:9}",
	}
	if !slices.Equal(got, want) {
		t.Errorf("%q\nwant %q", got, want)
	}
}
