package nbd

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"runtime"
	"sync"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/nbdproto"
)

// flat is a volume that does nothing but copy, so that what is measured is the
// server.
type flat struct {
	mem    []byte
	device bool // nothing can be done without waiting
	writes sync.Pool
}

func (f *flat) Info() block.VolumeInfo {
	return block.VolumeInfo{ID: 1, Name: "v", Size: int64(len(f.mem))}
}
func (f *flat) TryRead(p []byte, off int64) (bool, error) {
	return !f.device, f.Read(context.Background(), p, off)
}
func (f *flat) Read(_ context.Context, p []byte, off int64) error { copy(p, f.mem[off:]); return nil }
func (f *flat) TryStage(off int64, n int) (block.Write, error) {
	if f.device {
		return nil, nil
	}
	return f.Stage(context.Background(), off, n)
}
func (f *flat) Stage(_ context.Context, off int64, n int) (block.Write, error) {
	w, ok := f.writes.Get().(*flatWrite)
	if !ok {
		w = &flatWrite{f: f}
	}
	w.bufs[0] = f.mem[off : off+int64(n)]
	return w, nil
}
func (f *flat) Trim(context.Context, int64, int64, block.Tag) error              { return nil }
func (f *flat) WriteZeroes(context.Context, int64, int64, bool, block.Tag) error { return nil }
func (f *flat) Flush(context.Context) error                                      { return nil }
func (f *flat) OpenSession(context.Context, block.SessionID, int, int) (block.Session, error) {
	return nil, block.ErrUnsupported
}
func (f *flat) Status(_ context.Context, off, n int64, _ int, ext []block.Extent) ([]block.Extent, error) {
	return append(ext, block.Extent{Offset: off, Length: n}), nil
}

type flatWrite struct {
	f    *flat
	bufs [1][]byte
}

func (w *flatWrite) Buffers() [][]byte            { return w.bufs[:] }
func (w *flatWrite) SetTag(block.Tag)             {}
func (w *flatWrite) TryCommit() (bool, error)     { w.Abort(); return true, nil }
func (w *flatWrite) Commit(context.Context) error { w.Abort(); return nil }
func (w *flatWrite) Abort()                       { w.f.writes.Put(w) }

// rounds sends a window of depth equal requests, waits for their replies, and
// does so again.
func rounds(tb testing.TB, nc net.Conn, n, depth int, cmd, flags uint16, size uint32) {
	one := requestBytes(cmd, flags, 1, 4096, size, nil)
	back := nbdproto.SimpleSize
	switch cmd {
	case nbdproto.CmdWrite:
		one = append(one, pattern(1, int(size))...)
	case nbdproto.CmdRead:
		back = nbdproto.DataChunkSize + int(size)
	case nbdproto.CmdBlockStatus:
		back = statusBytes(1)
	}
	var window []byte
	for range depth {
		window = append(window, one...)
	}
	answers := make([]byte, depth*back)
	for ; n > 0; n -= depth {
		sent := window[:min(n, depth)*len(one)]
		if _, err := nc.Write(sent); err != nil {
			tb.Fatal(err)
		}
		if _, err := io.ReadFull(nc, answers[:min(n, depth)*back]); err != nil {
			tb.Fatal(err)
		}
	}
}

var loads = []struct {
	name       string
	cmd, flags uint16
	size       uint32
	depth      int
	device     bool
}{
	{"read4k", nbdproto.CmdRead, 0, 4096, 16, false},
	{"write4k", nbdproto.CmdWrite, 0, 4096, 16, false},
	{"read128k", nbdproto.CmdRead, 0, 128 << 10, 1, false},
	{"write128k", nbdproto.CmdWrite, 0, 128 << 10, 1, false},
	{"read4k-device", nbdproto.CmdRead, 0, 4096, 16, true},
	{"write4k-fulllog", nbdproto.CmdWrite, 0, 4096, 16, true},
	{"write4k-fua", nbdproto.CmdWrite, nbdproto.CmdFlagFUA, 4096, 16, false},
	{"status", nbdproto.CmdBlockStatus, 0, 4096, 16, false},
}

func newFlat(device bool) *flat {
	f := &flat{mem: make([]byte, 1<<20), device: device}
	copy(f.mem, pattern(1, len(f.mem))) // holes would make shorter replies
	return f
}

// TestNoAllocationPerRequest allows what pools that were emptied by a garbage
// collection cost, and nothing per request.
func TestNoAllocationPerRequest(t *testing.T) {
	if raceEnabled {
		t.Skip("the race detector makes pools drop at random")
	}
	for _, l := range loads {
		t.Run(l.name, func(t *testing.T) {
			h := start(t, Config{Exports: &exports{list: []Export{{Name: "v", Volume: newFlat(l.device)}}}})
			c := h.dialUnix().enter("v")
			rounds(t, c.nc, 2000, l.depth, l.cmd, l.flags, l.size) // fills the pools
			const n = 4000
			var before, after runtime.MemStats
			runtime.ReadMemStats(&before)
			rounds(t, c.nc, n, l.depth, l.cmd, l.flags, l.size)
			runtime.ReadMemStats(&after)
			if perRequest := float64(after.Mallocs-before.Mallocs) / n; perRequest > 0.1 {
				t.Errorf("%.2f allocations per request", perRequest)
			}
		})
	}
}

// TestConnectionsUseMemoryAgain: clients that come one after the other have the same
// memory for what they send.
func TestConnectionsUseMemoryAgain(t *testing.T) {
	h := start(t, Config{
		Exports: &exports{list: []Export{{Name: "v", Volume: newFlat(false)}}},
		Logger:  slog.New(slog.DiscardHandler),
	})
	connect := func(n int) {
		for range n {
			nc, err := net.Dial("unix", h.unix)
			if err != nil {
				t.Fatal(err)
			}
			enter(t, nc)
			rounds(t, nc, 1, 1, nbdproto.CmdRead, 0, 4096)
			if err := nc.Close(); err != nil {
				t.Fatal(err)
			}
		}
	}
	connect(10) // fills the pools
	const n = 200
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	connect(n)
	runtime.ReadMemStats(&after)
	// With the race detector pools drop one in four.
	if each := (after.TotalAlloc - before.TotalAlloc) / n; each > inBytes*3/4 {
		t.Errorf("%d bytes were allocated for each connection", each)
	}
}

// BenchmarkConnect is what a client costs until it has its export.
func BenchmarkConnect(b *testing.B) {
	srv, err := New(Config{Exports: &exports{list: []Export{{Name: "v", Volume: newFlat(false)}}}, Logger: slog.New(slog.DiscardHandler)})
	if err != nil {
		b.Fatal(err)
	}
	ln, err := net.Listen("unix", b.TempDir()+"/s")
	if err != nil {
		b.Fatal(err)
	}
	defer ln.Close()
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	wg.Go(func() { _ = srv.Serve(ctx, ln) })
	defer wg.Wait()
	defer cancel()
	b.ReportAllocs()
	for b.Loop() {
		nc, err := net.Dial("unix", ln.Addr().String())
		if err != nil {
			b.Fatal(err)
		}
		enter(b, nc)
		_ = nc.Close()
	}
}

func BenchmarkRequests(b *testing.B) {
	for _, l := range loads {
		b.Run(fmt.Sprintf("%s/qd%d", l.name, l.depth), func(b *testing.B) {
			srv, err := New(Config{Exports: &exports{list: []Export{{Name: "v", Volume: newFlat(l.device)}}}})
			if err != nil {
				b.Fatal(err)
			}
			ln, err := net.Listen("unix", b.TempDir()+"/s")
			if err != nil {
				b.Fatal(err)
			}
			defer ln.Close()
			ctx, cancel := context.WithCancel(context.Background())
			var wg sync.WaitGroup
			wg.Go(func() { _ = srv.Serve(ctx, ln) })
			defer wg.Wait()
			defer cancel()
			nc, err := net.Dial("unix", ln.Addr().String())
			if err != nil {
				b.Fatal(err)
			}
			defer nc.Close()
			enter(b, nc)
			rounds(b, nc, 1000, l.depth, l.cmd, l.flags, l.size)
			b.SetBytes(int64(l.size))
			b.ReportAllocs()
			b.ResetTimer()
			rounds(b, nc, b.N, l.depth, l.cmd, l.flags, l.size)
		})
	}
}

// enter negotiates without looking closely.
func enter(b testing.TB, nc net.Conn) {
	say := cat(helloBytes, optionBytes(nbdproto.OptStructured, nil),
		optionBytes(nbdproto.OptSetContext, contextData("v", nbdproto.ContextAllocation)), optionBytes(nbdproto.OptGo, goData("v")))
	if _, err := nc.Write(say); err != nil {
		b.Fatal(err)
	}
	heard := 18 + 20 + (20 + 4 + len(nbdproto.ContextAllocation) + 20) + (20 + 12 + 20 + 14 + 20)
	if _, err := io.ReadFull(nc, make([]byte, heard)); err != nil {
		b.Fatal(err)
	}
}
