package units

import "testing"

func TestParse(t *testing.T) {
	for s, want := range map[string]int64{"0": 0, "4096": 4096, "64GiB": 64 << 30, "64g": 64 << 30, "1.5 T": 3 << 39, "500MB": 500e6, "9007199254740993": 9007199254740993} {
		if got, err := Parse(s); err != nil || got != want {
			t.Errorf("%s: %d, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "G", "-1", "1X", "9999999P"} {
		if got, err := Parse(s); err == nil {
			t.Errorf("%q gave %d", s, got)
		}
	}
}

// What is written is read as the same number.
func TestFormat(t *testing.T) {
	for n, want := range map[int64]string{0: "0", 1000: "1000", 4096: "4KiB", 5 << 20: "5MiB", 1 << 30: "1GiB", 3 << 40: "3TiB", 1<<20 + 512: "1049088"} {
		s := Format(n)
		if back, err := Parse(s); s != want || err != nil || back != n {
			t.Errorf("%d: %s, which is %d, %v", n, s, back, err)
		}
	}
}
