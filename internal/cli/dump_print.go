package cli

import (
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/pollux-storage/pollux/internal/dump"
)

// The results of package dump, as people see them. For programs they are what
// they are there.
type (
	dumpedLabels      dump.Labels
	dumpedSuperblocks dump.Superblocks
	dumpedJournal     dump.Journal
	dumpedLog         dump.FlushLog
	dumpedRegion      dump.Region
	dumpedMap         dump.Map
	dumpedCounts      dump.Counts
	dumpedFlash       dump.Flash
)

func (d *dumpedLabels) found() *dump.Found      { return &d.Found }
func (d *dumpedSuperblocks) found() *dump.Found { return &d.Found }
func (d *dumpedJournal) found() *dump.Found     { return &d.Found }
func (d *dumpedLog) found() *dump.Found         { return &d.Found }
func (d *dumpedRegion) found() *dump.Found      { return &d.Found }
func (d *dumpedMap) found() *dump.Found         { return &d.Found }
func (d *dumpedCounts) found() *dump.Found      { return &d.Found }
func (d *dumpedFlash) found() *dump.Found       { return &d.Found }

func (d *dumpedFlash) print(s *session) error {
	err := table(s.out, [][]string{
		cells("flash device", d.Device), cells("id", d.ID), cells("data set", humanSize(d.SetBytes)), cells("slots", d.Slots), cells("used", d.Used),
		cells("lost", d.Lost), cells("pages of the table lost", d.LostPages), cells("collected", humanSize(int64(d.Collected))), cells("policy", d.Policy),
	})
	rows := [][]string{{"DEVICE", "ID", "SETS", "ON FLASH"}}
	for _, p := range d.Primaries {
		rows = append(rows, cells(p.Number, p.ID, p.Sets, p.On))
	}
	_, e := fmt.Fprintln(s.out)
	return errors.Join(err, e, table(s.out, rows))
}

// cells makes a row of a table.
func cells(values ...any) []string {
	row := make([]string, len(values))
	for i, v := range values {
		row[i] = orDash(fmt.Sprint(v))
	}
	return row
}

// columns shows things side by side: a row for each of their facts.
func columns(s *session, names []string, facts [][]string) error {
	rows := make([][]string, len(names))
	for i, n := range names {
		rows[i] = []string{n}
		for _, f := range facts {
			rows[i] = append(rows[i], orDash(f[i]))
		}
	}
	return table(s.out, rows)
}

// extent shows a range of blocks, nothing for none.
func extent(first, n uint64) string {
	if n == 0 {
		return ""
	}
	return fmt.Sprintf("%d to %d", first, first+n-1)
}

func yes(v bool) string {
	if v {
		return "yes"
	}
	return "no"
}

func (d *dumpedLabels) print(s *session) error {
	var facts [][]string
	for _, l := range d.Copies {
		if !l.Valid {
			facts = append(facts, append(cells(l.Block, "no"), make([]string, 11)...))
			continue
		}
		facts = append(facts, cells(l.Block, "yes", l.Name, l.Pool, l.Owner, l.Number, l.Device, l.Blocks,
			extent(l.Journal, l.JournalBlocks), extent(l.Flush, l.FlushBlocks), extent(l.Data, l.Blocks-l.Data), orDash(l.Host), yes(l.Exported)))
	}
	return columns(s, []string{"block", "valid", "pool", "pool id", "guest", "device number", "device id", "blocks",
		"journal", "flush log", "data", "host", "exported"}, facts)
}

func (d *dumpedSuperblocks) print(s *session) error {
	names := []string{"block", "valid", "counts", "generation", "epoch", "consistency point", "log position", "fold", "used blocks",
		"journal from", "flush log from", "catalogue", "region", "boot", "devices"}
	var facts [][]string
	for _, b := range d.Slots {
		if b.Pool == "" {
			facts = append(facts, append(cells(b.Block, "no", "no"), make([]string, len(names)-3)...))
			continue
		}
		facts = append(facts, cells(b.Block, yes(b.Valid), yes(b.Wins), b.Generation, b.Epoch, b.CP, b.Log, b.Fold, b.Used,
			fmt.Sprintf("record %d", b.JournalNumber), fmt.Sprintf("batch %d", b.FlushBatch), b.Catalogue, b.RegionID, b.BootID, len(b.Devices)))
	}
	if err := columns(s, names, facts); err != nil {
		return err
	}
	for _, b := range d.Slots {
		if !b.Wins {
			fmt.Fprintf(s.out, "block %d does not count: %s\n", b.Block, b.Why)
		}
	}
	return nil
}

func (d *dumpedJournal) print(s *session) error {
	fmt.Fprintf(s.out, "journal of pool %s: blocks %s\n", d.Pool, extent(d.Start, d.Blocks))
	rows := [][]string{{"RECORD", "BLOCK", "BYTES", "EPOCH", "PREV", "SUM", "KIND", "CP", "LOG", "CONTENT"}}
	for _, r := range d.Records {
		cp, log := strconv.FormatUint(r.CP, 10), strconv.FormatUint(r.Log, 10)
		content := fmt.Sprintf("%d mappings in %d runs, %d holes, %d changes of volumes", r.Mappings, r.Runs, r.Holes, r.Changes)
		if r.Kind == "fold" {
			cp, log = "", ""
			content = fmt.Sprintf("fold %d: %d pages taken, %d freed", r.Fold, r.Taken, r.Freed)
			if !r.Used {
				content += "; it never got its superblock"
			}
		}
		rows = append(rows, cells(r.Number, r.Block, r.Bytes, r.Epoch, r.Prev, r.Sum, r.Kind, cp, log, content))
	}
	if err := table(s.out, rows); err != nil {
		return err
	}
	return printEnd(s, "record", d.End)
}

func printEnd(s *session, what string, e dump.End) error {
	if e.Next == 0 {
		_, err := fmt.Fprintln(s.out, e.Why)
		return err
	}
	_, err := fmt.Fprintf(s.out, "the chain ends before %s %d, at byte %d of the device: %s\n", what, e.Next, e.At, e.Why)
	return err
}

func (d *dumpedLog) print(s *session) error {
	fmt.Fprintf(s.out, "flush log of pool %s: %s from byte %d on\n", d.Pool, humanSize(d.Bytes), d.Start)
	rows := [][]string{{"BATCH", "AT", "BYTES", "EPOCH", "FIRST", "LAST", "RECORDS", "PAYLOAD", "DAMAGED", "FLUSHED BY THEN"}}
	for _, b := range d.Batches {
		rows = append(rows, cells(b.Number, b.At, b.Bytes, b.Epoch, b.First, b.Last, b.Records, b.Payload, b.Damaged, b.Durable))
	}
	if err := table(s.out, rows); err != nil {
		return err
	}
	return printEnd(s, "batch", d.End)
}

func (d *dumpedRegion) print(s *session) error {
	var facts [][]string
	for _, h := range d.Headers {
		if !h.Valid {
			facts = append(facts, append(cells(h.At, "no", "no"), make([]string, 6)...))
			continue
		}
		facts = append(facts, cells(h.At, "yes", yes(h.Wins), h.Generation, h.ID, h.Pool, h.Owner, h.Epoch, h.BootID))
	}
	if err := columns(s, []string{"header at", "valid", "counts", "generation", "region", "pool id", "owner", "epoch", "boot"}, facts); err != nil {
		return err
	}
	fmt.Fprintf(s.out, "\nepoch now %d, %s, heartbeat %d, announced %d times, consistency point %d committed the log up to %d\n",
		d.Epoch, orDash(d.State), d.Heartbeat, d.Announced, d.CP, d.Committed)
	for _, x := range d.Sections {
		if d.Log != nil && x.Offset == d.Log.Offset {
			continue // it has a line of its own
		}
		fmt.Fprintf(s.out, "%s in bytes %d to %d%s\n", x.Kind, x.Offset, x.Offset+x.Length-1, sectionFacts(x))
		if err := printSessions(s, x.Sessions); err != nil {
			return err
		}
	}
	if l := d.Log; l != nil {
		fmt.Fprintf(s.out, "operation log at byte %d: epoch %d, generation %d, %d extents, %d slots, begun after %d, released up to %d, published up to %d\n",
			l.Offset, l.Epoch, l.Generation, l.Extents, l.Slots, l.Start, l.Tail, l.Head)
	}
	rows := [][]string{{"POSITION", "KIND", "VOLUME", "BLOCK", "BLOCKS", "EXTENT", "VERDICT"}}
	for _, r := range d.Records {
		ext := ""
		if r.Kind == "write" {
			ext = strconv.FormatUint(uint64(r.Extent), 10)
		}
		if tag := r.Tag; tag != nil {
			what := fmt.Sprintf("%s: the next %d are submission %d of slot %d, queue %d, session %s", r.Verdict, tag.Records, tag.Counter, tag.Slot, tag.Queue, tag.Session)
			rows = append(rows, cells(r.Seq, r.Kind, r.Volume, "", "", "", what))
			continue
		}
		rows = append(rows, cells(r.Seq, r.Kind, r.Volume, r.LBA, r.Blocks, ext, r.Verdict))
	}
	return table(s.out, rows)
}

// printSessions shows the sessions of a table.
func printSessions(s *session, x *dump.SessionFacts) error {
	if x == nil || len(x.List) == 0 {
		return nil
	}
	rows := [][]string{{"SESSION", "VOLUME", "QUEUES", "SLOTS", "SINCE", "LEFT", "SLOTS USED", "NEWEST SUBMISSION", "DAMAGED"}}
	for _, c := range x.List {
		rows = append(rows, cells(c.ID, c.Volume, c.Queues, c.Slots, c.Since, c.Left, c.Used, c.Last, c.Damaged))
	}
	return table(s.out, rows)
}

// sectionFacts shows what a section says of itself.
func sectionFacts(s dump.Section) string {
	x := s.Index
	switch {
	case s.Why != "":
		return ": of no use: " + s.Why
	case s.Cache != nil:
		return fmt.Sprintf(" of pool %s, room for %d blocks", s.Cache.Pool, s.Cache.Frames)
	case s.Journal != nil:
		k := s.Journal
		whole := ""
		if !k.Whole {
			whole = ", and what follows is not whole"
		}
		return fmt.Sprintf(": %s of %s of pool %s, generation %d, records %d to %d%s",
			humanSize(k.Used), humanSize(k.Bytes), k.Pool, k.Generation, k.First, k.Last, whole)
	case s.Sessions != nil:
		return fmt.Sprintf(" of pool %s: %d, made at epoch %d, room for %d slots", s.Sessions.Pool, len(s.Sessions.List), s.Sessions.Epoch, s.Sessions.Slots)
	case s.Restart != nil:
		r := s.Restart
		return fmt.Sprintf(" %d of pool %s of %s, written %s, %d devices, %d volumes", r.Number, r.Name, r.Identity, r.Written.Format(time.RFC3339), len(r.Devices), r.Volumes)
	case x == nil:
		return ""
	}
	successor := ""
	if x.Successor {
		successor = ", takes the place of another"
	}
	return fmt.Sprintf(": %s of pool %s, generation %d, %s, %d entries, one block in %d%s",
		humanSize(x.Bytes), x.Pool, x.Generation, x.State, x.Entries, x.Every, successor)
}

// pageRows shows pages of a tree.
func pageRows(pages []dump.Page) [][]string {
	rows := [][]string{{"LEVEL", "FROM BLOCK", "PLACE", "TWIN", "WRITTEN BY CP", "CHECKSUM", "ENTRIES", "VERDICT"}}
	for _, p := range pages {
		verdict := "good"
		if !p.OK {
			verdict = "BAD"
		}
		rows = append(rows, cells(p.Level, p.First, p.Place, orDash(p.Twin), p.Birth, p.Sum, p.Entries, verdict))
	}
	return rows
}

func (d *dumpedMap) print(s *session) error {
	rows := [][]string{{"ID", "VOLUME", "SIZE", "BLOCKS IN TREE", "ROOT", "TRIMMED"}}
	for _, v := range d.Volumes {
		name := v.Name
		if name == "" {
			name = "(deleted)"
		}
		var trimmed []string
		for _, r := range v.Pending {
			trimmed = append(trimmed, fmt.Sprintf("%d-%d up to cp %d", r.Start, r.End-1, r.Limit))
		}
		rows = append(rows, cells(v.ID, name, humanSize(v.Size), v.Used, v.Root, strings.Join(trimmed, ", ")))
	}
	if err := table(s.out, rows); err != nil {
		return err
	}
	fmt.Fprintf(s.out, "pool %s: %d mappings are in the journal and not in the trees\n", d.Pool, d.Unfolded)
	if len(d.Pages) > 0 {
		if err := table(s.out, pageRows(d.Pages)); err != nil {
			return err
		}
	}
	if b := d.Block; b != nil {
		content := "good"
		switch {
		case !b.OK:
			content = "BAD"
		case b.Sum == "":
			content = "zeroes"
		}
		inTree := b.InTree
		if b.Dead {
			inTree += ", trimmed"
		}
		if b.From != "journal" && !b.Dead {
			fmt.Fprintf(s.out, "block %d: %s, checksum %s, content %s\n", b.LBA, b.Now, orDash(b.Sum), content)
			return nil
		}
		fmt.Fprintf(s.out, "block %d: %s, from the journal (tree: %s), checksum %s, content %s\n", b.LBA, b.Now, inTree, orDash(b.Sum), content)
	}
	return nil
}

func (d *dumpedCounts) print(s *session) error {
	for _, c := range d.Blocks {
		fmt.Fprintf(s.out, "%d blocks with count %d\n", c.Blocks, c.Count)
	}
	fmt.Fprintf(s.out, "pool %s: %d mappings are in the journal and not counted yet\n", d.Pool, d.Unfolded)
	rows := [][]string{{"DEVICE", "FROM BLOCK", "BLOCKS", "COUNT"}}
	for _, r := range d.Runs {
		rows = append(rows, cells(r.Device, r.First, r.Blocks, r.Count))
	}
	if err := table(s.out, rows); err != nil {
		return err
	}
	if len(d.Bad) > 0 {
		return table(s.out, pageRows(d.Bad))
	}
	return nil
}
