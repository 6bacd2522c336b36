package ring

import (
	"encoding/binary"
	"errors"
	"hash/crc32"
	"testing"
)

// sealed returns a header with the right checksum, so that what is behind it is looked at.
func sealed(p []byte) []byte {
	h := make([]byte, headerLen)
	copy(h, p)
	binary.LittleEndian.PutUint32(h[12:], crc32.Checksum(h[16:], castagnoli))
	return h
}

func header(s Shape) []byte {
	p := make([]byte, page)
	s.encode(p)
	return p[:headerLen]
}

// A header that is accepted is of a ring that lies within its memory, and is encoded
// as it was.
func FuzzHeader(f *testing.F) {
	f.Add(header(shape(1, 2)), int64(1<<20))
	f.Add(header(shape(64, 4096)), int64(1<<40))
	f.Add(header(Shape{Session: 1, Queues: 3, Entries: 16, Data: 1 << 30}), int64(1<<31))
	f.Add(header(shape(4, 64)), int64(4096))
	f.Add([]byte(magic), int64(0))
	f.Fuzz(func(t *testing.T, p []byte, size int64) {
		for _, h := range [][]byte{p, sealed(p)} {
			s, err := decode(h, size)
			if err != nil {
				if !errors.Is(err, ErrBroken) && !errors.Is(err, ErrNoRing) && !errors.Is(err, ErrVersion) {
					t.Fatalf("an error of no kind: %v", err)
				}
				continue
			}
			if s.Check() != nil || s.Size() > size || s.queueAt(s.Queues) != s.dataAt() || s.dataAt() > s.Size() {
				t.Fatalf("accepted %+v of %d bytes in %d", s, s.Size(), size)
			}
			again, err := decode(header(s), size)
			if err != nil || again != s {
				t.Fatalf("%+v became %+v, %v", s, again, err)
			}
		}
	})
}

// words lets a fuzzer write to a queue: each ten bytes are a place and a word.
func scribble(mem []byte, p []byte) {
	for ; len(p) >= 10; p = p[10:] {
		at := int(binary.LittleEndian.Uint16(p)) * 8 % len(mem)
		put(mem, at, binary.LittleEndian.Uint64(p[2:]))
	}
}

// wordsOf makes what scribble reads.
func wordsOf(v ...uint64) (p []byte) {
	for i := 0; i < len(v); i += 2 {
		p = binary.LittleEndian.AppendUint16(p, uint16(v[i]/8))
		p = binary.LittleEndian.AppendUint64(p, v[i+1])
	}
	return p
}

// A back-end that finds anything in a queue gives requests that make sense, or says that
// the front-end has broken the rules; it gives no slot twice.
func FuzzBack(f *testing.F) {
	const entries = 4
	s := shape(1, entries)
	m, err := Format(make([]byte, s.Size()), s)
	if err != nil {
		f.Fatal(err)
	}
	t0 := m.tables(0)
	slot := func(n int) uint64 { return uint64(t0.slotAt(n)) }
	what := (&Entry{Op: OpWrite, Segs: make([]Segment, 1)}).what()
	good := wordsOf(slot(1)+slotCounter, 1, slot(1)+slotWhat, what, slot(1)+slotLength, 4096, slot(1)+slotAddr, 0, slot(1)+slotLen, 4096, uint64(t0.sqAt(0)), 1, tailAt, 1)
	f.Add([]byte{}, good)
	f.Add(good, []byte{})
	f.Add(good, wordsOf(tailAt, 2, uint64(t0.sqAt(1)), 1))                                 // a slot twice
	f.Add([]byte{}, wordsOf(tailAt, 100))                                                  // too many
	f.Add([]byte{}, append(good, wordsOf(uint64(t0.sqAt(0)), 9)...))                       // no such slot
	f.Add([]byte{}, append(good, wordsOf(slot(1)+slotLen, 1<<63)...))                      // lengths that overflow
	f.Add([]byte{}, append(good, wordsOf(slot(1)+slotWhat, what|40<<16)...))               // too many segments
	f.Add(wordsOf(ctailAt, 3, headAt, 4, tailAt, 5), []byte{})                             // taken and not completed
	f.Add(wordsOf(slot(0)+slotCounter, 1, slot(2)+slotCounter, 1, tailAt, 2), []byte{})    // one counter twice
	f.Add(wordsOf(slot(0)+slotCounter, 2, slot(2)+slotCounter, 1, tailAt, 2), []byte{7})   // two to be done
	f.Add(wordsOf(tailAt, 1<<64-1, ctailAt, 1<<64-3, headAt, 1<<64-3), wordsOf(tailAt, 1)) // positions that wrap
	f.Fuzz(func(t *testing.T, before, after []byte) {
		m, err := Format(make([]byte, s.Size()), s)
		if err != nil {
			t.Fatal(err)
		}
		mem := m.tables(0).mem
		scribble(mem, before)
		b, err := NewBack(m, 0)
		if err != nil {
			if !errors.Is(err, ErrBroken) {
				t.Fatalf("an error of no kind: %v", err)
			}
			return
		}
		scribble(mem, after)
		running := map[int]bool{}
		for n := range 3 * entries {
			var e Entry
			ok, _, err := b.Take(&e)
			if err != nil {
				if !errors.Is(err, ErrBroken) {
					t.Fatalf("an error of no kind: %v", err)
				}
				if ok, _, again := b.Take(&e); ok || again == nil {
					t.Fatal("a queue that was broken gives more")
				}
				return
			}
			if !ok {
				return
			}
			var sum int64
			for _, x := range e.Segs {
				sum += int64(x.Len)
			}
			if running[e.Slot] || e.Slot >= entries || len(e.Segs) > Segments || sum > MaxLength || (e.Op == OpRead || e.Op == OpWrite) && sum != e.Length {
				t.Fatalf("took %+v with %v running", e, running)
			}
			b.Canceled(e.Slot)
			if running[e.Slot] = n%2 == 0; !running[e.Slot] {
				b.Post(e.Slot, StatusIO, b.PutText(e.Slot, "no"))
				b.Publish()
			}
			scribble(mem, after)
		}
	})
}

// A front-end that finds anything from the back-end takes each answer once, or says that
// the back-end has broken the rules.
func FuzzFront(f *testing.F) {
	const entries = 4
	s := shape(1, entries)
	m, err := Format(make([]byte, s.Size()), s)
	if err != nil {
		f.Fatal(err)
	}
	t0 := m.tables(0)
	cq := func(n int) uint64 { return uint64(t0.cqAt(uint64(n))) }
	f.Add(wordsOf(cq(0), 1, cq(0)+8, 0, ctailAt, 1))
	f.Add(wordsOf(cq(0), 2, cq(0)+8, 1|uint64(StatusIO)<<16|20<<32, ctailAt, 1))
	f.Add(wordsOf(cq(0), 1, cq(0)+8, 1, ctailAt, 1))                   // of another slot
	f.Add(wordsOf(cq(0), 1, cq(1), 1, ctailAt, 2))                     // twice
	f.Add(wordsOf(cq(0), 1, cq(0)+8, 9, ctailAt, 1))                   // no such slot
	f.Add(wordsOf(ctailAt, 100))                                       // more than there are
	f.Add(wordsOf(cq(0), 1, cq(0)+8, 1<<62, ctailAt, 1))               // endless text
	f.Add(wordsOf(factsSeq, 2, factsAt, 1<<20, factsAt+8, 4096, 8, 8)) // facts, of another page
	f.Fuzz(func(t *testing.T, p []byte) {
		m, err := Format(make([]byte, s.Size()), s)
		if err != nil {
			t.Fatal(err)
		}
		w := NewFront(m, 0)
		open := map[uint64]bool{}
		for range entries {
			e := Entry{Op: OpStatus, Length: 4096}
			w.Put(&e)
			open[e.Counter] = true
		}
		w.Publish()
		scribble(m.tables(0).mem, p)
		for {
			c, ok, err := w.Next()
			if err != nil {
				if !errors.Is(err, ErrBroken) {
					t.Fatalf("an error of no kind: %v", err)
				}
				break
			}
			if !ok {
				break
			}
			if !open[c.Counter] {
				t.Fatalf("request %d is answered, and was not open", c.Counter)
			}
			delete(open, c.Counter)
			for i := 0; i < c.N && i < Segments; i++ {
				w.Extent(c, i)
			}
			for _, r := range w.Text(c) {
				if r < ' ' || r > '~' {
					t.Fatalf("text with %q", r)
				}
			}
		}
		scribble(m.mem[backPage:backPage+page], p)
		if f, _, err := m.Facts(); err == nil && f.Check() != nil {
			t.Fatalf("accepted facts %+v", f)
		}
	})
}

// A message that is accepted is encoded as it was.
func FuzzMessage(f *testing.F) {
	for kind := uint32(msgAttach); kind <= msgNo; kind++ {
		f.Add(message{kind: kind, number: 7, size: 1 << 20, text: "text"}.append(nil), []byte{})
	}
	f.Add([]byte{}, []byte{16, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0})
	f.Add(make([]byte, messageMax+1), []byte{1, 2, 3})
	f.Fuzz(func(t *testing.T, p, oob []byte) {
		m, err := decodeMessage(p)
		if err == nil {
			again, err := decodeMessage(m.append(nil))
			if err != nil || again != m {
				t.Fatalf("%+v became %+v, %v", m, again, err)
			}
		} else if !errors.Is(err, ErrBroken) && !errors.Is(err, ErrVersion) {
			t.Fatalf("an error of no kind: %v", err)
		}
		if _, err := rights(oob); err != nil && !errors.Is(err, ErrBroken) {
			t.Fatalf("an error of no kind: %v", err)
		}
	})
}
