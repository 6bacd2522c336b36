package host

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pollux-storage/pollux/internal/control"
)

func TestEventsAreBoundedAndNumbered(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events.log")
	l, err := openEvents(path, 4096)
	if err != nil {
		t.Fatal(err)
	}
	for range 200 {
		if err := l.add(control.Event{Kind: "k", Message: strings.Repeat("x", 50)}); err != nil {
			t.Fatal(err)
		}
	}
	l.close()
	for _, p := range []string{path, path + ".1"} {
		if st, err := os.Stat(p); err != nil || st.Size() > 4096 {
			t.Errorf("%s: %v, %v", p, st, err)
		}
	}
	// A crash cut the last line.
	f, err := os.OpenFile(path, os.O_WRONLY|os.O_APPEND, 0)
	if err != nil {
		t.Fatal(err)
	}
	_, _ = f.WriteString(`{"seq":201,"ki`)
	_ = f.Close()
	l, err = openEvents(path, 4096)
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	if err := l.add(control.Event{Kind: "next"}); err != nil {
		t.Fatal(err)
	}
	got, _ := l.since(199)
	if len(got) != 2 || got[1].Seq != 201 || got[1].Kind != "next" {
		t.Errorf("%+v", got)
	}
}

func TestEventsFollow(t *testing.T) {
	l, err := openEvents(filepath.Join(t.TempDir(), "events.log"), 1<<20)
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	synctest.Test(t, func(t *testing.T) {
		l.more = make(chan struct{}) // of the bubble
		end := make(chan struct{})
		stop := errors.New("enough")
		done := make(chan error, 1)
		n := 0
		go func() {
			done <- l.serve(context.Background(), control.EventQuery{Follow: true}, end, func(control.Event) error {
				if n++; n == 3 {
					return stop
				}
				return nil
			})
		}()
		for range 3 {
			time.Sleep(time.Hour)
			if err := l.add(control.Event{Kind: "k"}); err != nil {
				t.Error(err)
			}
		}
		if err := <-done; !errors.Is(err, stop) {
			t.Error(err)
		}
	})
}

// TestEventsInMemory: few enough are held in memory, the newest, and followers
// get those also that no file takes.
func TestEventsInMemory(t *testing.T) {
	path := filepath.Join(t.TempDir(), "events.log")
	l, err := openEvents(path, 1<<10)
	if err != nil {
		t.Fatal(err)
	}
	defer l.close()
	if err := os.MkdirAll(filepath.Join(path+".1", "in the way"), 0o700); err != nil {
		t.Fatal(err)
	}
	failed := 0
	for range 2*keep + 1 {
		if l.add(control.Event{Kind: "k", Message: strings.Repeat("x", 100)}) != nil {
			failed++
		}
	}
	if failed == 0 {
		t.Error("the file was put aside in the place of a folder")
	}
	if len(l.events) != keep || l.events[keep-1].Seq != 2*keep+1 {
		t.Errorf("%d events, up to %d", len(l.events), l.events[len(l.events)-1].Seq)
	}
	for _, c := range []struct {
		ended bool
		want  error
	}{{true, nil}, {false, context.Canceled}} {
		ctx, cancel := context.WithCancel(t.Context())
		end := make(chan struct{})
		n := 0
		err := l.serve(ctx, control.EventQuery{Last: 3, Follow: true}, end, func(control.Event) error {
			if n++; n == 3 && c.ended {
				close(end)
			} else if n == 3 {
				cancel()
			}
			return nil
		})
		cancel()
		if !errors.Is(err, c.want) || n != 3 {
			t.Errorf("ended %v: %d events, %v", c.ended, n, err)
		}
	}
}

func FuzzParseEvent(f *testing.F) {
	f.Add([]byte(`{"seq":1,"time":"2025-01-01T00:00:00Z","kind":"k","fields":{"a":"b"}}`))
	f.Add([]byte(`{"seq":-1}`))
	f.Fuzz(func(t *testing.T, p []byte) { _, _ = parseEvent(p) })
}
