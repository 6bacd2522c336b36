package ondisk

import (
	"bytes"
	"errors"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
)

func sealed() []byte {
	p := make([]byte, 4096)
	for i := range p {
		p[i] = byte(i)
	}
	Seal(p, Header{Kind: KindLabel, Version: 1, Length: 300, Pool: block.PoolID{1, 2}, Epoch: 7, Generation: 9})
	return p
}

func TestRoundTrip(t *testing.T) {
	p := sealed()
	before := bytes.Clone(p)
	h, err := Open(p, KindLabel, 1)
	if err != nil {
		t.Fatal(err)
	}
	if h.Length != 300 || h.Epoch != 7 || h.Generation != 9 || h.Pool != (block.PoolID{1, 2}) {
		t.Errorf("got %+v", h)
	}
	if !bytes.Equal(p, before) {
		t.Error("Open changed its input")
	}
}

// Every single flipped bit within the covered bytes is noticed.
func TestEveryBit(t *testing.T) {
	p := sealed()
	for i := range 300 * 8 {
		p[i/8] ^= 1 << (i % 8)
		if _, err := Open(p, KindLabel, 1); err == nil {
			t.Fatalf("bit %d flipped unnoticed", i)
		}
		p[i/8] ^= 1 << (i % 8)
	}
}

func TestReasons(t *testing.T) {
	p := sealed()
	if _, err := Open(p, KindJournal, 1); !errors.Is(err, ErrMagic) {
		t.Errorf("wrong kind: %v", err)
	}
	if _, err := Open(p[:200], KindLabel, 1); !errors.Is(err, ErrChecksum) {
		t.Errorf("cut short: %v", err)
	}
	Seal(p, Header{Kind: KindLabel, Version: 2, Length: 300})
	if _, err := Open(p, KindLabel, 1); !errors.Is(err, ErrVersion) {
		t.Errorf("newer: %v", err)
	}
	if _, err := Open(make([]byte, 4096), KindLabel, 1); !errors.Is(err, ErrMagic) {
		t.Errorf("zeroes: %v", err)
	}
}

func FuzzOpen(f *testing.F) {
	f.Add(sealed())
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, p []byte) {
		if h, err := Open(p, KindLabel, 1); err == nil && h.Length > len(p) {
			t.Fatalf("length %d of %d", h.Length, len(p))
		}
	})
}
