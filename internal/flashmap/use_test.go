package flashmap

import (
	"reflect"
	"testing"
	"testing/synctest"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/block/blocktest"
)

// What is read and written is counted where it was, with the mean time of some of it.
func TestUse(t *testing.T) {
	primary, flash := disks(t)
	f, err := Open(flash)
	must(t, err)
	var now time.Duration
	open := func() Device {
		d, err := f.Over(primary, Primary{Number: 3, ID: primaryID, Clock: func() time.Duration {
			now += time.Millisecond // each time that somebody looks
			return now
		}})
		must(t, err)
		return d
	}
	d := open()
	if got, want := f.Use(), []PrimaryUse{{Number: 3, Name: "disk"}}; !reflect.DeepEqual(got, want) {
		t.Errorf("before any use: %+v", got)
	}
	in(t, f, 10)
	q, err := d.NewQueue(4)
	must(t, err)
	p := pattern(1, 3)
	const at, beside = 10 * setBytes, 9 * setBytes
	for range 2*sampleEvery + 2 {
		must(t, hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Offset: at, Vec: [][]byte{p[:block.Size]}}))
	}
	for _, r := range []*hpdi.Request{
		{Op: hpdi.OpWrite, Offset: beside, Vec: [][]byte{p}},
		{Op: hpdi.OpWrite, Offset: at - block.Size, Vec: [][]byte{p[:block.Size], p[block.Size:]}}, // across both
		{Op: hpdi.OpWriteZeroes, Offset: at, Length: 5 * block.Size},
		{Op: hpdi.OpRead, Offset: beside, Vec: [][]byte{p}},
		{Op: hpdi.OpDiscard, Offset: at, Length: block.Size},
		{Op: hpdi.OpFlush},
	} {
		must(t, hpdi.Do(q, r))
	}
	if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpRead, Offset: 1, Vec: [][]byte{p}}); err == nil {
		t.Error("a request that is malformed was served")
	}
	must(t, q.Close())
	ms := time.Millisecond
	want := []PrimaryUse{{Number: 3, Name: "disk", Moved: setBytes,
		Primary: TierUse{Reads: OpUse{1, 3 * block.Size, ms, 1}, Writes: OpUse{2, 4 * block.Size, ms, 1}},
		Flash:   TierUse{Reads: OpUse{2*sampleEvery + 2, (2*sampleEvery + 2) * block.Size, ms, 3}, Writes: OpUse{2, 7 * block.Size, ms, 1}},
	}}
	// Of a request across both, the part at the primary is not the first of its kind; the
	// one on flash is, and so are zeroes.
	want[0].Flash.Writes.Samples = 2
	if got := f.Use(); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	out(t, f, 10)
	// It goes on when the device is opened again, larger.
	must(t, d.Close())
	if got := f.Use(); len(got) != 1 || got[0].Name != "" || got[0].Moved != setBytes {
		t.Errorf("with the device closed: %+v", got)
	}
	primary = primary.Resize(primarySize + pageSets*setBytes)
	d = open()
	must(t, write(t, d, 9*setBlocks, 1, 1))
	want[0].Primary.Writes.Requests++
	want[0].Primary.Writes.Bytes += block.Size
	want[0].Primary.Writes.Samples++
	if got := f.Use(); !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
	must(t, d.Close())
	must(t, f.Forget(3))
	if got := f.Use(); len(got) != 0 {
		t.Errorf("forgotten, and used %+v", got)
	}
}

// A queue that waits for a device has added what it has counted before.
func TestUseWhileWaiting(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		primary, flash := disks(t)
		fault := blocktest.NewFault(primary, 1)
		gate := blocktest.NewGate()
		f, d := attach(t, fault, flash)
		q, err := d.NewQueue(4)
		must(t, err)
		fault.Add(blocktest.Rule{Op: hpdi.OpRead, Hold: gate.Hold})
		for range 3 {
			must(t, q.Submit(&hpdi.Request{Op: hpdi.OpRead, Offset: 9 * setBytes, Vec: [][]byte{pattern(0, 1)}}))
		}
		done := make(chan error)
		go func() {
			_, err := q.Wait(3, nil)
			done <- err
		}()
		synctest.Wait()
		if got := f.Use()[0].Primary.Reads; got.Requests != 3 || got.Bytes != 3*block.Size || got.Samples != 0 {
			t.Errorf("while it waits: %+v", got)
		}
		time.Sleep(7 * time.Millisecond) // of the simulated clock
		gate.Open()
		must(t, <-done)
		if got := f.Use()[0].Primary.Reads; got.Samples != 1 || got.Latency != 7*time.Millisecond {
			t.Errorf("afterwards: %+v", got)
		}
		must(t, q.Close())
	})
}
