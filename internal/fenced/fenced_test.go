package fenced

import (
	"runtime"
	"sync"
	"sync/atomic"
	"testing"
	"unsafe"

	"golang.org/x/sys/unix"
)

// Of two threads that store a word each and then load the other's, one at least sees the
// other, in memory that is not Go's and with the race detector, too.
func TestOneSeesTheOther(t *testing.T) {
	mem, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_SHARED|unix.MAP_ANONYMOUS)
	if err != nil {
		t.Fatal(err)
	}
	defer func() {
		if err := unix.Munmap(mem); err != nil {
			t.Error(err)
		}
	}()
	at := func(off int) unsafe.Pointer { return unsafe.Pointer(&mem[off]) }
	for name, side := range map[string]func(own, other int, v uint64) bool{
		"Store64": func(own, other int, v uint64) bool {
			Store64((*atomic.Uint64)(at(own)), v)
			return (*atomic.Uint64)(at(other)).Load() >= v
		},
		"Store32": func(own, other int, v uint64) bool {
			Store32((*uint32)(at(own)), uint32(v))
			return atomic.LoadUint32((*uint32)(at(other))) >= uint32(v)
		},
	} {
		t.Run(name, func(t *testing.T) {
			clear(mem)
			const rounds = 50_000
			saw := [2][]bool{make([]bool, rounds), make([]bool, rounds)}
			var begun atomic.Int64
			var wg sync.WaitGroup
			for i := range saw {
				wg.Go(func() {
					runtime.LockOSThread()
					defer runtime.UnlockOSThread()
					for n := range rounds {
						begun.Add(1)
						for begun.Load() < int64(2*(n+1)) { // both begin a round together
							if runtime.GOMAXPROCS(0) == 1 {
								runtime.Gosched()
							}
						}
						saw[i][n] = side(1024*i, 1024*(1-i), uint64(n+1))
					}
				})
			}
			wg.Wait()
			for n := range rounds {
				if !saw[0][n] && !saw[1][n] {
					t.Fatalf("in round %d neither saw the other", n)
				}
			}
		})
	}
}
