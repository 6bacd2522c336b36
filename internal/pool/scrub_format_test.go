package pool

import (
	"bytes"
	"reflect"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

func testScrubRecord() *scrubRecord {
	at := time.Unix(1_800_000_000, 5)
	return &scrubRecord{
		generation: 7, state: ScrubPaused, place: scrubPlace{scrubVolumes, 3, 4097}, since: at,
		now: scrubResult{begun: at.Add(time.Hour), took: time.Minute, total: 1000, blocks: 400, bytes: 800 * block.Size, repaired: 2, unreadable: 1,
			findings: []scrubFinding{{ScrubData, 3, 7, block.At(1, 300)}}},
		last: scrubResult{begun: at.Add(time.Second), ended: at.Add(time.Minute), took: 59 * time.Second, total: 900, blocks: 900, bytes: 1800 * block.Size},
	}
}

func TestGoldenScrub(t *testing.T) {
	pool := block.PoolID{1, 2, 3, 4}
	b := testScrubRecord().encode(pool, 9)
	golden(t, "testdata/scrub.hex", b)
	if r, err := decodeScrub(b, pool); err != nil || !reflect.DeepEqual(r, testScrubRecord()) {
		t.Errorf("%v: %+v", err, r)
	}
	if _, err := decodeScrub(b, block.PoolID{5}); err == nil {
		t.Error("a record of another pool was taken")
	}
}

// The largest record fits its block.
func TestScrubRecordFits(t *testing.T) {
	r := testScrubRecord()
	for range scrubFindings - 1 {
		r.now.findings = append(r.now.findings, r.now.findings[0])
	}
	r.last.findings = r.now.findings
	if got, err := decodeScrub(r.encode(block.PoolID{1}, 1), block.PoolID{1}); err != nil || len(got.last.findings) != scrubFindings {
		t.Errorf("%v: %+v", err, got)
	}
}

func FuzzScrub(f *testing.F) {
	f.Add(bytes.TrimRight(testScrubRecord().encode(block.PoolID{}, 1), "\x00"), true)
	f.Add([]byte("PLXscrub"), false)
	f.Fuzz(func(t *testing.T, in []byte, sound bool) {
		b := make([]byte, block.Size)
		n := copy(b, in)
		if sound && n >= ondisk.HeaderSize {
			ondisk.Seal(b, ondisk.Header{Kind: ondisk.KindScrub, Version: 1, Length: n})
		}
		r, err := decodeScrub(b, block.PoolID{})
		if err != nil {
			return
		}
		if again, err := decodeScrub(r.encode(block.PoolID{}, 1), block.PoolID{}); err != nil || !reflect.DeepEqual(again, r) {
			t.Fatalf("%v: %+v became %+v", err, r, again)
		}
	})
}
