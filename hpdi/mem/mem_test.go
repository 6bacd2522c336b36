package mem_test

import (
	"errors"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/hpditest"
	"github.com/pollux-storage/pollux/hpdi/mem"
)

func TestConformance(t *testing.T) {
	hpditest.Run(t, func(t *testing.T) hpdi.Device {
		dev, err := mem.New("test", 16<<20)
		if err != nil {
			t.Fatal(err)
		}
		return dev
	})
}

func TestNewRefusesBadSize(t *testing.T) {
	for _, size := range []int64{-4096, 0, 1, 4097} {
		if dev, err := mem.New("test", size); err == nil {
			t.Errorf("New of %d bytes worked: %v", size, dev.Info())
		}
	}
}

func TestCloseRefusesOpenQueues(t *testing.T) {
	dev, err := mem.New("test", 4096)
	if err != nil {
		t.Fatal(err)
	}
	q, err := dev.NewQueue(1)
	if err != nil {
		t.Fatal(err)
	}
	if err := dev.Close(); err == nil {
		t.Fatal("device closed under an open queue")
	}
	if err := q.Close(); err != nil {
		t.Fatal(err)
	}
	if err := dev.Close(); err != nil {
		t.Fatal(err)
	}
}

func BenchmarkWrite4K(b *testing.B) {
	dev, err := mem.New("bench", 16<<20)
	if err != nil {
		b.Fatal(err)
	}
	hpditest.Bench(b, dev, hpdi.OpWrite, 4096, 16)
	if err := dev.Close(); err != nil {
		b.Fatal(err)
	}
}

// More memory than there are addresses is an error that names the device.
func TestNoMemory(t *testing.T) {
	d, err := mem.New("disk-a", 1<<60)
	if err == nil {
		t.Fatalf("there is %+v", d.Info())
	}
	if !errors.Is(err, unix.ENOMEM) || !strings.Contains(err.Error(), "disk-a") || !strings.Contains(err.Error(), "map 1152921504606846976 bytes") {
		t.Error(err)
	}
}
