package e2e

import (
	"bytes"
	"context"
	"errors"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/test/campaign/nbdclient"
	"github.com/pollux-storage/pollux/test/pair"
)

// written returns where a file has blocks that are not zero.
func written(t *testing.T, path string) (at []int64) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	zero, b := make([]byte, blockSize), make([]byte, blockSize)
	for off := int64(0); ; off += blockSize {
		// Straight to the next data, because the file is sparse.
		next, err := f.Seek(off, unix.SEEK_DATA)
		if err != nil {
			return at
		}
		off = next &^ (blockSize - 1)
		if n, err := f.ReadAt(b, off); err != nil || n < blockSize {
			return at
		}
		if !bytes.Equal(b, zero) {
			at = append(at, off)
		}
	}
}

// Whatever bit flips on a device, in data or in what leads to it: a client reads
// what was written or gets an error. What is behind the damage may be refused
// altogether, and it is well again when the bit is.
func TestBitFlipsAnywhere(t *testing.T) {
	s := small
	s.PoolSize = "128MiB"
	r := start(t, s)
	rng := random(t)
	const blocks = 96
	content := noise(rng, blocks*blockSize)
	disk := r.volume("disk", blocks*blockSize, "a")
	if bad, err := r.writeAll(disk.NBD, content); bad > 0 || err != nil {
		t.Fatal(bad, err)
	}
	r.down()
	r.clean()
	device := filepath.Join(r.Dir, "pool-a.img")
	places := written(t, device)
	t.Logf("%d blocks are written, %d of them by the client", len(places), blocks)
	for round, at := range draws(t, rng, device, places, content) {
		bit := rng.IntN(8 * blockSize)
		flip(t, device, at+int64(bit/8), bit%8)
		t.Logf("round %d: bit %d of block %d", round, bit, at/blockSize)
		r.serveDamaged(disk.NBD, content)
		// Where the pool had written the block anew this damages it once more.
		flip(t, device, at+int64(bit/8), bit%8)
		r.up()
		if wrong, failed := r.readAll(disk.NBD, content); wrong+failed > 0 {
			t.Fatalf("the device is whole again: %d blocks were read with wrong data, %d not at all", wrong, failed)
		}
		r.clean()
		r.down()
	}
}

// serveDamaged starts the pair on a device with a flipped bit, reads everything
// and takes it down.
func (r *rig) serveDamaged(uri string, content []byte) {
	r.t.Helper()
	_, err := r.Check(r.t.Context())
	found := err != nil
	if err := r.Up(r.t.Context()); err != nil {
		r.t.Logf("  up: %v", err)
	}
	var st control.Status
	decided := func(now control.Status) string {
		if st = now; pair.Guest(st, "a").ServedBy == "" && len(st.Alerts) == 0 {
			return "the volume is neither served nor is there an alert"
		}
		return ""
	}
	if err := r.Until(r.t.Context(), 10*time.Second, decided); err != nil {
		r.t.Error(err)
	}
	wrong, failed := 0, 0
	by := pair.Guest(st, "a").ServedBy
	if by != "" {
		wrong, failed = r.readAll(uri, content)
	}
	r.t.Logf("  check finds it: %v; served by %q; %d blocks are errors; alerts %q", found, by, failed, st.Alerts)
	if !found && (by == "" || failed > 0) {
		r.t.Error("clients met the damage, and the check had not")
	}
	if wrong > 0 {
		r.t.Errorf("%d blocks were read with wrong data", wrong)
	}
	// What the damage keeps from being committed stays in the region, and down
	// says so.
	if _, err := r.Do(r.t.Context(), "down"); err != nil && !strings.Contains(err.Error(), "goes on from there") {
		r.t.Fatal(err)
	}
}

// draws chooses places, most of them not the client's.
func draws(t *testing.T, rng *rand.Rand, device string, places []int64, content []byte) (chosen []int64) {
	t.Helper()
	f, err := os.Open(device)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	var own []int64
	b := make([]byte, blockSize)
	for _, at := range places {
		if _, err := f.ReadAt(b, at); err != nil {
			t.Fatal(err)
		}
		if !bytes.Contains(content, b) {
			own = append(own, at)
		}
	}
	rng.Shuffle(len(own), func(i, j int) { own[i], own[j] = own[j], own[i] })
	return append(own[:min(len(own), 7)], places[rng.IntN(len(places))])
}

// writeAll writes content block by block.
func (r *rig) writeAll(uri string, content []byte) (failed int, err error) {
	return r.each(uri, len(content), func(c *nbdclient.Client, ctx context.Context, off int64) error {
		return c.Do(ctx, &nbdclient.Request{Command: nbdclient.Write, Offset: off, Data: content[off : off+blockSize]})
	})
}

// readAll reads a volume block by block and counts blocks with other data than
// content, and errors.
func (r *rig) readAll(uri string, content []byte) (wrong, failed int) {
	r.t.Helper()
	got := make([]byte, blockSize)
	failed, err := r.each(uri, len(content), func(c *nbdclient.Client, ctx context.Context, off int64) error {
		err := c.Do(ctx, &nbdclient.Request{Command: nbdclient.Read, Offset: off, Data: got})
		if err == nil && !bytes.Equal(got, content[off:off+blockSize]) {
			wrong++
		}
		return err
	})
	if err != nil {
		r.t.Error(err)
	}
	return wrong, failed
}

// each does something to each block and counts the server's errors.
func (r *rig) each(uri string, size int, do func(c *nbdclient.Client, ctx context.Context, off int64) error) (failed int, err error) {
	ctx, cancel := context.WithTimeout(r.t.Context(), 20*time.Second)
	defer cancel()
	c, err := nbdclient.New(nbdclient.Options{URI: uri, Structured: true})
	if err != nil {
		return 0, err
	}
	defer c.Close()
	for off := int64(0); off < int64(size); off += blockSize {
		var refused nbdclient.Errno
		if err := do(c, ctx, off); errors.As(err, &refused) {
			failed++
		} else if err != nil {
			return failed, err
		}
	}
	return failed, nil
}
