package region

import (
	"errors"
	"fmt"
	"io"
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
	Odd     []string // what is wrong with the file as a whole
}

// Inspect maps the region file at path, or a copy of one, read-only. It needs
// one good copy of the header; without one the Inspection has the two findings
// and nothing else, and must be closed as well. Log returns nil when the file does not
// have all of it.
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
	var p [2 * pageSize]byte
	if _, err := in.file.ReadAt(p[:], 0); err != nil {
		return fmt.Errorf("read header: %w", err)
	}
	for i := range in.Copies {
		c := &in.Copies[i]
		c.At = int64(i) * pageSize
		c.Err = c.Header.decode(p[c.At : c.At+pageSize])
		c.Generation = c.Header.generation
	}
	base := int64(firstAt)
	if err := in.hdr.decodeTwice(p[:]); err != nil {
		in.hdr = Header{}
	} else if len(in.hdr.Sections) > 0 {
		base = in.hdr.Fixed()
	}
	// What an owner may take out meanwhile is not mapped.
	mem, err := unix.Mmap(int(in.file.Fd()), 0, int(min(base, in.Bytes)), unix.PROT_READ, unix.MAP_SHARED)
	if err != nil {
		return fmt.Errorf("map %d bytes: %w", min(base, in.Bytes), err)
	}
	in.mem = mem
	if in.hdr.ID == "" {
		return nil
	}
	for i := range in.Copies {
		c := &in.Copies[i]
		c.Wins = c.Err == nil && c.Generation == in.hdr.generation
	}
	if in.Bytes < in.hdr.Size {
		in.Odd = append(in.Odd, fmt.Sprintf("the file has %d bytes, its header says %d", in.Bytes, in.hdr.Size))
	}
	if s := in.hdr.Sections; len(s) == 0 || s[0].Kind != SectionLog {
		in.Odd = append(in.Odd, "its first section is not the operation log")
	} else if end := s[0].end(); end <= in.Bytes {
		in.log = mem[s[0].Offset:end:end]
	}
	return nil
}

// Valid says whether a copy of the header can be read.
func (in *Inspection) Valid() bool { return in.Copies[0].Wins || in.Copies[1].Wins }

// Read reads the beginning of a section, as much of it as p has room for and the file
// has, and returns how much that is: its owner may be taking it out.
func (in *Inspection) Read(s Section, p []byte) int { return in.ReadAt(s, p, 0) }

// ReadAt is Read from an offset within the section on.
func (in *Inspection) ReadAt(s Section, p []byte, off int64) int {
	if off < 0 || off > s.Length {
		return 0
	}
	n, err := in.file.ReadAt(p[:min(int64(len(p)), s.Length-off)], s.Offset+off)
	if err != nil && !errors.Is(err, io.EOF) {
		return 0
	}
	return n
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
