package restart

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/ondisk"
)

// Path is the file for the record of an identity's pool in a pair's directory. It lies there
// and not on a device of the pool because it tells where these are and what they can do,
// which is wanted before the first is opened.
func Path(dir, identity string) string { return filepath.Join(dir, "restart", identity+".record") }

// Write stores a record in a file, in one step and durably.
func Write(path string, enc []byte) error {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return fmt.Errorf("restart record: %w", err)
	}
	if err := config.Replace(path, enc); err != nil {
		return fmt.Errorf("restart record: %w", err)
	}
	return nil
}

// Read returns the record in a file. A file that is not there is ErrNone.
func Read(path string) (*Record, error) {
	// A named pipe in its place must not hold anybody up.
	f, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return nil, ErrNone
	}
	if err != nil {
		return nil, fmt.Errorf("restart record: %w", err)
	}
	defer f.Close()
	st, err := f.Stat()
	if err != nil {
		return nil, fmt.Errorf("restart record: %w", err)
	}
	if !st.Mode().IsRegular() || st.Size() > MaxBytes {
		return nil, fmt.Errorf("restart record %s is no file of at most %d bytes: %w", path, MaxBytes, ondisk.ErrChecksum)
	}
	b := make([]byte, st.Size())
	if _, err := f.ReadAt(b, 0); err != nil {
		return nil, fmt.Errorf("restart record: %w", err)
	}
	r, err := Decode(b)
	if err != nil {
		return nil, fmt.Errorf("restart record %s: %w", path, err)
	}
	return r, nil
}

// Remove removes a record, if it is there.
func Remove(path string) error {
	if err := os.Remove(path); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return fmt.Errorf("restart record: %w", err)
	}
	return nil
}
