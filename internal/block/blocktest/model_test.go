package blocktest

import (
	"errors"
	"math/rand/v2"
	"strings"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
)

// flat is a volume in a slice, for checking the model itself.
type flat []byte

func (f flat) read(b block.Logical) ([]byte, error) {
	return f[int(b)*block.Size : (int(b)+1)*block.Size], nil
}

// TestModelPrefix: every prefix of a random history is recognised, also with
// partial blocks and zeroes, and a state with one change left out is not.
func TestModelPrefix(t *testing.T) {
	for seed := uint64(1); seed <= 6; seed++ {
		rng := rand.New(rand.NewPCG(seed, 0))
		m := NewModel(seed)
		type step struct {
			off  int64
			data []byte
			void bool
		}
		var steps []step
		const size = 16 * block.Size
		for range 40 {
			n := 1 + rng.IntN(3*block.Size)
			if rng.IntN(2) == 0 {
				n = block.Size * (1 + rng.IntN(3))
			}
			off := rng.Int64N(size - int64(n))
			s := step{off: off}
			var id int
			if rng.IntN(4) == 0 {
				id = m.Zero(off, int64(n))
				s.data = make([]byte, n)
			} else {
				id, s.data = m.Write(off, n)
			}
			switch rng.IntN(8) {
			case 0:
				m.Void(id)
				s.void = true
			case 1:
			default:
				m.Ack(id)
			}
			steps = append(steps, s)
		}
		state := func(prefix, without int) flat {
			f := make(flat, size)
			for i, s := range steps[:prefix] {
				if i != without && !s.void {
					copy(f[s.off:], s.data)
				}
			}
			return f
		}
		for p := 0; p <= len(steps); p++ {
			full := state(p, -1)
			got, err := m.CheckPrefix(full.read, 0)
			// A longer prefix may read the same.
			if err != nil || got < p || string(state(got, -1)) != string(full) {
				t.Fatalf("seed %d: prefix %d found as %d: %v", seed, p, got, err)
			}
			if _, err := m.CheckPrefix(full.read, got+1); !errors.Is(err, ErrModel) && got < len(steps) {
				t.Fatalf("seed %d: prefix %d satisfies %d: %v", seed, p, got+1, err)
			}
		}
		for i := range steps {
			holed := state(len(steps), i)
			if got, err := m.CheckPrefix(holed.read, len(steps)); err == nil && string(state(got, -1)) != string(holed) {
				t.Fatalf("seed %d: the loss of change %d was not seen", seed, i)
			}
		}
		if err := m.CheckBlocks(state(len(steps), -1).read); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
}

func TestModelMessages(t *testing.T) {
	m := NewModel(1)
	vol := make(flat, 4*block.Size)
	id1, a := m.Write(0, block.Size)
	id2, b := m.Write(block.Size, block.Size)
	id3, c := m.Write(0, block.Size)
	m.Ack(id1)
	m.Ack(id2)
	m.FlushDone(m.FlushStart())
	m.Ack(id3)
	if m.Flushed() != 2 || m.Acked() != 3 || m.Len() != 3 {
		t.Fatalf("flushed %d acked %d of %d", m.Flushed(), m.Acked(), m.Len())
	}
	check := func(want string) {
		t.Helper()
		_, err := m.CheckPrefix(vol.read, m.Flushed())
		if err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("error %v\nwant %q", err, want)
		}
	}
	copy(vol, a)
	check("it is at change 1 of 3, but the first 2 were promised")
	copy(vol, c)
	check("block 1 is as after #0..1, block 0 as after #3")
	copy(vol[block.Size:], b)
	if p, err := m.CheckPrefix(vol.read, m.Acked()); p != 3 || err != nil {
		t.Fatal(p, err)
	}
	copy(vol[:1024], a)
	check("bytes 0-1023: change 1 of block 0, bytes 1024-4095: change 3 of block 0")
	copy(vol, b)
	check("holds change 2 of block 1;")
	copy(vol, a)
	if err := m.CheckBlocks(vol.read); err == nil || !strings.Contains(err.Error(), "change 3 was acknowledged") {
		t.Error(err)
	}
	if got := m.Acceptable(0); len(got) != 1 || got[0] != id3 {
		t.Error(got)
	}
	m.Truncate(2)
	if p, err := m.CheckPrefix(vol.read, 2); p != 2 || err != nil {
		t.Error(p, err)
	}
	if id, _ := m.Write(0, 1); id == id3 {
		t.Error("the number of a change was used again")
	}
}

// toy is the smallest log: each change is one record block, then a data
// block; recovery replays whole records from the start until one is missing.
// With careless set it forgets the flush between them.
type toy struct {
	dev  hpdi.Device
	q    hpdi.Queue
	next int64
}

func (v *toy) put(lba int64, data []byte, careless bool) error {
	rec := make([]byte, block.Size)
	copy(rec, "rec")
	rec[8] = byte(lba)
	rec[SectorSize-1] = 1
	steps := []*hpdi.Request{{Op: hpdi.OpWrite, Offset: (v.next + 1) * block.Size, Vec: [][]byte{data}}}
	if !careless {
		steps = append(steps, &hpdi.Request{Op: hpdi.OpFlush})
	}
	steps = append(steps, &hpdi.Request{Op: hpdi.OpWrite, Offset: v.next * block.Size, Vec: [][]byte{rec}})
	for _, r := range steps {
		if err := hpdi.Do(v.q, r); err != nil {
			return err
		}
	}
	v.next += 2
	return nil
}

func (v *toy) recover(t *testing.T, size int) flat {
	vol := make(flat, size)
	for at := int64(0); ; at += 2 {
		rec := read(t, v.dev, at*block.Size, 2*block.Size)
		if string(rec[:3]) != "rec" {
			return vol
		}
		copy(vol[int(rec[8])*block.Size:], rec[block.Size:])
	}
}

// TestModelWithCrash runs the whole apparatus: a correct toy log passes at
// every operation and seed, a careless one is caught.
func TestModelWithCrash(t *testing.T) {
	run := func(n int64, seed uint64, careless bool) (done bool, err error) {
		clk := NewClock()
		clk.CutAfter(n)
		dev := clk.NewCrash(1<<20, seed)
		q, qerr := dev.NewQueue(1)
		must(t, qerr)
		m, v := NewModel(seed), &toy{dev: dev, q: q}
		var failed error
		for i := range 8 {
			id, data := m.Write(int64(i%3)*block.Size, block.Size)
			if failed = v.put(int64(i%3), data, careless); failed != nil {
				break
			}
			m.Ack(id)
			if i%2 == 1 {
				covers := m.FlushStart()
				if failed = hpdi.Do(q, &hpdi.Request{Op: hpdi.OpFlush}); failed != nil {
					break
				}
				m.FlushDone(covers)
			}
		}
		after := &toy{dev: dev.Cut(seed)}
		_, err = m.CheckPrefix(after.recover(t, 3*block.Size).read, m.Flushed())
		return failed == nil, err
	}
	caught := 0
	for seed := uint64(0); seed < 20; seed++ {
		for n := int64(1); ; n++ {
			done, err := run(n, seed, false)
			if err != nil {
				t.Fatalf("cut at operation %d, seed %d: %v", n, seed, err)
			}
			if _, err := run(n, seed, true); err != nil {
				caught++
			}
			if done {
				break
			}
		}
	}
	if caught == 0 {
		t.Error("a log without the flush between data and record was never caught")
	}
}
