package region

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/block"
)

// HeaderCopy is what the place of one copy of a region's header holds.
type HeaderCopy struct {
	At         int64 // byte of the file
	Header     Header
	Generation uint64
	Err        error // why there is no valid copy
	Wins       bool  // this one counts
}

// Inspection is a region as somebody sees it who only looks, damage included.
type Inspection struct {
	*Region // mapped read-only; only what reads may be called
	Copies  [2]HeaderCopy
	Bytes   int64    // of the file
	Odd     []string // what a guest would refuse the file for
	logSize int64
}

// Inspect maps the region file at path, or a copy of one, read-only. It needs
// one good copy of the header; without one the Inspection has the two findings
// and nothing else, and must be closed as well.
func Inspect(path string) (*Inspection, error) {
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	in := &Inspection{Region: &Region{path: path, file: f, readOnly: true}}
	if err := in.look(); err != nil {
		return nil, errors.Join(fmt.Errorf("inspect region %s: %w", path, err), in.Close())
	}
	return in, nil
}

func (in *Inspection) look() error {
	st, err := in.file.Stat()
	if err != nil {
		return err
	}
	if !st.Mode().IsRegular() {
		return fmt.Errorf("not a regular file: %w", block.ErrInvalid)
	}
	if in.Bytes = st.Size(); in.Bytes < firstAt {
		return corrupt("file", "only %d bytes long", in.Bytes)
	}
	mem, err := unix.Mmap(int(in.file.Fd()), 0, int(in.Bytes), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map %d bytes: %w", in.Bytes, err)
	}
	in.mem = mem
	for i := range in.Copies {
		c := &in.Copies[i]
		c.At = int64(i) * pageSize
		c.Err = c.Header.decode(mem[c.At : c.At+pageSize])
		c.Generation = c.Header.generation
	}
	if err := in.hdr.decodeTwice(mem[:2*pageSize]); err != nil {
		in.hdr = Header{}
		return nil
	}
	for i := range in.Copies {
		c := &in.Copies[i]
		c.Wins = c.Err == nil && c.Generation == in.hdr.generation
	}
	if in.hdr.Size != in.Bytes {
		in.Odd = append(in.Odd, fmt.Sprintf("the file has %d bytes, its header says %d", in.Bytes, in.hdr.Size))
	}
	if s := in.hdr.Sections; len(s) == 0 || s[0].Kind != SectionLog {
		in.Odd = append(in.Odd, "its first section is not the operation log")
	} else if s[0].Offset+s[0].Length <= in.Bytes {
		in.logSize = s[0].Length
	}
	return nil
}

// Valid says whether a copy of the header can be read.
func (in *Inspection) Valid() bool { return in.Copies[0].Wins || in.Copies[1].Wins }

// Log returns the memory of the operation log, nil when the file does not
// have all of it.
func (in *Inspection) Log() []byte {
	if in.logSize == 0 {
		return nil
	}
	return in.Region.Log()
}

// FindDir returns the folder that Dir has made for base, or would make,
// without making anything.
func FindDir(base string) (string, error) {
	base, err := filepath.Abs(base)
	if err != nil {
		return "", fmt.Errorf("region folder: %w", err)
	}
	if real, err := filepath.EvalSymlinks(base); err == nil {
		if mt, ok := mountAt(real); ok && mt.source == mountSource {
			return real, nil
		}
	}
	return fallback(base), nil
}
