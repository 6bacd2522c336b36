package cli

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/hpdi"
	"github.com/pollux-storage/pollux/hpdi/open"
	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/internal/devcopy"
)

type hpdiCopyOptions struct {
	*session
	depth  int
	piece  size
	create bool
	verify bool
}

func newHPDICopy(s *session) *cobra.Command {
	o := &hpdiCopyOptions{session: s, piece: 1 << 20}
	c := &cobra.Command{
		Use: "copy FROM TO", Short: "Copy one device to another",
		Long: `Make the beginning of TO what FROM is, and flush it. What FROM says is a hole or zero is
not read; on TO it is left alone where that has a hole already, and zeroed elsewhere. TO
must not be smaller than FROM; what lies behind keeps what it has. A file that others
have under a lock, and a mounted block device, is not written to (lock=off in its URI
overrides that).

On a terminal a line tells how far it is. When it is interrupted TO holds a part.

` + schemeHelp() + "\n\n" + sizeHelp,
		Example: "  pollux hpdi copy nbd://storage/vm1 file:vm1.img --create --verify\n  pollux hpdi copy uring:/dev/vdb vhost-user:/run/vm1.sock",
		Args:    args("FROM", "TO"),
		RunE:    func(c *cobra.Command, args []string) error { return o.run(c.Context(), args[0], args[1]) },
	}
	c.Flags().IntVar(&o.depth, "depth", 8, fmt.Sprintf("pieces in flight, 1 to %d", devcopy.MaxDepth))
	c.Flags().Var(&o.piece, "piece", "bytes of a piece")
	c.Flags().BoolVar(&o.create, "create", false, "make the file TO, as large as FROM; there must be none yet")
	c.Flags().BoolVar(&o.verify, "verify", false, "read both again at the end and compare them")
	s.jsonFlag(c)
	return c
}

// hpdiCopy is a copy for programs.
type hpdiCopy struct {
	Bytes    int64   `json:"bytes"`
	Copied   int64   `json:"copied_bytes"`
	Zeroed   int64   `json:"zeroed_bytes"`
	Skipped  int64   `json:"skipped_bytes"`
	Verified int64   `json:"verified_bytes"`
	Elapsed  float64 `json:"elapsed_ms"`
}

func (o *hpdiCopyOptions) run(ctx context.Context, from, to string) error {
	if from == to {
		return usagef("%s is both source and target", from)
	}
	if _, _, err := open.Settings(to); err != nil {
		return usagef("%w", err)
	}
	src, err := openDevice(ctx, from, "read-only", "on")
	if err != nil {
		return err
	}
	total := src.Info().Size
	if o.create {
		if err := open.Create(to, total); err != nil {
			return closing(src, err)
		}
	}
	dst, err := openDevice(ctx, to, "lock", "on")
	if err != nil {
		return closing(src, err)
	}
	began := o.now()
	r, err := o.copy(ctx, src, dst)
	elapsed := o.now().Sub(began)
	if err = closing(src, closing(dst, err)); err != nil {
		if errors.Is(err, devcopy.ErrDiffers) {
			err = &statusError{exitProblems, err}
		}
		return err
	}
	if o.json {
		return o.printJSON(hpdiCopy{total, r.Copied, r.Zeroed, r.Skipped, r.Verified, float64(elapsed) / 1e6})
	}
	text := fmt.Sprintf("%s in %s: %s copied, %s zeroed, %s left as holes", humanSize(total), took(control.Duration(elapsed)), humanSize(r.Copied), humanSize(r.Zeroed), humanSize(r.Skipped))
	if o.verify {
		text += fmt.Sprintf("; %s compared", humanSize(r.Verified))
	}
	_, err = fmt.Fprintln(o.out, text)
	return err
}

// showEvery is how often a person is told how far a copy is.
const showEvery = 100 * time.Millisecond

func (o *hpdiCopyOptions) copy(ctx context.Context, src, dst hpdi.Device) (devcopy.Result, error) {
	opts := devcopy.Options{Depth: o.depth, Piece: int64(o.piece), Verify: o.verify}
	if !o.watched {
		return devcopy.Copy(ctx, src, dst, opts)
	}
	line := &progressLine{w: o.err, now: o.now}
	defer line.clear()
	var shown time.Time
	opts.Progress = func(verifying bool, done, total int64) {
		if now := o.now(); now.Sub(shown) >= showEvery {
			shown = now
			phase := "copied"
			if verifying {
				phase = "compared"
			}
			line.show(control.CheckProgress{Pool: "copy", Phase: phase, Done: done, Total: total})
		}
	}
	return devcopy.Copy(ctx, src, dst, opts)
}
