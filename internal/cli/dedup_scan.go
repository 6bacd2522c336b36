package cli

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/control"
)

func newDedupScan(s *session) *cobra.Command {
	c := group("scan", "", "Share what a volume has held before",
		`A scan reads all that a volume holds, in the background, and shares what is stored
elsewhere in its pool, too. The volume must have deduplication on. What was written
while no volume of the pool had it on is known only when it was scanned: scan all
volumes that may have something in common, one after the other. "pollux dedup status"
shows how far it is. Whoever serves the pool next goes on with it.`)
	for _, sub := range []struct{ action, short string }{
		{control.ScanStart, "Begin a scan"}, {control.ScanPause, "Let a scan rest"},
		{control.ScanResume, "Let a scan that rests go on"}, {control.ScanStop, "End a scan before it is through"},
	} {
		c.AddCommand(newDedupScanAction(s, sub.action, sub.action, sub.short, ""))
	}
	return c
}

func newDedupUndo(s *session) *cobra.Command {
	return newDedupScanAction(s, "undo", control.ScanUndo, "Give a volume copies of its own of all that it shares",
		`Give a volume copies of its own of all that it shares, in the background, as if it
had never been deduplicated. Deduplication of the volume must be off. The pool needs
the room for that. "pollux dedup scan pause", "resume" and "stop" work on it as well.`)
}

type dedupScanOptions struct {
	*session
	action string
}

func newDedupScanAction(s *session, use, action, short, long string) *cobra.Command {
	o := &dedupScanOptions{s, action}
	c := &cobra.Command{
		Use: use + " VOLUME", Short: short, Long: long, Args: args("VOLUME"), ValidArgsFunction: s.volumeNames,
		RunE: func(c *cobra.Command, args []string) error { return o.run(c.Context(), args[0]) },
	}
	s.jsonFlag(c)
	return c
}

func (o *dedupScanOptions) run(ctx context.Context, name string) error {
	if err := checkName("volume", name); err != nil {
		return err
	}
	client, err := o.client()
	if err != nil {
		return err
	}
	v, err := client.ChangeVolume(ctx, name, control.VolumeChange{Scan: o.action})
	if err != nil {
		return err
	}
	return o.printVolume(v)
}

// scanText says in one line what is known of the scans of a pool.
func scanText(s control.DedupScan) string {
	if s.Volume == "" {
		return "none since it was opened"
	}
	text := fmt.Sprintf("%s: volume %s, %d of %d blocks, %d shared", s.State, s.Volume, s.Done, s.Total, s.Moved)
	if s.Undo {
		text = fmt.Sprintf("%s: volume %s, %d of %d blocks, %d not shared any more", s.State, s.Volume, s.Done, s.Total, s.Moved)
	}
	if s.Failed > 0 {
		text += fmt.Sprintf(", %d cannot be read", s.Failed)
	}
	if s.Why != "" {
		text += "; " + s.Why
	}
	return text
}
