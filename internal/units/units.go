// Package units reads and writes numbers of bytes as people write them.
package units

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// units by their names in lower case. A bare letter is binary, as storage
// tools have it; the decimal units are spelled out.
var units = map[string]float64{
	"": 1, "b": 1,
	"k": 1 << 10, "kib": 1 << 10, "kb": 1e3,
	"m": 1 << 20, "mib": 1 << 20, "mb": 1e6,
	"g": 1 << 30, "gib": 1 << 30, "gb": 1e9,
	"t": 1 << 40, "tib": 1 << 40, "tb": 1e12,
	"p": 1 << 50, "pib": 1 << 50, "pb": 1e15,
}

// Parse reads "64GiB", "64G" (the same), "1.5T", "500MB" or a number of bytes.
func Parse(s string) (int64, error) {
	t := strings.TrimSpace(s)
	i := len(t)
	for i > 0 && (t[i-1] < '0' || t[i-1] > '9') && t[i-1] != '.' {
		i--
	}
	unit, ok := units[strings.ToLower(strings.TrimSpace(t[i:]))]
	n, err := strconv.ParseFloat(t[:i], 64)
	if !ok || err != nil || i == 0 || n < 0 || n*unit >= math.MaxInt64 {
		return 0, fmt.Errorf("%q is not a size such as 64GiB, 512M or 1048576", s)
	}
	if whole, err := strconv.ParseInt(t[:i], 10, 64); err == nil {
		return whole * int64(unit), nil // exact beyond 2^53
	}
	return int64(n * unit), nil
}

// Format writes the largest binary unit that divides a number of bytes.
func Format(n int64) string {
	for _, u := range []struct {
		name string
		n    int64
	}{{"TiB", 1 << 40}, {"GiB", 1 << 30}, {"MiB", 1 << 20}, {"KiB", 1 << 10}} {
		if n >= u.n && n%u.n == 0 {
			return fmt.Sprintf("%d%s", n/u.n, u.name)
		}
	}
	return strconv.FormatInt(n, 10)
}
