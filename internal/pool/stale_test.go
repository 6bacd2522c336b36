package pool

import (
	"context"
	"errors"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
)

// Whoever has lost the pool to a higher epoch acknowledges nothing any more
// and ends.
func TestHigherEpochStopsOwner(t *testing.T) {
	r := newRig(t, 1, testSize)
	p, err := Open(context.Background(), r.options())
	if err != nil {
		t.Fatal(err)
	}
	r.Pool = p
	ended := make(chan error, 1)
	go func() { ended <- p.Run(context.Background()) }()
	v := r.volume("v", 1<<20)
	if err := write(v, 0, pattern(1)); err != nil {
		t.Fatal(err)
	}
	if err := p.Region().SetOwner("b", p.Epoch()+1); err != nil {
		t.Fatal(err)
	}
	if err := write(v, 0, pattern(2)); !errors.Is(err, block.ErrStale) {
		t.Errorf("write: %v", err)
	}
	if err := v.Trim(context.Background(), 0, block.Size, block.Tag{}); !errors.Is(err, block.ErrStale) {
		t.Errorf("trim: %v", err)
	}
	if err := p.Probe(context.Background()); !errors.Is(err, block.ErrStale) {
		t.Errorf("probe: %v", err)
	}
	if err := <-ended; !errors.Is(err, block.ErrStale) {
		t.Errorf("run: %v", err)
	}
	if err := p.Close(context.Background()); !errors.Is(err, block.ErrStale) {
		t.Errorf("close: %v", err)
	}
	r.reopen()
	r.mustOpen()
	v, _ = r.Volume("v")
	got := make([]byte, block.Size)
	if err := v.Read(context.Background(), got, 0); err != nil || got[0] != 1 {
		t.Errorf("%v: %d", err, got[0])
	}
	r.shut()
}
