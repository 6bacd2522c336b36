package campaign

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/pollux-storage/pollux/internal/control"
	"github.com/pollux-storage/pollux/test/campaign/nbdclient"
	"github.com/pollux-storage/pollux/test/pair"
)

// Options of a campaign.
type Options struct {
	Bin    string        // the program
	Base   string        // where to work; the system's temporary directory when empty
	Seed   uint64        // of the schedule and the load
	Rounds int           // at most so many faults
	Limit  time.Duration // no round begins after so long; 0 for none
	Only   string        // only faults whose name contains this
	Log    io.Writer     // a line for each round
}

// hangTimeout is that of the campaign's pairs.
const hangTimeout = 500 * time.Millisecond

// volumeUnits is the size of most volumes in units.
const volumeUnits = 4096

// Bounds of what may take time; none is reached while all is well.
const (
	roundLimit = 3 * time.Minute
	healLimit  = time.Minute
)

// Result is what a campaign did.
type Result struct {
	Rounds   int
	Requests int64
	Connects int // of all connections together
	Lost     string
	// Of Kills: requests in flight that the next server ran again, that were in the log, and
	// of which it knew nothing.
	Again, Logged, Unknown int
}

// campaign is a running one.
type campaign struct {
	Options
	pair    *pair.Pair
	disks   []*disk
	stopped map[string]*pair.Process
	done    []round // including the one that runs
	async   sync.WaitGroup
}

// Run runs a campaign. Its error tells everything that is needed to run it
// again.
func Run(ctx context.Context, o Options) (res Result, err error) {
	settings := pair.Settings{
		Log: "16MiB", Cache: "32MiB", PoolSize: "1GiB",
		Failover: []string{
			fmt.Sprintf("hang_timeout: %v", hangTimeout), "heartbeat: 20ms",
			"restart_delay: 50ms", "restart_max: 500ms", "crash_limit: 1000000",
		},
	}
	// One campaign in three gives back by itself.
	if o.Seed%3 == 0 {
		settings.Failover = append(settings.Failover, "giveback_delay: 200ms", "lockout_count: 1000000")
	} else {
		settings.Failover = append(settings.Failover, "giveback_delay: -1s")
	}
	p, err := pair.New(o.Bin, o.Base, settings)
	if err != nil {
		return res, err
	}
	c := &campaign{Options: o, pair: p, stopped: map[string]*pair.Process{}}
	defer func() {
		if err == nil {
			err = p.Remove(context.WithoutCancel(ctx))
			return
		}
		err = c.report(err)
		c.async.Wait()
		// What runs is ended; the directory stays for a look.
		if derr := p.Down(context.WithoutCancel(ctx)); derr != nil {
			err = fmt.Errorf("%w\nand taking the pair down: %w", err, derr)
		}
	}()
	defer func() {
		for _, d := range c.disks {
			d.close()
			res.Requests += d.acked.Load()
			for _, cl := range d.clients {
				res.Connects += cl.Stats().Connects
			}
		}
	}()
	if err := c.begin(ctx); err != nil {
		return res, err
	}
	began := time.Now()
	for n := 0; res.Rounds < o.Rounds && (o.Limit == 0 || time.Since(began) < o.Limit); n++ {
		r := draw(o.Seed, n, hangTimeout)
		if !strings.Contains(r.name, o.Only) {
			continue
		}
		start := time.Now()
		if err := c.round(ctx, n, r); err != nil {
			return res, err
		}
		res.Rounds++
		fmt.Fprintf(o.Log, "round %3d  %5.1fs  %v\n", n, time.Since(start).Seconds(), r)
	}
	return res, c.end(ctx)
}

// begin starts the pair and makes the volumes.
func (c *campaign) begin(ctx context.Context) error {
	if err := c.pair.Up(ctx); err != nil {
		return err
	}
	for i, v := range []struct {
		name        string
		unit, units int
		more        []string
	}{
		{"a4k", 4096, volumeUnits, nil}, {"a512", 512, volumeUnits, nil}, {"b4k", 4096, volumeUnits, nil},
		{"a32k", 32768, volumeUnits / 16, []string{"--dedup", "on", "--thn", "4"}}, // much of it is the same
	} {
		d := &disk{name: v.name, id: uint64(i + 1), unit: v.unit, units: v.units, depth: depth, hot: hotUnits, history: newHistory(v.units)}
		create := append([]string{"volume", "create", d.name, "--size", fmt.Sprint(d.unit * d.units), "--guest", d.name[:1]}, v.more...)
		if _, err := c.pair.Do(ctx, create...); err != nil {
			return err
		}
		e, err := c.pair.Export(ctx, d.name)
		if err != nil {
			return err
		}
		for _, o := range []nbdclient.Options{{URI: e.NBDUnix, Structured: true}, {URI: e.NBD}, {URI: e.NBD, Structured: true}} {
			cl, err := nbdclient.New(o)
			if err != nil {
				return err
			}
			d.clients = append(d.clients, cl)
		}
		c.disks = append(c.disks, d)
	}
	return nil
}

// round runs one fault under load.
func (c *campaign) round(ctx context.Context, n int, r round) error {
	c.done = append(c.done, r)
	ctx, cancel := context.WithTimeoutCause(ctx, roundLimit, fmt.Errorf("the round took longer than %v: %w", roundLimit, context.DeadlineExceeded))
	defer cancel()
	stop := make(chan struct{})
	var load sync.WaitGroup
	for _, d := range c.disks {
		load.Go(func() { d.work(ctx, c.Seed+uint64(n)<<32, stop) })
	}
	err := c.fault(ctx, r)
	close(stop)
	if err != nil {
		cancel() // nothing will answer the load
	}
	load.Wait()
	c.async.Wait()
	for _, p := range c.stopped {
		p.Close()
	}
	clear(c.stopped)
	for _, d := range c.disks {
		if ferr := d.failed(); ferr != nil && !(err != nil && errors.Is(ferr, context.Canceled)) {
			err = errors.Join(ferr, err)
		}
	}
	if err != nil {
		return err
	}
	for _, d := range c.disks {
		if err := d.settle(ctx); err != nil {
			return err
		}
		for _, cl := range d.clients {
			if st := cl.Stats(); st.Refused > 0 {
				return fmt.Errorf("volume %s: a client that came back was refused: %w", d.name, st.Last)
			}
		}
	}
	return nil
}

// fault hurts the pair, waits until it is whole, and sees to it that every
// volume answers.
func (c *campaign) fault(ctx context.Context, r round) error {
	answered := func() error {
		for _, d := range c.disks {
			if err := d.progress(ctx, 50); err != nil {
				return err
			}
		}
		return nil
	}
	if err := answered(); err != nil {
		return err
	}
	for _, s := range r.steps {
		if s.after > 0 {
			time.Sleep(s.after)
		}
		if err := c.do(ctx, s); err != nil {
			return fmt.Errorf("%v: %w", s, err)
		}
	}
	if err := c.whole(ctx); err != nil {
		return err
	}
	if r.back {
		if err := c.home(ctx); err != nil {
			return err
		}
	}
	return answered()
}

// whole waits until nothing is wrong with the pair.
func (c *campaign) whole(ctx context.Context) error {
	return c.pair.Until(ctx, healLimit, pair.Well)
}

// home gives back what is not with its own guest.
func (c *campaign) home(ctx context.Context) error {
	st, err := c.pair.Status(ctx)
	if err != nil {
		return err
	}
	for _, g := range st.Guests {
		if g.ServedBy == g.Name {
			continue
		}
		if err := c.move(ctx, "giveback", g.Name); err != nil {
			return err
		}
	}
	return c.pair.Until(ctx, healLimit, pair.Well)
}

// move hands an identity over by a command that must succeed, if it is not
// where it shall be already.
func (c *campaign) move(ctx context.Context, how, guest string) error {
	if err := c.whole(ctx); err != nil {
		return err
	}
	_, err := c.pair.Do(ctx, how, guest)
	if err == nil {
		return nil
	}
	// An automatic giveback may have come first.
	if st, serr := c.pair.Status(ctx); serr == nil && (pair.Guest(st, guest).ServedBy == guest) == (how == "giveback") {
		return nil
	}
	return err
}

func (c *campaign) do(ctx context.Context, s step) error {
	switch s.act {
	case killPID:
		return c.signal(ctx, s.guest, unix.SIGKILL)
	case stopPID:
		return c.signal(ctx, s.guest, unix.SIGSTOP)
	case contPID:
		if p := c.stopped[s.guest]; p != nil {
			return p.Signal(unix.SIGCONT)
		}
	case killCLI, hangCLI:
		verb := map[act]string{killCLI: "kill", hangCLI: "hang"}[s.act]
		p, err := c.pair.HoldGuest(ctx, s.guest)
		if err != nil {
			return err
		}
		c.keep(s.guest, p)
		_, err = c.pair.Do(ctx, "guest", verb, s.guest, "--yes")
		return err
	case resumeCLI:
		_, err := c.pair.Do(ctx, "guest", "resume", s.guest, "--yes")
		return refusedIsFine(err)
	case restart:
		_, err := c.pair.Do(ctx, "guest", "restart", s.guest, "--yes")
		return err
	case takeover, giveback:
		c.async.Go(func() { _, _ = c.pair.Do(ctx, string(s.act), s.guest) }) // may fail: somebody dies
	case planned:
		return c.move(ctx, "takeover", s.guest)
	case plannedGB:
		return c.move(ctx, "giveback", s.guest)
	case commit:
		return c.committed(ctx, s.guest)
	case survive:
		return c.pair.Until(ctx, healLimit, func(st control.Status) string {
			if by := pair.Guest(st, s.guest).ServedBy; by == "" {
				return "nobody serves " + s.guest
			}
			return ""
		})
	case heal:
		c.async.Wait()
		return c.whole(ctx)
	case killAgent:
		p, err := c.pair.HoldAgent(ctx)
		if err != nil {
			return err
		}
		defer p.Close()
		return p.Signal(unix.SIGKILL)
	case up:
		return c.pair.Up(ctx)
	}
	return nil
}

// signal sends a signal to a guest's process, if it has one now.
func (c *campaign) signal(ctx context.Context, guest string, s unix.Signal) error {
	p, err := c.pair.HoldGuest(ctx, guest)
	if err != nil {
		return nil // dead already; that is a schedule, too
	}
	c.keep(guest, p)
	return p.Signal(s)
}

func (c *campaign) keep(guest string, p *pair.Process) {
	if old := c.stopped[guest]; old != nil {
		old.Close()
	}
	c.stopped[guest] = p
}

// committed waits until a pool of the guest's identity has had one more
// consistency point.
func (c *campaign) committed(ctx context.Context, guest string) error {
	var first uint64
	return c.pair.Until(ctx, healLimit, func(st control.Status) string {
		for _, g := range st.Guests {
			for _, s := range g.PoolStats {
				if s.Identity != guest {
					continue
				}
				if first == 0 {
					first = s.CP
				}
				if s.CP > first {
					return ""
				}
			}
		}
		return "no new consistency point of " + guest
	})
}

// refusedIsFine drops the error of a command that the pair refused.
func refusedIsFine(err error) error {
	if _, ok := errors.AsType[*pair.CommandError](err); ok {
		return nil
	}
	return err
}
