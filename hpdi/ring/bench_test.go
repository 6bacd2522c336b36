package ring

import (
	"fmt"
	"path/filepath"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/hpditest"
)

func benchRing(b *testing.B, depth int, poll, backPoll time.Duration, other bool) {
	path := filepath.Join(b.TempDir(), "ring.sock")
	if other {
		p := startBack(b, path, "memory", backPoll)
		b.Cleanup(p.kill)
	} else {
		serveAt(b, path, memory(b, hpditest.MinSize))
	}
	d := open(b, path, Options{Queues: 1, Entries: 128, Poll: poll, Reconnect: time.Minute})
	defer d.Close()
	q, err := d.NewQueue(depth)
	if err != nil {
		b.Fatal(err)
	}
	defer q.Close()
	buf, err := hpdi.Alloc(depth * 4096)
	if err != nil {
		b.Fatal(err)
	}
	defer hpdi.Free(buf)
	reqs := make([]hpdi.Request, depth)
	free := make([]*hpdi.Request, 0, depth)
	for i := range reqs {
		reqs[i] = hpdi.Request{Op: hpdi.OpRead, Offset: int64(4096 * i), Vec: [][]byte{buf[4096*i : 4096*(i+1)]}}
		free = append(free, &reqs[i])
	}
	b.ReportAllocs()
	b.ResetTimer()
	for n := 0; n < b.N; {
		if err := q.Submit(free...); err != nil {
			b.Fatal(err)
		}
		if free, err = q.Wait(1, free[:0]); err != nil {
			b.Fatal(err)
		}
		n += len(free)
	}
}

func BenchmarkRing(b *testing.B) {
	for _, depth := range []int{1, 32} {
		for _, poll := range []time.Duration{0, 50 * time.Microsecond, time.Second} {
			b.Run(fmt.Sprintf("depth=%d/poll=%v", depth, poll), func(b *testing.B) { benchRing(b, depth, poll, poll, true) })
		}
	}
}
