package vhostuser

import (
	"fmt"
	"sync/atomic"
	"unsafe"

	"github.com/pollux-storage/pollux/internal/vhost"
	"github.com/pollux-storage/pollux/internal/virtio"
)

// maxDirtyLog is the most bytes of a log of dirty pages: enough for 32 TiB of addresses.
const maxDirtyLog = 1 << 30

// dirtyLog has a bit for each page of the machine's memory, by guest address; whoever
// migrates the machine reads and clears them while they are set here.
type dirtyLog struct {
	mapping []byte
	bits    []byte
}

func openDirtyLog(fd int, l vhost.Log) (*dirtyLog, error) {
	i, err := inspect(fd)
	if err != nil {
		return nil, err
	}
	if l.Size > maxDirtyLog {
		return nil, fmt.Errorf("%w: a log of dirty pages of %d bytes, at most %d are possible", errRule, l.Size, maxDirtyLog)
	}
	if l.Offset%8 != 0 || l.Size%8 != 0 {
		return nil, fmt.Errorf("%w: a log of dirty pages of %d bytes at %d, which are not multiples of 8", errRule, l.Size, l.Offset)
	}
	d := &dirtyLog{}
	if d.mapping, d.bits, err = mapFile(fd, i, l.Offset, l.Size); err != nil {
		return nil, fmt.Errorf("log of dirty pages: %w", err)
	}
	return d, nil
}

func (d *dirtyLog) close() { unmap(d.mapping) }

// mark marks the pages of n bytes at a guest address. What is not in the log the front-end
// does not want to know.
func (d *dirtyLog) mark(addr, n uint64) {
	if n == 0 || addr+n < addr {
		return
	}
	for page := addr / vhost.PageBytes; page <= (addr+n-1)/vhost.PageBytes; page++ {
		at := page / 8 &^ 3 // the word's first byte
		if at+4 > uint64(len(d.bits)) {
			return
		}
		word := (*uint32)(unsafe.Pointer(unsafe.SliceData(d.bits[at : at+4 : at+4])))
		atomic.OrUint32(word, 1<<(page%32))
	}
}

// logData marks the pages that a request has written to.
func (q *queue) logData(r *request) {
	if q.dirty == nil {
		return
	}
	left := uint64(r.written)
	for i, p := range r.chain.In {
		n := min(left, uint64(len(p)))
		q.dirty.mark(r.chain.InAddr(i), n)
		left -= n
	}
	last := len(r.chain.In) - 1 // with the status
	q.dirty.mark(r.chain.InAddr(last), uint64(len(r.chain.In[last])))
}

// logUsed marks the pages of the ring that a batch of completions has changed: all of
// them, for they are few. The front-end gives the guest address of what it calls the used
// ring. In a packed queue that is the device's event suppression, and the descriptors,
// which the device writes as well, are elsewhere.
func (q *queue) logUsed() {
	if q.dirty == nil || q.addr.Flags&vhost.VringLog == 0 {
		return
	}
	if !q.features.Has(virtio.FRingPacked) {
		_, _, n := virtio.SplitBytes(q.size)
		q.dirty.mark(q.addr.Log, uint64(n))
		return
	}
	ring, event := virtio.PackedBytes(q.size)
	q.dirty.mark(q.addr.Log, uint64(event))
	q.dirty.mark(q.ring, uint64(ring))
}
