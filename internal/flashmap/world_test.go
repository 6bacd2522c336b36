package flashmap

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

// anything is the number of a write that leaves what nobody knows: a discard.
const anything = ^uint64(0)

// problem is what a world panics with when it has found something.
type problem struct{ error }

// world is a device under test, what its blocks may hold, and who moves data sets. All
// is done by one goroutine, by seed, so that it can be run again.
type world struct {
	rng  *rand.Rand
	f    *Flash
	d    Device
	q    hpdi.Queue
	off  func() bool // power was cut: errors are expected
	lax  bool        // a device fails: errors are expected that name it
	now  uint64      // number of the newest write
	hist map[int][]uint64
	// done is the newest completed write to a block, kept says that the oldest entry of
	// hist is durable, so that the block cannot be as if never written.
	done map[int]uint64
	kept map[int]bool
	// wild are blocks that read as anything, since they were discarded or a write failed.
	wild   map[int]bool
	busy   map[int]bool // a request under way changes the block
	flying map[*hpdi.Request]flight
	moves  []*Move
}

// flight is what a request under way does to the model.
type flight struct {
	at, n   int
	v       uint64
	flushes map[int]uint64 // of a flush: what was complete
}

func newWorld(seed uint64, f *Flash, d Device, off func() bool) *world {
	w := &world{rng: rand.New(rand.NewPCG(seed, 1)), f: f, d: d, off: off,
		hist: map[int][]uint64{}, done: map[int]uint64{}, kept: map[int]bool{}, wild: map[int]bool{}, busy: map[int]bool{}, flying: map[*hpdi.Request]flight{}}
	w.connect()
	return w
}

func (w *world) connect() {
	var err error
	w.q, err = w.d.NewQueue(8)
	w.try("queue", err)
}

func (w *world) fail(format string, args ...any) { panic(problem{fmt.Errorf(format, args...)}) }

// try notes an error: with power on, and devices that work, there must be none.
func (w *world) try(what string, err error) bool {
	if err != nil && !w.off() && !w.lax {
		w.fail("%s: %v", what, err)
	}
	return err == nil
}

// The blocks that the world uses: of 12 data sets, the first ones fixed.
const worldBlocks = 12 * setBlocks

// step does something at random.
func (w *world) step() {
	switch n := w.rng.IntN(100); {
	case n < 25:
		w.write(false)
	case n < 32:
		w.write(true)
	case n < 38:
		w.change(hpdi.OpWriteZeroes)
	case n < 42:
		w.discard()
	case n < 47:
		w.flush()
	case n < 57:
		w.reap()
	case n < 65:
		w.look(w.rng.IntN(worldBlocks))
	case n < 75:
		w.begin()
	case n < 77:
		_, err := w.f.Tidy()
		w.try("tidy", err)
	default:
		w.push()
	}
}

// write submits a write of a few blocks, and does not wait for it.
func (w *world) write(durable bool) {
	w.now++
	at, n := w.rng.IntN(worldBlocks), 1+w.rng.IntN(6)
	if w.rng.IntN(8) == 0 {
		n = setBlocks + w.rng.IntN(setBlocks)
	}
	w.submit(&hpdi.Request{Op: hpdi.OpWrite, Offset: int64(at) * block.Size, Durable: durable, Vec: [][]byte{pattern(w.now, n)}}, at, n, w.now)
}

// change submits a write of zeroes, which are write 0.
func (w *world) change(op hpdi.Op) {
	at, n := w.rng.IntN(worldBlocks), 1+w.rng.IntN(3)
	w.submit(&hpdi.Request{Op: op, Offset: int64(at) * block.Size, Length: int64(n) * block.Size}, at, n, 0)
}

func (w *world) discard() {
	set := 1 + w.rng.IntN(worldBlocks/setBlocks-1)
	w.submit(&hpdi.Request{Op: hpdi.OpDiscard, Offset: int64(set) * setBytes, Length: setBytes}, set*setBlocks, setBlocks, anything)
}

// submit submits a request unless it touches what others change: nobody could tell
// which of them came last.
func (w *world) submit(r *hpdi.Request, at, n int, v uint64) {
	if len(w.flying) >= 6 {
		w.reap()
	}
	for b := at; b < at+n; b++ {
		if w.busy[b] {
			return
		}
	}
	for b := at; b < at+n; b++ {
		w.busy[b] = true
		if r.Op == hpdi.OpDiscard {
			w.wild[b] = true
		}
		if len(w.hist[b]) == 0 {
			w.hist[b] = []uint64{0} // as it was created
		}
		w.hist[b] = append(w.hist[b], v)
	}
	w.flying[r] = flight{at: at, n: n, v: v}
	w.try("submit", w.q.Submit(r))
}

// flush submits a flush.
func (w *world) flush() {
	r := &hpdi.Request{Op: hpdi.OpFlush}
	done := map[int]uint64{}
	for b, v := range w.done {
		done[b] = v
	}
	w.flying[r] = flight{flushes: done}
	w.try("submit", w.q.Submit(r))
}

// reap takes what is complete.
func (w *world) reap() {
	done, err := w.q.Wait(0, nil)
	w.try("wait", err)
	for _, r := range done {
		fl := w.flying[r]
		delete(w.flying, r)
		ok := w.try(fmt.Sprintf("%s of %d blocks at %d", r.Op, fl.n, fl.at), r.Err)
		for b, v := range fl.flushes {
			// A later write may have been durable already.
			if i := slices.Index(w.hist[b], v); ok && i >= 0 {
				w.hist[b], w.kept[b] = w.hist[b][i:], true
			}
		}
		for b := fl.at; b < fl.at+fl.n; b++ {
			delete(w.busy, b)
			switch {
			case !ok:
				w.wild[b] = true
				w.hist[b] = append(w.hist[b], anything)
			case r.Op == hpdi.OpDiscard:
				w.done[b] = anything
			default:
				delete(w.wild, b)
				if w.done[b] = fl.v; r.Durable {
					w.hist[b], w.kept[b] = w.hist[b][lastIndex(w.hist[b], fl.v):], true
				}
			}
		}
	}
}

func lastIndex(s []uint64, v uint64) int {
	for i := len(s) - 1; i > 0; i-- {
		if s[i] == v {
			return i
		}
	}
	return 0
}

// rest waits until nothing is under way. What is held goes on with the moves.
func (w *world) rest() {
	for range 1000 {
		if w.reap(); len(w.flying) == 0 || w.off() {
			return
		}
		for range w.moves {
			w.push()
		}
	}
	w.fail("%d requests do not end", len(w.flying))
}

// look proves that a block holds the newest completed write.
func (w *world) look(b int) {
	if p, ok := w.read(b, 1); ok {
		w.judge(b, p)
	}
}

func (w *world) judge(b int, p []byte) {
	if got := binary.LittleEndian.Uint64(p); got != w.done[b] && !w.busy[b] && !w.wild[b] {
		w.fail("block %d holds write %d instead of %d", b, got, w.done[b])
	}
}

func (w *world) read(b, n int) ([]byte, bool) {
	q, err := w.d.NewQueue(1)
	if !w.try("queue", err) {
		return nil, false
	}
	defer func() { _ = q.Close() }()
	p := make([]byte, n*block.Size)
	ok := w.try(fmt.Sprintf("read block %d", b), hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Offset: int64(b) * block.Size, Vec: [][]byte{p}}))
	return p, ok
}

// begin begins a move of a data set that is at rest.
func (w *world) begin() {
	if len(w.moves) >= 3 {
		w.push()
		return
	}
	set := Set(w.rng.IntN(worldBlocks / setBlocks))
	m, err := w.f.MoveIn(3, set)
	if err != nil && onFlashNow(w.d, set) {
		m, err = w.f.MoveOut(3, set)
	}
	if err == nil {
		w.moves = append(w.moves, m)
	}
}

// push steps one of the moves.
func (w *world) push() {
	if len(w.moves) == 0 {
		return
	}
	i := w.rng.IntN(len(w.moves))
	p, err := w.moves[i].Step()
	w.try("step", err)
	if p == Done && err == nil {
		w.moves = slices.Delete(w.moves, i, i+1)
	}
}

// lookBlocks is how many blocks are looked at: those that the world uses, and behind.
const lookBlocks = worldBlocks + 2*setBlocks

// latest proves that each block holds the newest completed write.
func (w *world) latest() {
	if p, ok := w.read(0, lookBlocks); ok {
		for b := range lookBlocks {
			w.judge(b, p[b*block.Size:])
		}
	}
}

// plausible proves that each block holds what a power cut may have left, and takes
// that for what it holds.
func (w *world) plausible() {
	all, _ := w.read(0, lookBlocks)
	for b := range lookBlocks {
		p := all[b*block.Size:][:block.Size]
		same, any := true, slices.Contains(w.hist[b], anything)
		for s := 0; s < block.Size; s += blocktest.SectorSize {
			v := binary.LittleEndian.Uint64(p[s:])
			if !any && !slices.Contains(w.hist[b], v) && (v != 0 || w.kept[b]) {
				w.fail("sector %d of block %d holds write %d, not one of %v", s/blocktest.SectorSize, b, v, w.hist[b])
			}
			same = same && v == binary.LittleEndian.Uint64(p)
		}
		if w.wild[b] = !same; same {
			w.done[b] = binary.LittleEndian.Uint64(p)
			w.hist[b] = []uint64{w.done[b]}
		}
	}
}
