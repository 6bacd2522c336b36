package blocktest

import (
	"bytes"
	"errors"
	"math/bits"
	"testing"
	"testing/synctest"

	"github.com/pollux-storage/pollux/hpdi"
)

var errInjected = errors.New("injected")

func TestFaultErrors(t *testing.T) {
	f := NewFault(NewCrash(1<<20, 1), 1)
	remove := f.Add(Rule{Op: hpdi.OpWrite, Offset: 8192, Length: 4096, Skip: 1, Count: 1, Err: errInjected})
	must(t, write(t, f, 0, fill(1, 8192)))
	must(t, write(t, f, 8192, fill(1, 4096)))
	if err := write(t, f, 4096, fill(2, 8192)); !errors.Is(err, errInjected) {
		t.Fatalf("second write of the range: %v", err)
	}
	if !bytes.Equal(read(t, f, 0, 12288), fill(1, 12288)) {
		t.Fatal("a failed write reached the device")
	}
	must(t, write(t, f, 8192, fill(3, 4096)))
	if f.Hits() != 1 {
		t.Fatalf("%d hits", f.Hits())
	}
	remove()
	f.Add(Rule{Op: hpdi.OpWrite, Err: errInjected, Late: true})
	if err := write(t, f, 0, fill(4, 4096)); !errors.Is(err, errInjected) {
		t.Fatal(err)
	}
	if !bytes.Equal(read(t, f, 0, 4096), fill(4, 4096)) {
		t.Fatal("a late error kept the write from the device")
	}
	f.Clear()
	must(t, write(t, f, 0, fill(5, 4096)))
}

func TestFaultData(t *testing.T) {
	f := NewFault(NewCrash(1<<20, 1), 1)
	must(t, write(t, f, 0, fill(0, 8192)))
	remove := f.Add(Rule{Op: hpdi.OpRead, FlipBits: 1})
	ones := 0
	for _, b := range read(t, f, 0, 8192) {
		ones += bits.OnesCount8(b)
	}
	if ones != 1 {
		t.Fatalf("%d bits flipped", ones)
	}
	remove()
	remove = f.Add(Rule{Op: hpdi.OpWrite, Lose: true})
	must(t, write(t, f, 0, fill(1, 4096)))
	remove()
	remove = f.Add(Rule{Op: hpdi.OpWrite, Misdirect: 4096})
	must(t, write(t, f, 4096, fill(2, 4096)))
	remove()
	want := append(fill(0, 8192), fill(2, 4096)...)
	if !bytes.Equal(read(t, f, 0, 12288), want) {
		t.Fatal("lost or misdirected write went elsewhere")
	}
	f.Shorten(8192)
	if err := write(t, f, 8192, fill(1, 4096)); !errors.Is(err, hpdi.ErrRange) || f.Info().Size != 8192 {
		t.Fatalf("write past a shortened end: %v", err)
	}
}

func TestFaultProbability(t *testing.T) {
	f := NewFault(NewCrash(1<<20, 1), 2)
	f.Add(Rule{Probability: 0.25, Err: errInjected})
	for range 1000 {
		_ = flush(t, f)
	}
	if n := f.Hits(); n < 200 || n > 300 {
		t.Fatalf("%d of 1000 hit, want about 250", n)
	}
}

// TestFaultHold: a held write stays in flight, others overtake it, and it
// completes when it is released.
func TestFaultHold(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := NewFault(NewCrash(1<<20, 1), 1)
		gate := NewGate()
		f.Add(Rule{Op: hpdi.OpWrite, Count: 1, Hold: gate.Hold})
		q, err := f.NewQueue(4)
		must(t, err)
		slow := &hpdi.Request{Op: hpdi.OpWrite, Vec: [][]byte{fill(1, 4096)}}
		fast := &hpdi.Request{Op: hpdi.OpWrite, Offset: 4096, Vec: [][]byte{fill(2, 4096)}}
		must(t, q.Submit(slow, fast))
		if r := <-gate.Arrived(); r != slow {
			t.Fatal("the gate holds another request")
		}
		done, err := q.Wait(1, nil)
		must(t, err)
		if len(done) != 1 || done[0] != fast {
			t.Fatalf("%d done before the gate opened", len(done))
		}
		if got := read(t, f, 0, 8192); !bytes.Equal(got, append(fill(0, 4096), fill(2, 4096)...)) {
			t.Fatal("the held write is visible, or the other is not")
		}
		go gate.Open()
		done, err = q.Wait(1, nil)
		must(t, err)
		if len(done) != 1 || done[0] != slow || slow.Err != nil {
			t.Fatalf("after the gate opened: %d done, %v", len(done), slow.Err)
		}
		must(t, q.Close())
		if !bytes.Equal(read(t, f, 0, 4096), fill(1, 4096)) {
			t.Fatal("the released write is not there")
		}
	})
}

func TestTrace(t *testing.T) {
	var rec Recorder
	clk := NewClock()
	a := rec.Wrap("a", clk.NewCrash(1<<20, 1))
	b := rec.Wrap("", clk.NewCrash(1<<20, 2))
	must(t, write(t, a, 4096, fill(1, 8192)))
	read(t, b, 0, 4096)
	must(t, flush(t, a))
	rec.Note("-- cut")
	clk.CutAfter(3)
	_ = io(t, b, &hpdi.Request{Op: hpdi.OpWriteZeroes, Offset: 8192, Length: 4096})
	const want = `a: write 4096+8192
read 0+4096
a: flush
-- cut
write-zeroes 8192+4096 (power is cut)
`
	if got := rec.Take(); got != want {
		t.Errorf("trace:\n%swant:\n%s", got, want)
	}
	if rec.String() != "" {
		t.Error("Take left something")
	}
}
