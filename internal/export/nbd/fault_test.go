package nbd

import (
	"bytes"
	"context"
	"log/slog"
	"strings"
	"sync"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/export/nbd/nbdtest"
	"github.com/pollux-storage/pollux/internal/nbdproto"
)

// lockedBuffer is a log that connections share.
type lockedBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *lockedBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *lockedBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

// Damage that a client meets is in the log with its address, however the client
// met it and whatever it makes of the answer; a client that goes on trying does
// not fill the log.
func TestFaultsAreLogged(t *testing.T) {
	for _, op := range []nbdtest.Op{nbdtest.OpTryRead, nbdtest.OpRead} {
		v := nbdtest.New("v", 1<<20)
		v.Hook = func(ctx context.Context, now nbdtest.Op, off, n int64) error {
			if now == op {
				return &block.CorruptError{What: "block", Where: "0:4711", Why: "checksum"}
			}
			return wouldWait(ctx, now, off, n)
		}
		var log lockedBuffer
		h := start(t, Config{Exports: &exports{list: []Export{{Name: "v", Volume: v}}}, Logger: slog.New(slog.NewTextHandler(&log, nil))})
		c := h.dialUnix().enter("v")
		for range 100 {
			c.expect(nbdproto.EIO, nbdproto.CmdRead, 0, 8192, 4096, nil)
		}
		c.expect(nbdproto.EOK, nbdproto.CmdFlush, 0, 0, 0, nil)
		h.stop()
		text := log.String()
		if n := strings.Count(text, "request failed"); n != 7 {
			t.Errorf("100 faults are logged %d times, want 7", n)
		}
		for _, want := range []string{"level=ERROR", "command=read", "offset=8192", "export=v", "0:4711", "failed=64"} {
			if !strings.Contains(text, want) {
				t.Errorf("the log lacks %s:\n%.500s", want, text)
			}
		}
	}
}
