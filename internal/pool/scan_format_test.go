package pool

import (
	"bytes"
	"reflect"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

func testScanRecord() *scanRecord {
	return &scanRecord{generation: 7, id: 3, leaf: 4097,
		stats: ScanStats{State: ScanPaused, Undo: true, Done: 400, Total: 1000, Moved: 30, Raced: 2, Failed: 1}}
}

func TestGoldenScan(t *testing.T) {
	pool := block.PoolID{1, 2, 3, 4}
	b := testScanRecord().encode(pool, 9)
	golden(t, "testdata/scan.hex", b)
	if r, err := decodeScan(b, pool); err != nil || !reflect.DeepEqual(r, testScanRecord()) {
		t.Errorf("%v: %+v", err, r)
	}
	if _, err := decodeScan(b, block.PoolID{5}); err == nil {
		t.Error("a record of another pool was taken")
	}
}

func FuzzScan(f *testing.F) {
	f.Add(bytes.TrimRight(testScanRecord().encode(block.PoolID{}, 1), "\x00"), true)
	f.Add([]byte("PLXscan"), false)
	f.Fuzz(func(t *testing.T, in []byte, sound bool) {
		b := make([]byte, block.Size)
		n := copy(b, in)
		if sound && n >= ondisk.HeaderSize {
			ondisk.Seal(b, ondisk.Header{Kind: ondisk.KindScan, Version: 1, Length: n})
		}
		r, err := decodeScan(b, block.PoolID{})
		if err != nil {
			return
		}
		if again, err := decodeScan(r.encode(block.PoolID{}, 1), block.PoolID{}); err != nil || !reflect.DeepEqual(again, r) {
			t.Fatalf("%v: %+v became %+v", err, r, again)
		}
	})
}
