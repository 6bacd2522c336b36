package ring

import (
	"errors"
	"net/url"
	"path/filepath"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/hpditest"
	"github.com/pollux-storage/pollux/hpdi/mem"
)

// serve serves dev at a socket until the test ends, and returns its path.
func serve(t testing.TB, dev hpdi.Device) (string, *Server) {
	t.Helper()
	path := filepath.Join(t.TempDir(), "ring.sock")
	return path, serveAt(t, path, dev)
}

func serveAt(t testing.TB, path string, dev hpdi.Device) *Server {
	t.Helper()
	s, err := NewServer(dev, ServeOptions{Poll: 20 * time.Microsecond})
	if err != nil {
		t.Fatal(err)
	}
	l, err := Listen(path)
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Serve(l) }()
	t.Cleanup(func() {
		s.Close()
		if err := <-done; err != nil {
			t.Error(err)
		}
		l.Close()
	})
	return s
}

func memory(t testing.TB, size int64) hpdi.Device {
	t.Helper()
	dev, err := mem.New("memory", size)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := dev.Close(); err != nil {
			t.Error(err)
		}
	})
	return dev
}

func open(t testing.TB, path string, o Options) hpdi.Device {
	t.Helper()
	d, err := Open(t.Context(), path, o)
	if err != nil {
		t.Fatal(err)
	}
	return d
}

func TestConformance(t *testing.T) {
	hpditest.Run(t, func(t *testing.T) hpdi.Device {
		path, _ := serve(t, memory(t, hpditest.MinSize))
		return open(t, path, Options{Queues: 8, Entries: 64, Poll: 20 * time.Microsecond, Reconnect: time.Minute})
	})
}

// A ring of two slots, which never looks before it sleeps.
func TestConformanceSmall(t *testing.T) {
	hpditest.Run(t, func(t *testing.T) hpdi.Device {
		path, _ := serve(t, memory(t, hpditest.MinSize))
		return open(t, path, Options{Queues: 8, Entries: 2, Reconnect: time.Minute})
	})
}

func TestParseOptions(t *testing.T) {
	o, err := ParseOptions(url.Values{"queues": {"9"}, "entries": {"100"}, "poll": {"1ms"}, "reconnect": {"2s"}, "size": {"1GiB"}})
	if want := (Options{Queues: 9, Entries: 100, Poll: time.Millisecond, Reconnect: 2 * time.Second, Size: 1 << 30}); err != nil || o != want {
		t.Errorf("%+v, %v", o, err)
	}
	if s, err := o.shape(); err != nil || s.Queues != 9 || s.Entries != 128 || s.Session == 0 {
		t.Errorf("%+v, %v", s, err)
	}
	for _, bad := range []url.Values{{"queues": {"0"}}, {"queues": {"65"}}, {"entries": {"1"}}, {"poll": {"fast"}}, {"other": {"1"}}} {
		if _, err := ParseOptions(bad); !errors.Is(err, hpdi.ErrProperty) {
			t.Errorf("%v: %v", bad, err)
		}
	}
}
