package vhostuser

import (
	"fmt"
	"testing"
	"time"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/hpditest"
)

// What a request costs with another's back-end.
func BenchmarkStorageDaemon(b *testing.B) {
	daemon := newDaemon(b, 64<<20, "writable=on,num-queues=4")
	for _, depth := range []int{1, 32} {
		for _, op := range []hpdi.Op{hpdi.OpRead, hpdi.OpWrite} {
			b.Run(fmt.Sprintf("%v/%d", op, depth), func(b *testing.B) {
				d, err := Open(b.Context(), daemon.sock, Options{Poll: 50 * time.Microsecond})
				must(b, err)
				defer func() { must(b, d.Close()) }()
				hpditest.Bench(b, d, op, 4096, depth)
			})
		}
	}
}
