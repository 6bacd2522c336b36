package golden

import (
	"bufio"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

const (
	blockSize = 4096
	// Limits of what is believed of a file.
	maxFiles = 16
	maxSize  = 64 << 20
	maxName  = 64
)

const regionName = "region"

// pack writes files to w: their number, then of each the length of its name, the name, its
// size, and its blocks that are not zero, each with its number plus one before it; 0 ends
// them. Numbers are as encoding/binary appends an unsigned one of variable length.
func pack(w io.Writer, files []string) error {
	z, err := gzip.NewWriterLevel(w, gzip.BestCompression)
	if err != nil {
		return err
	}
	put := func(b []byte) {
		if err == nil {
			_, err = z.Write(b)
		}
	}
	number := func(v uint64) { put(binary.AppendUvarint(nil, v)) }
	number(uint64(len(files)))
	zero := make([]byte, blockSize)
	for _, path := range files {
		b, rerr := os.ReadFile(path)
		if rerr != nil {
			return rerr
		}
		name := filepath.Base(path)
		number(uint64(len(name)))
		put([]byte(name))
		number(uint64(len(b)))
		for n := uint64(1); len(b) > 0; n++ {
			if string(b[:blockSize]) != string(zero) {
				number(n)
				put(b[:blockSize])
			}
			b = b[blockSize:]
		}
		number(0)
	}
	return errors.Join(err, z.Close())
}

// unpack makes the files of r in a directory, and returns their paths.
func unpack(r io.Reader, dir string) (paths []string, err error) {
	z, err := gzip.NewReader(r)
	if err != nil {
		return nil, err
	}
	in := bufio.NewReader(z)
	count, err := binary.ReadUvarint(in)
	if err != nil || count > maxFiles {
		return nil, fmt.Errorf("%d files: %w", count, errors.Join(err, io.ErrUnexpectedEOF))
	}
	for range count {
		path, err := unpackFile(in, dir)
		if err != nil {
			return nil, err
		}
		paths = append(paths, path)
	}
	_, err = in.ReadByte()
	if !errors.Is(err, io.EOF) {
		return nil, fmt.Errorf("something follows the last file: %w", errors.Join(err, io.ErrUnexpectedEOF))
	}
	return paths, z.Close()
}

func unpackFile(in *bufio.Reader, dir string) (path string, err error) {
	n, err := binary.ReadUvarint(in)
	if err != nil || n == 0 || n > maxName {
		return "", fmt.Errorf("name of %d bytes: %w", n, errors.Join(err, io.ErrUnexpectedEOF))
	}
	name := make([]byte, n)
	if _, err := io.ReadFull(in, name); err != nil {
		return "", err
	}
	size, err := binary.ReadUvarint(in)
	if err != nil || size > maxSize || size%blockSize != 0 || filepath.Base(string(name)) != string(name) || name[0] == '.' {
		return "", fmt.Errorf("file %q of %d bytes: %w", name, size, errors.Join(err, io.ErrUnexpectedEOF))
	}
	path = filepath.Join(dir, string(name))
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return "", err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	if err := f.Truncate(int64(size)); err != nil {
		return "", err
	}
	if string(name) == regionName && size > 0 { // all its memory is there
		if err := unix.Fallocate(int(f.Fd()), 0, 0, int64(size)); err != nil {
			return "", err
		}
	}
	block := make([]byte, blockSize)
	for {
		n, err := binary.ReadUvarint(in)
		if err != nil || n > size/blockSize {
			return "", fmt.Errorf("block %d of file %s: %w", n, name, errors.Join(err, io.ErrUnexpectedEOF))
		}
		if n == 0 {
			return path, nil
		}
		if _, err := io.ReadFull(in, block); err != nil {
			return "", err
		}
		if _, err := f.WriteAt(block, int64(n-1)*blockSize); err != nil {
			return "", err
		}
	}
}
