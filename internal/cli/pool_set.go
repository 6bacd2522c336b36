package cli

import (
	"context"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/config"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/cp"
	"github.com/pollux-storage/pollux/internal/dedup"
)

// defaultWord is the value of flags that make a setting what it is where nobody has
// said anything.
const defaultWord = "default"

// indexFlag is --dedup-index.
type indexFlag struct{ bytes *int64 } // nil if not given

// String shows the value in the help.
func (f *indexFlag) String() string {
	switch {
	case f.bytes == nil:
		return ""
	case *f.bytes == 0:
		return defaultWord
	}
	return config.Size(*f.bytes).String()
}

// Type names the value in the help.
func (f *indexFlag) Type() string { return "SIZE|default" }

// Set parses the value of the flag.
func (f *indexFlag) Set(text string) error {
	var z size
	if text != defaultWord {
		if err := z.Set(text); err != nil {
			return err
		}
		if z < dedup.MinIndex {
			return usagef("%s is too little: at least %s, or %q", text, humanSize(dedup.MinIndex), defaultWord)
		}
	}
	n := int64(z)
	f.bytes = &n
	return nil
}

// thresholdFlag is --llrrm-threshold.
type thresholdFlag struct{ places *int } // nil if not given

// String shows the value in the help.
func (f *thresholdFlag) String() string {
	switch {
	case f.places == nil:
		return ""
	case *f.places == 0:
		return defaultWord
	}
	return strconv.Itoa(*f.places)
}

// Type names the value in the help.
func (f *thresholdFlag) Type() string { return "N|default" }

// Set parses the value of the flag.
func (f *thresholdFlag) Set(text string) error {
	n := 0
	if text != defaultWord {
		var err error
		if n, err = strconv.Atoi(text); err != nil || n < 1 || n > cp.MaxThreshold {
			return usagef("%q is not a number of places from 1 to %d, nor %q", text, cp.MaxThreshold, defaultWord)
		}
	}
	f.places = &n
	return nil
}

type poolSetOptions struct {
	*session
	name      string
	index     indexFlag
	threshold thresholdFlag
}

func newPoolSet(s *session) *cobra.Command {
	o := &poolSetOptions{session: s}
	c := &cobra.Command{
		Use:   "set NAME [--dedup-index SIZE|default] [--llrrm-threshold N|default]",
		Short: "Change settings that are kept with a pool",
		Long: fmt.Sprintf(`Change settings that are kept with a pool, whoever serves it. "default" makes one
what it is in a pool for which nobody has said anything.

--dedup-index is the memory of the pool's index, which finds what is stored already;
the default is the setting dedup_index. It is used in powers of two, at least %s,
and at most 16 bytes for each block of the pool. An index of another size is made in
the background, beside the one that there is, which finds blocks until the new one
is complete: until then both take memory. "pollux dedup status" shows how far it is.

LLRRM is low-latency random read memory; the threshold is the number of places of a
block on disks with which it moves there when it is received once more: 1 to %d, and
%d by default.

`, humanSize(dedup.MinIndex), cp.MaxThreshold, cp.DefaultThreshold) + sizeHelp,
		Example: `  pollux pool set pool-a --dedup-index 256M
  pollux pool set pool-a --llrrm-threshold 3 --dedup-index default`,
		Args: args("NAME"),
		RunE: func(c *cobra.Command, args []string) error {
			o.name = args[0]
			return o.run(c.Context())
		},
	}
	c.Flags().Var(&o.index, "dedup-index", "memory of the index that finds what is stored already")
	c.Flags().Var(&o.threshold, "llrrm-threshold", "places of a block with which it moves to LLRRM")
	s.jsonFlag(c)
	return c
}

func (o *poolSetOptions) run(ctx context.Context) error {
	if err := checkName("pool", o.name); err != nil {
		return err
	}
	change := control.PoolChange{DedupIndex: o.index.bytes, LLRRMThreshold: o.threshold.places}
	if change == (control.PoolChange{}) {
		return usagef("set what? --dedup-index SIZE, --llrrm-threshold N, or both")
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	p, err := client.ChangePool(ctx, o.name, change)
	if err != nil {
		return err
	}
	return o.printPool(p)
}

// settingRows shows the settings of a pool that somebody has changed.
func settingRows(s control.PoolSettings) (rows [][]string) {
	if s.DedupIndex != 0 {
		rows = append(rows, []string{"dedup index", humanSize(s.DedupIndex)})
	}
	if s.LLRRMThreshold != 0 {
		rows = append(rows, []string{"LLRRM threshold", strconv.Itoa(s.LLRRMThreshold)})
	}
	return rows
}
