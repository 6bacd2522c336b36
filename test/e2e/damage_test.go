package e2e

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/test/campaign/nbdclient"
	"github.com/pollux-storage/pollux/test/pair"
)

const (
	blockSize    = 4096
	ioError      = "Input/output error"
	exitProblems = 6
)

// find returns where in a file whole blocks have some content.
func find(t *testing.T, path string, want []byte) (at []int64) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	b := make([]byte, 1<<20)
	for off := int64(0); ; off += int64(len(b)) {
		n, err := io.ReadFull(f, b)
		for i := 0; i+blockSize <= n; i += blockSize {
			if bytes.Equal(b[i:i+blockSize], want) {
				at = append(at, off+int64(i))
			}
		}
		if err != nil {
			return at
		}
	}
}

// flip flips a bit of a file.
func flip(t *testing.T, path string, at int64, bit int) {
	t.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var b [1]byte
	if _, err := f.ReadAt(b[:], at); err != nil {
		t.Fatal(err)
	}
	b[0] ^= 1 << bit
	if _, err := f.WriteAt(b[:], at); err != nil {
		t.Fatal(err)
	}
}

// wantProblem demands that check ends with its status for problems and names a
// place.
func (r *rig) wantProblem(how, place string) {
	r.t.Helper()
	out, err := r.Do(r.t.Context(), "check")
	var failed *pair.CommandError
	if !errors.As(err, &failed) || failed.Status != exitProblems {
		r.t.Errorf("check: %v, want exit status %d\n%s", err, exitProblems, out)
	}
	for _, want := range []string{how, place} {
		if !strings.Contains(string(out), want) {
			r.t.Errorf("check does not tell %q:\n%s", want, out)
		}
	}
	var report struct{ OK bool }
	if err := r.JSON(r.t.Context(), &report, "check"); report.OK || !errors.As(err, &failed) || failed.Status != exitProblems {
		r.t.Errorf("check --json: %+v, %v", report, err)
	}
}

// A bit that flips on a device is an error to the client that reads it, and
// never wrong data; check finds it, running or not; everything else is served.
func TestDamagedBlock(t *testing.T) {
	pair.Need(t, "qemu-io", "nbdcopy")
	s := small
	s.PoolSize = "256MiB"
	r := start(t, s)
	rng := random(t)
	const blocks = 512
	content := noise(rng, blocks*blockSize)
	disk := r.volume("disk", blocks*blockSize, "a")
	// Without a flush, which would leave a copy in the log's place on the device.
	run(t, "nbdcopy", write(t, content), disk.NBDUnix)
	r.down()

	bad := rng.IntN(blocks)
	device := filepath.Join(r.Dir, "pool-a.img")
	at := find(t, device, content[bad*blockSize:][:blockSize])
	if len(at) != 1 {
		t.Fatalf("block %d of the volume is %d times in %s", bad, len(at), device)
	}
	r.clean()
	flip(t, device, at[0]+rng.Int64N(blockSize), rng.IntN(8))
	place := fmt.Sprintf("0:%d ", at[0]/blockSize)
	r.wantProblem("checked offline", place)
	r.up()
	r.wantProblem("checked on the running pair", place)
	r.wantProblem("checked on the running pair", fmt.Sprintf("block %d of volume \"disk\"", bad))

	off := bad * blockSize
	for _, uri := range []string{disk.NBD, disk.NBDUnix} {
		wantError(t, uri, fmt.Sprintf("read %d %d", off, blockSize), ioError)
		wantError(t, uri, fmt.Sprintf("read %d 1", off+rng.IntN(blockSize)), ioError)
		wantError(t, uri, fmt.Sprintf("read 0 %d", len(content)), ioError)
		// Part of a block cannot be replaced where the rest is unknown.
		if out, err := qemuIO(t, uri, fmt.Sprintf("write -P 1 %d 512", off), "flush", fmt.Sprintf("read %d %d", off, blockSize)); err == nil {
			t.Errorf("a block of which a part is unknown was read:\n%s", out)
		}
	}
	if !strings.Contains(r.Logs(1000), "block at "+place) {
		t.Error("no log tells where the damage is that clients met")
	}
	r.until(func(st control.Status) string {
		for _, d := range st.Guests[0].Devices {
			if d.Corrupt > 0 && strings.Contains(alerts(st), device+" of pool pool-a has lost blocks") {
				return ""
			}
		}
		return fmt.Sprintf("no alert tells of it: %s", alerts(st))
	})
	r.others(content, bad)
	// And so does the partner, which has nothing of it in its cache.
	r.must("takeover", "a")
	wantError(t, disk.NBD, fmt.Sprintf("read %d %d", off, blockSize), ioError)
	r.others(content, bad)
	r.must("giveback", "a")

	// A whole block that is written anew is well again, and so is the pool.
	copy(content[off:], bytes.Repeat([]byte{0x5a}, blockSize))
	mustQemuIO(t, disk.NBD, fmt.Sprintf("write -P 0x5a %d %d", off, blockSize), "flush")
	sameContent(t, disk.NBD, content)
	r.clean()
	r.down()
	r.clean()
}

// others demands that all blocks of the volume but one are what they were.
func (r *rig) others(content []byte, bad int) {
	r.t.Helper()
	ctx, cancel := context.WithTimeout(r.t.Context(), time.Minute)
	defer cancel()
	c, err := nbdclient.New(nbdclient.Options{URI: r.export("disk").NBD, Structured: true})
	if err != nil {
		r.t.Fatal(err)
	}
	defer c.Close()
	got := make([]byte, blockSize)
	for i := range len(content) / blockSize {
		err := c.Do(ctx, &nbdclient.Request{Command: nbdclient.Read, Offset: int64(i) * blockSize, Data: got})
		if i == bad {
			if err == nil {
				r.t.Errorf("block %d is damaged and was read", i)
			}
			continue
		}
		if err != nil || !bytes.Equal(got, content[i*blockSize:][:blockSize]) {
			r.t.Fatalf("block %d, which nobody damaged: %v, or other data", i, err)
		}
	}
}
