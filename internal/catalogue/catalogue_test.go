package catalogue

import (
	"reflect"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/internal/block"
)

func sample() *Set {
	s := New()
	when := time.Unix(1700000000, 5).UTC()
	s.Apply(Change{Put: &Volume{ID: 1, Name: "one", Size: 4096, Created: when, Run: 8}})
	s.Apply(Change{Put: &Volume{ID: 2, Name: "two", Size: 1 << 40, Created: when, Root: block.Pointer{Phys: 7, Birth: 3, Sum: 9},
		Pending: []Pending{{block.Range{Start: 1, End: 5}, 9}}}})
	s.Apply(Change{Put: &Volume{ID: 3, Name: "three", Size: 4096, Created: when}})
	s.Apply(Change{Delete: 3})
	return s
}

func TestRoundTrip(t *testing.T) {
	s := sample()
	got, err := Decode(Encode(s.All(), s.NextID()))
	if err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got.All(), s.All()) || got.NextID() != 4 {
		t.Errorf("got %+v next %d", got.All(), got.NextID())
	}
}

func TestChanges(t *testing.T) {
	s := sample()
	v, _ := s.Get(2)
	v.Name, v.Root = "zwei", block.Pointer{}
	s.Apply(Change{Put: &v})
	if _, ok := s.ByName("two"); ok {
		t.Error("the old name still works")
	}
	if v, ok := s.ByName("zwei"); !ok || v.Root.Phys != 7 {
		t.Errorf("renamed volume: %+v %v", v, ok)
	}
	s.Apply(Change{Delete: 2})
	if len(s.List()) != 1 || len(s.All()) != 3 || s.NextID() != 4 {
		t.Error("a deleted volume's identity must not come back")
	}
}

func FuzzDecode(f *testing.F) {
	s := sample()
	f.Add(Encode(s.All(), s.NextID()))
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, b []byte) {
		s, err := Decode(b)
		if err != nil {
			return
		}
		if again, err := Decode(Encode(s.All(), s.NextID())); err != nil || !reflect.DeepEqual(again.All(), s.All()) {
			t.Fatalf("%x: %v", b, err)
		}
	})
}
