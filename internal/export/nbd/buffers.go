package nbd

import (
	"sync"

	"github.com/pollux-storage/pollux/internal/block"
)

// segment is a piece of output, or the side buffer of a payload, in pooled
// memory.
type segment struct {
	mem  []byte // all of it
	data []byte // what is still to be written to the socket
	pool *sync.Pool

	// What leaves the connection's flight when the last byte has left.
	requests int
	bytes    int64
}

// Capacities of pooled segments; each has room for the largest reply header
// beside its power of two of data.
const (
	segmentHead = 128
	batchBytes  = 128 << 10
)

var segmentSizes = [...]int{512, 8 << 10, 32 << 10, batchBytes, 512 << 10, 2 << 20, 8 << 20, block.MaxIO}

var segmentPools [len(segmentSizes)]sync.Pool

// getSegment returns a segment for n bytes of data and their reply header.
func getSegment(n int) *segment {
	i := 0
	for segmentSizes[i] < n {
		i++ // requests are at most MaxIO, the last size
	}
	if s, ok := segmentPools[i].Get().(*segment); ok {
		return s
	}
	return &segment{mem: make([]byte, segmentSizes[i]+segmentHead), pool: &segmentPools[i]}
}

// release gives the memory back.
func (s *segment) release() {
	s.data, s.requests, s.bytes = nil, 0, 0
	s.pool.Put(s)
}
