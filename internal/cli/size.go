package cli

import (
	"github.com/dustin/go-humanize"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/config"
)

// sizeHelp goes into the help of every command that takes a size.
const sizeHelp = `Sizes are bytes, or a number with a unit. Units are binary: 10G and 10GiB are
10 times 2^30 bytes. Only a written-out decimal unit is decimal: 10GB is 10
times 10^9 bytes. Sizes are rounded up to whole blocks of 4 KiB.`

// size is a flag that holds a number of bytes.
type size int64

// String shows the value in the help.
func (z *size) String() string {
	if *z == 0 {
		return ""
	}
	return config.Size(*z).String()
}

// Type names the value in the help.
func (z *size) Type() string { return "SIZE" }

// Set parses the value of the flag.
func (z *size) Set(text string) error {
	n, err := config.ParseSize(text)
	switch {
	case err != nil:
		return usagef("%w", err)
	case n == 0:
		return usagef("%q is nothing", text)
	case n > 1<<62:
		return usagef("%q is too large", text)
	}
	*z = size((int64(n) + block.Size - 1) &^ (block.Size - 1))
	return nil
}

// humanSize shows a number of bytes in binary units.
func humanSize(n int64) string {
	if n < 0 {
		return "-" + humanSize(-n)
	}
	return humanize.IBytes(uint64(n))
}
