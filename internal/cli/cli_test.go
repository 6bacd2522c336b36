package cli

import (
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi/open"
	"github.com/pollux-storage/pollux/internal/control"
)

func TestSizesAreWholeBlocks(t *testing.T) {
	for text, want := range map[string]size{
		"1": 4096, "4096": 4096, "4097": 8192,
		"10G": 10 << 30, "10GiB": 10 << 30, "1.5T": 3 << 39,
		"10GB": 10_000_003_072, // 10 times 10^9, rounded up
	} {
		var z size
		if err := z.Set(text); err != nil || z != want {
			t.Errorf("%s: %d, %v instead of %d", text, z, err, want)
		}
	}
}

func TestSizeSurvivesItsOwnText(t *testing.T) {
	for _, want := range []size{4096, 3 << 30, 10_000_003_072, 1<<62 - 4096} {
		var z size
		if err := z.Set(want.String()); err != nil || z != want {
			t.Errorf("%s: %d, %v instead of %d", want.String(), z, err, want)
		}
	}
}

func TestDurations(t *testing.T) {
	for d, want := range map[time.Duration]string{
		1234 * time.Nanosecond:          "0s",
		1234567 * time.Nanosecond:       "1.23ms",
		31_512 * time.Microsecond:       "31.5ms",
		1_234_567_890 * time.Nanosecond: "1.23s",
	} {
		if got := took(control.Duration(d)); got != want {
			t.Errorf("%d ns took %s instead of %s", d, got, want)
		}
	}
	for d, want := range map[time.Duration]string{
		0: "-", 59 * time.Second: "59s", 61 * time.Second: "1m1s",
		25*time.Hour + time.Minute: "1d1h", 2*time.Hour + 3*time.Minute: "2h3m",
	} {
		if got := uptime(control.Duration(d)); got != want {
			t.Errorf("uptime %v is %s instead of %s", d, got, want)
		}
	}
}

// What a terminal shows while a check runs: one line, each text written over
// the one before, and nothing at the end.
func TestProgressLine(t *testing.T) {
	var out strings.Builder
	now := time.Unix(0, 0)
	l := &progressLine{w: &out, now: func() time.Time { return now }}
	l.show(control.CheckProgress{Pool: "pool-a", Phase: "metadata", Done: 8 << 20})
	l.show(control.CheckProgress{Pool: "pool-a", Phase: "data", Done: 1 << 30, Total: 4 << 30})
	now = now.Add(2 * time.Second)
	l.show(control.CheckProgress{Pool: "pool-a", Phase: "data", Done: 2 << 30, Total: 4 << 30})
	l.show(control.CheckProgress{Pool: "pool-a", Phase: "data", Done: 4 << 30, Total: 4 << 30})
	l.clear()
	last := "pool-a: data, 2.0 GiB of 4.0 GiB (50%), 512 MiB/s, 4s left"
	end := "pool-a: data, 4.0 GiB of 4.0 GiB (100%), 1.5 GiB/s"
	want := "\rpool-a: metadata, 8.0 MiB\rpool-a: data, 1.0 GiB of 4.0 GiB (25%)\r" + last +
		"\r" + end + strings.Repeat(" ", len(last)-len(end)) + "\r" + strings.Repeat(" ", len(end)) + "\r"
	if got := out.String(); got != want {
		t.Errorf("shown:\n%q\nwant\n%q", got, want)
	}
}

func TestShellQuote(t *testing.T) {
	for word, want := range map[string]string{
		"nbd://127.0.0.11:10809/disk1": "nbd://127.0.0.11:10809/disk1",
		"nbd+unix:///d?socket=/s":      "'nbd+unix:///d?socket=/s'",
		"it's":                         `'it'\''s'`,
		"":                             "''",
	} {
		if got := shellQuote(word); got != want {
			t.Errorf("%q is quoted as %s", word, got)
		}
	}
}

// A plain path is a file whatever it is called, and what is a URI stays one.
func TestDeviceURI(t *testing.T) {
	for name, want := range map[string]string{
		"disk":                   "file:disk?read-only=on",
		"/srv/read-only=/a?b#c%": "file:/srv/read-only=/a%3Fb%23c%25?read-only=on",
		"odd:name":               "file:odd:name?read-only=on",
		"FILE:disk?direct=on":    "FILE:disk?direct=on&read-only=on",
		"file:disk?read-only=no": "file:disk?read-only=no",
		"mem:?size=4KiB":         "mem:?size=4KiB",
	} {
		if got, err := open.With(deviceURI(name), "read-only", "on"); err != nil || got != want {
			t.Errorf("%s: %s, %v; want %s", name, got, err, want)
		}
	}
}
