package pool

import (
	"context"
	"errors"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/dedup"
)

// A volume may share blocks from its creation on, and does so after the death of its
// guest, too. What it is not to share is refused before anything is made.
func TestCreateSharing(t *testing.T) {
	r := newRigWithLog(t, 1, testSize, 16<<20)
	r.mustOpen()
	ctx := context.Background()
	if v, err := r.CreateSharing(ctx, "v", 64<<20, 8); err != nil || v.Run != 8 {
		t.Fatalf("%+v, %v", v, err)
	}
	for _, run := range []int{-1, dedup.MaxRun + 1} {
		if _, err := r.CreateSharing(ctx, "w", 64<<20, run); !errors.Is(err, block.ErrInvalid) {
			t.Errorf("THN %d: %v", run, err)
		}
	}
	r.die()
	r.mustOpen()
	if list := r.Volumes(); len(list) != 1 || list[0].Run != 8 {
		t.Errorf("%+v", list)
	}
	v, err := r.Volume("v")
	if err != nil {
		t.Fatal(err)
	}
	data := content(1, 100)
	r.put(v, 0, data)
	if written, shared := r.put(v, 1000, data); written != 0 || shared != 100 {
		t.Errorf("%d blocks were written and %d shared", written, shared)
	}
	r.shut()
}
