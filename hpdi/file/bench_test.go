package file

import (
	"fmt"
	"testing"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/hpditest"
)

// BenchmarkIO measures both engines with direct I/O, where there is any, on
// the file system of the temporary folder (TMPDIR).
func BenchmarkIO(b *testing.B) {
	const size = 256 << 20
	path := create(b, b.TempDir(), size)
	prefill(b, path)
	for _, op := range []hpdi.Op{hpdi.OpRead, hpdi.OpWrite} {
		for _, n := range []int{4 << 10, 128 << 10} {
			for _, depth := range []int{1, 16} {
				for _, engine := range engines(b) {
					b.Run(fmt.Sprintf("%s/%dKiB/qd%d/%s", op, n>>10, depth, engine), func(b *testing.B) {
						d := open(b, path, Options{Engine: engine})
						hpditest.Bench(b, d, op, n, depth)
					})
				}
			}
		}
	}
}

// prefill writes the whole file, so that no write has to allocate.
func prefill(b *testing.B, path string) {
	d := open(b, path, Options{})
	q := newQueue(b, d, 1)
	defer closeQueue(b, q)
	mem := alloc(b, 1<<20)
	for i := range mem {
		mem[i] = byte(i)
	}
	for off := int64(0); off < d.Info().Size; off += int64(len(mem)) {
		if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpWrite, Offset: off, Vec: [][]byte{mem}}); err != nil {
			b.Fatal(err)
		}
	}
	if err := hpdi.Do(q, &hpdi.Request{Op: hpdi.OpFlush}); err != nil {
		b.Fatal(err)
	}
}
