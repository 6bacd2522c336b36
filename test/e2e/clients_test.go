package e2e

import (
	"encoding/json"
	"fmt"
	"math/rand/v2"
	"net/url"
	"os"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/test/pair"
)

// overBoth runs a test with both URIs that status prints for an export.
func overBoth(t *testing.T, e control.Export, f func(t *testing.T, uri string)) {
	t.Run("tcp", func(t *testing.T) { f(t, e.NBD) })
	t.Run("unix", func(t *testing.T) { f(t, e.NBDUnix) })
}

// Clients attach with what status prints, over TCP and over the unix socket.
func TestClients(t *testing.T) {
	pair.Need(t, "nbdinfo", "nbdcopy", "qemu-img", "qemu-io", "fio")
	r := start(t, small)
	const size = 64 << 20
	disk := r.volume("disk", size, "a")
	other := r.volume("other", 2*size, "a")
	r.volume("elsewhere", size, "b")
	t.Run("nbdinfo", func(t *testing.T) {
		overBoth(t, disk, func(t *testing.T, uri string) { nbdinfo(t, uri, size) })
		overBoth(t, disk, func(t *testing.T, uri string) { nbdinfoList(t, uri) })
	})
	t.Run("qemu-img", func(t *testing.T) {
		overBoth(t, other, func(t *testing.T, uri string) { qemuImg(t, uri, other.NBD, 2*size) })
	})
	t.Run("qemu-io", func(t *testing.T) { alignments(t, disk, size) })
	t.Run("fio", func(t *testing.T) {
		overBoth(t, disk, fio)
	})
	r.clean()
	r.well()
}

func nbdinfo(t *testing.T, uri string, size int64) {
	var info struct {
		Protocol string
		Exports  []map[string]any
	}
	if err := json.Unmarshal([]byte(run(t, "nbdinfo", "--json", uri)), &info); err != nil {
		t.Fatal(err)
	}
	if info.Protocol != "newstyle-fixed" || len(info.Exports) != 1 {
		t.Fatalf("nbdinfo --json: %+v", info)
	}
	e := info.Exports[0]
	if e["export-name"] != "disk" || e["export-size"] != float64(size) || e["is_read_only"] != false {
		t.Errorf("nbdinfo --json: %+v", e)
	}
	for _, can := range []string{"can_multi_conn", "can_flush", "can_fua", "can_trim", "can_zero", "can_fast_zero", "can_df", "can_cache"} {
		if e[can] != true {
			t.Errorf("%s is %v", can, e[can])
		}
	}
	if text := fmt.Sprint(e["contexts"]); !strings.Contains(text, "base:allocation") {
		t.Errorf("contexts: %s", text)
	}
}

// nbdinfoList lists the exports of an identity: its own and no others.
func nbdinfoList(t *testing.T, uri string) {
	u, err := url.Parse(uri)
	if err != nil {
		t.Fatal(err)
	}
	u.Path = "/"
	var list struct{ Exports []map[string]any }
	if err := json.Unmarshal([]byte(run(t, "nbdinfo", "--list", "--json", u.String())), &list); err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range list.Exports {
		names = append(names, fmt.Sprint(e["export-name"]))
	}
	if got := strings.Join(names, " "); got != "disk other" {
		t.Errorf("%s lists %q", u, got)
	}
}

// qemuImg writes an image with holes, and finds it and its holes again, also
// by the other way to the volume.
func qemuImg(t *testing.T, uri, again string, size int64) {
	var info struct {
		Format string
		Size   int64 `json:"virtual-size"`
	}
	if err := json.Unmarshal([]byte(run(t, "qemu-img", "info", "--output=json", uri)), &info); err != nil {
		t.Fatal(err)
	}
	if info.Format != "raw" || info.Size != size {
		t.Errorf("qemu-img info: %+v", info)
	}
	rng := random(t)
	content := make([]byte, size)
	copy(content[1<<20:], noise(rng, 3<<20))
	copy(content[80<<20:], noise(rng, 1<<20))
	file := write(t, content)
	run(t, "qemu-img", "convert", "-n", "-f", "raw", "-O", "raw", file, uri)
	for _, u := range []string{uri, again} {
		run(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", file, u)
	}
	var extents []struct {
		Start, Length int64
		Zero          bool
	}
	if err := json.Unmarshal([]byte(run(t, "qemu-img", "map", "--output=json", "-f", "raw", uri)), &extents); err != nil {
		t.Fatal(err)
	}
	var data int64
	for _, x := range extents {
		if !x.Zero {
			data += x.Length
		}
	}
	if data != 4<<20 {
		t.Errorf("qemu-img map sees %d bytes of data, 4 MiB were written: %+v", data, extents)
	}
	mustQemuIO(t, uri, "write -P 1 8M 1")
	if out, err := try(t, "qemu-img", "compare", "-f", "raw", "-F", "raw", file, again); err == nil || !strings.Contains(out, "8388608") {
		t.Errorf("qemu-img compare does not see the byte that differs: %v\n%s", err, out)
	}
}

// alignments runs requests of every alignment and kind against a model, in
// turns over both ways, and compares all bytes at the end of each batch.
func alignments(t *testing.T, disk control.Export, size int) {
	rng := random(t)
	model := make([]byte, size)
	for batch := range 6 {
		uri, again := disk.NBD, disk.NBDUnix
		if batch%2 == 1 {
			uri, again = again, uri
		}
		var commands []string
		for range 60 {
			commands = append(commands, draw(rng, model)...)
		}
		mustQemuIO(t, uri, commands...)
		sameContent(t, again, model)
		if t.Failed() {
			t.Logf("batch %d: %q", batch, commands)
			return
		}
	}
}

// draw draws a request, does it to the model, and returns the commands that do
// it and that see its outcome.
func draw(rng *rand.Rand, model []byte) []string {
	// Near each other, so that requests meet in blocks.
	const near = 2 << 20
	lengths := []int{1, 511, 512, 513, 4095, 4096, 4097, 8192, 12289, 65536, 100_001, 1 << 20}
	n := lengths[rng.IntN(len(lengths))]
	off := rng.IntN(near)
	switch rng.IntN(3) {
	case 0:
		off &^= 4095
	case 1:
		off &^= 511
	}
	if rng.IntN(10) == 0 {
		off = len(model) - n // the end of the volume
	}
	pattern := byte(1 + rng.IntN(255))
	fill := func(b byte) {
		for i := range n {
			model[off+i] = b
		}
	}
	written := fmt.Sprintf("read -P %d %d %d", pattern, off, n)
	zeroed := fmt.Sprintf("read -P 0 %d %d", off, n)
	switch rng.IntN(8) {
	case 0:
		fill(0)
		return []string{fmt.Sprintf("write -z %d %d", off, n), zeroed}
	case 1:
		fill(0)
		return []string{fmt.Sprintf("write -z -u -f %d %d", off, n), "flush", zeroed}
	case 2:
		off, n = off&^4095, max(4096, n&^4095)
		if off+n > len(model) {
			off -= 4096
		}
		fill(0)
		return []string{fmt.Sprintf("discard %d %d", off, n), fmt.Sprintf("read -P 0 %d %d", off, n)}
	case 3:
		fill(pattern)
		return []string{fmt.Sprintf("write -f -P %d %d %d", pattern, off, n), written}
	case 4:
		fill(pattern)
		return []string{fmt.Sprintf("aio_write -P %d %d %d", pattern, off, n), "aio_flush", written}
	default:
		fill(pattern)
		return []string{fmt.Sprintf("write -P %d %d %d", pattern, off, n), "flush", written}
	}
}

// fio writes and verifies at random, in blocks of the pool's size and in others.
func fio(t *testing.T, uri string) {
	for _, job := range [][]string{
		{"--rw=randwrite", "--bs=4k"},
		{"--rw=randrw", "--bs=4k"},
		{"--rw=randwrite", "--bs=512", "--io_size=4M"},
		{"--rw=randrw", "--bs=20k"},
	} {
		out := run(t, "fio", append(job, "--name=verify", "--ioengine=nbd", "--uri="+uri, "--iodepth=16",
			"--size=32M", "--verify=crc32c", "--do_verify=1", "--verify_fatal=1", "--minimal")...)
		if strings.Contains(out, "verify:") {
			t.Errorf("fio %q:\n%s", job, out)
		}
	}
	if _, err := os.Stat("local-verify-0-verify.state"); err == nil {
		t.Error("fio has left its state in the tree")
	}
}
