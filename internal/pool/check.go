package pool

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/pollux-storage/pollux/internal/block"
	"github.com/pollux-storage/pollux/internal/oplog"
)

// CheckOptions says how thorough a check is.
type CheckOptions struct {
	// Data reads every block that a volume refers to and verifies it.
	Data bool
	// Progress, if not nil, is kept up to date.
	Progress *CheckProgress
}

// CheckProgress tells how far a check has come, to whoever asks.
type CheckProgress struct {
	data        atomic.Bool
	done, total atomic.Int64
}

// Load returns the phase, and how many bytes of it are done and how many it
// has; a total of 0 is not known yet.
func (p *CheckProgress) Load() (phase string, done, total int64) {
	if phase = "metadata"; p.data.Load() {
		phase = "data"
	}
	return phase, p.done.Load() * block.Size, p.total.Load() * block.Size
}

// CheckReport is what a check found.
type CheckReport struct {
	Pool        string
	Volumes     int
	DataBlocks  int64 // references to data blocks
	Pages       int64 // blocks of metadata pages, twins included
	BlocksRead  int64 // data blocks read and verified
	LogRecords  int64 // acknowledged records that are not on the devices yet
	Problems    []string
	MoreProblem int // problems beyond those listed
	Mended      []string
	MoreMended  int // what was mended beyond that
}

// maxProblems bounds the list of a report.
const maxProblems = 100

// checker is a check under way. Its memory is bounded whatever the size of the
// pool and of its volumes: the recount takes a window of the pool's blocks at a
// time (see countWindow), a walk of a tree holds the entries of walkGroup pages
// a level, data is read in batches of dataLeaves leaves, all through the
// buffers of one bulk reader. What grows with the pool is the cache of its
// owner, of a settled size, and the counts and overlays that an open pool has
// anyway.
type checker struct {
	*Pool
	o     CheckOptions
	bulk  *bulk
	owner bool // the pool is open: its superblock was written whole

	// loadCounts fills have with the counts in use of a window.
	loadCounts func(ctx context.Context, w *window) error
	log        logReader // nil when nothing is in a log
	// lookSessions says what is damaged in the table of sessions, or cannot be.
	lookSessions func() []error
	window       uint64 // blocks that are recounted at once
	// pass runs fn unless the pool was closed.
	pass func(fn func() error) error

	mu     sync.Mutex  // guards what follows while pages are read
	report CheckReport //
	// lost says in which trees a page could not be read: it hides what is below
	// it, so the recount would only repeat that.
	lost  lostPages
	wrong faults
	// mend makes copies that are bad like those that are good.
	mend bool
	// copiesProved says that the pages' copies were read.
	copiesProved bool
}

// logReader is an operation log, of a serving pool or only looked at.
type logReader interface {
	Head() block.Seq
	Get(block.Seq) (oplog.Record, error)
	VerifyPayload(*oplog.Record) []int
}

func (p *Pool) newChecker(o CheckOptions) (*checker, error) {
	if o.Progress == nil {
		o.Progress = &CheckProgress{}
	}
	b, err := newBulk(p.set)
	if err != nil {
		return nil, err
	}
	return &checker{Pool: p, o: o, bulk: b, window: countWindow, report: CheckReport{Pool: p.label.Name}}, nil
}

// lostPages says in which trees there is a page that cannot be read from any copy.
type lostPages struct{ maps, list, counts, prints bool }

// faults is what was found wrong that a repair can make anew.
type faults struct {
	counts []string // reference counts, and what is said of them elsewhere
	more   int      // beyond those
	// used is what volumes have in use, where the list of volumes has other figures.
	used               map[block.VolumeID]int64
	labels, superblock []badCopy
}

// badCopy is a place of a structure that has several.
type badCopy struct {
	at   block.Physical
	what string
}

func (c *checker) problem(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.problemLocked(format, args...)
}

func (c *checker) problemLocked(format string, args ...any) {
	note(&c.report.Problems, &c.report.MoreProblem, format, args...)
}

// miscounted reports a problem of reference counts, which a repair makes anew.
func (c *checker) miscounted(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.miscountedLocked(format, args...)
}

func (c *checker) miscountedLocked(format string, args ...any) {
	c.problemLocked(format, args...)
	note(&c.wrong.counts, &c.wrong.more, format, args...)
}

// mended reports what a repair has mended.
func (c *checker) mended(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	note(&c.report.Mended, &c.report.MoreMended, format, args...)
}

// note adds a line to a list that is bounded.
func note(list *[]string, more *int, format string, args ...any) {
	if len(*list) == maxProblems {
		*more++
		return
	}
	*list = append(*list, fmt.Sprintf(format, args...))
}

// Check counts all references anew and compares them with the counts in use,
// reads every metadata page, and verifies the payload of the log. It does that
// between two consistency points: requests are served meanwhile, from room
// that the log has. Data is read afterwards, beside everything else.
func (p *Pool) Check(ctx context.Context, o CheckOptions) (CheckReport, error) {
	c, err := p.newChecker(o)
	if err != nil {
		return CheckReport{}, err
	}
	defer c.bulk.close()
	c.loadCounts, c.log, c.owner, c.lookSessions = c.countsInMemory, p.log, true, p.sessions.Check
	c.pass = func(fn func() error) error {
		if !p.gate.Enter() {
			return fmt.Errorf("pool %s: %w", p.label.Name, block.ErrClosed)
		}
		defer p.gate.Exit()
		return fn()
	}
	err = p.do(ctx, func() error {
		if err := p.machine.Claimed(); err != nil {
			return err
		}
		if p.machine.Folding() {
			if err := p.foldAll(); p.machine.Broken() != nil {
				return err
			} else if err != nil {
				// It has given back what it took, so all can be counted.
				c.problem("%v", err)
			}
		}
		if err := p.space.CheckFree(); err != nil {
			c.problem("%v", err)
		}
		return c.still(ctx)
	})
	if err == nil && o.Data {
		err = c.data(ctx)
	}
	return c.report, err
}

// still does the part that needs everything to stand still.
func (c *checker) still(ctx context.Context) error {
	c.report.Volumes = len(c.catalogue.List())
	if err := c.copies(); err != nil {
		return err
	}
	if err := c.recount(ctx); err != nil {
		return err
	}
	for _, p := range c.flash.check() {
		c.problem("flash device: %s", p)
	}
	c.records()
	for _, err := range c.lookSessions() {
		c.problem("table of sessions: %v", err)
	}
	return ctx.Err()
}

// records verifies the records and payload that are not committed.
func (c *checker) records() {
	if c.log == nil {
		return
	}
	head := c.log.Head() // the end of a change
	last := c.machine.Committed()
	for seq := last + 1; seq <= head; seq++ {
		rec, err := c.log.Get(seq)
		if err != nil {
			c.problem("operation log: %v", err)
			return
		}
		c.report.LogRecords++
		if rec.Kind == oplog.KindTag {
			if seq <= last || seq+block.Seq(rec.Count) > head {
				c.problem("operation log, position %d: the tag of %d records is within the change of another, or they are not all there", seq, rec.Count)
			}
			last = seq + block.Seq(rec.Count)
		}
		for _, i := range c.log.VerifyPayload(&rec) {
			c.problem("operation log, position %d: payload of block %d of volume %d is damaged", seq, rec.LBA+block.Logical(i), rec.Volume)
		}
	}
}

// isDevice says whether err is of a device or a pool's state, and no finding
// about what is stored.
func isDevice(err error) bool { return err != nil && !errors.Is(err, block.ErrCorrupt) }
