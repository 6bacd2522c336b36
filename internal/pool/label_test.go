package pool

import (
	"bytes"
	"encoding/hex"
	"flag"
	"os"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

var update = flag.Bool("update", false, "write golden files anew")

func testLabel() Label {
	return Label{
		Pool: block.PoolID{1, 2, 3, 4}, Device: block.DeviceID{0xd0, 0xd1}, Name: "pool", Identity: "a",
		Blocks: 65536, LogBytes: testLog, Layout: layout(0, 65536, testLog, 0),
	}
}

// golden compares a block, without the zeroes at its end, with a file of hex dumps.
func golden(t *testing.T, file string, b []byte) {
	t.Helper()
	got := hex.Dump(bytes.TrimRight(b, "\x00"))
	if *update {
		if err := os.WriteFile(file, []byte(got), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	want, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	if got != string(want) {
		t.Errorf("%s: the format has changed; if that is meant, raise its version:\n%s", file, got)
	}
}

func TestGoldenLabel(t *testing.T) {
	b := testLabel().encode()
	golden(t, "testdata/label.hex", b)
	if l, err := decodeLabel(b); err != nil || l != testLabel() {
		t.Errorf("%v: %+v", err, l)
	}
}

func FuzzLabel(f *testing.F) {
	f.Add(bytes.TrimRight(testLabel().encode(), "\x00"), true)
	f.Add([]byte("PLXlabel"), false)
	f.Fuzz(func(t *testing.T, in []byte, sound bool) {
		b := make([]byte, block.Size)
		n := copy(b, in)
		if sound && n >= ondisk.HeaderSize {
			ondisk.Seal(b, ondisk.Header{Kind: ondisk.KindLabel, Version: 1, Length: n})
		}
		l, err := decodeLabel(b)
		if err != nil {
			return
		}
		if again, err := decodeLabel(l.encode()); err != nil || again != l {
			t.Fatalf("%v: %+v became %+v", err, l, again)
		}
	})
}
