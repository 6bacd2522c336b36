package nbd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"math/rand/v2"
	"testing"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/export/nbd/nbdtest"
	"github.com/pollux-storage/pollux/internal/nbdproto"
)

func TestReadWrite(t *testing.T) {
	for _, structured := range []bool{true, false} {
		t.Run(fmt.Sprintf("structured=%v", structured), func(t *testing.T) {
			v := nbdtest.New("v", 64<<20)
			h := serveVolume(t, v, Limits{})
			c := h.dialUnix()
			if structured {
				c.enter("v")
			} else {
				c.enterSimple("v")
			}
			for _, n := range []int{1, 511, 4096, 4097, 65536, 131072, 1 << 20, block.MaxIO} {
				off := uint64(12345)
				p := pattern(byte(n), n)
				c.expect(nbdproto.EOK, nbdproto.CmdWrite, 0, off, uint32(n), p)
				if got := c.expect(nbdproto.EOK, nbdproto.CmdRead, 0, off, uint32(n), nil); !bytes.Equal(got.data, p) {
					t.Fatalf("%d bytes came back changed", n)
				}
				c.expect(nbdproto.EOK, nbdproto.CmdFlush, 0, 0, 0, nil)
			}
			if n := v.Staged(); n != 0 {
				t.Errorf("%d writes are still staged", n)
			}
		})
	}
}

// wouldWait makes every Try method decline.
func wouldWait(_ context.Context, op nbdtest.Op, _, _ int64) error {
	switch op {
	case nbdtest.OpTryRead, nbdtest.OpTryStage, nbdtest.OpTryCommit:
		return nbdtest.ErrWouldWait
	}
	return nil
}

// TestModel runs random requests, many at a time, and compares with a plain
// array. Requests in flight at once do not overlap, so that the outcome is
// known.
func TestModel(t *testing.T) {
	hooks := map[string]func(uint64) func(context.Context, nbdtest.Op, int64, int64) error{
		"memory": func(uint64) func(context.Context, nbdtest.Op, int64, int64) error { return nil },
		"device": func(uint64) func(context.Context, nbdtest.Op, int64, int64) error { return wouldWait },
		"mixed": func(seed uint64) func(context.Context, nbdtest.Op, int64, int64) error {
			return func(ctx context.Context, op nbdtest.Op, off, n int64) error {
				if rand.N(2) == 0 { // any interleaving is right, so this need not be the seed's
					return wouldWait(ctx, op, off, n)
				}
				return nil
			}
		},
	}
	for name, hook := range hooks {
		for _, structured := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s/structured=%v", name, structured), func(t *testing.T) {
				seed := testSeed(t)
				v := nbdtest.New("v", 4<<20)
				v.Hook = hook(seed)
				h := serveVolume(t, v, Limits{Requests: 8, Bytes: 1 << 20})
				c := h.dialUnix()
				if structured {
					c.enter("v")
				} else {
					c.enterSimple("v")
				}
				runModel(t, c, rand.New(rand.NewPCG(seed, 1)), v)
			})
		}
	}
}

// inFlight is a request of runModel whose reply is awaited.
type inFlight struct {
	cmd  uint16
	off  uint64
	n    uint32
	want []byte
}

func runModel(t *testing.T, c *client, rng *rand.Rand, v *nbdtest.Volume) {
	model := make([]byte, v.Info().Size)
	for range 60 {
		flying := map[uint64]inFlight{}
		lane := len(model) / 8
		var out []byte
		for i := range 1 + rng.IntN(8) {
			n := 1 + rng.IntN(lane/4)
			if rng.IntN(2) == 0 {
				n = 4096
			}
			f := inFlight{off: uint64(i*lane + rng.IntN(lane-n+1)), n: uint32(n)}
			var payload []byte
			var flags uint16
			part := model[f.off : f.off+uint64(n)]
			switch rng.IntN(6) {
			case 0, 1:
				f.cmd, f.want = nbdproto.CmdRead, bytes.Clone(part)
				if c.structured && rng.IntN(3) == 0 {
					flags = nbdproto.CmdFlagDF
				}
			case 2, 3:
				f.cmd, payload = nbdproto.CmdWrite, pattern(byte(rng.IntN(4)), n)
				copy(part, payload)
			case 4:
				f.cmd = nbdproto.CmdWriteZeroes
				flags = uint16(rng.IntN(4)) * nbdproto.CmdFlagNoHole & (nbdproto.CmdFlagNoHole | nbdproto.CmdFlagFastZero)
				clear(part)
			case 5:
				f.cmd = nbdproto.CmdTrim
				clear(part)
			}
			if f.cmd != nbdproto.CmdRead && rng.IntN(4) == 0 {
				flags |= nbdproto.CmdFlagFUA
			}
			c.cookie++
			flying[c.cookie] = f
			out = append(out, requestBytes(f.cmd, flags, c.cookie, f.off, f.n, payload)...)
		}
		sent := make(chan error, 1)
		go func() { _, err := c.nc.Write(out); sent <- err }()
		for len(flying) > 0 {
			r := receiveAny(c, flying)
			f := flying[r.cookie]
			delete(flying, r.cookie)
			if r.err != nbdproto.EOK || f.cmd == nbdproto.CmdRead && !bytes.Equal(r.data, f.want) {
				t.Fatalf("command %d at %d+%d: error %d, or wrong data", f.cmd, f.off, f.n, r.err)
			}
		}
		if err := <-sent; err != nil {
			t.Fatal(err)
		}
	}
	if !bytes.Equal(model, v.Bytes(0, v.Info().Size)) {
		t.Error("the volume differs from the model")
	}
	if n := v.Staged(); n != 0 {
		t.Errorf("%d writes are still staged", n)
	}
}

// receiveAny takes the reply to any of several requests, also when chunks of
// several replies alternate (they do not, here, but replies come in any order).
func receiveAny(c *client, flying map[uint64]inFlight) reply {
	c.t.Helper()
	// The header tells the request; peek at its cookie.
	head := c.read(16)
	cookieAt := 8
	var cookie uint64
	for _, x := range head[cookieAt:16] {
		cookie = cookie<<8 | uint64(x)
	}
	f, ok := flying[cookie]
	if !ok {
		c.t.Fatalf("reply to unknown cookie %d", cookie)
	}
	whole := c.nc
	c.nc = &unread{Conn: whole, head: head}
	defer func() { c.nc = whole }()
	return c.receive(f.off, f.n, f.cmd == nbdproto.CmdRead)
}

func TestFlagsAndErrors(t *testing.T) {
	v := nbdtest.New("v", testSize)
	h := serveVolume(t, v, Limits{})
	c := h.dialUnix().enter("v")
	p := pattern(0, 4096)
	c.expect(nbdproto.EOK, nbdproto.CmdRead, nbdproto.CmdFlagFUA, 0, 512, nil)
	c.expect(nbdproto.EINVAL, nbdproto.CmdRead, nbdproto.CmdFlagNoHole, 0, 512, nil)
	c.expect(nbdproto.EINVAL, nbdproto.CmdWrite, nbdproto.CmdFlagDF, 0, 4096, p)
	c.expect(nbdproto.EINVAL, nbdproto.CmdWriteZeroes, nbdproto.CmdFlagReqOne, 0, 4096, nil)
	c.expect(nbdproto.EINVAL, nbdproto.CmdFlush, 0, 0, 1, nil)
	c.expect(nbdproto.EINVAL, 99, 0, 0, 0, nil)
	c.expect(nbdproto.EINVAL, nbdproto.CmdRead, 0, testSize-1, 2, nil)
	c.expect(nbdproto.EINVAL, nbdproto.CmdRead, 0, 1<<63, 1, nil)
	c.expect(nbdproto.EINVAL, nbdproto.CmdRead, 0, 1<<64-1, 4096, nil)
	c.expect(nbdproto.ENOSPC, nbdproto.CmdWrite, 0, testSize-1, 2, p[:2])
	c.expect(nbdproto.ENOSPC, nbdproto.CmdWriteZeroes, 0, testSize, 1, nil)
	c.expect(nbdproto.EINVAL, nbdproto.CmdTrim, 0, testSize, 1, nil)
	c.expect(nbdproto.EINVAL, nbdproto.CmdBlockStatus, 0, testSize, 1, nil)
	c.expect(nbdproto.EINVAL, nbdproto.CmdBlockStatus, 0, 0, 0, nil)
	c.expect(nbdproto.EOVERFLOW, nbdproto.CmdRead, 0, 0, block.MaxIO+1, nil)
	for _, cmd := range []uint16{nbdproto.CmdRead, nbdproto.CmdWrite, nbdproto.CmdTrim, nbdproto.CmdWriteZeroes, nbdproto.CmdCache} {
		c.expect(nbdproto.EOK, cmd, 0, testSize, 0, nil)
	}
	c.expect(nbdproto.EOK, nbdproto.CmdCache, 0, 0, testSize, nil)
	c.expect(nbdproto.EOK, nbdproto.CmdWrite, 0, 0, 4096, p) // and still in step
	s := h.dialUnix().enterSimple("v")
	s.expect(nbdproto.EINVAL, nbdproto.CmdRead, nbdproto.CmdFlagDF, 0, 512, nil)
	s.expect(nbdproto.EINVAL, nbdproto.CmdRead, 0, 0, block.MaxIO+1, nil)
	s.expect(nbdproto.EINVAL, nbdproto.CmdBlockStatus, 0, 0, 512, nil)
	s.send(nbdproto.CmdDisc, 0, 0, 0, nil)
	s.expectCut()
}

func TestReadOnly(t *testing.T) {
	v := nbdtest.New("v", testSize)
	h := start(t, Config{Exports: &exports{list: []Export{{Name: "v", Volume: v, ReadOnly: true}}}})
	c := h.dialUnix().enter("v")
	if c.flags&nbdproto.FlagReadOnly == 0 || c.flags&nbdproto.FlagSendTrim != 0 {
		t.Errorf("flags %#x", c.flags)
	}
	c.expect(nbdproto.EPERM, nbdproto.CmdWrite, 0, 0, 5, []byte("hello"))
	c.expect(nbdproto.EPERM, nbdproto.CmdTrim, 0, 0, 4096, nil)
	c.expect(nbdproto.EPERM, nbdproto.CmdWriteZeroes, 0, 0, 4096, nil)
	c.expect(nbdproto.EOK, nbdproto.CmdRead, 0, 0, 4096, nil)
	c.expect(nbdproto.EOK, nbdproto.CmdFlush, 0, 0, 0, nil)
	if v.Calls(nbdtest.OpTryStage) != 0 {
		t.Error("a write reached the volume")
	}
}

func TestErrorsOfTheVolume(t *testing.T) {
	device := errors.New("the device failed")
	for _, x := range []struct {
		err        error
		read, zero nbdproto.Errno
	}{
		{fmt.Errorf("wrapped: %w", block.ErrNoSpace), nbdproto.ENOSPC, nbdproto.ENOSPC},
		{block.ErrReadOnly, nbdproto.EPERM, nbdproto.EPERM},
		{block.ErrInvalid, nbdproto.EINVAL, nbdproto.EINVAL},
		{&block.CorruptError{What: "block", Where: "0:1", Why: "test"}, nbdproto.EIO, nbdproto.EIO},
		{device, nbdproto.EIO, nbdproto.EIO},
		{block.ErrUnsupported, nbdproto.EINVAL, nbdproto.ENOTSUP},
	} {
		for _, waits := range []bool{false, true} {
			v := nbdtest.New("v", testSize)
			v.Hook = func(ctx context.Context, op nbdtest.Op, off, n int64) error {
				if waits {
					if err := wouldWait(ctx, op, off, n); err != nil {
						return err
					}
				}
				return x.err
			}
			c := serveVolume(t, v, Limits{}).dialUnix().enter("v")
			if r := c.expect(x.read, nbdproto.CmdRead, 0, 0, 4096, nil); r.text == "" {
				t.Errorf("%v: no text for people", x.err)
			}
			c.expect(x.read, nbdproto.CmdRead, 0, 0, 1<<20, nil)
			c.expect(x.read, nbdproto.CmdWrite, 0, 0, 4096, pattern(0, 4096))
			c.expect(x.read, nbdproto.CmdWrite, 0, 0, 1<<20, pattern(0, 1<<20))
			c.expect(x.read, nbdproto.CmdFlush, 0, 0, 0, nil)
			c.expect(x.read, nbdproto.CmdTrim, 0, 0, 4096, nil)
			c.expect(x.read, nbdproto.CmdCache, 0, 0, 4096, nil)
			c.expect(x.read, nbdproto.CmdBlockStatus, 0, 0, 4096, nil)
			c.expect(x.zero, nbdproto.CmdWriteZeroes, nbdproto.CmdFlagFastZero, 0, 4096, nil)
			if n := v.Staged(); n != 0 {
				t.Errorf("%v: %d writes are still staged", x.err, n)
			}
		}
	}
}

func TestVolumeGone(t *testing.T) {
	for _, gone := range []error{block.ErrClosed, block.ErrStale} {
		for _, cmd := range []uint16{nbdproto.CmdRead, nbdproto.CmdWrite, nbdproto.CmdFlush} {
			v := nbdtest.New("v", testSize)
			v.Hook = func(context.Context, nbdtest.Op, int64, int64) error { return gone }
			c := serveVolume(t, v, Limits{}).dialUnix().enter("v")
			switch cmd {
			case nbdproto.CmdRead:
				c.send(cmd, 0, 0, 4096, nil)
			case nbdproto.CmdWrite:
				c.send(cmd, 0, 0, 4096, pattern(0, 4096))
			default:
				c.send(cmd, 0, 0, 0, nil)
			}
			c.expectCut()
		}
	}
}

func TestHoles(t *testing.T) {
	v := nbdtest.New("v", testSize)
	c := serveVolume(t, v, Limits{}).dialUnix().enter("v")
	if r := c.expect(nbdproto.EOK, nbdproto.CmdRead, 0, 0, 4096, nil); r.holes != 1 || len(r.chunks) != 1 {
		t.Errorf("empty block: chunks %v", r.chunks)
	}
	c.expect(nbdproto.EOK, nbdproto.CmdWrite, 0, 64<<10, 4096, pattern(1, 4096))
	want := v.Bytes(0, 256<<10)
	r := c.expect(nbdproto.EOK, nbdproto.CmdRead, 0, 0, 256<<10, nil)
	if !bytes.Equal(r.data, want) || r.holes != 2 || len(r.chunks) != 3 {
		t.Errorf("hole, data, hole: chunks %v", r.chunks)
	}
	r = c.expect(nbdproto.EOK, nbdproto.CmdRead, nbdproto.CmdFlagDF, 0, 256<<10, nil)
	if !bytes.Equal(r.data, want) || len(r.chunks) != 1 || r.holes != 0 {
		t.Errorf("with DF: chunks %v", r.chunks)
	}
}

func TestFindRuns(t *testing.T) {
	seed := testSeed(t)
	rng := rand.New(rand.NewPCG(seed, 2))
	s := &session{negotiated: negotiated{structured: true}}
	for i := range 500 {
		off, n := rng.Uint64N(1<<20), 1+rng.IntN(400<<10)
		data := make([]byte, n)
		for at := 0; at < n; { // runs of zeroes and of data
			k := min(n-at, 1+rng.IntN(40<<10))
			if rng.IntN(2) == 0 {
				copy(data[at:at+k], pattern(1, k))
			}
			at += k
		}
		b := make([]byte, nbdproto.DataChunkSize+n)
		copy(b[nbdproto.DataChunkSize:], data)
		k := s.encodeRead(b, n, &header{off: off, n: uint32(n)})
		c := &client{t: t, structured: true, nc: &unread{head: b[:k]}}
		if r := c.receive(off, uint32(n), true); !bytes.Equal(r.data, data) {
			t.Fatalf("seed %d round %d: reply decodes to something else (chunks %v)", seed, i, r.chunks)
		}
	}
}

func TestBlockStatus(t *testing.T) {
	v := nbdtest.New("v", 5<<30)
	c := serveVolume(t, v, Limits{Extents: 3}).dialUnix().enter("v")
	c.expect(nbdproto.EOK, nbdproto.CmdWrite, 0, 8192, 4096, pattern(1, 4096))
	c.expect(nbdproto.EOK, nbdproto.CmdWrite, 0, 16384, 4096, pattern(1, 4096))
	r := c.expect(nbdproto.EOK, nbdproto.CmdBlockStatus, 0, 100, 32768, nil)
	want := []block.Extent{{Offset: 100, Length: 8092, Hole: true}, {Offset: 8192, Length: 4096}, {Offset: 12288, Length: 4096, Hole: true}}
	if fmt.Sprint(r.extent) != fmt.Sprint(want) {
		t.Errorf("extents %v, want %v", r.extent, want)
	}
	r = c.expect(nbdproto.EOK, nbdproto.CmdBlockStatus, nbdproto.CmdFlagReqOne, 20480, 1<<32-1, nil)
	if len(r.extent) != 1 || !r.extent[0].Hole || r.extent[0].Length != 1<<32-4096 {
		t.Errorf("4 GiB hole with REQ_ONE: %v", r.extent)
	}
}

func TestFUAFlushesBeforeTheReply(t *testing.T) {
	v := nbdtest.New("v", testSize)
	c := serveVolume(t, v, Limits{}).dialUnix().enter("v")
	c.expect(nbdproto.EOK, nbdproto.CmdWrite, 0, 0, 4096, pattern(1, 4096))
	if v.Unstable() == 0 {
		t.Fatal("a plain write was flushed")
	}
	for _, cmd := range []uint16{nbdproto.CmdWrite, nbdproto.CmdWriteZeroes, nbdproto.CmdTrim} {
		var p []byte
		if cmd == nbdproto.CmdWrite {
			p = pattern(2, 4096)
		}
		c.expect(nbdproto.EOK, cmd, nbdproto.CmdFlagFUA, 0, 4096, p)
		if n := v.Unstable(); n != 0 {
			t.Errorf("command %d with FUA left %d changes unstable", cmd, n)
		}
	}
}
