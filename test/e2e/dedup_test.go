package e2e

import (
	"bytes"
	"fmt"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/test/pair"
)

// dedup returns what `dedup status` tells of a guest's pool.
func (r *rig) dedup(guest string) control.PoolDedup {
	r.t.Helper()
	var pools []control.PoolDedup
	if err := r.JSON(r.t.Context(), &pools, "dedup", "status"); err != nil {
		r.t.Fatal(err)
	}
	for _, p := range pools {
		if p.Guest == guest {
			return p
		}
	}
	r.t.Fatalf("dedup status tells of no pool of %s: %+v", guest, pools)
	return control.PoolDedup{}
}

// What is written twice is stored once, and figures say so to the byte; the survivor of
// a killed guest serves it, knows what the dead one stored, and goes on sharing it.
func TestDedup(t *testing.T) {
	pair.Need(t, "qemu-io", "nbdcopy")
	s := small
	s.PoolSize = "256MiB"
	// Consistency points come only when the test asks for one.
	s.More = []string{"dedup_index: 150KiB", "consistency_points: {interval: 1m}"}
	r := start(t, s)
	const size, part = 32 << 20, 4 << 20
	const blocks = part / blockSize
	rng := random(t)
	data, other := noise(rng, part), noise(rng, 1<<20)
	r.must("volume", "create", "disk", "--size", fmt.Sprint(size), "--guest", "a", "--dedup", "on")
	disk := r.export("disk")
	content := make([]byte, size)
	put := func(what []byte, at int) {
		t.Helper()
		mustQemuIO(t, disk.NBDUnix, fmt.Sprintf("write -s %s %d %d", write(t, what), at, len(what)))
		copy(content[at:], what)
	}
	points := 0
	commit := func() { // each change of the list of volumes is one
		t.Helper()
		points++
		r.must("volume", "create", fmt.Sprint("v", points), "--size", "1M", "--guest", "a")
	}

	put(data, 0)
	commit()
	d := r.dedup("a")
	if d.Refers != part || d.Stored != part || d.Saved != 0 || d.Written != blocks || d.Shared != 0 {
		t.Errorf("written once: %+v", d)
	}
	if x := d.Index; x == nil || x.Bytes != 128<<10 || x.Entries != blocks || !x.Complete() {
		t.Errorf("written once: %+v", x)
	}
	put(data, 8<<20)
	put(bytes.Repeat([]byte{0}, 1<<20), 30<<20)
	commit()
	d = r.dedup("a")
	if d.Refers != 2*part || d.Stored != part || d.Saved != part || d.Written != blocks || d.Shared != blocks || d.Zeros != 256 || d.Unequal != 0 {
		t.Errorf("written twice: %+v", d)
	}
	if n := d.References; n[1].Blocks != blocks || n[2].Blocks != 0 || (n[0].Blocks)*blockSize != d.Metadata {
		t.Errorf("written twice: %+v", d)
	}
	if v := d.Volumes[0]; v.Name != "disk" || v.THN != 8 || v.Shared != blocks || v.Written != blocks || v.Zeros != 256 {
		t.Errorf("written twice: %+v", d.Volumes)
	}
	if st := pair.Guest(r.status(), "a").PoolStats[0].Dedup; st.Saved != part || st.Shared != blocks || st.IndexBytes != 128<<10 {
		t.Errorf("status: %+v", st)
	}
	if b := r.dedup("b"); b.Index != nil || b.Saved != 0 {
		t.Errorf("the other pool: %+v", b)
	}

	// What no consistency point has brought to the devices is served, too.
	put(other, 16<<20)
	r.must("guest", "kill", "a", "--yes")
	r.well()
	if by := pair.Guest(r.status(), "a").ServedBy; by != "b" {
		t.Fatalf("%s serves a", by)
	}
	sameContent(t, disk.NBDUnix, content)
	if err := r.Until(t.Context(), 30*time.Second, func(control.Status) string {
		pools, err := r.Client().Dedup(t.Context())
		if err != nil || len(pools) != 2 || pools[0].Index == nil || !pools[0].Index.Complete() {
			return fmt.Sprintf("the index is not complete: %+v, %v", pools, err)
		}
		return ""
	}); err != nil {
		t.Fatal(err)
	}
	put(data, 20<<20)
	commit()
	d = r.dedup("a")
	if d.Saved != 2*part || d.Stored != part+1<<20 || d.Shared != blocks || d.References[2].Blocks != blocks {
		t.Errorf("written once more: %+v", d)
	}
	sameContent(t, disk.NBDUnix, content)
	r.clean()

	// Nothing more is shared when it is switched off, and what is shared stays.
	r.must("giveback", "a")
	r.well()
	r.must("volume", "set", "disk", "--dedup", "off")
	put(data, 24<<20)
	commit()
	if d = r.dedup("a"); d.Saved != 2*part || d.Shared != 0 || d.Written != blocks {
		t.Errorf("switched off: %+v", d)
	}
	sameContent(t, disk.NBDUnix, content)
	r.clean()

	// A scan shares it, and all of that can be undone.
	scan := func(saved int64, command ...string) {
		t.Helper()
		r.must(command...)
		if err := r.Until(t.Context(), 30*time.Second, func(control.Status) string {
			pools, err := r.Client().Dedup(t.Context())
			if err != nil || pools[0].Scan.State != "done" || pools[0].Saved != saved {
				return fmt.Sprintf("the scan is not done, or what it has replaced is not free: %+v, %v", pools, err)
			}
			return ""
		}); err != nil {
			t.Fatal(err)
		}
		if d = r.dedup("a"); d.Scan.Volume != "disk" || d.Scan.Done == 0 {
			t.Errorf("%q: %+v", command, d)
		}
		sameContent(t, disk.NBDUnix, content)
		r.clean()
	}
	r.must("volume", "set", "disk", "--dedup", "on")
	scan(3*part, "dedup", "scan", "start", "disk")
	r.must("volume", "set", "disk", "--dedup", "off")
	scan(0, "dedup", "undo", "disk")
	if out, err := r.Do(t.Context(), "events"); err != nil || strings.Count(string(out), "dedup-scan-end") != 2 {
		t.Errorf("events: %v, %s", err, out)
	}
	r.down()
	r.clean()
}

// Blocks that are duplicates one by one go to low-latency memory, are there for the
// survivor of a killed guest, and come back to a disk when the memory is taken out.
func TestLLRRM(t *testing.T) {
	pair.Need(t, "qemu-io", "nbdcopy")
	s := small
	s.PoolSize = "256MiB"
	r := start(t, s)
	const size, n = 8 << 20, 64
	memory := filepath.Join(t.TempDir(), "memory.img")
	r.must("pool", "add", "pool-a", memory, "--class", "llrrm", "--size", "16MiB")
	r.must("pool", "set", "pool-a", "--llrrm-threshold", "1")
	r.must("volume", "create", "disk", "--size", fmt.Sprint(size), "--guest", "a", "--dedup", "on")
	disk := r.export("disk")
	content := make([]byte, size)
	rng := random(t)
	single := noise(rng, n*blockSize)
	for k := range 3 {
		part := noise(rng, 2*n*blockSize)
		for i := range n {
			copy(part[2*i*blockSize:], single[i*blockSize:][:blockSize])
		}
		at := k * len(part)
		mustQemuIO(t, disk.NBDUnix, fmt.Sprintf("write -s %s %d %d", write(t, part), at, len(part)))
		copy(content[at:], part)
		r.must("volume", "create", fmt.Sprint("v", k), "--size", "1M", "--guest", "a") // a consistency point
	}
	d := r.dedup("a")
	if m := d.LLRRM; m == nil || m.Used != n*blockSize || m.Written != n || m.Threshold != 1 || m.Waiting != n || d.Shared != n || d.Saved != n*blockSize {
		t.Fatalf("%+v, %+v", d, d.LLRRM)
	}
	if out, err := r.Do(t.Context(), "pool", "show", "pool-a"); err != nil || !strings.Contains(string(out), "256 KiB of") || !strings.Contains(string(out), "LLRRM") {
		t.Errorf("%v: %s", err, out)
	}
	r.must("guest", "kill", "a", "--yes")
	r.well()
	sameContent(t, disk.NBDUnix, content)
	r.clean()
	r.must("giveback", "a")
	r.well()
	r.must("pool", "remove", "pool-a", memory)
	if err := r.Until(t.Context(), 60*time.Second, func(st control.Status) string {
		if p := pair.Guest(st, "a").PoolStats[0]; p.Removal != nil || p.LLRRM != nil {
			return fmt.Sprintf("it is not removed: %+v", p.Removal)
		}
		return ""
	}); err != nil {
		t.Fatal(err)
	}
	sameContent(t, disk.NBDUnix, content)
	if d = r.dedup("a"); d.Saved < n*blockSize {
		t.Errorf("what was in memory once is on the disk several times: %+v", d)
	}
	r.down()
	r.clean()
}
