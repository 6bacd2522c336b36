package vhost

import (
	"errors"
	"math/rand/v2"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	driver "github.com/pollux-storage/pollux/hpdi/vhostuser"
	"github.com/pollux-storage/pollux/internal/export/nbd/nbdtest"
)

// A virtqueue that is always full, with requests of all kinds and lengths that complete in any
// order, is none that breaks.
func TestFull(t *testing.T) {
	for name, o := range layouts {
		t.Run(name, func(t *testing.T) {
			o.QueueSize, o.Queues = 16, 2
			s := serve(t, nbdtest.New("v", 4<<20))
			d, err := driver.Open(t.Context(), s.sock, o)
			must(t, err)
			const depth, part = 24, 16 << 10
			mem, err := hpdi.Alloc(2 * depth * part)
			must(t, err)
			seed := rand.Uint64()
			t.Logf("seed %d", seed)
			work := func(n int) error {
				rng := rand.New(rand.NewPCG(seed, uint64(n)))
				q, err := d.NewQueue(depth)
				if err != nil {
					return err
				}
				var ready, done []*hpdi.Request
				for i := range depth {
					ready = append(ready, &hpdi.Request{Vec: [][]byte{mem[(n*depth+i)*part:][:part]}})
				}
				for begun := time.Now(); time.Since(begun) < 300*time.Millisecond && err == nil; {
					for _, r := range ready {
						r.Op = hpdi.OpRead + hpdi.Op(rng.IntN(3))
						r.Vec[0] = r.Vec[0][:(1+rng.IntN(4))*4096]
						r.Offset = rng.Int64N(1000) * 4096
					}
					if err = q.Submit(ready...); err == nil {
						done, err = q.Wait(1+rng.IntN(8), done[:0])
					}
					for _, r := range done {
						err = errors.Join(err, r.Err)
					}
					ready = append(ready[:0], done...)
				}
				return errors.Join(err, q.Close())
			}
			ended := make(chan error)
			for n := range 2 {
				go func() { ended <- work(n) }()
			}
			must(t, errors.Join(<-ended, <-ended, d.Close(), hpdi.Free(mem)))
		})
	}
}
