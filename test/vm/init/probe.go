package main

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/test/vm/wire"
)

// probe writes a number to the first block of a disk and reads it back, again and again,
// past the kernel's cache, and tells how long the slowest of these took. A request that
// fails or reads something else than what was written ends it.
func probe(disk, seconds string) (string, error) {
	limit, err := strconv.ParseFloat(seconds, 64)
	if err != nil {
		return "", err
	}
	fd, err := unix.Open(disk, unix.O_RDWR|unix.O_DIRECT|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", fmt.Errorf("probe %s: %w", disk, err)
	}
	defer unix.Close(fd)
	// Memory that is mapped is aligned as direct I/O wants it.
	buf, err := unix.Mmap(-1, 0, 4096, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANONYMOUS)
	if err != nil {
		return "", err
	}
	var r wire.Probe
	end := time.Now().Add(time.Duration(limit * float64(time.Second)))
	for n := uint64(1); time.Now().Before(end); n++ {
		binary.LittleEndian.PutUint64(buf, n)
		began := time.Now()
		if _, err := unix.Pwrite(fd, buf, 0); err != nil {
			return "", fmt.Errorf("write %d of the probe: %w", n, err)
		}
		clear(buf)
		if _, err := unix.Pread(fd, buf, 0); err != nil {
			return "", fmt.Errorf("read %d of the probe: %w", n, err)
		}
		took := time.Since(began)
		if got := binary.LittleEndian.Uint64(buf); got != n {
			return "", fmt.Errorf("the probe wrote %d and read %d", n, got)
		}
		if r.Rounds++; took >= wire.Pause {
			r.Pauses = append(r.Pauses, took.Seconds())
		}
		time.Sleep(2 * time.Millisecond)
	}
	out, err := json.Marshal(r)
	return string(out), errors.Join(err, unix.Munmap(buf))
}
