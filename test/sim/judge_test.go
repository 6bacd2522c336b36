package sim

import (
	"bytes"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/oplog"
)

// TestFailedWrite looks whom the judge takes a record for that more than one may have
// published, when writes fail: a failed one is wrong only if nobody else remains.
func TestFailedWrite(t *testing.T) {
	const blocks = 4
	old, data := stamped(1, 0, blocks*block.Size), stamped(2, 0, blocks*block.Size)
	for _, c := range []struct {
		name   string
		others [][]byte // what other clients write at the same place meanwhile
		there  []byte   // before
		fail   int      // of the requests
		wrong  bool
	}{
		{"alone", nil, old, 1, true},
		{"another content", [][]byte{old}, nil, 1, true},
		{"less than the record", [][]byte{data[:block.Size]}, old, 1, true},
		{"the same content", [][]byte{data}, old, 1, false},
		{"more content", [][]byte{stamped(2, 0, 2*blocks*block.Size)}, old, 1, false},
		{"the same content, and both fail", [][]byte{data}, old, 2, true},
		{"three, and two fail", [][]byte{data, data}, old, 2, false},
		{"it was there, and may have been moved", nil, data, 1, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			mem, err := hpdi.Alloc(int(oplog.SectionSize(logBytes)))
			if err != nil {
				t.Fatal(err)
			}
			defer func() { _ = hpdi.Free(mem) }()
			log, err := oplog.Format(mem, oplog.Config{PayloadBytes: logBytes})
			if err != nil {
				t.Fatal(err)
			}
			view, err := oplog.OpenView(mem)
			if err != nil {
				t.Fatal(err)
			}
			w := newWorld(1, t.TempDir(), 0)
			w.opt.Cleaner.Off = false
			v := &volume{name: "v", id: 1, size: 1 << 20, blocks: map[block.Logical][]version{}}
			pl := &pool{w: w, identity: "a", copies: 1, log: view, volumes: map[string]*volume{"v": v}, ids: map[block.VolumeID]*volume{1: v}}
			w.pools["a"] = pl // without a disk: it is full
			for i := range block.Logical(len(c.there) / block.Size) {
				v.blocks[i] = []version{{page: (*[block.Size]byte)(c.there[i*block.Size:])}}
			}
			var requests []*request
			for i, p := range append([][]byte{data}, c.others...) {
				s := w.session("c"+string(rune('1'+i)), "v")
				r := &request{id: i + 1, s: s, op: opWrite, n: int64(len(p)), data: p, tries: 1}
				s.flying = append(s.flying, r)
				requests = append(requests, r)
			}

			ext, _ := log.Alloc(blocks, nil)
			rec := oplog.Record{Kind: oplog.KindWrite, Volume: 1, Count: blocks, First: ext[0]}
			copy(log.Payload(ext[0], blocks), data)
			log.Sum(&rec)
			if _, ok := log.Publish([]oplog.Record{rec}); !ok {
				t.Fatal("the log is full")
			}
			w.observe()
			if w.fail != nil {
				t.Fatal(w.fail)
			}
			if got := v.current(blocks - 1); !bytes.Equal(got, data[(blocks-1)*block.Size:]) {
				t.Fatalf("the history has %s", describe(got))
			}
			for _, r := range requests[:c.fail] {
				if w.fail != nil {
					t.Fatalf("before the last has failed: %v", w.fail)
				}
				w.answered(r, nil, block.ErrNoSpace)
			}
			if wrong := w.fail != nil && strings.Contains(w.fail.Error(), "took effect"); wrong != c.wrong || wrong != (w.fail != nil) {
				t.Fatalf("judged as %v", w.fail)
			}
		})
	}
}
