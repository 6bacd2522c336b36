// Package ring kills a storage process under an application that reaches a volume over a ring in
// shared memory, and looks whether each change was made once.
package ring

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/anishathalye/porcupine"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/file"
	front "github.com/pollux-storage/pollux/hpdi/ring"
	"github.com/pollux-storage/pollux/internal/export/ring"
	"github.com/pollux-storage/pollux/internal/pool"
)

// guestEnv makes the test binary a guest of one pool: its folder and the socket.
const guestEnv = "POLLUX_RING_GUEST"

func TestMain(m *testing.M) {
	if v := os.Getenv(guestEnv); v != "" {
		var dir, socket string
		if _, err := fmt.Sscan(v, &dir, &socket); err == nil {
			fmt.Fprintln(os.Stderr, beGuest(dir, socket))
		}
		os.Exit(1)
	}
	os.Exit(m.Run())
}

const (
	deviceBytes = 96 << 20
	volumeBytes = 8 << 20
)

// beGuest opens the pool, which it makes where there is none, and serves its volume until it is
// killed.
func beGuest(dir, socket string) error {
	ctx := context.Background()
	name := filepath.Join(dir, "device")
	_, err := os.Stat(name)
	fresh := errors.Is(err, os.ErrNotExist)
	if fresh {
		if err := file.Create(name, deviceBytes); err != nil {
			return err
		}
	}
	dev, err := file.Open(name, file.Options{Lock: true, Direct: file.DirectOff})
	for began := time.Now(); errors.Is(err, hpdi.ErrLocked) && time.Since(began) < 10*time.Second; {
		time.Sleep(time.Millisecond) // what the last guest gave to the kernel is not done yet
		dev, err = file.Open(name, file.Options{Lock: true, Direct: file.DirectOff})
	}
	if err != nil {
		return err
	}
	if fresh {
		if _, err := pool.Create(ctx, pool.CreateOptions{Name: "p", Identity: "a", Devices: []hpdi.Device{dev}, LogBytes: 4 << 20}); err != nil {
			return err
		}
	}
	p, err := pool.Open(ctx, pool.OpenOptions{
		Devices: []hpdi.Device{dev}, RegionPath: filepath.Join(dir, "region"), CacheBytes: 8 << 20, Owner: "a",
		Interval: 20 * time.Millisecond,
	})
	if err != nil {
		return err
	}
	go func() {
		if err := p.Run(ctx); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
	}()
	if fresh {
		if _, err := p.CreateVolume(ctx, "v", volumeBytes); err != nil {
			return err
		}
	}
	v, err := p.Volume("v")
	if err != nil {
		return err
	}
	s, err := ring.New(ring.Options{Volume: v, Poll: 20 * time.Microsecond})
	if err != nil {
		return err
	}
	l, err := front.Listen(socket)
	if err != nil {
		return err
	}
	fmt.Println("ready")
	return s.Serve(l)
}

// guest is one of them.
type guest struct{ cmd *exec.Cmd }

func start(t *testing.T, dir, socket string) *guest {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(exe)
	cmd.Env = append(os.Environ(), fmt.Sprintf("%s=%s %s", guestEnv, dir, socket))
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	g := &guest{cmd}
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "ready\n" {
		g.kill()
		t.Fatalf("the guest says %q, %v", line, err)
	}
	return g
}

func (g *guest) kill() {
	_ = g.cmd.Process.Kill()
	_ = g.cmd.Wait()
}

// act is what one request did to a block.
type act struct {
	write bool
	value uint64 // written, or read
	block int
}

// client keeps requests in flight on blocks that others use as well, and notes what they did.
type client struct {
	q     hpdi.Queue
	rng   *rand.Rand
	clock func() int64
	value func() uint64
	acts  []porcupine.Operation
}

const (
	blocks = 12
	depth  = 6
)

func (c *client) run(stop *atomic.Bool) error {
	mem, err := hpdi.Alloc(depth * 4096)
	if err != nil {
		return err
	}
	defer hpdi.Free(mem)
	type slot struct {
		hpdi.Request
		act
		p    []byte
		call int64
	}
	var free []*slot
	for i := range depth {
		s := &slot{p: mem[4096*i : 4096*(i+1)]}
		s.User, s.Vec = s, [][]byte{s.p}
		free = append(free, s)
	}
	var done []*hpdi.Request
	for !stop.Load() || len(free) < depth {
		for len(free) > 0 && !stop.Load() {
			s := free[len(free)-1]
			free = free[:len(free)-1]
			s.act = act{write: c.rng.IntN(2) == 0, block: c.rng.IntN(blocks)}
			s.Op, s.Offset, s.Durable = hpdi.OpRead, int64(s.block)*4096, false
			if s.write {
				s.act.value = c.value()
				s.Op, s.Durable = hpdi.OpWrite, c.rng.IntN(3) == 0
				for i := 0; i < len(s.p); i += 8 {
					binary.LittleEndian.PutUint64(s.p[i:], s.act.value)
				}
			}
			s.call = c.clock()
			if err := c.q.Submit(&s.Request); err != nil {
				return err
			}
		}
		if done, err = c.q.Wait(1, done[:0]); err != nil {
			return err
		}
		for _, r := range done {
			s := r.User.(*slot)
			if r.Err != nil {
				return fmt.Errorf("%s of block %d: %w", r.Op, s.block, r.Err)
			}
			if !s.write {
				s.act.value = binary.LittleEndian.Uint64(s.p)
				for i := 0; i < len(s.p); i += 8 {
					if v := binary.LittleEndian.Uint64(s.p[i:]); v != s.act.value {
						return fmt.Errorf("block %d holds parts of the writes of %d and %d", s.block, s.act.value, v)
					}
				}
			}
			c.acts = append(c.acts, porcupine.Operation{Input: s.act, Call: s.call, Return: c.clock()})
			free = append(free, s)
		}
	}
	return nil
}

// register is a block that holds what was written last.
var register = porcupine.Model{
	Init: func() any { return uint64(0) },
	Step: func(state, input, _ any) (bool, any) {
		a := input.(act)
		if a.write {
			return true, a.value
		}
		return a.value == state.(uint64), state
	},
}

// kills is how many times the guest is killed.
func kills() int {
	if os.Getenv("POLLUX_SOAK") != "" {
		return 1000
	}
	return 6
}

// The guest is killed again and again under three queues that write and read the same blocks:
// no request fails, and what is read agrees with each write having happened once.
func TestKills(t *testing.T) {
	dir, err := os.MkdirTemp("/dev/shm", "pollux-rings-*")
	if err != nil {
		dir = t.TempDir()
	}
	defer os.RemoveAll(dir)
	socket := filepath.Join(dir, "ring")
	seed := rand.Uint64()
	if v := os.Getenv("POLLUX_SEED"); v != "" {
		if seed, err = strconv.ParseUint(v, 10, 64); err != nil {
			t.Fatalf("POLLUX_SEED: %v", err)
		}
	}
	t.Logf("seed %d (POLLUX_SEED=%d repeats what is drawn)", seed, seed)
	g := start(t, dir, socket)
	defer func() { g.kill() }()
	d, err := front.Open(t.Context(), socket, front.Options{Queues: 3, Entries: 8, Poll: 20 * time.Microsecond, Reconnect: time.Minute})
	if err != nil {
		t.Fatal(err)
	}
	began := time.Now()
	clock := func() int64 { return int64(time.Since(began)) }
	var last atomic.Uint64
	rng := rand.New(rand.NewPCG(seed, 0))
	longest := time.Duration(0)
	total := 0
	// A history is checked after each few kills, for it must not become too long.
	for n := kills(); n > 0 && !t.Failed(); {
		var stop atomic.Bool
		var wg sync.WaitGroup
		clients := make([]*client, 3)
		for i := range clients {
			q, err := d.NewQueue(depth)
			if err != nil {
				t.Fatal(err)
			}
			c := &client{q: q, rng: rand.New(rand.NewPCG(seed, uint64(n*10+i))), clock: clock, value: func() uint64 { return last.Add(1) }}
			clients[i] = c
			wg.Go(func() {
				if err := errors.Join(c.run(&stop), c.q.Close()); err != nil {
					t.Error(err)
				}
			})
		}
		for range min(n, 3) {
			n--
			time.Sleep(time.Duration(5+rng.IntN(30)) * time.Millisecond)
			g.kill()
			at := time.Now()
			g = start(t, dir, socket)
			longest = max(longest, time.Since(at))
		}
		stop.Store(true)
		wg.Wait()
		history := make([][]porcupine.Operation, blocks)
		for i, c := range clients {
			for _, o := range c.acts {
				o.ClientId = i
				b := o.Input.(act).block
				history[b] = append(history[b], o)
			}
			total += len(c.acts)
		}
		for b, ops := range history {
			if got := porcupine.CheckOperationsTimeout(register, ops, time.Minute); got != porcupine.Ok {
				t.Errorf("block %d: what was read of %d requests does not agree with each write having happened once (%s)", b, len(ops), got)
			}
		}
		// All blocks begin the next history with zeroes.
		if err := settle(d); err != nil {
			t.Fatal(err)
		}
	}
	if err := d.Close(); err != nil {
		t.Error(err)
	}
	t.Logf("%d requests through %d kills; a guest was back within %v", total, kills(), longest)
	if total < 20*kills() {
		t.Errorf("only %d requests came through", total)
	}
}

// settle zeroes all blocks.
func settle(d hpdi.Device) error {
	q, err := d.NewQueue(1)
	if err != nil {
		return err
	}
	return errors.Join(hpdi.Do(q, &hpdi.Request{Op: hpdi.OpWriteZeroes, Length: blocks * 4096}), q.Close())
}
