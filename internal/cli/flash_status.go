package cli

import (
	"context"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"

	"github.com/pollux-storage/pollux/internal/control"
)

type flashStatusOptions struct{ *session }

func newFlashStatus(s *session) *cobra.Command {
	o := &flashStatusOptions{s}
	c := &cobra.Command{
		Use:   "status POOL",
		Short: "Show what is on flash, and what that comes to",
		Long: `Show the flash of a pool: how many of the requests it has served and how long they
took there and on the devices, what is on it and what moves, what moves wait for, what was
written to it and the budgets for that, moves that failed, pins, and the data sets that save
most time on flash or would. Requests, moves and times are those since the pool was opened.`,
		Args: args("POOL"),
		RunE: func(c *cobra.Command, args []string) error { return o.run(c.Context(), args[0]) },
	}
	s.jsonFlag(c)
	return c
}

func (o *flashStatusOptions) run(ctx context.Context, name string) error {
	p, err := o.poolFlash(ctx, name)
	if err != nil {
		return err
	}
	return o.printFlash(p)
}

// poolFlash asks for the flash of a pool.
func (s *session) poolFlash(ctx context.Context, name string) (control.PoolFlash, error) {
	if err := checkName("pool", name); err != nil {
		return control.PoolFlash{}, err
	}
	client, err := s.client()
	if err != nil {
		return control.PoolFlash{}, err
	}
	return client.Flash(ctx, name)
}

// printFlash shows all of the flash of a pool.
func (s *session) printFlash(p control.PoolFlash) error {
	if s.json {
		return s.printJSON(p)
	}
	return s.printTables(flashRows(p), flashDeviceRows(p), pinRows(p), flashFailureRows(p), topRows(p))
}

func flashRows(p control.PoolFlash) [][]string {
	requests := uint64(0)
	for _, d := range p.Primaries {
		requests += d.Flash.Reads + d.Flash.Writes + d.Primary.Reads + d.Primary.Writes
	}
	rows := [][]string{
		{"pool", p.Pool},
		{"flash", p.Device + ", " + p.State},
	}
	add := func(name, text string) { rows = append(rows, []string{name, text}) }
	if p.Why != "" {
		add("why", p.Why)
	}
	add("on flash", fmt.Sprintf("%d of %d sets of %s, %s of %s", p.Used, p.Slots, humanSize(p.SetBytes), humanSize(int64(p.Used)*p.SetBytes), humanSize(int64(p.Slots)*p.SetBytes)))
	if p.Lost > 0 {
		add("LOST", fmt.Sprintf("%d sets on flash, %s, cannot be reached", p.Lost, humanSize(int64(p.Lost)*p.SetBytes)))
	}
	if p.Total > 0 {
		add("evacuation", evacuationText(&p.FlashStatus))
	}
	add("hit share", fmt.Sprintf("%s of %d requests", percent(p.HitShare), requests))
	add("moves", fmt.Sprintf("%d to flash, %d back, %d given up, %d failed; %d queued", p.Promoted, p.Demoted, p.GivenUp, p.FailedMoves, p.Queued))
	if p.Stopped != "" {
		add("moves wait for", p.Stopped)
	}
	copying := "as fast as the devices do"
	if p.MigrateBudget > 0 {
		copying = fmt.Sprintf("up to %s a second", humanSize(p.MigrateBudget))
	}
	add("copying", copying)
	worn := humanSize(p.Worn) + " in 24 hours"
	if p.WearBudget > 0 {
		worn += fmt.Sprintf(", %s of the %s at which moves to flash wait", percent(float64(p.Worn)/float64(p.WearBudget)), humanSize(p.WearBudget))
	}
	add("worn by", worn)
	add("written", fmt.Sprintf("%s by clients, %s by moves", humanSize(int64(p.WrittenByClients)), humanSize(int64(p.WrittenByMoves))))
	if p.RulesEvaluated > 0 {
		text := fmt.Sprintf("%d evaluated, %d of them could not be", p.RulesEvaluated, p.RulesBroken)
		if p.RuleError != "" {
			text += ": " + p.RuleError
		}
		add("rules", text)
	}
	if !p.Kept.IsZero() {
		add("statistics kept", when(p.Kept))
	}
	return rows
}

func flashDeviceRows(p control.PoolFlash) [][]string {
	rows := [][]string{{"DEVICE", "CLASS", "ON FLASH", "REQUESTS", "HITS", "READS ON FLASH", "ON DEVICE", "WRITES ON FLASH", "ON DEVICE"}}
	for _, d := range p.Primaries {
		hits := d.Flash.Reads + d.Flash.Writes
		all := hits + d.Primary.Reads + d.Primary.Writes
		share := "-"
		if all > 0 {
			share = percent(float64(hits) / float64(all))
		}
		class := d.Class
		if d.Given {
			class += " (given)"
		}
		rows = append(rows, []string{
			d.Device, orDash(class), humanSize(int64(d.OnFlash) * p.SetBytes), strconv.FormatUint(all, 10), share,
			meanTime(d.Flash.ReadLatency), meanTime(d.Primary.ReadLatency), meanTime(d.Flash.WriteLatency), meanTime(d.Primary.WriteLatency),
		})
	}
	return rows
}

// meanTime shows a mean that may be of nothing.
func meanTime(d control.Duration) string {
	if d == 0 {
		return "-"
	}
	return took(d)
}

func flashFailureRows(p control.PoolFlash) [][]string {
	rows := [][]string{{"FAILED ON", "AT", "TIMES", "NEXT TRY", "REASON"}}
	for _, f := range p.Failures {
		rows = append(rows, []string{f.Device, exact(f.Offset), strconv.Itoa(f.Times), when(f.Until), f.Reason})
	}
	return rows
}

func topRows(p control.PoolFlash) [][]string {
	rows := [][]string{{"BEST SETS OF", "AT", "ON FLASH", "READS", "WRITES", "SEQUENTIAL", "REQUESTS OF", "LAST USED", "SAVES"}}
	for _, t := range p.Top {
		on := yesNo(t.OnFlash)
		if t.Pinned {
			on += ", pinned"
		}
		rows = append(rows, []string{
			t.Device, exact(t.Offset), on, fmt.Sprintf("%.1f", t.Reads), fmt.Sprintf("%.1f", t.Writes), fmt.Sprintf("%.1f", t.Sequential),
			humanSize(int64(t.RequestBytes)), short(t.Age), took(t.Benefit),
		})
	}
	return rows
}
