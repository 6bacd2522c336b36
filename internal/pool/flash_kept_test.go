package pool

import (
	"bytes"
	"reflect"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/flashmap/policy"
)

// someKept is what people may have said.
func someKept() flashKept {
	p := policy.Defaults()
	q := policy.DefaultPattern()
	q.Promote = "reads > 2.0 && references > 1"
	p.Patterns["sata"] = q
	return flashKept{
		Policy: p, Classes: map[string]string{"d0000000000000000000000000000000": "sata"},
		Pins: []keptPin{{Volume: 3}, {Volume: 7, Offset: 4096, Length: 1 << 40}}, Evacuate: true,
	}
}

// What is decoded is what was encoded.
func TestKeptFormat(t *testing.T) {
	for _, k := range []flashKept{defaultKept(), someKept()} {
		b, err := k.encode()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := decodeKept(b); err != nil || !reflect.DeepEqual(got, k) {
			t.Errorf("%v\n%+v\n%+v", err, got, k)
		}
	}
	for _, bad := range []string{
		``, `{}`, `{"version":2}`, `{"version":1,"policy":{"no_such":1}}`, `{"version":1,"policy":{"interval":-1}}`,
		`{"version":1,"policy":{},"pins":[{"volume":1,"offset":-1}]}`,
		`{"version":1,"policy":{},"pins":[` + strings.Repeat(`{},`, maxPins) + `{}]}`,
	} {
		if k, err := decodeKept([]byte(bad)); err == nil {
			t.Errorf("%s is taken for %+v", bad, k)
		}
	}
}

// FuzzKept decodes anything without harm, and what it takes it writes as it has read it.
func FuzzKept(f *testing.F) {
	for _, k := range []flashKept{defaultKept(), someKept()} {
		b, err := k.encode()
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(`{"version":1,"policy":{},"pins":[{"volume":1,"offset":9223372036854775807,"length":9223372036854775807}]}`))
	f.Fuzz(func(t *testing.T, b []byte) {
		k, err := decodeKept(b)
		if err != nil {
			return
		}
		for _, p := range k.Pins {
			if p.first() > p.end() {
				t.Fatalf("pin %+v begins at block %d and ends at %d", p, p.first(), p.end())
			}
		}
		again, err := k.encode()
		if err != nil {
			t.Fatal(err)
		}
		if got, err := decodeKept(again); err != nil || len(got.Pins) != len(k.Pins) || got.Evacuate != k.Evacuate {
			t.Fatalf("%v: %+v instead of %+v", err, got, k)
		}
	})
}

// FuzzHistory decodes anything without harm.
func FuzzHistory(f *testing.F) {
	empty := history{}
	f.Add(empty.encode())
	h := history{wear: policy.Wear{Hour: 500000}, devices: []historyEntry{{block.DeviceID{1}, []byte("state")}, {block.DeviceID{2}, nil}}}
	h.wear.Bytes[3] = 1 << 30
	f.Add(h.encode())
	f.Add(bytes.Repeat([]byte{255}, historyFixed))
	f.Fuzz(func(t *testing.T, b []byte) {
		h, err := decodeHistory(b)
		if err != nil {
			return
		}
		if got := h.encode(); !bytes.HasPrefix(b, got) {
			t.Fatalf("%x was read as %x", b, got)
		}
	})
}
