package file

import (
	"errors"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/hpdi"
)

// Where lseek finds data and holes; every file system has the same numbers.
const (
	seekData = 3
	seekHole = 4
)

// probeStatus finds out whether the file system tells holes from data. A block device
// does not: what it could tell of blocks it has never written is not to be had here.
func (d *device) probeStatus() {
	if d.block {
		return
	}
	_, err := d.seek(0, seekData)
	d.info.Status = err == nil || errors.Is(err, unix.ENXIO)
}

// seek returns where from off on the next data or hole begins; ENXIO says that there is
// none. The position that it moves is used by nobody else.
func (d *device) seek(off int64, whence int) (at int64, err error) {
	err = ignoringEINTR(func() error { at, err = unix.Seek(d.fd, off, whence); return err })
	return at, err
}

// statusNow is status for a queue: with the error as requests have it, unless the request's
// time is over.
func (d *device) statusNow(r *hpdi.Request) error {
	err := r.Late(time.Now())
	if err == nil {
		err = d.status(r)
	}
	if err != nil {
		return d.fail(err)
	}
	return nil
}

// status answers a block status. A block with any data is data. What the file system has
// allocated and nobody has written is a hole too: it reads as zero, and it takes a walk
// of the file's extents to know the difference.
func (d *device) status(r *hpdi.Request) error {
	for pos, end := r.Offset, r.Offset+r.Length; pos < end; {
		data, err := d.seek(pos, seekData)
		if errors.Is(err, unix.ENXIO) { // nothing but a hole up to the end of the file
			data, err = end, nil
		}
		if err != nil {
			return err
		}
		begin := min(data, end) &^ (BlockSize - 1)
		if begin > pos && !r.AddExtent(begin-pos, hpdi.Hole) {
			return nil // the end, or no more room
		}
		hole, err := d.seek(data, seekHole)
		if err != nil && !errors.Is(err, unix.ENXIO) { // ENXIO: the file was shortened just now
			return err
		}
		// At least a block, so that a file that changes meanwhile does not hold it up.
		hole = max((hole+BlockSize-1)&^(BlockSize-1), begin+BlockSize)
		if !r.AddExtent(hole-begin, hpdi.Data) {
			return nil
		}
		pos = hole
	}
	return nil
}
