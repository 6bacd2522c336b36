package cli

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/control"
)

type dedupStatusOptions struct{ *session }

func newDedupStatus(s *session) *cobra.Command {
	o := &dedupStatusOptions{s}
	c := &cobra.Command{
		Use:   "status",
		Short: "Show what volumes share, and what that saves",
		Long: `Show what the volumes of each open pool share, and what that saves.

A volume has no saved bytes of its own: what several share belongs to all of
them. What deleting it would free, and how long the pieces are in which it lies, is
known when "pollux dedup survey" has found it, and is as of that time. What was shared,
written and became holes counts since the pool was opened; the rest is the present. Of a
pool that cannot tell, as when its counts cannot be read, the error is shown, and the exit
status is that of a failure.`,
		Args: args(),
		RunE: func(c *cobra.Command, _ []string) error { return o.run(c.Context()) },
	}
	s.jsonFlag(c)
	return c
}

func (o *dedupStatusOptions) run(ctx context.Context) error {
	client, err := o.client()
	if err != nil {
		return err
	}
	pools, err := client.Dedup(ctx)
	if err != nil {
		return err
	}
	if o.json {
		if err := o.printJSON(orEmpty(pools)); err != nil {
			return err
		}
		return dedupError(pools)
	}
	for i, p := range pools {
		if i > 0 {
			fmt.Fprintln(o.out)
		}
		if err := o.print(p); err != nil {
			return err
		}
	}
	return dedupError(pools)
}

// dedupError makes the command fail that could not tell of some pool.
func dedupError(pools []control.PoolDedup) error {
	var errs []error
	for _, p := range pools {
		if p.Error != "" {
			errs = append(errs, fmt.Errorf("deduplication of pool %s: %s", p.Pool, p.Error))
		}
	}
	return errors.Join(errs...)
}

func (o *dedupStatusOptions) print(p control.PoolDedup) error {
	if p.Error != "" {
		return table(o.out, [][]string{{"pool", p.Pool}, {"error", p.Error}})
	}
	rows := [][]string{
		{"pool", p.Pool},
		{"refers to", humanSize(p.Refers)},
		{"stored", humanSize(p.Stored)},
		{"saved", dedupSaved(p)},
		{"metadata", humanSize(p.Metadata)},
		{"shared", dedupBlocks(p.Shared)},
		{"written", dedupBlocks(p.Written)},
		{"zeroes", dedupBlocks(p.Zeros)},
		{"unequal", fmt.Sprintf("%d series since it was opened", p.Unequal)},
		{"index", indexText(p.Index)},
	}
	if p.LLRRM != nil {
		rows = append(rows, []string{"LLRRM", llrrmLine(p.LLRRM)})
	}
	if p.Index != nil {
		rows = append(rows, []string{"rebuilt", rebuiltText(p.Index)})
		if x := p.Resized; x != nil {
			rows = append(rows, []string{"resized", fmt.Sprintf("to %s, %s", humanSize(x.Bytes), rebuiltText(x))})
		}
		rows = append(rows, []string{"scan", scanText(p.Scan)})
	}
	rows = append(rows, []string{"survey", surveyText(p.Survey)})
	if p.MeanExtent > 0 {
		rows = append(rows, []string{"mean extent", extentText(p.MeanExtent)})
	}
	if err := table(o.out, rows); err != nil {
		return err
	}
	rows = [][]string{{"REFERENCES", "BLOCKS", "SIZE"}}
	for _, r := range p.References {
		if n := strconv.Itoa(r.From); r.Blocks > 0 {
			if r.To > r.From {
				n = fmt.Sprintf("%d-%d", r.From, r.To)
			}
			row := []string{n, strconv.FormatInt(r.Blocks, 10), humanSize(r.Blocks * block.Size)}
			if r.From == 1 {
				row = append(row, "metadata included")
			}
			rows = append(rows, row)
		}
	}
	if err := o.part(rows); err != nil {
		return err
	}
	rows = [][]string{{"VOLUME", "DEDUP", "REFERS TO", "SHARED", "WRITTEN", "ZEROES", "WOULD FREE", "MEAN EXTENT", "AS OF"}}
	for _, v := range p.Volumes {
		rows = append(rows, append([]string{
			v.Name, control.Volume{Dedup: v.Dedup, THN: v.THN}.Sharing(), humanSize(v.Refers),
			dedupSize(v.Shared), dedupSize(v.Written), dedupSize(v.Zeros),
		}, surveyColumns(v.Survey)...))
	}
	return o.part(rows)
}

// part shows one more table, unless it has only a heading.
func (o *dedupStatusOptions) part(rows [][]string) error {
	if len(rows) == 1 {
		return nil
	}
	fmt.Fprintln(o.out)
	return table(o.out, rows)
}

// dedupSaved shows what sharing saves, and how much of what is referred to that is.
func dedupSaved(p control.PoolDedup) string {
	if p.Refers == 0 {
		return humanSize(p.Saved)
	}
	return fmt.Sprintf("%s (%.1f %%)", humanSize(p.Saved), 100*float64(p.Saved)/float64(p.Refers))
}

func dedupSize(blocks uint64) string { return humanSize(int64(blocks) * block.Size) }

func dedupBlocks(n uint64) string {
	return fmt.Sprintf("%s since it was opened (%d blocks)", dedupSize(n), n)
}

func indexText(x *control.DedupIndex) string {
	if x == nil {
		return "none: no volume has shared blocks yet"
	}
	kept := "each block"
	if x.Every > 1 {
		kept = fmt.Sprintf("one block in %d", x.Every)
	}
	if x.Ends != "" {
		kept += "; it ends with its guest: " + x.Ends
	}
	return fmt.Sprintf("%s, %d of %d slots, %s", humanSize(x.Bytes), x.Entries, x.Slots, kept)
}

func rebuiltText(x *control.DedupIndex) string {
	if x.Complete() {
		return "done"
	}
	return fmt.Sprintf("%d of %d pages", x.Done, x.Pages)
}
