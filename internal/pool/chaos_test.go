package pool

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"slices"
	"strings"
	"testing"
	"unsafe"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
	"github.com/pollux-storage/pollux/internal/dedup"
	"github.com/pollux-storage/pollux/internal/ondisk"
	"github.com/pollux-storage/pollux/internal/oplog"
	"github.com/pollux-storage/pollux/internal/region"
)

// chaos is a region that is damaged while no guest lives.
type chaos struct {
	*rig
	rng    *rand.Rand
	header region.Header
	file   []byte // the region before
	now    []byte // and after
	parts  []part
	hit    []string // which parts were damaged
}

// part is a piece of a region that is damaged as one.
type part struct {
	name     string
	ranges   [][2]int64 // alike: of two copies both
	advisory bool       // nothing but time and savings depends on it
}

// newChaos looks at what the dead guest has left.
func newChaos(r *rig, rng *rand.Rand) *chaos {
	r.t.Helper()
	c := &chaos{rig: r, rng: rng}
	r.changeRegion(func(q *region.Region) { c.header = q.Header() })
	var err error
	if c.file, err = os.ReadFile(r.region); err != nil {
		r.t.Fatal(err)
	}
	c.now = bytes.Clone(c.file)
	c.parts = []part{
		{"header", [][2]int64{{0, 512}}, false}, {"header", [][2]int64{{4096, 4608}}, false},
		{"words", [][2]int64{{8192, 8192 + 6*64}}, false},
		{"both headers", [][2]int64{{0, 512}, {4096, 4608}}, false},
		{"room", [][2]int64{{512, 4096}, {4608, 8192}, {8192 + 6*64, 16384}}, true},
	}
	log := c.header.Sections[0]
	end := log.Offset + log.Length
	// header and positions | ring | payload | ring | header and positions
	was := c.log(c.file)
	v, err := oplog.OpenView(was)
	if err != nil {
		r.t.Fatal(err)
	}
	h, err := v.Header()
	if err != nil {
		r.t.Fatal(err)
	}
	arena := log.Offset + int64(offsetOf(v.Payload(0, 1), was))
	arenaEnd, ring := arena+int64(h.Extents)*block.Size, arena-log.Offset-4096
	for at := int64(0); at < ring; at += 4096 {
		a, b := log.Offset+4096+at, arenaEnd+at
		c.parts = append(c.parts, part{"ring", [][2]int64{{a, a + 4096}}, false}, part{"ring", [][2]int64{{b, b + 4096}}, false},
			part{"both rings", [][2]int64{{a, a + 4096}, {b, b + 4096}}, false})
	}
	c.parts = append(c.parts,
		part{"log header", [][2]int64{{log.Offset, log.Offset + 4096}}, false}, part{"log header", [][2]int64{{end - 4096, end}}, false},
		part{"both log headers", [][2]int64{{log.Offset, log.Offset + 4096}, {end - 4096, end}}, false},
		part{"room for payload", [][2]int64{{arena, arenaEnd}}, false}, part{"anywhere", [][2]int64{{0, int64(len(c.file))}}, false})
	for seq := v.Tail() + 1; seq <= v.Head(); seq++ {
		if rec, err := v.Get(seq); err == nil && rec.Kind == oplog.KindWrite {
			at := arena + int64(rec.First)*block.Size
			c.parts = append(c.parts, part{"payload", [][2]int64{{at, at + int64(rec.Count)*block.Size}}, false})
		}
	}
	for _, s := range c.header.Sections[1:] {
		if s.Offset > end {
			c.parts = append(c.parts, part{"gap", [][2]int64{{end, s.Offset}}, true})
		}
		c.parts = append(c.parts, part{s.Kind.String(), [][2]int64{{s.Offset, s.Offset + s.Length}}, true},
			part{s.Kind.String(), [][2]int64{{s.Offset, s.Offset + min(s.Length, 8192)}}, true})
		end = s.Offset + s.Length
	}
	return c
}

// damage spoils some parts.
func (c *chaos) damage() {
	c.t.Helper()
	var names []string
	for _, p := range c.parts {
		if !slices.Contains(names, p.name) {
			names = append(names, p.name)
		}
	}
	for range 1 + c.rng.IntN(3) {
		name := names[c.rng.IntN(len(names))]
		of := slices.DeleteFunc(slices.Clone(c.parts), func(p part) bool { return p.name != name })
		c.spoilPart(of[c.rng.IntN(len(of))])
	}
	if err := os.WriteFile(c.rig.region, c.now, 0o600); err != nil {
		c.t.Fatal(err)
	}
}

func (c *chaos) spoilPart(p part) {
	whole := c.rng.IntN(4) == 0
	for _, r := range p.ranges {
		mem := c.now[r[0]:min(r[1], int64(len(c.now)))]
		if len(mem) == 0 {
			continue
		}
		before := bytes.Clone(mem)
		if whole {
			for i := range mem {
				mem[i] = byte(c.rng.Uint32())
			}
		} else {
			spoil(c.rng, mem)
		}
		if !bytes.Equal(before, mem) {
			c.hit = append(c.hit, p.name)
		}
	}
}

// offsetOf returns where a part of memory begins in it.
func offsetOf(part, mem []byte) uintptr {
	return uintptr(unsafe.Pointer(&part[0])) - uintptr(unsafe.Pointer(&mem[0]))
}

// advisory reports whether only advice was damaged.
func (c *chaos) advisory() bool {
	return !slices.ContainsFunc(c.hit, func(name string) bool {
		i := slices.IndexFunc(c.parts, func(p part) bool { return p.name == name })
		return !c.parts[i].advisory
	})
}

// log returns a copy of the log section of a region as a view wants it.
func (c *chaos) log(file []byte) []byte {
	c.t.Helper()
	s := c.header.Sections[0]
	mem, err := hpdi.AllocPrivate(int(s.Length))
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(func() { _ = hpdi.Free(mem) })
	copy(mem, file[s.Offset:])
	return mem
}

// lost returns the blocks of a volume whose newest write is in the log, with payload that is
// damaged now: they must read as errors. With each comes what it had been.
func (c *chaos) lost(volume block.VolumeID, committed block.Seq) map[block.Logical][]byte {
	c.t.Helper()
	was, now := c.log(c.file), c.log(c.now)
	v, err := oplog.OpenView(was)
	if err != nil {
		c.t.Fatal(err)
	}
	newest := map[block.Logical][]byte{}
	for seq := max(v.Tail(), committed) + 1; seq <= v.Head(); seq++ {
		rec, err := v.Get(seq)
		if err != nil {
			c.t.Fatal(err)
		}
		for i := range block.Logical(rec.Count) {
			switch {
			case rec.Volume != volume:
			case rec.Kind == oplog.KindWrite:
				newest[rec.LBA+i] = v.Payload(rec.First+oplog.Extent(i), 1)
			default:
				delete(newest, rec.LBA+i)
			}
		}
	}
	for lba, p := range newest {
		if bytes.Equal(p, now[offsetOf(p, was):][:block.Size]) {
			delete(newest, lba)
		}
	}
	return newest
}

// chaosLife plays a life of a pool with everything that there is, ends it, and damages its
// region.
func chaosLife(t testing.TB, seed uint64) (c *chaos, m *blocktest.Model) {
	rng := rand.New(rand.NewPCG(seed, 53))
	r := newRig(t, 1+int(seed%2), testSize)
	r.repeats, r.warm = true, seed%4 > 0
	r.indexBytes = dedup.MinIndex << (seed % 3)
	r.mustOpen()
	v := r.sharingVolume("v", 3<<20, 1+int(seed%3))
	m = blocktest.NewModel(seed)
	step := func() {
		t.Helper()
		if err := exercise(r, v, m, rng, 30); err != nil {
			t.Fatalf("seed %d: %v", seed, err)
		}
	}
	step()
	if seed%3 != 0 {
		r.addMemory(8 << 20)
	}
	if seed%4 != 0 {
		r.addFlash(16 << 20)
	}
	for range 1 + rng.IntN(3) {
		step()
		for range rng.IntN(4) {
			r.indexStep()
		}
		if seed%4 != 0 {
			for range rng.IntN(6) {
				if err := r.flashStep(); err != nil {
					t.Fatalf("seed %d: %v", seed, err)
				}
			}
			r.keepUsage()
		}
	}
	r.die()
	c = newChaos(r, rng)
	return c, m
}

// chaosOnce damages the region of one life, and returns what is wrong with what comes after
// it.
func chaosOnce(t testing.TB, seed uint64) (c *chaos, how string, err error) {
	c, m := chaosLife(t, seed)
	c.damage()
	o := c.options()
	o.Owner = []string{"a", "b"}[c.rng.IntN(2)] // the guest itself, or its partner
	if err := c.openWith(o); err != nil {
		return c, "refused", c.afterRefusal(m, err)
	}
	v, err := c.Volume("v")
	if err != nil {
		return c, "", err
	}
	bad := c.lost(c.id("v"), c.machine.Committed())
	read := blockReader(v)
	n, err := m.CheckPrefix(func(lba block.Logical) ([]byte, error) {
		was, lost := bad[lba]
		p, err := read(lba)
		switch {
		case !lost:
			return p, err
		case err == nil && !bytes.Equal(p, was):
			return nil, fmt.Errorf("block %d, whose payload in the log is damaged, reads as something", lba)
		}
		return was, nil
	}, m.Acked())
	if err != nil {
		return c, "", err
	}
	m.Truncate(n)
	how = "whole"
	for lba := range bad {
		if _, err := read(lba); !errors.Is(err, block.ErrCorrupt) {
			return c, "", fmt.Errorf("block %d, whose payload in the log is damaged: %v", lba, err)
		}
		// It is as good as new when it is written again.
		id, data := m.Write(int64(lba)*block.Size, block.Size)
		if err := write(v, int64(lba)*block.Size, data); err != nil {
			return c, "", err
		}
		m.Ack(id)
		how = "blocks lost"
	}
	return c, how, c.goesOn(v, m)
}

// goesOn lets the pool work, and proves that it is whole.
func (c *chaos) goesOn(v block.Volume, m *blocktest.Model) error {
	if err := exercise(c.rig, v, m, c.rng, 20); err != nil {
		return fmt.Errorf("afterwards: %w", err)
	}
	if err := c.Fold(context.Background()); err != nil {
		return err
	}
	if _, err := m.CheckPrefix(blockReader(v), m.Acked()); err != nil {
		return fmt.Errorf("afterwards: %w", err)
	}
	report, err := c.Check(context.Background(), CheckOptions{Data: true})
	if err == nil && len(report.Problems) > 0 {
		err = fmt.Errorf("check: %s", strings.Join(report.Problems, "; "))
	}
	if err != nil {
		return err
	}
	c.die()
	if err := c.open(); err != nil {
		return fmt.Errorf("opened once more: %w", err)
	}
	c.shut()
	return nil
}

// afterRefusal proves that a pool that does not open says why and what to do, and that what
// was flushed is there for who accepts the loss.
func (c *chaos) afterRefusal(m *blocktest.Model, refused error) error {
	if c.advisory() {
		return fmt.Errorf("damage to what is advice keeps the pool shut: %w", refused)
	}
	if !errors.Is(refused, block.ErrCorrupt) && !errors.Is(refused, ondisk.ErrMagic) && !errors.Is(refused, block.ErrUnsupported) && !errors.Is(refused, block.ErrInvalid) {
		return fmt.Errorf("refused with an error of another kind: %w", refused)
	}
	if !strings.Contains(refused.Error(), "accept_loss") || !strings.Contains(refused.Error(), c.rig.region) {
		return fmt.Errorf("the error does not say what to do, or where: %w", refused)
	}
	var lost *oplog.DamageError
	if errors.As(refused, &lost) && !strings.Contains(refused.Error(), fmt.Sprintf("from position %d on", lost.First)) {
		return fmt.Errorf("the error does not name the first lost position, %d: %w", lost.First, refused)
	}
	c.reopen()
	c.acceptLoss = true
	if err := c.open(); err != nil {
		return fmt.Errorf("with the loss accepted, after %q: %w", refused, err)
	}
	c.acceptLoss = false
	v, err := c.Volume("v")
	if err != nil {
		return err
	}
	n, err := m.CheckPrefix(blockReader(v), m.Flushed())
	if err != nil {
		return fmt.Errorf("with the loss accepted: %w", err)
	}
	m.Truncate(n)
	return c.goesOn(v, m)
}

// id returns the number of a volume.
func (c *chaos) id(name string) block.VolumeID {
	v, ok := c.catalogue.ByName(name)
	if !ok {
		c.t.Fatalf("no volume %s", name)
	}
	return v.ID
}

// Whatever happens to the memory of a region while no guest lives: what is advice is given
// up, damaged payload is an error of just the blocks that it is of, and without the records
// nobody serves until the loss is accepted; then what was flushed is there. Nothing wrong is
// ever read, and the pool is whole afterwards.
func TestRegionChaos(t *testing.T) {
	long(t)
	seeds, first := few(60), uint64(1)
	if soak {
		seeds, first = 1000, rand.Uint64()>>16
	}
	if s := os.Getenv("POLLUX_SEED"); s != "" && s != "1" {
		if _, err := fmt.Sscan(s, &first); err != nil {
			t.Fatal(err)
		}
		if !soak {
			seeds = 1
		}
	}
	outcomes := map[string]int{}
	for seed := first; seed < first+uint64(seeds); seed++ {
		c, how, err := chaosOnce(t, seed)
		if err != nil || t.Failed() {
			t.Fatalf("POLLUX_SEED=%d: damaged were %q: %v", seed, c.hit, err)
		}
		outcomes[how]++
	}
	t.Logf("seeds from %d on: %v", first, outcomes)
	if seeds >= 60 && (outcomes["whole"] == 0 || outcomes["blocks lost"] == 0 || outcomes["refused"] == 0) {
		t.Errorf("some outcomes never came: %v", outcomes)
	}
}

// Words of a region have no checksum. Whatever one of them holds, what was acknowledged is
// served, and owners go on as if nothing had happened.
func TestRegionWords(t *testing.T) {
	long(t)
	for word := range int64(8) { // heartbeat, epoch, state, announced, and two points with their numbers
		for _, value := range []uint64{0, 1, 1 << 40, 1<<63 + 6, 1<<64 - 1, 1<<64 - 2} {
			r := newRig(t, 1, testSize)
			r.mustOpen()
			v := r.volume("v", 1<<20)
			for i := range int64(5) {
				if err := write(v, i*block.Size, pattern(byte(i+1))); err != nil {
					t.Fatal(err)
				}
				if i < 4 {
					if err := r.Commit(t.Context()); err != nil {
						t.Fatal(err)
					}
				}
			}
			epoch := r.Epoch()
			r.die()
			at := []int64{8192, 8256, 8320, 8384, 8448, 8456, 8512, 8520}[word]
			file, err := os.OpenFile(r.region, os.O_WRONLY, 0)
			if err != nil {
				t.Fatal(err)
			}
			_, err = file.WriteAt(binary.LittleEndian.AppendUint64(nil, value), at)
			if err = errors.Join(err, file.Close()); err != nil {
				t.Fatal(err)
			}
			for range 2 {
				if err := r.open(); err != nil {
					t.Fatalf("%d at byte %d: %v", value, at, err)
				}
				if now := r.Epoch(); now <= epoch || now > epoch+3 {
					t.Errorf("%d at byte %d: epoch %d became %d", value, at, epoch, now)
				}
				r.holds(map[int64]byte{0: 1, 1: 2, 2: 3, 3: 4, 4: 5})
				if err := r.Commit(t.Context()); err != nil {
					t.Fatal(err)
				}
				r.die()
			}
			r.mustOpen()
			r.shut()
		}
	}
}
