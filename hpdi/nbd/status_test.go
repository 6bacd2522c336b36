package nbd

import (
	"errors"
	"slices"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	proto "github.com/pollux-storage/pollux/internal/nbdproto"
)

// What a server tells of bytes becomes what an application is told of blocks.
func TestStatusOfBlocks(t *testing.T) {
	const hole, zero = proto.StateHole | proto.StateZero, proto.StateZero
	const kib = 1 << 10
	for name, x := range map[string]struct {
		told []uint32 // length, flags, and so on
		want []hpdi.Extent
	}{
		"whole blocks":            {[]uint32{8 * kib, 0, 4 * kib, hole, 4 * kib, zero}, []hpdi.Extent{{Length: 8 * kib}, {Length: 4 * kib, State: hpdi.Hole}, {Length: 4 * kib, State: hpdi.Zero}}},
		"less than was asked for": {[]uint32{4 * kib, hole}, []hpdi.Extent{{Length: 4 * kib, State: hpdi.Hole}}},
		"more than was asked for": {[]uint32{1 << 30, hole}, []hpdi.Extent{{Length: 16 * kib, State: hpdi.Hole}}},
		"contents undefined":      {[]uint32{16 * kib, proto.StateHole}, []hpdi.Extent{{Length: 16 * kib, State: hpdi.Data}}},
		"neighbours alike":        {[]uint32{4 * kib, 0, 4 * kib, proto.StateHole}, []hpdi.Extent{{Length: 8 * kib}}},
		"data in half a block":    {[]uint32{100, 0, 16*kib - 100, hole}, []hpdi.Extent{{Length: 512}, {Length: 16*kib - 512, State: hpdi.Hole}}},
		"a hole in half a block":  {[]uint32{100, hole, 16*kib - 100, 0}, []hpdi.Extent{{Length: 16 * kib}}},
		"a border in a block":     {[]uint32{700, hole, 16*kib - 700, zero}, []hpdi.Extent{{Length: 512, State: hpdi.Hole}, {Length: 512}, {Length: 15 * kib, State: hpdi.Zero}}},
		"less than a block":       {[]uint32{1, hole}, []hpdi.Extent{{Length: 512}}},
	} {
		_, d, q := opened(t, false, Options{}, func(c *serving, q asked) (bool, error) {
			if q.kind != proto.CmdBlockStatus || q.off != 8*kib || q.n != 16*kib {
				return true, errLeft
			}
			return true, c.chunk(proto.ChunkDone, proto.ChunkBlockStatus, q, uint32(contextID), x.told)
		})
		r := &hpdi.Request{Op: hpdi.OpStatus, Offset: 8 * kib, Length: 16 * kib, Extents: make([]hpdi.Extent, 0, 10)}
		if err := hpdi.Do(q, r); err != nil || !slices.Equal(r.Extents, x.want) {
			t.Errorf("%s: %v, want %v; %v", name, r.Extents, x.want, err)
		}
		must(t, q.Close())
		must(t, d.Close())
	}
}

// A server that tells nonsense of a range breaks the protocol.
func TestHostileStatus(t *testing.T) {
	const id = uint32(contextID)
	one := []uint32{4096, 0}
	for name, reply := range map[string]func(c *serving, q asked) error{
		"another context": func(c *serving, q asked) error {
			return c.chunk(1, proto.ChunkBlockStatus, q, id+1, one)
		},
		"an empty extent": func(c *serving, q asked) error {
			return c.chunk(1, proto.ChunkBlockStatus, q, id, []uint32{0, 0})
		},
		"no extent":  func(c *serving, q asked) error { return c.chunk(1, proto.ChunkBlockStatus, q, id) },
		"a half one": func(c *serving, q asked) error { return c.chunk(1, proto.ChunkBlockStatus, q, id, uint32(1)) },
		"one too many": func(c *serving, q asked) error {
			return c.chunk(1, proto.ChunkBlockStatus, q, id, one, one, one)
		},
		"twice": func(c *serving, q asked) error {
			return errors.Join(c.chunk(0, proto.ChunkBlockStatus, q, id, one), c.chunk(1, proto.ChunkBlockStatus, q, id, one))
		},
		"nothing":        func(c *serving, q asked) error { return c.chunk(1, proto.ChunkNone, q) },
		"data":           func(c *serving, q asked) error { return c.chunk(1, proto.ChunkOffsetData, q, q.off, make([]byte, 8)) },
		"a simple reply": func(c *serving, q asked) error { return c.write(uint32(proto.MagicSimple), uint32(0), q.cookie) },
	} {
		_, d, q := opened(t, false, Options{}, func(c *serving, q asked) (bool, error) {
			if err := reply(c, q); err != nil {
				return true, err
			}
			_, err := c.in.Peek(1) // until the client has left
			return true, err
		})
		mem := make([]hpdi.Extent, 3)
		err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpStatus, Length: 8192, Extents: mem[:0:2]})
		if !errors.Is(err, errProtocol) || !errors.Is(err, hpdi.ErrDisconnected) {
			t.Errorf("%s: %v", name, err)
		}
		if mem[2] != (hpdi.Extent{}) {
			t.Errorf("%s: an extent was written beside their place", name)
		}
		must(t, q.Close())
		must(t, d.Close())
	}
}
