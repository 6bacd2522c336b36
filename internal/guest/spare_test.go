package guest

import (
	"strings"
	"testing"
)

func TestAwaitNumber(t *testing.T) {
	for text, want := range map[string]uint64{"": 0, "1\n": 1, "18446744073709551615\n": 1<<64 - 1, "7\n8\n": 7} {
		if n, err := awaitNumber(strings.NewReader(text)); err != nil || n != want {
			t.Errorf("%q: %d, %v", text, n, err)
		}
	}
	for _, text := range []string{"1", "0\n", "\n", "-1\n", "one\n", "18446744073709551616\n", strings.Repeat("1", 100) + "\n"} {
		if n, err := awaitNumber(strings.NewReader(text)); err == nil || n != 0 {
			t.Errorf("%q is number %d", text, n)
		}
	}
}

// What a spare process does beforehand needs nothing to be there.
func TestWarm(t *testing.T) {
	b := newBench(t)
	warm(b.cfg.Dir)
	warm(b.cfg.Dir + "/none")
}

func FuzzAwaitNumber(f *testing.F) {
	f.Add("")
	f.Add("1\n")
	f.Add("18446744073709551616\n")
	f.Add("00\n")
	f.Fuzz(func(t *testing.T, text string) {
		n, err := awaitNumber(strings.NewReader(text))
		if n == 0 && err == nil && text != "" || n != 0 && err != nil {
			t.Fatalf("%q: %d, %v", text, n, err)
		}
	})
}
