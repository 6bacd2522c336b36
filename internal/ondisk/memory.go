package ondisk

import (
	"encoding/binary"
	"sync/atomic"
	"unsafe"
)

// StoreWords stores p, a sealed structure, in memory that outlives this process. Its words of
// eight bytes are stored atomically only to keep the compiler from moving stores that belong
// before it behind it, or those that belong behind it before. Both begin at a multiple of
// eight bytes in memory, and p has a multiple of eight.
func StoreWords(mem, p []byte) {
	at := unsafe.Pointer(&mem[:len(p)][0])
	for i := 0; i < len(p); i += 8 {
		(*atomic.Uint64)(unsafe.Add(at, i)).Store(binary.NativeEndian.Uint64(p[i:]))
	}
}

// Newer settles on one of two copies by what reading them has brought and by their
// generations, and tells whether it is the second. The error is that of the first where none
// is whole.
func Newer(errA error, a uint64, errB error, b uint64) (second bool, err error) {
	if errA != nil && errB != nil {
		return false, errA
	}
	return errA != nil || errB == nil && b > a, nil
}
