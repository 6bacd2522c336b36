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

func TestGoldenLabel(t *testing.T) {
	const file = "testdata/label.hex"
	b := testLabel().encode()
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
		t.Errorf("the label's format has changed; if that is meant, raise its version:\n%s", got)
	}
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
