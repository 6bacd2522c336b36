package catalogue

import (
	"encoding/binary"
	"errors"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
)

func TestDecodeRefusals(t *testing.T) {
	good := Volume{ID: 4, Name: "four", Size: block.Size}
	with := func(edit func(*Volume)) []byte {
		v := good
		edit(&v)
		return Encode([]Volume{v}, 5)
	}
	flags := with(func(*Volume) {})
	flags[8+entryMin-2-4-1] = 4
	run := func(n uint16) []byte {
		b := with(func(v *Volume) { v.Run = 1 })
		binary.LittleEndian.PutUint16(b[len(b)-2:], n)
		return b
	}
	count := with(func(*Volume) {})
	binary.LittleEndian.PutUint32(count[4:], 2)
	for _, test := range []struct {
		name string
		b    []byte
		word string
	}{
		{"volume 0", with(func(v *Volume) { v.ID = 0 }), "volume 0"},
		{"no size", with(func(v *Volume) { v.Size = 0 }), "of 0 bytes"},
		{"negative size", with(func(v *Volume) { v.Size = -block.Size }), "of -4096 bytes"},
		{"half a block", with(func(v *Volume) { v.Size = block.Size + 1 }), "of 4097 bytes"},
		{"too large", with(func(v *Volume) { v.Size = MaxSize + block.Size }), "volume 4"},
		{"no name", with(func(v *Volume) { v.Name = "" }), `volume 4 ""`},
		{"deleted with a name", with(func(v *Volume) { v.Deleted = true }), `"four"`},
		{"too many ranges", with(func(v *Volume) { v.Pending = make([]Pending, MaxPending+1) }), "volume 4"},
		{"flags", flags, "flags 0x4"},
		{"runs of nothing", run(0), "runs of 0 blocks"},
		{"runs longer than a track", run(MaxRun + 1), "runs of 257 blocks"},
		{"count", count, "elements"},
		{"twice", Encode([]Volume{good, {ID: 4, Name: "other", Size: block.Size}}, 5), "volume 4 twice"},
		{"name twice", Encode([]Volume{good, {ID: 5, Name: "four", Size: block.Size}}, 6), `volume "four" twice`},
		{"nothing", nil, "field of 4 bytes"},
	} {
		if s, err := Decode(test.b); !errors.Is(err, block.ErrCorrupt) || !strings.Contains(err.Error(), test.word) {
			t.Errorf("%s: %+v %v", test.name, s, err)
		}
	}
	s := sample()
	whole := Encode(s.All(), s.NextID())
	for n := range whole {
		if _, err := Decode(whole[:n]); !errors.Is(err, block.ErrCorrupt) {
			t.Errorf("cut to %d of %d bytes: %v", n, len(whole), err)
		}
	}
	// The limits themselves; two deleted volumes have the same, empty name.
	for _, b := range [][]byte{
		with(func(v *Volume) { v.Size = MaxSize }),
		with(func(v *Volume) { v.Pending = make([]Pending, MaxPending) }),
		with(func(v *Volume) { v.Name, v.Deleted = "", true }),
		Encode([]Volume{{ID: 1, Size: block.Size, Deleted: true}, {ID: 2, Size: block.Size, Deleted: true}}, 3),
	} {
		if _, err := Decode(b); err != nil {
			t.Error(err)
		}
	}
	// Identities are not reused, whatever the stored number says.
	if s, err := Decode(Encode([]Volume{good}, 2)); err != nil || s.NextID() != 5 {
		t.Errorf("%v: next is %d", err, s.NextID())
	}
}

func TestDead(t *testing.T) {
	pending := []Pending{{block.Range{Start: 10, End: 20}, 7}, {block.Range{Start: 15, End: 30}, 9}}
	for _, test := range []struct {
		lba   block.Logical
		birth block.CP
		want  bool
	}{
		{9, 1, false}, {10, 1, true}, {10, 7, true}, {10, 8, false},
		{15, 8, true}, {19, 9, true}, {20, 9, true}, {29, 10, false}, {30, 1, false},
	} {
		if got := Dead(pending, test.lba, test.birth); got != test.want {
			t.Errorf("block %d of consistency point %d: %v", test.lba, test.birth, got)
		}
	}
	if Dead(nil, 10, 1) {
		t.Error("dead without a range")
	}
}

// What folds do to the list, and what they leave alone.
func TestFolds(t *testing.T) {
	s := sample()
	root := block.Pointer{Phys: 99, Birth: 4, Sum: 5}
	s.SetTree(1, root, 17, nil)
	if v, ok := s.Get(1); !ok || v.Root != root || v.Used != 17 || v.Name != "one" {
		t.Errorf("%+v %v", v, ok)
	}
	s.SetTree(77, root, 1, nil)
	if _, ok := s.Get(77); ok || len(s.All()) != 3 {
		t.Error("a tree made a volume")
	}
	if _, ok := s.Get(3); ok {
		t.Error("a deleted volume is there")
	}
	s.Forget(3)
	if len(s.All()) != 2 || s.NextID() != 4 {
		t.Errorf("%d volumes, next %d", len(s.All()), s.NextID())
	}
	s.Apply(Change{Delete: 3}) // as a replayed journal may say again
	if len(s.All()) != 2 {
		t.Error("a deletion made a volume")
	}
	other := New()
	other.Apply(Change{Put: &Volume{ID: 9, Name: "nine", Size: block.Size}})
	s.Replace(other)
	if _, ok := s.ByName("one"); ok || s.NextID() != 10 {
		t.Errorf("not replaced: next %d", s.NextID())
	}
	if v, ok := s.ByName("nine"); !ok || v.ID != 9 {
		t.Errorf("%+v", v)
	}
	if _, ok := s.ByName(""); ok {
		t.Error("a volume without a name")
	}
}
