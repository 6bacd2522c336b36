package oplog

import (
	"bufio"
	"bytes"
	"encoding/binary"
	"fmt"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"sync/atomic"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/block"
)

// recorder is a sink that stores and keeps a list of what it stored.
type recorder struct {
	mapped
	to *trace
}

type trace struct {
	stores []store
	each   func() // called before each store
}

type store struct {
	off  int
	v    uint64
	seal bool
}

func (r recorder) word(off int, v uint64) { r.note(off, v, false); r.mapped.word(off, v) }
func (r recorder) seal(off int, v uint64) { r.note(off, v, true); r.mapped.seal(off, v) }

func (r recorder) note(off int, v uint64, seal bool) {
	if r.to.each != nil {
		r.to.each()
	}
	r.to.stores = append(r.to.stores, store{off, v, seal})
}

// TestEveryStore stops publication, release and change of epoch after every
// single store and looks at what a killed process would leave.
func TestEveryStore(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	const extents = 24
	mem := section(t, extents)
	l := format(t, mem, extents, 5)
	before, now := section(t, extents), section(t, extents)
	var live []Record
	for step := range 120 {
		copy(before, mem)
		old, free, tail := live, l.ExtentsFree(), l.Tail()
		tr := &trace{}
		rec := recorder{l.out, tr}
		n := 1 + rng.IntN(12)
		switch {
		case step%10 == 9:
			l.hdr.epoch++
			l.hdr.generation++
			storeHeader(rec, &l.geo, &l.hdr)
		case n <= free:
			recs := write(t, l, block.Logical(rng.Uint32()), n, rng.Uint64())
			recs = append(recs, Record{Volume: 3, Kind: KindZero, LBA: 7, Count: 1 + rng.Uint64N(1<<40)})
			if _, ok := publish(rec, l, recs); !ok {
				t.Fatal("no room")
			}
			live = append(live, recs...)
		default:
			stored := func() bool {
				v, ok := cellDecode(mem[tailCellAt:], l.seed, tailCellAt)
				return ok && v > tail
			}
			tr.each = func() {
				if l.ExtentsFree() != free && !stored() {
					t.Fatal("extents were freed before the tail was stored")
				}
			}
			k := 1 + rng.IntN(len(live))
			release(rec, l, live[k-1].Seq)
			live = live[k:]
		}
		for cut := range len(tr.stores) + 1 {
			copy(now, before)
			copyArena(l, now, mem)
			apply(now, tr.stores, cut, rng)
			checkCut(t, now, l, old, live, tail)
		}
	}
}

// copyArena copies the payload: it is in place before anything is published.
func copyArena(l *Log, to, from []byte) {
	a, n := l.geo.arena, int(l.geo.extents)*block.Size
	copy(to[a:a+n], from[a:a+n])
}

// apply makes the first cut stores, and of those after the last seal among
// them only some: their order is not fixed.
func apply(mem []byte, stores []store, cut int, rng *rand.Rand) {
	sealed := cut
	for sealed > 0 && !stores[sealed-1].seal {
		sealed--
	}
	m := mapped{unsafe.Pointer(unsafe.SliceData(mem))}
	for i, s := range stores {
		if i < sealed || i >= sealed && !s.seal && i <= cut && rng.IntN(2) == 0 {
			m.word(s.off, s.v)
		} else if s.seal {
			break
		}
	}
}

// checkCut attaches to what was left and expects a state between before (old
// records, tail) and after (live records).
func checkCut(t *testing.T, mem []byte, l *Log, old, live []Record, tail block.Seq) {
	t.Helper()
	for again := range 3 {
		a, err := Attach(mem)
		if err != nil {
			t.Fatal(err)
		}
		want := old
		if len(live) > len(old) {
			want = live
		}
		if a.Tail() != tail && a.Tail() != l.Tail() {
			t.Fatalf("tail %d, was %d, becomes %d", a.Tail(), tail, l.Tail())
		}
		for len(want) > 0 && want[0].Seq <= a.Tail() {
			want = want[1:]
		}
		got := collect(t, a)
		must := 0
		for _, r := range old {
			if r.Seq > a.Tail() {
				must++
			}
		}
		if len(got) < must || len(got) > len(want)+again {
			t.Fatalf("%d records, must be %d to %d", len(got), must, len(want))
		}
		for i, r := range got {
			if i < len(want) && r.Volume != 9 && (r != want[i] || a.VerifyPayload(&r) != nil) {
				t.Fatalf("record %d differs: %+v, want %+v", r.Seq, r, want[i])
			}
		}
		// What a crash left behind does not disturb those who go on.
		if _, ok := a.Publish([]Record{{Volume: 9, Kind: KindNop}}); !ok {
			return
		}
	}
}

const killEnv = "POLLUX_TEST_OPLOG"

// TestMain turns the test binary into the process that is killed.
func TestMain(m *testing.M) {
	if path := os.Getenv(killEnv); path != "" {
		seed, _ := strconv.ParseUint(os.Args[len(os.Args)-1], 10, 64)
		if err := publisher(path, seed); err != nil {
			fmt.Fprintln(os.Stderr, err)
		}
		os.Exit(1)
	}
	os.Exit(m.Run())
}

const killExtents = 300

// mapShared maps the log of the kill test, and behind it a page with the
// position up to which the publisher has acknowledged.
func mapShared(path string) (log []byte, acked *atomic.Uint64, unmap func(), err error) {
	size := int(SectionSize(killExtents * block.Size))
	fd, err := unix.Open(path, unix.O_RDWR|unix.O_CREAT|unix.O_CLOEXEC, 0o600)
	if err != nil {
		return nil, nil, nil, err
	}
	defer unix.Close(fd)
	if err := unix.Ftruncate(fd, int64(size+block.Size)); err != nil {
		return nil, nil, nil, err
	}
	mem, err := unix.Mmap(fd, 0, size+block.Size, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED)
	if err != nil {
		return nil, nil, nil, err
	}
	return mem[:size:size], (*atomic.Uint64)(unsafe.Pointer(&mem[size])), func() { _ = unix.Munmap(mem) }, nil
}

// publisher publishes, acknowledges and releases until it is killed.
func publisher(path string, seed uint64) error {
	mem, acked, _, err := mapShared(path)
	if err != nil {
		return err
	}
	l, err := Attach(mem)
	if err != nil {
		return err
	}
	l.AllowTags()
	fmt.Println("ready")
	rng := rand.New(rand.NewPCG(seed, 0))
	var ext []Extent
	var recs []Record
	for {
		n := 1 + rng.IntN(40)
		var ok bool
		if ext, ok = l.Alloc(n, ext[:0]); !ok {
			upTo := l.Tail() + 1 + block.Seq(rng.Uint64N(uint64(l.Head()-l.Tail())))
			for at := l.Tail() + 1; at <= upTo; at++ { // changes are released whole
				if r, err := l.Get(at); err != nil {
					return err
				} else if r.Kind == KindTag {
					at += block.Seq(r.Count)
					upTo = max(upTo, at)
				}
			}
			l.Release(upTo)
			continue
		}
		recs = recs[:0]
		next := uint64(l.Head()) + 1
		if rng.IntN(2) == 0 { // the counter of a tag is its position
			recs = append(recs, TagRecord(1, block.Tag{Session: 1, Counter: next}, n))
			next++
		}
		for i, e := range ext {
			// One record a block: its content begins with its position.
			binary.LittleEndian.PutUint64(l.Payload(e, 1), next+uint64(i))
			r := Record{Volume: 1, LBA: block.Logical(next) + block.Logical(i), Kind: KindWrite, Count: 1, First: e}
			l.Sum(&r)
			recs = append(recs, r)
		}
		if _, ok := l.Publish(recs); !ok {
			return fmt.Errorf("no room for %d records", n)
		}
		acked.Store(uint64(l.Head()))
	}
}

// TestKill kills a process at any instruction, over and over in one log.
func TestKill(t *testing.T) {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	rng := rand.New(rand.NewPCG(seed, 0))
	path := filepath.Join(t.TempDir(), "log")
	mem, acked, unmap, err := mapShared(path)
	if err != nil {
		t.Fatal(err)
	}
	defer unmap()
	format(t, mem, killExtents, 0)
	repaired, tags := 0, 0
	for round := range 40 {
		target := acked.Load() + 1 + rng.Uint64N(5000)
		killWhen(t, path, rng.Uint64(), func() bool { return acked.Load() >= target })
		l, err := Attach(mem)
		if err != nil {
			t.Fatalf("round %d: %v", round, err)
		}
		repaired += l.Repaired()
		if uint64(l.Head()) < acked.Load() {
			t.Fatalf("round %d: head %d, acknowledged %d", round, l.Head(), acked.Load())
		}
		rest := uint64(0) // of a tagged change
		for _, r := range collect(t, l) {
			if r.Kind == KindTag {
				if rest != 0 || r.Tag().Counter != uint64(r.Seq) {
					t.Fatalf("round %d: tag %d of submission %d, %d records of another change are missing", round, r.Seq, r.Tag().Counter, rest)
				}
				rest, tags = r.Count, tags+1
				continue
			}
			rest -= min(rest, 1)
			content := binary.LittleEndian.Uint64(l.Payload(r.First, 1))
			if uint64(r.LBA) != uint64(r.Seq) || content != uint64(r.Seq) || l.VerifyPayload(&r) != nil {
				t.Fatalf("round %d: record %d has another content", round, r.Seq)
			}
		}
		if rest != 0 {
			t.Fatalf("round %d: the last change lacks %d records", round, rest)
		}
	}
	if tags == 0 {
		t.Error("there was no tag")
	}
	t.Logf("%d records, %d copies were restored, %d tags were found", acked.Load(), repaired, tags)
}

// killWhen starts a publisher and kills it once the condition holds.
func killWhen(t *testing.T, path string, seed uint64, when func() bool) {
	t.Helper()
	cmd := exec.Command(os.Args[0], strconv.FormatUint(seed, 10))
	cmd.Env = append(os.Environ(), killEnv+"="+path)
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	line, err := bufio.NewReader(out).ReadString('\n')
	ended := make(chan struct{})
	go func() { // ends with the process, which holds the other end
		_, _ = io.Copy(io.Discard, out)
		close(ended)
	}()
	for err == nil && !when() {
		select {
		case <-ended:
			err = io.ErrUnexpectedEOF
		default:
			runtime.Gosched()
		}
	}
	_ = cmd.Process.Kill()
	<-ended
	_ = cmd.Wait()
	if err != nil {
		t.Fatalf("publisher said %q, %v: %s", line, err, stderr.String())
	}
}
