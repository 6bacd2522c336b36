package main

import (
	"fmt"
	"time"
)

// row is one kind of load, and what is wanted of it.
type row struct {
	Name  string
	RW    string
	Block string
	Depth int // requests under way on each connection
	Conns int
	// Flush is after how many writes of a connection a flush follows; 0 is
	// never. The latencies of such a row are those of its flushes.
	Flush int
	// Bytes is how much is read or written in all, the last flush included,
	// whatever time that takes; nil is as much as comes within the time of a run.
	Bytes func(o options) int64
	// Sync says that the row ends in a flush.
	Sync bool
	// Cold rows read what is in no cache.
	Cold bool
	// Alone leaves the peers that fill the page cache out of a cold row: they
	// would soon read from it.
	Alone bool
	Want  wants
}

// wants are the ratios to reach, 0 where nothing is wanted. Those of
// throughput are at least what is wanted, those of latency and CPU time at most.
type wants struct {
	Cached, Direct, Ceiling float64
	P99, CPU                float64
}

// burst is what an operation log takes before a consistency point has made
// room in it; sustained is what it takes only with their help.
func burst(o options) int64     { return o.log / 4 * 3 }
func sustained(o options) int64 { return 4 * o.log }

// once reads each block one time, so that no cache can help.
func once(o options) int64 { return o.size }

var (
	small = wants{Cached: 1.2, Ceiling: 0.8, P99: 1, CPU: 0.7}
	large = wants{Cached: 1.2, P99: 1}
)

var allRows = []row{
	{Name: "4k-randwrite-qd16", RW: "randwrite", Block: "4k", Depth: 16, Want: small},
	{Name: "4k-randwrite-qd16-x4", RW: "randwrite", Block: "4k", Depth: 16, Conns: 4, Want: small},
	{Name: "4k-randread-qd16", RW: "randread", Block: "4k", Depth: 16, Want: small},
	{Name: "4k-randread-qd16-x4", RW: "randread", Block: "4k", Depth: 16, Conns: 4, Want: small},
	{Name: "4k-randwrite-qd1", RW: "randwrite", Block: "4k", Depth: 1, Want: wants{Cached: 1.2, P99: 1, CPU: 0.7}},
	{Name: "4k-randread-qd1", RW: "randread", Block: "4k", Depth: 1, Want: wants{Cached: 1.2, P99: 1, CPU: 0.7}},
	{Name: "4k-randread-cold", RW: "randread", Block: "4k", Depth: 16, Cold: true, Alone: true, Want: wants{Direct: 1, P99: 1, CPU: 0.7}},
	{Name: "4k-write-flush-x16", RW: "randwrite", Block: "4k", Depth: 1, Conns: 16, Flush: 1, Want: wants{Cached: 2, P99: 1, CPU: 0.7}},
	{Name: "128k-write-burst", RW: "write", Block: "128k", Depth: 16, Bytes: burst, Want: large},
	{Name: "128k-write-sustained", RW: "write", Block: "128k", Depth: 16, Bytes: sustained, Sync: true, Want: wants{Direct: 0.95, P99: 1}},
	{Name: "128k-read-qd16", RW: "read", Block: "128k", Depth: 16, Want: large},
	{Name: "128k-read-cold", RW: "read", Block: "128k", Depth: 16, Cold: true, Bytes: once, Want: wants{Direct: 1, P99: 1}},
}

// suits reports whether a row is measured on a server.
func (r row) suits(server string) bool {
	switch server {
	case "pollux":
		return !r.Cold
	case "pollux-cold":
		return r.Cold
	case "ceiling": // has no device
		return !r.Cold
	case "qsd-cached", "nbdkit-cached":
		return !r.Alone
	}
	return true
}

func (r row) writes() bool { return r.RW == "write" || r.RW == "randwrite" }

// args are fio's for a row on a volume.
func (r row) args(o options) []string {
	args := []string{"--rw=" + r.RW, "--bs=" + r.Block, fmt.Sprintf("--iodepth=%d", r.Depth), fmt.Sprintf("--numjobs=%d", max(r.Conns, 1))}
	if r.Bytes != nil {
		// Around and around, for as long as that takes.
		args = append(args, fmt.Sprintf("--io_size=%d", r.Bytes(o)))
	} else {
		args = append(args, "--time_based", fmt.Sprintf("--runtime=%d", int(o.runtime/time.Second)))
	}
	if r.Flush > 0 {
		args = append(args, fmt.Sprintf("--fsync=%d", r.Flush))
	}
	if r.Sync {
		args = append(args, "--end_fsync=1")
	}
	return args
}
