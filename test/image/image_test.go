package image

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/test/pair"
)

func TestCopiersSurviveTheDeathOfTheServer(t *testing.T) {
	pair.Need(t, "nbdkit", "nbdcopy", "qemu-img")
	dir := t.TempDir()
	img := Image{Path: filepath.Join(dir, "image"), Size: 64 << 20}
	if err := os.WriteFile(img.Path, []byte(strings.Repeat("0123456789abcdef", 4<<20)), 0o600); err != nil {
		t.Fatal(err)
	}
	sum, err := Checksum(img.Path)
	if err != nil {
		t.Fatal(err)
	}
	img.Sum = sum
	for name, write := range map[string]Copier{"nbdcopy": Nbdcopy(dir), "qemu-img": QemuImg} {
		t.Run(name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
			defer cancel()
			store, socket := filepath.Join(dir, "store"), filepath.Join(dir, "s")
			if err := os.WriteFile(store, nil, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Truncate(store, img.Size); err != nil {
				t.Fatal(err)
			}
			stop, err := ServeFile(ctx, socket, store)
			if err != nil {
				t.Fatal(err)
			}
			defer func() { stop() }()
			uri := "nbd+unix:///disk?socket=" + socket
			halves := 0
			err = write(ctx, img, uri, func(program Program) {
				halves++
				if !program.Running() {
					t.Error("the program has ended half-way")
				}
				stop()
				var err error
				if stop, err = ServeFile(ctx, socket, store); err != nil {
					t.Error(err)
					stop = func() {}
				}
			})
			if err != nil {
				t.Fatal(err)
			}
			if halves != 1 {
				t.Errorf("half-way was reported %d times", halves)
			}
			got, err := ReadBack(ctx, uri, filepath.Join(dir, "back"))
			if err != nil {
				t.Fatal(err)
			}
			if got != sum {
				t.Errorf("read back %s, wrote %s", got, sum)
			}
		})
	}
}

func TestProgressOfBothPrograms(t *testing.T) {
	for name, text := range map[string]string{
		"nbdcopy":  "1/100\n49/100\n50/100\n100/100\n",
		"qemu-img": "    (0.00/100%)\r    (49.99/100%)\r    (62.50/100%)\r    (100.00/100%)\r\n",
		"silent":   "",
	} {
		t.Run(name, func(t *testing.T) {
			calls := 0
			watch(strings.NewReader(text), func() { calls++ })
			if calls != 1 {
				t.Errorf("half-way was called %d times for %s", calls, fmt.Sprintf("%q", text))
			}
		})
	}
}
