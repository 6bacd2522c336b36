package nbdclient

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"path/filepath"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/export/nbd"
	"github.com/pollux-storage/pollux/internal/export/nbd/nbdtest"
)

// one offers one volume.
type one struct{ v *nbdtest.Volume }

func (o one) Lookup(name string) (nbd.Export, error) {
	if name != o.v.Info().Name {
		return nbd.Export{}, block.ErrNotFound
	}
	return nbd.Export{Name: name, Volume: o.v}, nil
}

func (o one) List() []nbd.Export {
	x, _ := o.Lookup(o.v.Info().Name)
	return []nbd.Export{x}
}

// serve runs a server on l until stop is called, which cuts its clients.
func serve(t *testing.T, l net.Listener, v *nbdtest.Volume) (stop func()) {
	t.Helper()
	srv, err := nbd.New(nbd.Config{Exports: one{v}})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		if err := srv.Serve(ctx, l); !errors.Is(err, context.Canceled) {
			t.Errorf("Serve: %v", err)
		}
	}()
	return func() { cancel(); <-ended }
}

func TestNothingIsLostWhenConnectionsAre(t *testing.T) {
	for _, structured := range []bool{false, true} {
		t.Run(fmt.Sprintf("structured=%t", structured), func(t *testing.T) {
			socket := filepath.Join(t.TempDir(), "s")
			l, err := net.Listen("unix", socket)
			if err != nil {
				t.Fatal(err)
			}
			defer l.Close()
			v := nbdtest.New("disk", 1<<20)
			stop := serve(t, l, v)
			c, err := New(Options{URI: "nbd+unix:///disk?socket=" + socket, Structured: structured})
			if err != nil {
				t.Fatal(err)
			}
			defer c.Close()
			var wg sync.WaitGroup
			for worker := range 8 {
				wg.Go(func() { hammer(t, c, worker) })
			}
			// Cut them while they work: each time after some more calls.
			for range 20 {
				for before := v.Calls(nbdtest.OpTryStage); v.Calls(nbdtest.OpTryStage) < before+40 && !t.Failed(); {
					time.Sleep(time.Millisecond)
				}
				stop()
				stop = serve(t, l, v)
			}
			wg.Wait()
			stop()
			st := c.Stats()
			if st.Connects < 2 || st.Refused > 0 || c.Size() != 1<<20 {
				t.Errorf("%+v, size %d", st, c.Size())
			}
		})
	}
}

// hammer writes and reads back blocks that no other worker touches.
func hammer(t *testing.T, c *Client, worker int) {
	rng := rand.New(rand.NewPCG(uint64(worker), 1))
	want := make([]byte, 128<<10)
	base := int64(worker) * int64(len(want))
	for range 400 {
		off := rng.IntN(len(want) - 9000)
		n := 1 + rng.IntN(9000)
		r := &Request{Command: Write, Offset: base + int64(off)}
		switch rng.IntN(4) {
		case 0:
			r.Command, r.Length = Trim, n
			clear(want[off : off+n])
		case 1:
			r.Command, r.Length, r.NoHole = WriteZeroes, n, true
			clear(want[off : off+n])
		default:
			r.Data = make([]byte, n)
			for i := range r.Data {
				r.Data[i] = byte(rng.Uint32())
			}
			copy(want[off:], r.Data)
		}
		if err := c.Do(t.Context(), r); err != nil {
			t.Errorf("worker %d: %v", worker, err)
			return
		}
		if last := r.Attempts[len(r.Attempts)-1]; last.Lost || last.Ended.Before(last.Sent) {
			t.Errorf("attempts %+v", r.Attempts)
		}
		got := &Request{Command: Read, Offset: base + int64(off), Data: make([]byte, n)}
		if err := c.Do(t.Context(), got); err != nil {
			t.Errorf("worker %d: %v", worker, err)
			return
		}
		if !bytes.Equal(got.Data, want[off:off+n]) {
			t.Errorf("worker %d: block at %d differs", worker, off)
			return
		}
	}
}

func TestErrorsOfTheServer(t *testing.T) {
	socket := filepath.Join(t.TempDir(), "s")
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	v := nbdtest.New("disk", 1<<20)
	v.Hook = func(_ context.Context, op nbdtest.Op, _, _ int64) error {
		if op == nbdtest.OpTryStage {
			return block.ErrNoSpace
		}
		return nil
	}
	defer serve(t, l, v)()
	for _, structured := range []bool{false, true} {
		c, err := New(Options{URI: "nbd+unix:///disk?socket=" + socket, Structured: structured})
		if err != nil {
			t.Fatal(err)
		}
		if err := c.Do(t.Context(), &Request{Command: Write, Data: make([]byte, 4096)}); !errors.Is(err, ENOSPC) {
			t.Errorf("%v instead of ENOSPC", err)
		}
		if err := c.Do(t.Context(), &Request{Command: Read, Offset: 1 << 20, Data: make([]byte, 1)}); !errors.Is(err, EINVAL) {
			t.Errorf("%v instead of EINVAL", err)
		}
		c.Close()
		if err := c.Do(t.Context(), &Request{Command: Flush}); !errors.Is(err, ErrClosed) {
			t.Errorf("%v after Close", err)
		}
	}
}

func TestRefusalsAreCounted(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, err := New(Options{URI: "nbd+unix:///x?socket=/nonexistent/socket", Redial: time.Second})
		if err != nil {
			t.Fatal(err)
		}
		time.Sleep(10*time.Second - time.Millisecond)
		synctest.Wait()
		if st := c.Stats(); st.Failed != 10 || st.Connects != 0 {
			t.Errorf("%+v", st)
		}
		c.Close()
	})
}

func TestParseURI(t *testing.T) {
	for uri, want := range map[string]string{
		"nbd://127.0.0.11:10809/disk":     "tcp 127.0.0.11:10809 disk",
		"nbd+unix:///d%20k?socket=/a/b.s": "unix /a/b.s d k",
		"http://x/y":                      "",
		"nbd+unix:///x":                   "",
	} {
		network, address, export, err := ParseURI(uri)
		if got := fmt.Sprintf("%s %s %s", network, address, export); want != "" && (got != want || err != nil) || want == "" && err == nil {
			t.Errorf("%s: %s, %v", uri, got, err)
		}
	}
}
