package guest

import (
	"bytes"
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/file"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/mirror"
)

// fakeMirror has some tracks to be resilvered and may fail.
type fakeMirror struct {
	mu           sync.Mutex // guards what follows
	left, tidied int
	fails        error
}

func (f *fakeMirror) Tidy() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.tidied++
	return nil
}

func (f *fakeMirror) state() (left, tidied int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.left, f.tidied
}

func (f *fakeMirror) fail(err error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.fails = err
}

func (f *fakeMirror) Resync(n int) (bool, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.fails != nil {
		return false, f.fails
	}
	f.left = max(0, f.left-n)
	return f.left == 0, nil
}

// Resilvering keeps to its rate, marks are cleared meanwhile and after, and an
// error that stays is told once.
func TestKeepMirror(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const resilverRate = 50 // tracks a second
		var said bytes.Buffer
		ctx, cancel := context.WithCancel(t.Context())
		m := &fakeMirror{left: 10 * resilverRate}
		ended := make(chan struct{})
		go func() {
			keepMirror(ctx, m, resilverRate*block.TrackBytes, slog.New(slog.NewTextHandler(&said, nil)))
			close(ended)
		}()
		time.Sleep(5 * time.Second)
		synctest.Wait()
		if left, tidied := m.state(); left < 4*resilverRate || left > 6*resilverRate || tidied < 2 {
			t.Errorf("after 5 of 10 seconds %d tracks are left, and marks were cleared %d times", left, tidied)
		}
		time.Sleep(10 * time.Second)
		synctest.Wait()
		if left, tidied := m.state(); left != 0 || tidied < 6 {
			t.Errorf("%d tracks are left, marks were cleared %d times", left, tidied)
		}
		m.fail(errors.New("no copy"))
		time.Sleep(20 * time.Second)
		cancel()
		<-ended
		if n := strings.Count(said.String(), "no copy"); n != 1 {
			t.Errorf("told %d times: %s", n, said.String())
		}
	})
}

// mirrorFiles makes files and a mirror of them.
func mirrorFiles(t *testing.T, names ...string) (set config.Pool) {
	t.Helper()
	dir := t.TempDir()
	var devs []hpdi.Device
	for _, n := range names {
		path := filepath.Join(dir, n)
		if err := os.WriteFile(path, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(path, 8<<20); err != nil {
			t.Fatal(err)
		}
		d, err := file.Open(path, file.Options{Lock: true})
		if err != nil {
			t.Fatal(err)
		}
		devs = append(devs, d)
		set.Devices = append(set.Devices, path)
	}
	if set.Copies = len(names); len(names) > 1 {
		if _, err := mirror.Create(devs); err != nil {
			t.Fatal(err)
		}
	}
	closeAll(devs)
	return set
}

func TestDisks(t *testing.T) {
	locked := func(path string) (hpdi.Device, error) { return file.Open(path, file.Options{Lock: true}) }
	for _, tt := range []struct {
		name    string
		spoil   func(t *testing.T, path string) // of the second copy
		without bool
		fails   error
	}{
		{"all are there", func(*testing.T, string) {}, false, nil},
		{"one is missing", func(t *testing.T, path string) { _ = os.Remove(path) }, true, nil},
		{"one is empty", func(t *testing.T, path string) { _ = os.Truncate(path, 0); _ = os.Truncate(path, 8<<20) }, true, nil},
		{"one has shrunk", func(t *testing.T, path string) { _ = os.Truncate(path, 4<<20) }, true, nil},
		{"one is in use", func(t *testing.T, path string) {
			d, err := locked(path)
			if err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() { _ = d.Close() })
		}, false, hpdi.ErrLocked},
	} {
		t.Run(tt.name, func(t *testing.T) {
			set := mirrorFiles(t, "x", "y")
			tt.spoil(t, set.Devices[1])
			var without []string
			devs, err := disks(&set, opening{open: locked, without: func(path string, _ error) { without = append(without, path) }})
			defer func() { closeAll(devs) }()
			if !errors.Is(err, tt.fails) {
				t.Fatalf("got %v, want %v", err, tt.fails)
			}
			if ms := mirrors(devs); err == nil && (len(ms) != 1 || len(devs) != 1 || ms[0].Status().Copies[0].State != mirror.InSync) {
				t.Errorf("got %d devices, %d mirrors", len(devs), len(ms))
			}
			if tt.without != (len(without) == 1 && without[0] == set.Devices[1]) {
				t.Errorf("without %v", without)
			}
		})
	}
	set := mirrorFiles(t, "x", "y")
	for _, path := range set.Devices {
		_ = os.Remove(path)
	}
	if _, err := disks(&set, opening{open: locked, without: func(string, error) {}}); !errors.Is(err, block.ErrNotFound) {
		t.Errorf("no copy is left: %v", err)
	}
	single := mirrorFiles(t, "z")
	_ = os.Remove(single.Devices[0])
	if _, err := disks(&single, opening{open: locked, without: func(string, error) {}}); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a device without a copy is missing: %v", err)
	}
}

// A pair that has written without a copy does not take that copy for the pool when
// the other is gone, unless it is told to.
func TestDisksOld(t *testing.T) {
	cfg := config.Config{Dir: t.TempDir()}
	set := mirrorFiles(t, "x", "y")
	o := opening{open: func(path string) (hpdi.Device, error) { return file.Open(path, file.Options{Lock: true}) },
		without: func(string, error) {}, mirrors: memory{Mirrors: cfg.Mirrors(), log: slog.New(slog.DiscardHandler)}}
	devs, err := disks(&set, o)
	if err != nil {
		t.Fatal(err)
	}
	if err := mirrors(devs)[0].Detach(0); err != nil {
		t.Fatal(err)
	}
	closeAll(devs)
	away := set.Devices[1] + ".away"
	if err := os.Rename(set.Devices[1], away); err != nil {
		t.Fatal(err)
	}
	if _, err = disks(&set, o); !errors.Is(err, mirror.ErrOld) {
		t.Fatalf("only the copy that was taken out: %v", err)
	}
	memories, err := filepath.Glob(filepath.Join(cfg.Dir, "mirrors", "*.json"))
	if err != nil || len(memories) != 1 {
		t.Fatalf("remembered: %v, %v", memories, err)
	}
	if err := os.WriteFile(memories[0], []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err = disks(&set, o); err == nil || !strings.Contains(err.Error(), memories[0]) {
		t.Errorf("what is remembered is damaged: %v", err)
	}
	o.mirrors.acceptLoss = true
	if devs, err = disks(&set, o); err != nil {
		t.Fatal(err)
	}
	closeAll(devs)
	o.mirrors.acceptLoss = false
	if devs, err = disks(&set, o); err != nil {
		t.Errorf("after the loss was accepted: %v", err)
	}
	closeAll(devs)
}
