package pair

import (
	"errors"
	"os"
)

// PlaceFile makes a file of size bytes that has no holes, as a block device has none:
// a file system takes longer for durable writes to a place that it has yet to find or
// to mark as written, and a process with such writes under way ends later. fill, if
// not nil, makes the content, which is zero otherwise.
func PlaceFile(path string, size int64, fill func(p []byte)) error {
	f, err := os.Create(path)
	if err != nil {
		return err
	}
	buf := make([]byte, 8<<20)
	for off := int64(0); err == nil && off < size; off += int64(len(buf)) {
		if fill != nil {
			fill(buf)
		}
		_, err = f.Write(buf[:min(int64(len(buf)), size-off)])
	}
	return errors.Join(err, f.Sync(), f.Close())
}
