package estimate

import (
	"bytes"
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/dedup"
)

// write writes a file of size bytes that has data at some offsets.
func write(t *testing.T, path string, size int64, data map[int64][]byte) string {
	t.Helper()
	f, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	for off, p := range data {
		if _, err := f.WriteAt(p, off); err != nil {
			t.Fatal(err)
		}
	}
	if err := f.Truncate(size); err != nil {
		t.Fatal(err)
	}
	return path
}

// noise returns n bytes that follow from a seed.
func noise(seed byte, n int) []byte {
	b := make([]byte, n)
	rand.NewChaCha8([32]byte{seed}).Read(b)
	return b
}

func TestScan(t *testing.T) {
	dir := t.TempDir()
	a := noise(1, 8*block.Size)
	clear(a[3*block.Size : 4*block.Size])
	// 8 blocks, one of them of zeroes, at 1 TiB - 8 blocks, and a block that is not whole.
	const tib = 1 << 40
	one := write(t, filepath.Join(dir, "one"), tib+100, map[int64][]byte{tib - int64(len(a)): a, tib: a[:100]})
	two := write(t, filepath.Join(dir, "two"), int64(len(a)), map[int64][]byte{0: a})
	empty := write(t, filepath.Join(dir, "empty"), 0, nil)
	var done, total int64
	s, err := Scan(t.Context(), []string{one, empty, two}, ScanOptions{Memory: MinMemory, Step: func(d, of int64) {
		if d < done {
			t.Errorf("progress from %d to %d", done, d)
		}
		done, total = d, of
	}})
	if err != nil {
		t.Fatal(err)
	}
	if want := int64(tib + 100 + len(a)); done != want || total != want {
		t.Errorf("progress ends at %d of %d instead of %d", done, total, want)
	}
	if s.Stream == nil {
		t.Fatal("15 blocks do not fit")
	}
	if n, zero := s.Stream.Blocks(); n != 15 || zero != 2+tib/block.Size-8 || s.Stream.Distinct() != 8 {
		t.Errorf("%d blocks, %d of zeroes, %d distinct", n, zero, s.Stream.Distinct())
	}
	if n, zero := s.Sample.blocks, s.Sample.zero; n != 15 || zero != 2+tib/block.Size-8 {
		t.Errorf("%d blocks, %d of zeroes in the sample", n, zero)
	}
	if s.Inputs[0].Unread < tib-1<<20 || s.Inputs[2].Unread != 0 {
		t.Errorf("%+v", s.Inputs)
	}
	volume, lba := s.Stream.Where(7)
	if volume != 0 || lba != tib/block.Size {
		t.Errorf("the block that is not whole is block %d of volume %d", lba, volume)
	}
	l, err := s.Stream.Simulate(Policy{Run: 4}, Options{})
	if err != nil || l.Saved() != 7 {
		t.Errorf("%d blocks saved (%v)", l.Saved(), err)
	}
}

// What is added to a file while others are read is not looked at.
func TestScanOfGrowingFile(t *testing.T) {
	dir := t.TempDir()
	one := write(t, filepath.Join(dir, "one"), 1<<20, map[int64][]byte{0: noise(1, 1<<20)})
	two := write(t, filepath.Join(dir, "two"), 1<<20, nil)
	var done, total int64
	s, err := Scan(t.Context(), []string{one, two}, ScanOptions{Memory: MinMemory, Step: func(d, of int64) {
		if done == 0 {
			write(t, two, 8<<20, map[int64][]byte{4 << 20: noise(2, 1<<20)})
		}
		done, total = d, of
	}})
	if err != nil {
		t.Fatal(err)
	}
	if n, zero := s.Stream.Blocks(); n != 256 || zero != 256 || s.Inputs[1].Unread != 1<<20 || done != 2<<20 || total != done {
		t.Errorf("%d blocks, %d of zeroes, %+v, progress to %d of %d", n, zero, s.Inputs, done, total)
	}
}

func TestScanFails(t *testing.T) {
	dir := t.TempDir()
	file := write(t, filepath.Join(dir, "file"), 3<<20, map[int64][]byte{0: bytes.Repeat([]byte{1}, 3<<20)})
	cut := func(done, _ int64) {
		if done == 1<<20 {
			if err := os.Truncate(file, 1<<20+5000); err != nil {
				t.Error(err)
			}
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	for _, c := range []struct {
		ctx   context.Context
		paths []string
		o     ScanOptions
		want  string
	}{
		{t.Context(), []string{file, dir}, ScanOptions{Memory: MinMemory}, dir + " is neither a file nor a block device"},
		{t.Context(), []string{"/dev/null"}, ScanOptions{Memory: MinMemory}, "/dev/null is neither a file nor a block device"},
		{t.Context(), []string{file + "x"}, ScanOptions{Memory: MinMemory}, "open " + file + "x: no such file or directory"},
		{t.Context(), []string{file}, ScanOptions{Memory: MinMemory - 1}, "16777215 bytes of memory are too few"},
		{ctx, []string{file}, ScanOptions{Memory: MinMemory}, "context canceled"},
		{t.Context(), []string{file}, ScanOptions{Memory: MinMemory, Step: cut}, fmt.Sprintf("read %s at byte %d: the file has become shorter", file, 1<<20+5000)},
	} {
		if _, err := Scan(c.ctx, c.paths, c.o); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%v instead of %q", err, c.want)
		}
	}
}

// A stream that grows beyond what it may is given up, and the sample goes on without it.
func TestScanBoundsMemory(t *testing.T) {
	s := newScan(MinMemory)
	s.found.Stream.Volume()
	n := int64(0)
	for ; s.found.Stream != nil; n++ {
		s.add(block.Logical(n), print(int(n)))
		if st := s.found.Stream; st != nil && n%PointBlocks == 0 && st.memory() > MinMemory/4*3+8<<20 {
			t.Fatalf("a stream of %d blocks takes %d bytes", n, st.memory())
		}
	}
	if n < 300_000 {
		t.Errorf("only %d blocks fit", n)
	}
	for range 4 * n {
		s.add(block.Logical(n), print(int(n)))
		n++
	}
	// It takes the place of the stream.
	if took := int64(cap(s.found.Sample.kept)) * occurrenceBytes; took > MinMemory || took < MinMemory/2 {
		t.Errorf("the sample takes %d bytes", took)
	}
	if s.found.Sample.blocks != n || s.found.Sample.Every() < 16 {
		t.Errorf("%d blocks of %d, one in %d", s.found.Sample.blocks, n, s.found.Sample.Every())
	}
}

// alike makes a stream, and a sample of it, of volumes that are alike in pieces.
func alike(seed uint64, memory int64) (*Stream, *Sample) {
	r := rand.New(rand.NewPCG(seed, 1))
	st, sample := new(Stream), newSample(memory)
	other := 1 << 30
	for range 4 {
		st.Volume()
		sample.volume()
		lba := block.Logical(0)
		for lba < 5000 {
			n := 1 + r.IntN(80)
			from := r.IntN(80) * 100
			fresh := r.IntN(2) == 0
			for i := range n {
				f := print(from + i)
				if fresh {
					f = print(other)
					other++
				}
				st.Add(lba, f)
				sample.add(f)
				lba++
			}
		}
	}
	st.Flush()
	sample.volume()
	return st, sample
}

var allPolicies = func() (all []Policy) {
	for _, run := range []int{1, 2, 4, 8, 16, 32} {
		for _, threshold := range []int{0, 2} {
			all = append(all, Policy{Run: run, Threshold: threshold})
		}
	}
	return all
}()

// A sample of everything says what the simulation says, but for what tracks cut.
func TestSampleOfAll(t *testing.T) {
	st, sample := alike(1, 64<<20)
	if sample.Every() != 1 {
		t.Fatalf("one in %d", sample.Every())
	}
	for i, e := range sample.Estimate(allPolicies) {
		p := allPolicies[i]
		l, err := st.Simulate(p, Options{})
		if err != nil {
			t.Fatal(err)
		}
		if l.Saved() < e.Low || l.Saved() > e.High || e.High != e.Saved {
			t.Errorf("%+v saves %d, and not %d to %d", p, l.Saved(), e.Low, e.High)
		}
		if p.Run == 1 && (e.Saved != l.Saved() || e.Low != e.Saved) {
			t.Errorf("%d instead of %d are duplicates", e.Saved, l.Saved())
		}
		if e.Memory > l.Memory {
			t.Errorf("%+v: %d blocks in low-latency memory at least, and %d in truth", p, e.Memory, l.Memory)
		}
	}
}

// What all has is nearly always between the bounds that a sample gives.
func TestSampleBounds(t *testing.T) {
	policies := []Policy{{Run: 1}, {Run: 1, Threshold: 2}, {Run: 8, Threshold: 2}}
	inside := make([]int, len(policies))
	const samples = 20
	for seed := range uint64(samples) {
		_, all := alike(seed, 16<<20)
		_, some := alike(seed, 1<<18)
		if all.Every() != 1 || some.Every() < 16 {
			t.Fatalf("one in %d and %d", all.Every(), some.Every())
		}
		truth := all.Estimate(policies)
		for i, e := range some.Estimate(policies) {
			if e.Low <= truth[i].Saved && truth[i].Saved <= e.High {
				inside[i]++
			}
			if e.High-e.Low > truth[i].Saved {
				t.Errorf("seed %d, %+v: between %d and %d", seed, policies[i], e.Low, e.High)
			}
		}
	}
	for i, n := range inside {
		if n < samples*17/20 {
			t.Errorf("%+v: %d of %d", policies[i], n, samples)
		}
	}
}

// A block that is everywhere does not crowd out others, and all of it counts.
func TestSampleOfOneBlock(t *testing.T) {
	s := newSample(1 << 20)
	hot := dedup.Fingerprint(1 << 40) // drawn whatever the mask
	for i := range 1 << 20 {
		s.add(hot)
		if i%16 == 0 {
			s.add(print(i))
		}
	}
	s.volume()
	e := s.Estimate([]Policy{{Run: 1}, {Run: 1, Threshold: 2}})
	if e[0].Saved < 1<<20-1 {
		t.Errorf("%d of %d duplicates", e[0].Saved, 1<<20-1)
	}
	if s.Every() > 64 {
		t.Errorf("one in %d is drawn", s.Every())
	}
}

// Where a file cannot be looked at for data, that is said.
func TestScanOfWhatIsClosed(t *testing.T) {
	f, size, err := open(write(t, filepath.Join(t.TempDir(), "one"), block.Size, nil))
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	err = newScan(MinMemory).read(t.Context(), f, &Input{Path: "one", Bytes: size})
	if err == nil || !strings.Contains(err.Error(), "look for data in one from byte 0 on") {
		t.Error(err)
	}
}
