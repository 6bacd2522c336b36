package nbd

import (
	"context"
	"errors"
	"os"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/export/nbd/nbdtest"
	"github.com/pollux-storage/pollux/internal/nbdproto"
)

// TestNoDescriptorLeak counts the descriptors of this process.
func TestNoDescriptorLeak(t *testing.T) {
	count := func() int {
		d, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Skip(err)
		}
		return len(d)
	}
	h := serveVolume(t, nbdtest.New("v", testSize), Limits{})
	start := count()
	for range 50 {
		c := h.dialUnix().enter("v")
		c.expect(nbdproto.EOK, nbdproto.CmdFlush, 0, 0, 0, nil)
		c.nc.Close()
	}
	h.srv.CloseExport(context.Background(), "v")
	if n := count(); n > start+2 {
		t.Errorf("%d descriptors, %d before", n, start)
	}
}

func TestValidate(t *testing.T) {
	ok := Config{Exports: &exports{}}
	if err := ok.Validate(); err != nil {
		t.Error(err)
	}
	for name, c := range map[string]Config{
		"no exports":     {},
		"no certificate": {Exports: &exports{}, TLS: TLS{Mode: TLSRequired}},
		"mode":           {Exports: &exports{}, TLS: TLS{Mode: 9}},
		"limits":         {Exports: &exports{}, Limits: Limits{Requests: -1}},
		"option bytes":   {Exports: &exports{}, Limits: Limits{OptionBytes: 1 << 30}},
	} {
		if err := c.Validate(); !errors.Is(err, block.ErrInvalid) {
			t.Errorf("%s: %v", name, err)
		}
	}
}
