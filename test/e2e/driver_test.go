package e2e

import (
	"fmt"
	"math/rand/v2"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/hpditest"
	"github.com/pollux-storage/pollux/hpdi/nbd"
)

// A program that reaches a volume by the device interface has a device like any other, which
// stays one while the guest that serves it is killed.
func TestDriver(t *testing.T) {
	r := start(t, small)
	e := r.volume("disk", 64<<20, "a")
	overBoth(t, e, func(t *testing.T, uri string) {
		hpditest.Run(t, func(t *testing.T) hpdi.Device {
			d, err := nbd.Open(t.Context(), uri, nbd.Options{Connections: 4, Reconnect: time.Minute})
			if err != nil {
				t.Fatal(err)
			}
			return d
		})
	})
	d, err := nbd.Open(t.Context(), e.NBD, nbd.Options{Connections: 2, Reconnect: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	q, err := d.NewQueue(16)
	if err != nil {
		t.Fatal(err)
	}
	killed := make(chan error, 1)
	for range 3 {
		serving := r.export("disk").ServedBy
		p, err := r.HoldGuest(t.Context(), serving)
		if err != nil {
			t.Fatal(err)
		}
		// In the middle of writes, whenever that is.
		go func() {
			time.Sleep(time.Duration(rand.IntN(50)) * time.Millisecond)
			killed <- p.Signal(unix.SIGKILL)
		}()
		if err := verify(q, 0, killed); err != nil {
			t.Fatal(err)
		}
		p.Close()
		r.well()
	}
	if err := q.Close(); err != nil {
		t.Error(err)
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	r.clean()
}

// verify writes blocks from base on and reads them back until a while after the guest was
// killed.
func verify(q hpdi.Queue, base int64, killed <-chan error) error {
	const blocks, size = 256, 4096
	var version [blocks]byte
	mem, err := hpdi.Alloc(16 * size)
	if err != nil {
		return err
	}
	defer hpdi.Free(mem)
	for left := 100; left > 0; {
		select {
		case err := <-killed:
			if killed = nil; err != nil {
				return err
			}
		default:
		}
		if killed == nil {
			left--
		}
		var reqs []*hpdi.Request
		some := rand.Perm(blocks)[:16]
		for i, b := range some {
			p := mem[i*size:][:size]
			r := &hpdi.Request{Op: hpdi.OpRead, Offset: base + int64(b)*size, Vec: [][]byte{p}}
			if version[b] == 0 || rand.IntN(2) == 0 {
				r.Op = hpdi.OpWrite
				version[b]++
				for j := range p {
					p[j] = version[b]
				}
			}
			reqs = append(reqs, r)
		}
		if err := hpdi.Do(q, reqs...); err != nil {
			return err
		}
		for i, b := range some {
			for _, v := range mem[i*size:][:size] {
				if v != version[b] {
					return fmt.Errorf("block %d from %d on holds version %d, not %d", b, base, v, version[b])
				}
			}
		}
	}
	return nil
}
