package hpditest

import (
	"bytes"
	"errors"
	"math"
	"net/url"
	"slices"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
)

func testInfo(t *testing.T, d hpdi.Device) {
	info := d.Info()
	if info.Name == "" || info.Driver == "" {
		t.Errorf("name %q, driver %q: both must say something", info.Name, info.Driver)
	}
	if info.BlockSize < 512 || info.BlockSize&(info.BlockSize-1) != 0 {
		t.Errorf("block size %d is not a power of two of at least 512", info.BlockSize)
	}
	if info.Size%int64(info.BlockSize) != 0 {
		t.Errorf("size %d is not a multiple of the block size %d", info.Size, info.BlockSize)
	}
	if info.ReadOnly {
		t.Error("the suite needs a device that may be written to")
	}
	if again := d.Info(); again != info {
		t.Errorf("info changed from %+v to %+v", info, again)
	}
	for _, depth := range []int{0, -1} {
		if q, err := d.NewQueue(depth); err == nil {
			t.Errorf("a queue of depth %d was made", depth)
			closeQueue(t, q)
		}
	}
}

// testProperties lists what the device says of itself: each property once, with a value
// that it may have, and the size as the queues have it.
func testProperties(t *testing.T, d hpdi.Device) {
	given := url.Values{}
	var props []hpdi.Property
	for _, s := range d.Info().List() {
		if props = append(props, s.Property); given.Has(s.Name) || s.Meaning == "" {
			t.Errorf("property %s is there twice, or means nothing", s.Name)
		}
		given.Set(s.Name, s.Value)
	}
	set, err := hpdi.ParseSettings(props, given)
	if err != nil {
		t.Fatal(err)
	}
	if set.Size("size") != d.Info().Size || set.Text("driver") != d.Info().Driver {
		t.Errorf("it lists %v", given)
	}
	q := newQueue(t, d, 1)
	defer closeQueue(t, q)
	p := alloc(t, d.Info().BlockSize)
	last := set.Size("size") - set.Size("block-size")
	do(t, q, read(last, p))
	if err := hpdi.Do(q, read(last+set.Size("block-size"), p)); !errors.Is(err, hpdi.ErrRange) {
		t.Errorf("a read behind the size that is listed: %v", err)
	}
}

func testReadBack(t *testing.T, d hpdi.Device) {
	q := newQueue(t, d, 1)
	defer closeQueue(t, q)
	bs := d.Info().BlockSize
	mem := alloc(t, 256*bs)
	for v, n := range []int{1, 2, 7, 64, 256} {
		p := mem[:n*bs]
		off := int64(v * 300 * bs)
		if off+int64(len(p)) > d.Info().Size {
			off = 0
		}
		fill(p, off, uint64(v))
		do(t, q, write(off, p))
		wantFill(t, p, off, uint64(v)) // a write leaves its data alone
		clear(p)
		do(t, q, read(off, p))
		wantFill(t, p, off, uint64(v))
	}
}

func testVectors(t *testing.T, d hpdi.Device) {
	q := newQueue(t, d, 4)
	defer closeQueue(t, q)
	bs := d.Info().BlockSize
	mem := alloc(t, 16*bs)
	whole := alloc(t, 8*bs)
	off := int64(5 * bs)
	fill(whole, off, 1)
	// Vectors of several lengths, out of order in memory, some empty.
	vec := [][]byte{mem[9*bs : 12*bs], nil, mem[:bs], mem[3*bs : 3*bs], mem[13*bs : 15*bs], mem[4*bs : 6*bs]}
	at := 0
	for _, v := range vec {
		at += copy(v, whole[at:])
	}
	do(t, q, write(off, vec...))
	clear(whole)
	do(t, q, read(off, whole))
	wantFill(t, whole, off, 1)

	clear(mem)
	do(t, q, read(off, vec...))
	at = 0
	for i, v := range vec {
		if !bytes.Equal(v, whole[at:at+len(v)]) {
			t.Fatalf("vector %d holds the wrong data", i)
		}
		at += len(v)
	}
	if !bytes.Equal(mem[bs:3*bs], make([]byte, 2*bs)) || !bytes.Equal(mem[15*bs:], make([]byte, bs)) {
		t.Fatal("a read touched memory beside its vectors")
	}
}

// testManyVectors passes more vectors than a kernel takes at once (1024),
// neighbours in reverse so that they cannot be merged.
func testManyVectors(t *testing.T, d hpdi.Device) {
	q := newQueue(t, d, 2)
	defer closeQueue(t, q)
	bs := d.Info().BlockSize
	n := min(1100, int(d.Info().Size)/bs)
	mem := alloc(t, n*bs)
	vec := make([][]byte, n)
	for i := range vec {
		vec[i] = mem[(n-1-i)*bs:][:bs]
		fill(vec[i], int64(i*bs), 3)
	}
	do(t, q, write(0, vec...))
	clear(mem)
	do(t, q, read(0, vec...))
	for i := range vec {
		wantFill(t, vec[i], int64(i*bs), 3)
	}
	flat := alloc(t, n*bs)
	do(t, q, read(0, flat))
	wantFill(t, flat, 0, 3)
}

// testGoHeap passes memory of the Go heap, which a driver must keep alive and
// in place, or must refuse as memory that no peer can map.
func testGoHeap(t *testing.T, d hpdi.Device) {
	q := newQueue(t, d, 32)
	defer closeQueue(t, q)
	bs := d.Info().BlockSize
	if d.Info().SharedMemory {
		for _, r := range []*hpdi.Request{read(0, heap(bs)), write(0, heap(bs))} {
			if err := hpdi.Do(q, r); !errors.Is(err, hpdi.ErrMemory) {
				t.Errorf("%s with memory that cannot be shared: %v, want %v", r.Op, err, hpdi.ErrMemory)
			}
		}
		return
	}
	for round := range 8 {
		reqs := make([]*hpdi.Request, 32)
		for i := range reqs {
			p := heap(bs)
			fill(p, int64(i*bs), uint64(round))
			reqs[i] = write(int64(i*bs), p)
		}
		do(t, q, reqs...)
		for i := range reqs {
			reqs[i] = read(int64(i*bs), heap(bs))
		}
		do(t, q, reqs...)
		for i, r := range reqs {
			wantFill(t, r.Vec[0], int64(i*bs), uint64(round))
		}
	}
}

// heap returns n bytes of the Go heap, aligned to n.
func heap(n int) []byte {
	p := make([]byte, 2*n)
	for i := 0; ; i++ {
		if aligned(p[i:], n) {
			return p[i : i+n : i+n]
		}
	}
}

func testEdges(t *testing.T, d hpdi.Device) {
	q := newQueue(t, d, 2)
	defer closeQueue(t, q)
	info := d.Info()
	bs := int64(info.BlockSize)
	p := alloc(t, 2*info.BlockSize)
	for v, off := range []int64{0, info.Size - bs} {
		fill(p[:bs], off, uint64(v))
		do(t, q, write(off, p[:bs]))
		clear(p)
		do(t, q, read(off, p[:bs]))
		wantFill(t, p[:bs], off, uint64(v))
	}
}

// malformed returns requests that no device may carry out, and the error each
// must complete with. mem is two blocks long.
func malformed(info hpdi.Info, mem []byte) map[*hpdi.Request]error {
	bs := int64(info.BlockSize)
	p := mem[:bs]
	bad := map[*hpdi.Request]error{
		read(1, p):                      hpdi.ErrAlign,
		write(bs/2, p):                  hpdi.ErrAlign,
		read(0, p[:1]):                  hpdi.ErrAlign,
		write(0, p[:bs/2], p[bs/2:]):    hpdi.ErrAlign,
		read(info.Size, p):              hpdi.ErrRange,
		write(info.Size, p):             hpdi.ErrRange,
		write(info.Size-bs, mem[:2*bs]): hpdi.ErrRange,
		read(-bs, p):                    hpdi.ErrRange,
		write(math.MaxInt64/bs*bs, p):   hpdi.ErrRange,
		read(math.MinInt64, p):          hpdi.ErrRange,
		{Op: 0, Vec: [][]byte{p}}:       hpdi.ErrUnsupported,
		{Op: 200, Vec: [][]byte{p}}:     hpdi.ErrUnsupported,
	}
	if info.Direct {
		bad[read(0, mem[8:8+bs])] = hpdi.ErrAlign
	}
	for op, has := range map[hpdi.Op]bool{hpdi.OpDiscard: info.Discard, hpdi.OpWriteZeroes: info.Zeroes} {
		if !has {
			bad[&hpdi.Request{Op: op, Length: bs}] = hpdi.ErrUnsupported
			continue
		}
		bad[&hpdi.Request{Op: op, Length: bs - 1}] = hpdi.ErrAlign
		bad[&hpdi.Request{Op: op, Offset: 512 + 1, Length: bs}] = hpdi.ErrAlign
		bad[&hpdi.Request{Op: op, Length: -bs}] = hpdi.ErrRange
		bad[&hpdi.Request{Op: op, Offset: info.Size - bs, Length: 2 * bs}] = hpdi.ErrRange
		bad[&hpdi.Request{Op: op, Offset: bs, Length: math.MaxInt64 / bs * bs}] = hpdi.ErrRange
	}
	return bad
}

func testMalformed(t *testing.T, d hpdi.Device) {
	q := newQueue(t, d, 4)
	defer closeQueue(t, q)
	info := d.Info()
	mem := alloc(t, 2*info.BlockSize)
	for r, want := range malformed(info, mem) {
		if err := q.Submit(r); err != nil {
			t.Fatalf("submit of a malformed %s broke the queue: %v", r.Op, err)
		}
		collect(t, q, []*hpdi.Request{r})
		if !errors.Is(r.Err, want) {
			t.Errorf("%s at %d of %d bytes: error %v, want %v", r.Op, r.Offset, r.Bytes(), r.Err, want)
		}
	}
}

// testMalformedAmongGood mixes good and bad requests in one batch.
func testMalformedAmongGood(t *testing.T, d hpdi.Device) {
	q := newQueue(t, d, 8)
	defer closeQueue(t, q)
	info := d.Info()
	bs := int64(info.BlockSize)
	mem := alloc(t, 2*info.BlockSize)
	bad := malformed(info, mem)
	data := alloc(t, len(bad)*info.BlockSize)
	fill(data, 0, 9)
	var batch, good []*hpdi.Request
	for r := range bad {
		off := int64(len(good)) * bs
		g := write(off, data[off:off+bs])
		good = append(good, g)
		batch = append(batch, r, g)
	}
	if err := q.Submit(batch...); err != nil {
		t.Fatal(err)
	}
	collect(t, q, batch)
	for _, r := range good {
		if r.Err != nil {
			t.Errorf("good %s at %d failed: %v", r.Op, r.Offset, r.Err)
		}
	}
	for r, want := range bad {
		if !errors.Is(r.Err, want) {
			t.Errorf("%s at %d: error %v, want %v", r.Op, r.Offset, r.Err, want)
		}
	}
	clear(data)
	do(t, q, read(0, data))
	wantFill(t, data, 0, 9)
}

// testEmpty runs requests that cover no bytes. They are well formed.
func testEmpty(t *testing.T, d hpdi.Device) {
	q := newQueue(t, d, 4)
	defer closeQueue(t, q)
	info := d.Info()
	reqs := []*hpdi.Request{read(0), write(info.Size), write(0, nil, []byte{})}
	if info.Discard {
		reqs = append(reqs, &hpdi.Request{Op: hpdi.OpDiscard})
	}
	if info.Zeroes {
		reqs = append(reqs, &hpdi.Request{Op: hpdi.OpWriteZeroes, Offset: info.Size})
	}
	do(t, q, reqs...)
	// A request may be used again, and an old error does not stick.
	r := reqs[0]
	r.Err = errors.New("from before")
	do(t, q, r)
}

func testFlush(t *testing.T, d hpdi.Device) {
	q := newQueue(t, d, 4)
	other := newQueue(t, d, 4)
	defer closeQueue(t, q)
	defer closeQueue(t, other)
	p := alloc(t, 8*d.Info().BlockSize)
	fill(p, 0, 4)
	do(t, q, write(0, p))
	do(t, other, &hpdi.Request{Op: hpdi.OpFlush}) // covers writes of all queues
	clear(p)
	do(t, other, read(0, p))
	wantFill(t, p, 0, 4)
	do(t, q, &hpdi.Request{Op: hpdi.OpFlush}, &hpdi.Request{Op: hpdi.OpFlush})
}

// testDurable cannot cut the power; what it sees is that a durable write is a
// write, and that a device without them says so.
func testDurable(t *testing.T, d hpdi.Device) {
	info := d.Info()
	q := newQueue(t, d, 4)
	defer closeQueue(t, q)
	p := alloc(t, 8*info.BlockSize)
	fill(p, 0, 5)
	durable := func(r *hpdi.Request) *hpdi.Request { r.Durable = true; return r }
	half := len(p) / 2
	if !info.Durable {
		if err := hpdi.Do(q, durable(write(0, p))); !errors.Is(err, hpdi.ErrUnsupported) {
			t.Errorf("a durable write is refused with %v", err)
		}
		return
	}
	do(t, q, durable(write(0, p[half:], p[:half])), durable(write(int64(len(p)), p)), write(int64(2*len(p)), p))
	got := alloc(t, 3*len(p))
	do(t, q, read(0, got))
	wantBytes(t, got, slices.Concat(p[half:], p[:half], p, p), 0)
	for _, r := range []*hpdi.Request{read(0, p), {Op: hpdi.OpFlush}, {Op: hpdi.OpDiscard, Length: int64(info.BlockSize)}} {
		if err := hpdi.Do(q, durable(r)); !errors.Is(err, hpdi.ErrUnsupported) {
			t.Errorf("a durable %s is refused with %v", r.Op, err)
		}
	}
	if err := hpdi.Do(q, durable(write(info.Size, p))); !errors.Is(err, hpdi.ErrRange) {
		t.Errorf("a durable write beyond the end is refused with %v", err)
	}
}

func testDiscard(t *testing.T, d hpdi.Device) {
	info := d.Info()
	if !info.Discard {
		t.Skip("the device does not discard")
	}
	testDeallocate(t, d, hpdi.OpDiscard)
}

func testWriteZeroes(t *testing.T, d hpdi.Device) {
	info := d.Info()
	if !info.Zeroes {
		t.Skip("the device does not write zeroes")
	}
	testDeallocate(t, d, hpdi.OpWriteZeroes)
}

// testDeallocate checks that op hits its range, and nothing beside it, and
// that the range can be written again.
func testDeallocate(t *testing.T, d hpdi.Device, op hpdi.Op) {
	q := newQueue(t, d, 4)
	defer closeQueue(t, q)
	bs := int64(d.Info().BlockSize)
	mem := alloc(t, int(64*bs))
	fill(mem, 0, 5)
	do(t, q, write(0, mem))
	from, to := 3*bs, 40*bs
	do(t, q, &hpdi.Request{Op: op, Offset: from, Length: to - from})
	do(t, q, read(0, mem))
	wantFill(t, mem[:from], 0, 5)
	wantFill(t, mem[to:], to, 5)
	if op == hpdi.OpWriteZeroes {
		wantBytes(t, mem[from:to], make([]byte, to-from), from)
	}
	fill(mem[from:to], from, 6)
	do(t, q, write(from, mem[from:to]))
	clear(mem)
	do(t, q, read(0, mem))
	wantFill(t, mem[from:to], from, 6)
	// The last block, and a block twice.
	last := d.Info().Size - bs
	do(t, q, &hpdi.Request{Op: op, Offset: last, Length: bs})
	do(t, q, &hpdi.Request{Op: op, Offset: last, Length: bs})
}

func testRegister(t *testing.T, d hpdi.Device) {
	q := newQueue(t, d, 2)
	defer closeQueue(t, q)
	mem := alloc(t, 16*d.Info().BlockSize)
	if err := d.Register(mem); err != nil {
		t.Fatal(err)
	}
	fill(mem, 0, 8)
	do(t, q, write(0, mem))
	clear(mem)
	do(t, q, read(0, mem))
	wantFill(t, mem, 0, 8)
	// Twice is once more to take back, and what was never registered is left alone.
	if err := errors.Join(d.Register(mem), d.Unregister(mem)); err != nil {
		t.Fatal(err)
	}
	do(t, q, read(0, mem))
	wantFill(t, mem, 0, 8)
	if err := errors.Join(d.Unregister(mem), d.Unregister(mem), d.Unregister(alloc(t, d.Info().BlockSize))); err != nil {
		t.Fatal(err)
	}
	clear(mem)
	do(t, q, read(0, mem))
	wantFill(t, mem, 0, 8)
}
