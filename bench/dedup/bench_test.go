package main

import (
	"bytes"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

// Two images of 64 blocks: of the second one 8 blocks and 4 are as in the first, a block
// is of zeroes, and the rest is new.
func TestMeasure(t *testing.T) {
	first, second := make([]byte, 64*block.Size), make([]byte, 64*block.Size)
	r := rand.NewChaCha8([32]byte{1})
	r.Read(first)
	r.Read(second)
	copy(second[16*block.Size:], first[8*block.Size:16*block.Size])
	copy(second[40*block.Size:], first[32*block.Size:36*block.Size])
	clear(second[60*block.Size : 61*block.Size])
	dir := t.TempDir()
	var paths []string
	for name, p := range map[string][]byte{"1": first, "2": second} {
		if err := os.WriteFile(filepath.Join(dir, name), p, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	paths = []string{filepath.Join(dir, "1"), filepath.Join(dir, "2")}
	m, err := measure(t.Context(), paths, true)
	if err != nil {
		t.Fatal(err)
	}
	if m.blocks != 127 || m.zero != 1 || m.exact() != 12 {
		t.Errorf("%d blocks, %d zero, %d saved by exact deduplication", m.blocks, m.zero, m.exact())
	}
	// From the beginning of the disk one track on, and then 127 blocks.
	turn := func(blocks int64) time.Duration {
		d := blocktest.BarracudaES2
		return time.Duration(blocks * block.Size * int64(d.Turn) / d.TurnBytes)
	}
	if m.whole.Jumps != 1 || m.whole.Requests != 8 || m.whole.Busy < turn(127) || m.whole.Busy > turn(127)+blocktest.BarracudaES2.Turn+time.Millisecond {
		t.Errorf("in one piece %+v", m.whole)
	}
	for _, want := range []struct {
		run                    int
		saved, jumps, requests int64
	}{{1, 12, 5, 11}, {2, 12, 5, 11}, {4, 12, 5, 11}, {8, 8, 3, 9}, {16, 0, 1, 8}, {32, 0, 1, 8}} {
		for _, row := range m.rows {
			if row.run == want.run && (row.dense.Saved() != want.saved || row.read.Jumps != want.jumps || row.read.Requests != want.requests) {
				t.Errorf("THN %d saves %d blocks and reads in %d requests with %d jumps", row.run, row.dense.Saved(), row.read.Requests, row.read.Jumps)
			}
		}
	}
	var out bytes.Buffer
	m.print(&out, "two")
	if !strings.Contains(out.String(), "| 8 | 32 KiB | 66.7 % | 50 % | 66.7 % | 100.0 % | 1, 8.0 |") {
		t.Errorf("printed\n%s", out.String())
	}
	out.Reset()
	if !m.verdict(&out, set{release: true}) || !strings.Contains(out.String(), "* MISSED: 66.7 % of exact savings are kept (88)") ||
		!strings.Contains(out.String(), "* reached: 2 jumps at most in a request (3)") {
		t.Errorf("said\n%s", out.String())
	}
}

func TestFilesOfSystems(t *testing.T) {
	seen := map[string]system{}
	for name, s := range sets {
		for _, sys := range s.systems {
			f := sys.file()
			if old, ok := seen[f]; ok && (old.suite != sys.suite || old.private != sys.private || len(old.packages) != len(sys.packages)) {
				t.Errorf("set %s: %s is the file of two systems", name, f)
			}
			seen[f] = sys
		}
	}
	if _, ok := seen["bookworm-nginx.ext4"]; !ok || len(seen) != 9 {
		t.Errorf("files are %v", seen)
	}
}
