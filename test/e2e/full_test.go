package e2e

import (
	"fmt"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/test/pair"
)

const noSpace = "No space left on device"

// fillUp writes into a volume until the pool is full, by 4 MiB with a pattern
// each, and returns the commands that read what was acknowledged.
func fillUp(t *testing.T, uri string, size int64) (reads []string) {
	t.Helper()
	const step = 4 << 20
	var commands []string
	for off := int64(0); off < size; off += step {
		commands = append(commands, fmt.Sprintf("write -P %d %d %d", 1+off/step%255, off, step))
	}
	out, err := qemuIO(t, uri, commands...)
	if err == nil || !strings.Contains(out, noSpace) {
		t.Fatalf("a pool smaller than the volume took it all: %v\n%.2000s", err, out)
	}
	for off := int64(0); off < size; off += step {
		if strings.Contains(out, fmt.Sprintf("wrote %d/%d bytes at offset %d\n", step, step, off)) {
			reads = append(reads, fmt.Sprintf("read -P %d %d %d", 1+off/step%255, off, step))
		}
	}
	return reads
}

// A full pool tells its clients so, keeps what it has, and serves on when space
// was freed, by the client or by a command.
func TestFullPool(t *testing.T) {
	pair.Need(t, "qemu-io")
	s := small
	s.PoolSize = "256MiB"
	r := start(t, s)
	const size = 320 << 20
	disk := r.volume("disk", size, "a")
	neighbour := r.volume("neighbour", 16<<20, "a")
	elsewhere := r.volume("elsewhere", 16<<20, "b")
	mustQemuIO(t, neighbour.NBD, "write -P 77 0 1M", "flush")

	var promised int64 // free space of the pool that is all but empty
	for round, free := range []func(){
		func() { mustQemuIO(t, disk.NBD, fmt.Sprintf("discard 0 %d", size)) },
		func() { mustQemuIO(t, disk.NBDUnix, fmt.Sprintf("write -z -u 0 %d", size)) },
		func() {
			r.must("volume", "delete", "disk")
			r.volume("disk", size, "a")
		},
		func() { mustQemuIO(t, disk.NBD, "discard 4M 32M") },
	} {
		if round == 0 {
			promised = pair.Guest(r.status(), "a").PoolStats[0].Free
		}
		reads := fillUp(t, disk.NBDUnix, size)
		t.Logf("round %d: the client has %d MiB, the pool said that %d MiB are free", round, 4*len(reads), promised>>20)
		// Some is left: a write of 4 MiB is refused as a whole, and metadata
		// takes its part.
		if int64(len(reads))*4<<20 < promised-(12<<20) {
			t.Errorf("the pool is full too early")
		}
		wantError(t, disk.NBD, "write -P 9 316M 4M", noSpace)
		wantError(t, neighbour.NBD, "write -P 9 8M 8M", noSpace)
		mustQemuIO(t, disk.NBD, reads...)
		mustQemuIO(t, neighbour.NBD, "read -P 77 0 1M")
		mustQemuIO(t, elsewhere.NBD, "write -P 5 0 8M", "flush")
		r.clean()
		free()
		mustQemuIO(t, disk.NBD, "write -P 3 308M 8M", "flush", "read -P 3 308M 8M", "discard 308M 8M")
	}
	r.well()

	// Full once more, and then it all happens: death, restart, recount.
	reads := fillUp(t, disk.NBDUnix, size)
	r.must("guest", "kill", "a", "--yes")
	mustQemuIO(t, disk.NBDUnix, reads...)
	wantError(t, disk.NBD, "write -P 9 316M 4M", noSpace)
	r.clean()
	r.down()
	r.clean()
	r.up()
	mustQemuIO(t, disk.NBDUnix, reads...)
	r.must("volume", "delete", "neighbour")
	mustQemuIO(t, disk.NBD, "discard 0 16M", "write -P 4 0 8M", "flush", "read -P 4 0 8M")
	r.clean()
}
