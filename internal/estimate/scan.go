package estimate

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/dedup"
)

// Input is a file or device that was read.
type Input struct {
	Path  string
	Bytes int64
	// Unread is how many of them lie in holes, which were not read.
	Unread int64
}

// ScanOptions say how to read.
type ScanOptions struct {
	// Memory bounds the memory of the scan and of simulations of its stream, in bytes.
	Memory int64
	// Step is told now and then how far it is, of how many bytes; it may be nil.
	Step func(done, total int64)
}

// MinMemory is the least that ScanOptions.Memory may be.
const MinMemory = 16 << 20

// Scanned is what a scan has found.
type Scanned struct {
	Inputs []Input
	// Stream is what the inputs have; nil when its simulations would need more memory
	// than they may.
	Stream *Stream
	// Sample is always there.
	Sample *Sample
}

// chunk is how many bytes are read at once.
const chunk = 1 << 20

// scan reads inputs one after the other.
type scan struct {
	ScanOptions
	found       Scanned
	secret      dedup.Secret
	limit       int64 // of the stream, in bytes
	buf         []byte
	done, total int64
}

// Scan reads files and devices as if each were written to a volume, one after the other.
func Scan(ctx context.Context, paths []string, o ScanOptions) (*Scanned, error) {
	if o.Memory < MinMemory {
		return nil, fmt.Errorf("%d bytes of memory are too few: at least %d", o.Memory, MinMemory)
	}
	s := newScan(o.Memory)
	s.ScanOptions, s.buf = o, make([]byte, chunk)
	files := make([]*os.File, 0, len(paths))
	defer func() {
		for _, f := range files {
			f.Close()
		}
	}()
	// What cannot be read shall show before hours were spent on the others.
	for _, path := range paths {
		f, size, err := open(path)
		if err != nil {
			return nil, err
		}
		files = append(files, f)
		s.found.Inputs = append(s.found.Inputs, Input{Path: path, Bytes: size})
		s.total += size
	}
	for i, f := range files {
		if s.found.Stream != nil {
			s.found.Stream.Volume()
		}
		s.found.Sample.volume()
		if err := s.read(ctx, f, &s.found.Inputs[i]); err != nil {
			return nil, err
		}
	}
	s.found.Sample.volume()
	if s.found.Stream != nil {
		s.found.Stream.Flush()
	}
	return &s.found, nil
}

func newScan(memory int64) *scan {
	// A quarter is for the sample, from the start: whether the stream fits is known late.
	return &scan{limit: memory / 4 * 3, found: Scanned{Stream: new(Stream), Sample: newSample(memory / 4)}}
}

// open opens a file or block device and returns its size.
func open(path string) (*os.File, int64, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, 0, err
	}
	info, err := f.Stat()
	if err == nil {
		switch mode := info.Mode(); {
		case mode.IsRegular():
			return f, info.Size(), nil
		case mode&os.ModeDevice != 0 && mode&os.ModeCharDevice == 0:
			var size int64
			if size, err = f.Seek(0, io.SeekEnd); err == nil {
				return f, size, nil
			}
			err = fmt.Errorf("size of %s: %w", path, err)
		default:
			err = fmt.Errorf("%s is neither a file nor a block device", path)
		}
	}
	f.Close()
	return nil, 0, err
}

// read reads a file, holes apart.
func (s *scan) read(ctx context.Context, f *os.File, in *Input) error {
	// Only a hint: what was read is not read again.
	_ = unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_SEQUENTIAL)
	for off := int64(0); off < in.Bytes; {
		from, to, err := data(f, off, in.Bytes)
		if err != nil {
			return fmt.Errorf("look for data in %s from byte %d on: %w", in.Path, off, err)
		}
		in.Unread += from - off
		s.zero((from - off + block.Size - 1) / block.Size)
		s.progress(from - off)
		for off = from; off < to; {
			if err := ctx.Err(); err != nil {
				return err
			}
			n := min(chunk, to-off)
			if err := s.blocks(f, in, off, n); err != nil {
				return err
			}
			off += n
			s.progress(n)
		}
	}
	return nil
}

// data returns the next range of whole blocks, from off on, that is no hole. It may end
// with the file, and is empty where nothing but a hole follows.
func data(f *os.File, off, size int64) (from, to int64, err error) {
	from, err = unix.Seek(int(f.Fd()), off, unix.SEEK_DATA)
	switch {
	case errors.Is(err, unix.ENXIO):
		return size, size, nil
	case errors.Is(err, unix.EINVAL):
		return off, size, nil // a device has no holes
	case err != nil:
		return 0, 0, err
	}
	if from >= size { // what was added since is not looked at
		return size, size, nil
	}
	if to, err = unix.Seek(int(f.Fd()), from, unix.SEEK_HOLE); err != nil {
		return 0, 0, err
	}
	from = max(off, from&^(block.Size-1))
	return from, min(size, (to+block.Size-1)&^(block.Size-1)), nil
}

// blocks reads n bytes at off and adds their blocks.
func (s *scan) blocks(f *os.File, in *Input, off, n int64) error {
	if k, err := f.ReadAt(s.buf[:n], off); err != nil {
		if errors.Is(err, io.EOF) {
			err = errors.New("the file has become shorter")
		}
		return fmt.Errorf("read %s at byte %d: %w", in.Path, off+int64(k), err)
	}
	end := (n + block.Size - 1) &^ (block.Size - 1)
	clear(s.buf[n:end]) // of a last block that is not whole
	for i := int64(0); i < end; i += block.Size {
		b := s.buf[i : i+block.Size]
		if isZero(b) {
			s.zero(1)
			continue
		}
		s.add(block.Logical((off+i)/block.Size), s.secret.Fingerprint(b))
	}
	return nil
}

// add adds a block to the sample, and to the stream if that may still grow.
func (s *scan) add(lba block.Logical, f dedup.Fingerprint) {
	s.found.Sample.add(f)
	if st := s.found.Stream; st != nil {
		st.Add(lba, f)
		if st.blocks%PointBlocks == 0 && st.memory() > s.limit {
			s.found.Stream = nil
			s.found.Sample.grow(s.limit)
		}
	}
}

func (s *scan) zero(n int64) {
	s.found.Sample.zero += n
	if s.found.Stream != nil {
		s.found.Stream.Zero(n)
	}
}

func (s *scan) progress(n int64) {
	s.done += n
	if s.Step != nil {
		s.Step(s.done, s.total)
	}
}

func isZero(b []byte) bool {
	for ; len(b) >= 8; b = b[8:] {
		if binary.NativeEndian.Uint64(b) != 0 {
			return false
		}
	}
	return true
}
