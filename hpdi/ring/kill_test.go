package ring

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/file"
	"github.com/pollux-storage/pollux/hpdi/hpditest"
)

// kills is how many times a side is killed.
func kills() int {
	if os.Getenv("POLLUX_SOAK") != "" {
		return 500
	}
	return 8
}

func seed(t *testing.T) uint64 {
	s := rand.Uint64()
	if v := os.Getenv("POLLUX_SEED"); v != "" {
		var err error
		if s, err = strconv.ParseUint(v, 10, 64); err != nil {
			t.Fatalf("POLLUX_SEED: %v", err)
		}
	}
	t.Logf("seed %d (POLLUX_SEED=%d repeats what is drawn)", s, s)
	return s
}

// stamp fills a block with its number and version.
func stamp(p []byte, block int, version uint64) {
	for i := 0; i < len(p); i += 16 {
		binary.LittleEndian.PutUint64(p[i:], uint64(block))
		binary.LittleEndian.PutUint64(p[i+8:], version)
	}
}

func stamped(p []byte, block int, version uint64) error {
	for i := 0; i < len(p); i += 16 {
		b, v := binary.LittleEndian.Uint64(p[i:]), binary.LittleEndian.Uint64(p[i+8:])
		if b != uint64(block) || v != version {
			return fmt.Errorf("block %d, byte %d: version %d of block %d, want version %d", block, i, v, b, version)
		}
	}
	return nil
}

// verify writes and reads blocks of its own part until stop, each as it must be, with as
// many in flight as the queue takes.
func verify(d hpdi.Device, rng *rand.Rand, first, blocks, depth int, stop *atomic.Bool) (requests int, err error) {
	q, err := d.NewQueue(depth)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, q.Close()) }()
	alloc, release := hpdi.Alloc, hpdi.Free
	if a, ok := d.(Allocator); ok {
		alloc, release = a.Alloc, a.Free
	}
	mem, err := alloc(depth * 4096)
	if err != nil {
		return 0, err
	}
	defer func() { err = errors.Join(err, release(mem)) }()
	version := make([]uint64, blocks)
	busy := make([]bool, blocks)
	type slot struct {
		hpdi.Request
		block int
		p     []byte
	}
	var free []*slot
	for i := range depth {
		s := &slot{p: mem[4096*i : 4096*(i+1)]}
		s.User, s.Vec = s, [][]byte{s.p}
		free = append(free, s)
	}
	var done []*hpdi.Request
	for n := uint64(1); !stop.Load() || len(free) < depth; {
		for len(free) > 0 && !stop.Load() {
			s := free[len(free)-1]
			free = free[:len(free)-1]
			for s.block = rng.IntN(blocks); busy[s.block]; s.block = (s.block + 1) % blocks {
			}
			busy[s.block] = true
			s.Offset, s.Op = int64(first+s.block)*4096, hpdi.OpRead
			if rng.IntN(2) == 0 {
				n++
				version[s.block], s.Op = n, hpdi.OpWrite
				stamp(s.p, first+s.block, n)
			} else {
				clear(s.p)
			}
			if err := q.Submit(&s.Request); err != nil {
				return requests, err
			}
		}
		if done, err = q.Wait(1, done[:0]); err != nil {
			return requests, err
		}
		for _, r := range done {
			s := r.User.(*slot)
			if r.Err != nil {
				return requests, r.Err
			}
			if r.Op == hpdi.OpRead && version[s.block] > 0 {
				if err := stamped(s.p, first+s.block, version[s.block]); err != nil {
					return requests, err
				}
			}
			busy[s.block] = false
			free = append(free, s)
			requests++
		}
	}
	return requests, nil
}

// A back-end is killed again and again under four queues: no request fails, none is lost,
// and what is read is what was written.
func TestKillBackEnd(t *testing.T) {
	path := filepath.Join(t.TempDir(), "ring.sock")
	killBacks(t, path, kills(), 30)
}

// The same without a socket: both sides map a file.
func TestKillBackEndOfFile(t *testing.T) {
	killBacks(t, ringFile(t, 4<<20), max(kills()/4, 3), 100)
}

// tmpfs returns a folder in memory.
func tmpfs(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/dev/shm", "pollux-ring-*")
	if err != nil {
		return t.TempDir()
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

// ringFile returns a file for a ring of that size.
func ringFile(t *testing.T, size int64) string {
	t.Helper()
	path := filepath.Join(tmpfs(t), "ring")
	if err := errors.Join(os.WriteFile(path, nil, 0o600), os.Truncate(path, size)); err != nil {
		t.Fatal(err)
	}
	return path
}

// killBacks verifies data while back-ends are killed, each after some milliseconds.
func killBacks(t *testing.T, path string, kills, most int) {
	device := filepath.Join(tmpfs(t), "device")
	if err := errors.Join(os.WriteFile(device, nil, 0o600), os.Truncate(device, hpditest.MinSize)); err != nil {
		t.Fatal(err)
	}
	p := startBack(t, path, device, 0)
	d := open(t, path, Options{Queues: 4, Entries: 16, Poll: 20 * time.Microsecond, Reconnect: time.Minute})
	s := seed(t)
	var stop atomic.Bool
	var all atomic.Int64
	var wg sync.WaitGroup
	for i := range 4 {
		wg.Go(func() {
			n, err := verify(d, rand.New(rand.NewPCG(s, uint64(i))), 256*i, 256, 16, &stop)
			if err != nil {
				t.Errorf("queue %d: %v", i, err)
			}
			all.Add(int64(n))
		})
	}
	rng := rand.New(rand.NewPCG(s, 99))
	for range kills {
		time.Sleep(time.Duration(rng.IntN(most)) * time.Millisecond)
		p.kill()
		p = startBack(t, path, device, 0)
	}
	stop.Store(true)
	wg.Wait()
	p.kill()
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	t.Logf("%d requests through %d kills", all.Load(), kills)
	if all.Load() < int64(30*kills) {
		t.Errorf("only %d requests came through", all.Load())
	}
}

// beFront has writes in flight until it is killed.
func beFront(path string) error {
	d, err := Open(context.Background(), path, Options{Queues: 2, Entries: 64})
	if err != nil {
		return err
	}
	fmt.Println("ready")
	var stop atomic.Bool
	_, err = verify(d, rand.New(rand.NewPCG(1, 1)), 0, 256, 64, &stop)
	return err
}

// Front-ends are killed again and again: the back-end frees what was theirs, and serves
// others all the time.
func TestKillFrontEnd(t *testing.T) {
	name := filepath.Join(t.TempDir(), "device")
	if err := file.Create(name, hpditest.MinSize); err != nil {
		t.Fatal(err)
	}
	dev, err := file.Open(name, file.Options{Direct: file.DirectOff})
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := dev.Close(); err != nil {
			t.Error(err)
		}
	}()
	path, s := serve(t, dev)
	defer s.Close() // before the device
	d := open(t, path, Options{Queues: 1, Entries: 16})
	var stop atomic.Bool
	var wg sync.WaitGroup
	sd := seed(t)
	wg.Go(func() {
		if _, err := verify(d, rand.New(rand.NewPCG(sd, 1)), 512, 256, 16, &stop); err != nil {
			t.Error(err)
		}
	})
	before := count(t, "/proc/self/fd")
	rng := rand.New(rand.NewPCG(sd, 2))
	for range kills() {
		p := start(t, path, frontEnv+"="+path)
		time.Sleep(time.Duration(rng.IntN(20)) * time.Millisecond)
		p.kill()
	}
	for began := time.Now(); s.core.Rings() > 1 && time.Since(began) < 10*time.Second; {
		time.Sleep(time.Millisecond)
	}
	if n := s.core.Rings(); n != 1 {
		t.Errorf("%d rings are left", n-1)
	}
	if after := count(t, "/proc/self/fd"); after > before+8 {
		t.Errorf("%d descriptors are open, %d were before", after, before)
	}
	stop.Store(true)
	wg.Wait()
	if err := d.Close(); err != nil {
		t.Error(err)
	}
}

func count(t *testing.T, dir string) int {
	t.Helper()
	all, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	return len(all)
}
