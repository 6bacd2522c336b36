package nbd

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"log/slog"
	"net"
	"os"
	"sync"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/export/nbd/nbdtest"
	"github.com/pollux-storage/pollux/internal/nbdproto"
)

// script is a connection whose client says what it was given, in pieces, and
// keeps the answers.
type script struct {
	mu     sync.Mutex
	in     []byte
	piece  int
	out    bytes.Buffer
	closed bool
}

func (s *script) Read(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return 0, net.ErrClosed
	}
	if len(s.in) == 0 {
		return 0, io.EOF
	}
	n := copy(p, s.in[:min(len(s.in), s.piece)])
	s.in = s.in[n:]
	return n, nil
}

func (s *script) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		return 0, net.ErrClosed
	}
	return s.out.Write(p)
}

func (s *script) Close() error {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.closed = true
	return nil
}
func (s *script) LocalAddr() net.Addr              { return &net.UnixAddr{} }
func (s *script) RemoteAddr() net.Addr             { return &net.UnixAddr{} }
func (s *script) SetDeadline(time.Time) error      { return nil }
func (s *script) SetReadDeadline(time.Time) error  { return nil }
func (s *script) SetWriteDeadline(time.Time) error { return nil }

func cat(parts ...[]byte) []byte { return bytes.Join(parts, nil) }

var helloBytes = binary.BigEndian.AppendUint32(nil, nbdproto.FlagFixedNewstyle|nbdproto.FlagNoZeroes)

// serveScript runs a connection on what a client said and returns the answers.
func serveScript(tb testing.TB, v *nbdtest.Volume, in []byte, piece int) []byte {
	s, err := New(Config{
		Exports: &exports{list: []Export{{Name: "v", Description: "d", Volume: v}}},
		Logger:  slog.New(slog.DiscardHandler),
		Limits:  Limits{Requests: 4, Bytes: 1 << 20, StagedBytes: 32 << 10},
	})
	if err != nil {
		tb.Fatal(err)
	}
	nc := &script{in: in, piece: max(1, piece)}
	newConn(s, nc).serve(context.Background())
	if n := v.Staged(); n != 0 {
		tb.Fatalf("%d writes are neither committed nor aborted", n)
	}
	return nc.out.Bytes()
}

func FuzzHandshake(f *testing.F) {
	opts := [][]byte{
		optionBytes(nbdproto.OptList, nil),
		optionBytes(nbdproto.OptInfo, goData("v", nbdproto.InfoName, nbdproto.InfoDescription, nbdproto.InfoBlockSize)),
		optionBytes(nbdproto.OptGo, goData("")),
		optionBytes(nbdproto.OptStructured, nil),
		optionBytes(nbdproto.OptSetContext, contextData("v", nbdproto.ContextAllocation, "x:y")),
		optionBytes(nbdproto.OptListContext, contextData("v")),
		optionBytes(nbdproto.OptStartTLS, nil),
		optionBytes(nbdproto.OptExportName, []byte("v")),
		optionBytes(nbdproto.OptAbort, nil),
		optionBytes(4711, []byte("data")),
		optionBytes(nbdproto.OptGo, make([]byte, 20<<10)),
	}
	for _, o := range opts {
		f.Add(cat(helloBytes, o), 1000)
		f.Add(cat(helloBytes, opts[3], o, o), 1)
	}
	f.Add(cat(helloBytes, cat(opts...)), 7)
	f.Add(cat(make([]byte, 4), opts[7]), 7)
	f.Fuzz(func(t *testing.T, in []byte, piece int) {
		out := serveScript(t, nbdtest.New("v", testSize), in, piece%70000)
		if len(out) < 18 {
			t.Fatal("no greeting")
		}
	})
}

func FuzzRequests(f *testing.F) {
	enter := cat(helloBytes, optionBytes(nbdproto.OptStructured, nil),
		optionBytes(nbdproto.OptSetContext, contextData("v", nbdproto.ContextAllocation)), optionBytes(nbdproto.OptGo, goData("v")))
	p := pattern(1, 9000)
	seeds := [][]byte{
		requestBytes(nbdproto.CmdWrite, nbdproto.CmdFlagFUA, 1, 100, 9000, p),
		requestBytes(nbdproto.CmdRead, 0, 2, 0, 200000, nil),
		requestBytes(nbdproto.CmdRead, nbdproto.CmdFlagDF, 2, 50, 20000, nil),
		requestBytes(nbdproto.CmdWrite, 0, 3, testSize-100, 9000, p),
		requestBytes(nbdproto.CmdTrim, 0, 4, 0, 8192, nil),
		requestBytes(nbdproto.CmdWriteZeroes, nbdproto.CmdFlagFastZero|nbdproto.CmdFlagNoHole, 5, 5, 100000, nil),
		requestBytes(nbdproto.CmdBlockStatus, nbdproto.CmdFlagReqOne, 6, 0, 1<<20, nil),
		requestBytes(nbdproto.CmdCache, 0, 7, 0, 4096, nil),
		requestBytes(nbdproto.CmdFlush, 0, 8, 0, 0, nil),
		requestBytes(nbdproto.CmdWrite, 0, 9, 0, 1<<31, p),
		requestBytes(1000, 0xffff, 10, 1<<63, 1<<31, nil),
		requestBytes(nbdproto.CmdDisc, 0, 0, 0, 0, nil),
	}
	for i, s := range seeds {
		f.Add(s, 100000, byte(i))
		f.Add(cat(s, seeds[1], s, seeds[8]), 13, byte(i))
	}
	f.Add(cat(seeds...), 64<<10, byte(2))
	f.Fuzz(func(t *testing.T, in []byte, piece int, hook byte) {
		v := nbdtest.New("v", testSize)
		var calls int
		var mu sync.Mutex
		v.Hook = func(ctx context.Context, op nbdtest.Op, off, n int64) error {
			mu.Lock()
			calls++
			k := calls
			mu.Unlock()
			switch {
			case hook&1 != 0 && k%2 == 0:
				return wouldWait(ctx, op, off, n)
			case hook&2 != 0 && k%5 == 0:
				return os.ErrInvalid // some error of a device
			}
			return nil
		}
		out := serveScript(t, v, cat(enter, in), piece%200000)
		if err := checkReplies(out); err != nil {
			t.Fatal(err)
		}
	})
}

// checkReplies checks the framing of everything a server said under structured
// replies; a cut at the end is allowed.
func checkReplies(b []byte) error {
	b = b[18:]
	for len(b) >= 20 && binary.BigEndian.Uint64(b) == nbdproto.MagicOptReply {
		n := 20 + int(binary.BigEndian.Uint32(b[16:]))
		b = b[min(n, len(b)):]
	}
	for len(b) >= 16 {
		n := nbdproto.SimpleSize
		switch binary.BigEndian.Uint32(b) {
		case nbdproto.MagicSimple:
		case nbdproto.MagicStructured:
			if len(b) < nbdproto.ChunkSize {
				return nil
			}
			if n = nbdproto.ChunkSize + int(binary.BigEndian.Uint32(b[16:])); n > testSize+nbdproto.DataChunkSize {
				return errors.New("a chunk is longer than the export")
			}
		default:
			return errors.New("a reply starts with no magic number")
		}
		b = b[min(n, len(b)):]
	}
	return nil
}
