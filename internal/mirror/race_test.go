package mirror

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"os"
	"strconv"
	"sync"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

// Clients write and read while copies leave, come back, are replaced and
// resilvered, and marks are cleared. Each client owns some blocks and always
// finds what it wrote last; at the end all copies are alike.
func TestTraffic(t *testing.T) {
	seed := rand.Uint64()
	if v := os.Getenv("POLLUX_SEED"); v != "" {
		var err error
		if seed, err = strconv.ParseUint(v, 10, 64); err != nil {
			t.Fatalf("POLLUX_SEED: %v", err)
		}
	}
	t.Logf("seed %d (POLLUX_SEED=%d draws the same steps)", seed, seed)
	const clients, blocks = 4, 1280 // blocks of the mirror
	disks := crashes(3)
	create(t, devices(disks...))
	m := open(t, Options{Devices: devices(disks...)})
	stop := make(chan struct{})
	results := make([]map[int]uint64, clients)
	var wg sync.WaitGroup
	for c := range clients {
		wg.Go(func() { results[c] = client(t, m, stop, seed+uint64(c), c, clients, blocks) })
	}
	rng := rand.New(rand.NewPCG(seed, 1))
	for step := range 300 {
		i := rng.IntN(len(disks))
		var err error
		switch rng.IntN(5) {
		case 0, 1:
			_, err = m.Resync(1 + rng.IntN(4))
		case 2:
			err = m.Tidy()
		case 3:
			if m.copies[i].is(Absent) {
				disks[i] = disks[i].Reopen()
				err = m.Attach(disks[i])
			} else {
				_ = m.Detach(i) // refused for the last one in sync
			}
		case 4:
			if rng.IntN(4) == 0 && m.copies[i].is(Absent) {
				disks[i] = crashes(1)[0]
				err = m.Replace(i, disks[i])
			}
		}
		if err != nil {
			t.Errorf("step %d: %v", step, err)
			break
		}
	}
	close(stop)
	wg.Wait()
	for i, c := range m.copies {
		if c.is(Absent) {
			disks[i] = disks[i].Reopen()
			if err := m.Attach(disks[i]); err != nil {
				t.Fatal(err)
			}
		}
	}
	w := newWorld(t, m)
	w.resync()
	for _, r := range results {
		for b, v := range r {
			w.hist[b], w.done[b] = []uint64{v}, v
		}
	}
	w.latest()
	alike(t, w.newest(), disks...)
}

// client writes and reads every clients-th block until stop, and returns what
// each holds.
func client(t *testing.T, m *Mirror, stop <-chan struct{}, seed uint64, c, clients, blocks int) map[int]uint64 {
	rng := rand.New(rand.NewPCG(seed, 2))
	q, err := m.NewQueue(4)
	if err != nil {
		t.Error(err)
		return nil
	}
	defer func() { _ = q.Close() }()
	have := map[int]uint64{}
	for v := uint64(c + 1); ; v += uint64(clients) {
		select {
		case <-stop:
			return have
		default:
		}
		reqs := make([]*hpdi.Request, 1+rng.IntN(3))
		used := map[int]bool{}
		for i := range reqs {
			b := rng.IntN(blocks/clients)*clients + c
			for used[b] {
				b = rng.IntN(blocks/clients)*clients + c
			}
			used[b] = true
			reqs[i] = &hpdi.Request{Op: hpdi.OpWrite, Offset: int64(b) * block.Size, Vec: [][]byte{pattern(v, 1)}, User: b}
			if _, ok := have[b]; ok && rng.IntN(2) == 0 {
				reqs[i].Op, reqs[i].Vec = hpdi.OpRead, [][]byte{make([]byte, block.Size)}
			}
		}
		if err := hpdi.Do(q, reqs...); err != nil {
			t.Errorf("client %d: %v", c, err)
			return have
		}
		for _, r := range reqs {
			b := r.User.(int)
			if r.Op == hpdi.OpWrite {
				have[b] = v
			} else if got := binary.LittleEndian.Uint64(r.Vec[0]); got != have[b] {
				t.Error(fmt.Errorf("client %d: block %d holds write %d instead of %d", c, b, got, have[b]))
				return have
			}
		}
	}
}
