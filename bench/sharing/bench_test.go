package main

import (
	"path/filepath"
	"testing"
	"time"
)

const testMiB = 1 << 20

// Each measurement is made of something small: it ends, and what does not depend on the
// machine is right.
func TestMeasurements(t *testing.T) {
	o := options{out: filepath.Join(t.TempDir(), "out.json"), written: 64 * testMiB, shared: 16 * testMiB, log: 4 * testMiB, cache: 8 * testMiB,
		volumes: 5, deletes: 2, rate: 1000, window: 50 * time.Millisecond}
	if err := run(t.Context(), o, []string{"write"}); err != nil {
		t.Error(err)
	}
	// How much slower others are is the machine's.
	if err := run(t.Context(), o, []string{"delete"}); err != nil && err != errMissed {
		t.Error(err)
	}
	var r report
	if err := r.read(o.out); err != nil {
		t.Fatal(err)
	}
	if len(r.Write) != 3 || r.Write[1].part(r.Write[1].all()) < 1 || r.Write[1].Written.Log != 0 || r.Write[2].Written.Log == 0 {
		t.Errorf("written: %+v", r.Write)
	}
	if r.Delete == nil || len(r.Delete.Rounds) != o.deletes || r.Delete.Rounds[0].Beside.N == 0 {
		t.Errorf("deleted: %+v", r.Delete)
	}
	if err := run(t.Context(), o, []string{"nothing"}); err == nil {
		t.Error("a measurement that does not exist was made")
	}
	o.volumes = 3
	if err := run(t.Context(), o, nil); err == nil {
		t.Error("all volumes were deleted")
	}
}

// A pool is filled until nothing more fits; with deduplication it has an index, more
// metadata and a little less data.
func TestOne(t *testing.T) {
	c := one{Size: 256 * testMiB, Log: 4 * testMiB, Cache: 8 * testMiB, Spill: t.TempDir()}
	off, err := c.measure(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	c.Shares = true
	on, err := c.measure(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if off.Full.Index != 0 || on.Full.Index == 0 || on.Full.Pages <= off.Full.Pages || on.Full.Data >= off.Full.Data || on.Full.Data < 128*testMiB {
		t.Errorf("without %+v, with %+v", off.Full, on.Full)
	}
}

func TestFill(t *testing.T) {
	const blocks = 1 << 18
	small, err := fillIndex(t.Context(), 128<<10, blocks)
	if err != nil {
		t.Fatal(err)
	}
	whole, err := fillIndex(t.Context(), dense, blocks)
	if err != nil {
		t.Fatal(err)
	}
	if small.Bytes != 128<<10 || small.Every < 16 || whole.Every != 1 || whole.Entries < blocks*999/1000 {
		t.Errorf("%+v, %+v", small, whole)
	}
	counts, err := fillCounts(t.Context(), blocks)
	if err != nil {
		t.Fatal(err)
	}
	if last := counts[len(counts)-1]; len(counts) != 7 || last.References != manyReferences || last.Bytes <= counts[0].Bytes {
		t.Errorf("%+v", counts)
	}
}
