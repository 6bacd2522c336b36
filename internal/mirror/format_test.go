package mirror

import (
	"bytes"
	"encoding/hex"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/stack"
)

func example() header {
	h := header{id: ID{1, 2, 3}, generation: 7, index: 1, blocks: 100 << 20}
	h.shift = shiftFor(h.blocks)
	h.copies = []member{{id: block.DeviceID{4}, state: InSync}, {id: block.DeviceID{5}, state: Resilvering}, {block.DeviceID{6}, Absent, 6}}
	return h
}

// The bytes of a header and of a page of the map do not change.
func TestGolden(t *testing.T) {
	page := make([]byte, block.Size)
	b := stack.NewBits(70)
	b.Set(0)
	b.Set(69)
	encodeMapPage(page, ID{1, 2, 3}, 0, b)
	for name, got := range map[string][]byte{"header": header1(), "map": page} {
		path := filepath.Join("testdata", name+".hex")
		text := hex.Dump(bytes.TrimRight(got, "\x00"))
		if os.Getenv("POLLUX_UPDATE_GOLDEN") != "" {
			if err := os.WriteFile(path, []byte(text), 0o644); err != nil {
				t.Fatal(err)
			}
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if strings.TrimSpace(string(want)) != strings.TrimSpace(text) {
			t.Errorf("%s has changed:\n%s", name, text)
		}
	}
}

func header1() []byte { h := example(); return h.encode() }

func TestHeaderRoundTrip(t *testing.T) {
	h := example()
	got, err := decodeHeader(h.encode())
	if err != nil || !reflect.DeepEqual(got, h) {
		t.Errorf("got %+v, %v", got, err)
	}
}

func TestHeaderRefused(t *testing.T) {
	for name, change := range map[string]func(*header){
		"no copy in sync":  func(h *header) { h.copies[0].state = Absent },
		"one copy":         func(h *header) { h.copies = h.copies[:1] },
		"another index":    func(h *header) { h.index = 3 },
		"no blocks":        func(h *header) { h.blocks = 0 },
		"too many blocks":  func(h *header) { h.blocks = block.MaxDeviceBlocks },
		"another region":   func(h *header) { h.shift++ },
		"an unknown state": func(h *header) { h.copies[1].state = 9 },
		"four copies":      func(h *header) { h.copies = append(h.copies, member{}) },
	} {
		h := example()
		change(&h)
		if _, err := decodeHeader(h.encode()); !errors.Is(err, block.ErrCorrupt) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Regions are tracks on small mirrors, and the map has room for the largest.
func TestRegionSize(t *testing.T) {
	for blocks, want := range map[uint64]uint{
		1: 8, 256 * mapPages * pageBits: 8, 256*mapPages*pageBits + 1: 9, block.MaxDeviceBlocks - reserved: 22,
	} {
		if got := shiftFor(blocks); got != want {
			t.Errorf("%d blocks: regions of 2^%d blocks instead of 2^%d", blocks, got, want)
		}
	}
}

func FuzzHeader(f *testing.F) {
	h := example()
	f.Add(h.encode()[ondisk.HeaderSize:200])
	f.Fuzz(func(t *testing.T, body []byte) {
		p := make([]byte, block.Size)
		n := ondisk.HeaderSize + copy(p[ondisk.HeaderSize:], body)
		ondisk.Seal(p, ondisk.Header{Kind: ondisk.KindMirror, Version: headerVersion, Length: n, Generation: 1})
		h, err := decodeHeader(p)
		if err != nil {
			return
		}
		if again, err := decodeHeader(h.encode()); err != nil || !reflect.DeepEqual(again, h) {
			t.Errorf("%+v became %+v, %v", h, again, err)
		}
	})
}

func FuzzMapPage(f *testing.F) {
	p := make([]byte, block.Size)
	encodeMapPage(p, ID{1}, 2, stack.NewBits(3*pageBits))
	f.Add(p, 2)
	f.Fuzz(func(t *testing.T, p []byte, n int) {
		if n < 0 || n >= mapPages {
			return
		}
		b := stack.NewBits(3*pageBits - 7)
		if decodeMapPage(p, ID{1}, n, b) == nil && n > 2 && b.Count() > 0 {
			t.Errorf("page %d has set regions that do not exist", n)
		}
	})
}
