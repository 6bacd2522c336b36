package control

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
)

// start serves h at socket for the length of the test.
func start(t *testing.T, socket string, h Handlers) *Server {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(socket), 0o700); err != nil {
		t.Fatal(err)
	}
	ln, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	s := Serve(ln, h)
	t.Cleanup(func() { _ = s.Close(context.Background()) })
	return s
}

func shortDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "plx")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = os.RemoveAll(dir) })
	return dir
}

func TestRoundTrip(t *testing.T) {
	dir := shortDir(t)
	ctx := t.Context()
	start(t, AgentSocket(dir), Handlers{
		Status: func(context.Context) (Status, error) {
			return Status{Protected: true, LastTakeover: &Takeover{Of: "a", By: "b", Total: Duration(31500 * time.Microsecond)}}, nil
		},
		CreateVolume: func(_ context.Context, c VolumeCreate) (Volume, error) {
			if c.Name == "full" {
				return Volume{}, fmt.Errorf("create %q: %w", c.Name, block.ErrNoSpace)
			}
			return Volume{Name: c.Name, Size: c.Size}, nil
		},
		ChangeVolume: func(_ context.Context, name string, c VolumeChange) (Volume, error) {
			return Volume{Name: name + ">" + c.Rename, Size: c.Size}, nil
		},
		Drill: func(_ context.Context, g, d string) error {
			return NewError(KindRefused, "drill "+d+" of "+g, "wait")
		},
	})
	c := NewClient(dir)
	defer c.Close()

	st, err := c.Status(ctx)
	if err != nil || !st.Protected || time.Duration(st.LastTakeover.Total) != 31500*time.Microsecond {
		t.Fatalf("status %+v, %v", st, err)
	}
	if v, err := c.CreateVolume(ctx, VolumeCreate{Name: "x/y", Size: 7}); err != nil || v.Name != "x/y" || v.Size != 7 {
		t.Fatalf("create: %+v, %v", v, err)
	}
	if v, err := c.RenameVolume(ctx, "x/y %", "z"); err != nil || v.Name != "x/y %>z" {
		t.Fatalf("rename: %+v, %v", v, err)
	}
	if _, err := c.CreateVolume(ctx, VolumeCreate{Name: "full"}); KindOf(err) != KindNoSpace {
		t.Fatalf("full pool: kind %q of %v", KindOf(err), err)
	}
	var e *Error
	if err := c.Drill(ctx, "a", DrillKill); !errors.As(err, &e) || e.Kind != KindRefused || e.Hint != "wait" || e.Message != "drill kill of a" {
		t.Fatalf("drill: %v", err)
	}
	if err := c.Down(ctx); KindOf(err) != KindUnsupported {
		t.Fatalf("a missing handler gave %v", err)
	}
}

func TestEventsFollow(t *testing.T) {
	dir := shortDir(t)
	more := make(chan Event)
	start(t, AgentSocket(dir), Handlers{Events: func(ctx context.Context, q EventQuery, emit func(Event) error) error {
		if err := emit(Event{Seq: q.After + 1, Kind: "past"}); err != nil || !q.Follow {
			return err
		}
		for {
			select {
			case e := <-more:
				if err := emit(e); err != nil {
					return err
				}
			case <-ctx.Done():
				return ctx.Err()
			}
		}
	}})
	c := NewClient(dir)
	defer c.Close()
	n := 0
	if err := c.Events(t.Context(), EventQuery{After: 4}, func(e Event) error { n++; return nil }); err != nil || n != 1 {
		t.Fatalf("%d events, %v", n, err)
	}
	stop := errors.New("enough")
	var got []Event
	err := c.Events(t.Context(), EventQuery{Follow: true}, func(e Event) error {
		got = append(got, e)
		if len(got) == 3 {
			return stop
		}
		// Sent only now: the stream must not be buffered on its way.
		go func() { more <- Event{Seq: e.Seq + 1, Kind: "new"} }()
		return nil
	})
	if !errors.Is(err, stop) || len(got) != 3 || got[2].Seq != 3 {
		t.Fatalf("%+v, %v", got, err)
	}
}

func TestFallbackToGuests(t *testing.T) {
	dir := shortDir(t)
	c := NewClient(dir)
	defer c.Close()
	if _, err := c.Status(t.Context()); KindOf(err) != KindNotRunning {
		t.Fatalf("nothing runs, and the error is %v", err)
	}
	for _, g := range []string{"a", "b"} {
		start(t, GuestSocket(dir, g), Handlers{
			Status: func(context.Context) (Status, error) {
				return Status{Guests: []GuestStatus{{Name: g, State: StateServing, Protected: true}}}, nil
			},
			Volumes: func(context.Context) ([]Volume, error) { return []Volume{{Name: "v" + g}}, nil },
			Check: func(context.Context) (CheckReport, error) {
				return CheckReport{OK: g == "a", Pools: []PoolCheck{{Pool: g}}}, nil
			},
			Checking: func(context.Context) ([]CheckProgress, error) {
				return []CheckProgress{{Pool: g, Phase: "data", Done: 1, Total: 2}}, nil
			},
		})
	}
	st, err := c.Status(t.Context())
	if err != nil || len(st.Guests) != 2 || st.Agent.Running || len(st.Alerts) == 0 || st.Guests[0].Protected {
		t.Fatalf("%+v, %v", st, err)
	}
	if v, err := c.Volume(t.Context(), "vb"); err != nil || v.Name != "vb" {
		t.Fatalf("%+v, %v", v, err)
	}
	if r, err := c.Check(t.Context()); err != nil || r.OK || len(r.Pools) != 2 {
		t.Fatalf("%+v, %v", r, err)
	}
	if p, err := c.Checking(t.Context()); err != nil || len(p) != 2 || p[1] != (CheckProgress{Pool: "b", Phase: "data", Done: 1, Total: 2}) {
		t.Fatalf("%+v, %v", p, err)
	}
	if _, err := c.CreateVolume(t.Context(), VolumeCreate{Name: "x"}); KindOf(err) != KindNotRunning {
		t.Fatalf("create without an agent: %v", err)
	}
}
